//! Memory that processes share: an array of zeroed records, made before the fork.
//!
//! Only atomics are given out, so that two processes can't tear a value. It is a file of memory, so
//! that another program can go on with it (memfd_create(2)). Fails when the system has no memory to
//! give.

#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::num::NonZeroUsize;
use std::ops::Deref;
use std::os::fd::OwnedFd;
use std::os::raw::c_void;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicI32, AtomicU32, AtomicU64};

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};

/// A record that may lie in memory which another process changes.
///
/// # Safety
/// The type consists of atomics (and arrays of them) alone, all bits zero is a valid value of it,
/// and it needs no drop.
pub unsafe trait SharedRecord {}

// SAFETY: atomics, valid when zero, no drop.
unsafe impl SharedRecord for AtomicU64 {}
// SAFETY: as above.
unsafe impl SharedRecord for AtomicU32 {}
// SAFETY: as above.
unsafe impl SharedRecord for AtomicI32 {}
// SAFETY: what holds for each holds for all of them.
unsafe impl<T: SharedRecord, const N: usize> SharedRecord for [T; N] {}

/// Declares a structure of atomics that is a [`SharedRecord`]. So the promise is made here once, and not
/// by each layer above.
macro_rules! shared_record {
    ($(#[$meta:meta])* $visibility:vis struct $name:ident {
        $($(#[$field_meta:meta])* $field_visibility:vis $field:ident : $type:ty),* $(,)?
    }) => {
        $(#[$meta])*
        #[repr(C)]
        $visibility struct $name { $($(#[$field_meta])* $field_visibility $field: $type),* }
        const _: () = {
            const fn must_be_a_record<T: $crate::sys::shared_memory::SharedRecord>() {}
            $(must_be_a_record::<$type>();)*
        };
        #[allow(unsafe_code)]
        // SAFETY: every field is a record, as the lines above have the compiler check.
        unsafe impl $crate::sys::shared_memory::SharedRecord for $name {}
    };
}

pub(crate) use shared_record;

/// An array of `length` zeroed records, shared with every process forked from now on, and the file
/// that it lies in. Memory is taken only for those that are touched, and never given back: the
/// processes end with it.
///
/// # Errors
/// ENOMEM, or no descriptor left.
pub fn array<T: SharedRecord>(length: NonZeroUsize) -> io::Result<(&'static [T], OwnedFd)> {
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    let file = File::from(memfd_create(c"preforkd-shared", flags)?);
    file.set_len(bytes_of::<T>(length)?.get() as u64)?;
    // A process that could make it shorter would end all others that look at it (SIGBUS, mmap(2)).
    let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
    fcntl(&file, FcntlArg::F_ADD_SEALS(seals))?;
    let file = OwnedFd::from(file);
    Ok((map(&file, length)?, file))
}

/// The array in a file that `array` has made, perhaps in another program.
///
/// # Errors
/// ENOMEM; EINVAL when the file is too short for so many records.
pub fn array_in<T: SharedRecord>(file: &OwnedFd, length: NonZeroUsize) -> io::Result<&'static [T]> {
    let there = File::from(file.try_clone()?).metadata()?.len();
    if there < bytes_of::<T>(length)?.get() as u64 {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    map(file, length)
}

fn bytes_of<T>(length: NonZeroUsize) -> io::Result<NonZeroUsize> {
    let bytes = length.checked_mul(NonZeroUsize::new(size_of::<T>()).unwrap_or(NonZeroUsize::MIN));
    bytes.ok_or(io::ErrorKind::OutOfMemory.into())
}

/// The file is at least as long as the records, and nobody cuts it: it has no name, and only this
/// program and what becomes of it have its descriptor.
fn map<T: SharedRecord>(file: &OwnedFd, length: NonZeroUsize) -> io::Result<&'static [T]> {
    let bytes = bytes_of::<T>(length)?;
    let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    // SAFETY: a new mapping at an address of the kernel's choice touches nobody's memory.
    let start: NonNull<c_void> =
        unsafe { mmap(None, bytes, protection, MapFlags::MAP_SHARED, file, 0) }?;
    // SAFETY: the mapping is page-aligned, as long as `length` records, zeroed by the kernel where
    // nobody wrote, never unmapped, and `SharedRecord` says that zeroes are valid and that others may
    // change it.
    Ok(unsafe { std::slice::from_raw_parts(start.as_ptr().cast(), length.get()) })
}

/// Likewise without a file: for these processes alone.
///
/// # Errors
/// ENOMEM.
pub fn array_without_file<T: SharedRecord>(length: NonZeroUsize) -> io::Result<&'static [T]> {
    let start = map_anonymous(bytes_of::<T>(length)?)?;
    // SAFETY: as in `map`.
    Ok(unsafe { std::slice::from_raw_parts(start.as_ptr().cast(), length.get()) })
}

/// Zeroed records, shared with every process forked from now on, until this process drops them.
#[derive(Debug)]
pub struct OwnedArray<T: SharedRecord + 'static> {
    records: &'static [T],
}

impl<T: SharedRecord> OwnedArray<T> {
    /// # Errors
    /// ENOMEM.
    pub fn new(length: NonZeroUsize) -> io::Result<Self> {
        let records = array_without_file(length)?;
        Ok(OwnedArray { records })
    }
}

impl<T: SharedRecord> Deref for OwnedArray<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        self.records
    }
}

impl<T: SharedRecord> Drop for OwnedArray<T> {
    fn drop(&mut self) {
        let start = NonNull::from(self.records).cast();
        // SAFETY: `new` has mapped so many bytes there, and references into them end with this value.
        let _ = unsafe { munmap(start, size_of_val(self.records)) };
    }
}

/// So many bytes, zero, shared with every process forked from now on, which has to leave them alone
/// for as long as this one lives: they are plain memory, and only what a dead process has left in
/// them is sure to stand still.
///
/// # Errors
/// ENOMEM.
pub fn bytes(length: NonZeroUsize) -> io::Result<&'static mut [u8]> {
    let start = map_anonymous(length)?;
    // SAFETY: a new mapping of that length, zeroed, never unmapped, handed out once; that no other
    // process touches it while this one may is the caller's promise.
    Ok(unsafe { std::slice::from_raw_parts_mut(start.as_ptr().cast(), length.get()) })
}

fn map_anonymous(bytes: NonZeroUsize) -> io::Result<NonNull<c_void>> {
    let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    // SAFETY: a new mapping at an address of the kernel's choice touches nobody's memory.
    Ok(unsafe { mmap_anonymous(None, bytes, protection, MapFlags::MAP_SHARED) }?)
}
