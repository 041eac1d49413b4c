//! Creates memory that processes share: an array of zeroed records, made before the fork.
//!
//! Callers get only atomics (except from [`bytes`]), so a value cannot be torn between two processes. The arrays of
//! [`array`] are in a memory file, so that a new program can continue to use them (memfd_create(2)). Fails if
//! the system has no
//! memory left.

#![allow(unsafe_code)]

use std::fs::{File, Permissions};
use std::io;
use std::num::NonZeroUsize;
use std::ops::Deref;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::raw::c_void;
use std::os::unix::fs::PermissionsExt;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicI32, AtomicU32, AtomicU64, Ordering::Relaxed, Ordering::SeqCst};

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap, mmap_anonymous, munmap};

/// A record in memory that another process may change.
///
/// # Safety
/// The type consists only of atomics and arrays of them. All bits zero is a valid value. It needs no
/// drop.
pub unsafe trait SharedRecord {}

// SAFETY: an atomic; zero is valid; it needs no drop.
unsafe impl SharedRecord for AtomicU64 {}
// SAFETY: as above.
unsafe impl SharedRecord for AtomicU32 {}
// SAFETY: as above.
unsafe impl SharedRecord for AtomicI32 {}
// SAFETY: what is true for the element is true for the array.
unsafe impl<T: SharedRecord, const N: usize> SharedRecord for [T; N] {}

/// Declares a structure of atomics that is a [`SharedRecord`], so that the layers above need no `unsafe`
/// code.
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
        // SAFETY: the lines above make the compiler check that every field is a `SharedRecord`.
        unsafe impl $crate::sys::shared_memory::SharedRecord for $name {}
    };
}

pub(crate) use shared_record;

/// The mode of the files. memfd_create(2) makes them with the mode 0777. Then a process of another user that has a
/// descriptor for reading could open the file for writing, through /proc/self/fd.
const OWNER_ONLY: u32 = 0o600;

/// Returns an array of `length` zeroed records, shared with every process forked from now on, and its
/// file. Only records that are used take memory. It is never unmapped before the process ends.
///
/// # Errors
/// ENOMEM, or no descriptor left.
pub fn array<T: SharedRecord>(length: NonZeroUsize) -> io::Result<(&'static [T], OwnedFd)> {
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    let file = File::from(memfd_create(c"preforkd-shared", flags)?);
    file.set_permissions(Permissions::from_mode(OWNER_ONLY))?;
    file.set_len(bytes_of::<T>(length)?.get() as u64)?;
    // If a process shortened the file, access by the others would raise SIGBUS (mmap(2)).
    let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
    fcntl(&file, FcntlArg::F_ADD_SEALS(seals))?;
    let file = OwnedFd::from(file);
    Ok((map(&file, length)?, file))
}

/// Maps the array in a file that `array` has made, perhaps in another program.
///
/// # Errors
/// ENOMEM; EINVAL if the file is too short for `length` records.
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

/// Maps a file that is at least as long as the records. No process can shorten it, because `array` has sealed it
/// (F_SEAL_SHRINK).
fn map<T: SharedRecord>(file: &OwnedFd, length: NonZeroUsize) -> io::Result<&'static [T]> {
    let bytes = bytes_of::<T>(length)?;
    let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    // SAFETY: the kernel chooses the address of the new mapping, so it overlaps no other memory.
    let start: NonNull<c_void> =
        unsafe { mmap(None, bytes, protection, MapFlags::MAP_SHARED, file, 0) }?;
    // A core dump would read all of it, which takes memory for each record that was never used.
    // SAFETY: it is the new mapping, and this advice changes no content.
    let _ = unsafe { madvise(start, bytes.get(), MmapAdvise::MADV_DONTDUMP) };
    // SAFETY: the mapping is page-aligned, as long as `length` records, zeroed by the kernel, and never
    // unmapped. `SharedRecord` guarantees that zeroes are valid and that other processes may change it.
    Ok(unsafe { std::slice::from_raw_parts(start.as_ptr().cast(), length.get()) })
}

/// Returns an array without a file. Only this process and those that it forks from now on can use it.
///
/// # Errors
/// ENOMEM.
pub fn array_without_file<T: SharedRecord>(length: NonZeroUsize) -> io::Result<&'static [T]> {
    let start = map_anonymous(bytes_of::<T>(length)?)?;
    // SAFETY: as in `map`.
    Ok(unsafe { std::slice::from_raw_parts(start.as_ptr().cast(), length.get()) })
}

/// A flag, shared with every process forked from now on. It is set once and stays set.
#[derive(Debug)]
pub struct SharedFlag(OwnedArray<AtomicU32>);

impl SharedFlag {
    /// # Errors
    /// ENOMEM.
    pub fn new(is_set: bool) -> io::Result<Self> {
        let flag = SharedFlag(OwnedArray::new(NonZeroUsize::MIN)?);
        if is_set {
            flag.set();
        }
        Ok(flag)
    }

    pub fn set(&self) {
        self.0[0].store(1, SeqCst);
    }

    pub fn is_set(&self) -> bool {
        self.0[0].load(SeqCst) != 0
    }
}

/// Zeroed records, shared with every process forked from now on. They are unmapped when this process
/// drops them.
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

impl<T: SharedRecord> OwnedArray<T> {
    /// Hides the records from processes that are forked from now on.
    ///
    /// # Errors
    /// ENOMEM.
    pub fn hide_from_children(&self) -> io::Result<()> {
        let start = NonNull::from(self.records).cast();
        let length = size_of_val(self.records);
        // SAFETY: `new` has mapped these bytes, and a child that lacks them has no reference to them.
        Ok(unsafe { madvise(start, length, MmapAdvise::MADV_DONTFORK) }?)
    }
}

/// Gives this process zeroed records of its own, which it may only read, instead of the shared ones. For a
/// forked child that must not write what others read. Because it is read-only, it uses no memory and does not count
/// for the commit limit (vm.overcommit_memory, proc_sys_vm(5)).
///
/// # Errors
/// ENOMEM.
pub fn make_private<T: SharedRecord>(records: &'static [T]) -> io::Result<()> {
    let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_FIXED;
    let protection = ProtFlags::PROT_READ;
    let Some((start, length)) = place_of(records) else {
        return Ok(());
    };
    // SAFETY: exactly the pages of these records are replaced. A mapping has whole pages, so nothing else
    // is in them. Zeroes are valid records.
    unsafe { mmap_anonymous(Some(start), length, protection, flags) }?;
    Ok(())
}

/// Makes the records of a file read-only, for good: the kernel refuses a later mprotect(2). `file` is a descriptor from
/// `read_only`. Close it afterwards: with it, the file could be opened again for writing (/proc/self/fd).
///
/// # Errors
/// ENOMEM; EACCES if `file` is not open for reading.
pub fn make_read_only<T: SharedRecord>(records: &'static [T], file: &OwnedFd) -> io::Result<()> {
    let flags = MapFlags::MAP_SHARED | MapFlags::MAP_FIXED;
    let Some((start, length)) = place_of(records) else {
        return Ok(());
    };
    // SAFETY: as in `make_private`; the file has the same records, and this process only reads them now.
    unsafe { mmap(Some(start), length, ProtFlags::PROT_READ, flags, file, 0) }?;
    Ok(())
}

fn place_of<T>(records: &'static [T]) -> Option<(NonZeroUsize, NonZeroUsize)> {
    let length = NonZeroUsize::new(size_of_val(records))?;
    Some((NonZeroUsize::new(records.as_ptr().addr())?, length))
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
        // SAFETY: `new` has mapped this many bytes there, and references into them end with this value.
        let _ = unsafe { munmap(start, size_of_val(self.records)) };
    }
}

/// Stores a number as two halves, the high one first.
#[inline]
pub fn store_u128([high, low]: &[AtomicU64; 2], number: u128) {
    high.store((number >> 64) as u64, Relaxed);
    low.store(number as u64, Relaxed);
}

/// Returns the number that [`store_u128`] has stored.
#[inline]
pub fn load_u128([high, low]: &[AtomicU64; 2]) -> u128 {
    u128::from(high.load(Relaxed)) << 64 | u128::from(low.load(Relaxed))
}

/// Writes as much of a text as the words have room for. Returns the number of bytes written.
pub fn store_text(words: &[AtomicU64], text: &str) -> u32 {
    let mut end = text.len().min(size_of_val(words));
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    for (word, bytes) in words.iter().zip(text.as_bytes()[..end].chunks(8)) {
        let mut value = [0; 8];
        value[..bytes.len()].copy_from_slice(bytes);
        word.store(u64::from_ne_bytes(value), Relaxed);
    }
    end as u32
}

/// Reads a text of `length` bytes, at most as long as the words. Invalid UTF-8 is replaced.
pub fn load_text(words: &[AtomicU64], length: u32) -> String {
    let words = words.iter();
    let mut text: Vec<u8> = words
        .flat_map(|word| word.load(Relaxed).to_ne_bytes())
        .collect();
    text.truncate(length as usize);
    String::from_utf8_lossy(&text).into_owned()
}

/// Maps zeroed memory that stays for the life of this process. Processes that are forked later share it. They must
/// leave it alone while this process lives: it is plain memory, without atomics.
///
/// # Errors
/// If there is not enough memory.
pub fn bytes(length: NonZeroUsize) -> io::Result<&'static mut [u8]> {
    let start = map_anonymous(length)?;
    // SAFETY: a new, zeroed mapping of that length, never unmapped, and returned only once. The caller
    // promises that no other process uses it while this process lives.
    Ok(unsafe { std::slice::from_raw_parts_mut(start.as_ptr().cast(), length.get()) })
}

fn map_anonymous(bytes: NonZeroUsize) -> io::Result<NonNull<c_void>> {
    let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    // SAFETY: the kernel chooses the address of the new mapping, so it overlaps no other memory.
    Ok(unsafe { mmap_anonymous(None, bytes, protection, MapFlags::MAP_SHARED) }?)
}

/// Unmaps all memory that this process shares for writing. For a forked child that has no use for what it
/// has inherited.
///
/// # Safety
/// Nothing in this process may use such memory from then on, signal handlers included.
///
/// # Errors
/// If /proc cannot be read.
pub unsafe fn unmap_shared() -> io::Result<()> {
    for line in std::fs::read_to_string("/proc/self/maps")?.lines() {
        let mut words = line.split(' ');
        let (range, rights) = (words.next().unwrap_or_default(), words.next());
        let Some((from, to)) = range.split_once('-').filter(|_| rights == Some("rw-s")) else {
            continue;
        };
        let number = |text| usize::from_str_radix(text, 16).map_err(io::Error::other);
        let (from, to) = (number(from)?, number(to)?);
        let start = NonNull::new(std::ptr::with_exposed_provenance_mut::<c_void>(from));
        if let Some(start) = start {
            // SAFETY: the kernel has named a whole mapping, and the caller promises that it is not used.
            unsafe { munmap(start, to - from) }?;
        }
    }
    Ok(())
}

/// Creates a zeroed file of shared memory that can grow and never shrinks. Only used pages take memory.
///
/// # Errors
/// ENOMEM, or no descriptor left.
pub fn growing_file(length: u64) -> io::Result<OwnedFd> {
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    let file = File::from(memfd_create(c"preforkd-metrics", flags)?);
    file.set_permissions(Permissions::from_mode(OWNER_ONLY))?;
    file.set_len(length)?;
    // As in `array`, but it may grow. With a seal on writing, the new program could not map it after an upgrade.
    fcntl(
        &file,
        FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_SEAL),
    )?;
    Ok(file.into())
}

/// Returns the record at `offset` (a multiple of the page size) of a file that `growing_file` has made,
/// and makes the file long enough. The record is never unmapped.
///
/// # Errors
/// ENOMEM; EFBIG if the file cannot become that long.
pub fn record_at<T: SharedRecord>(file: &OwnedFd, offset: u64) -> io::Result<&'static T> {
    let bytes = bytes_of::<T>(NonZeroUsize::MIN)?;
    let (end, handle) = (offset + bytes.get() as u64, File::from(file.try_clone()?));
    if handle.metadata()?.len() < end {
        handle.set_len(end)?;
    }
    let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    let offset = i64::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
    // SAFETY: the kernel chooses the address of the new mapping, so it overlaps no other memory.
    let start: NonNull<c_void> =
        unsafe { mmap(None, bytes, protection, MapFlags::MAP_SHARED, file, offset) }?;
    // SAFETY: the mapping is page-aligned, as long as the record, and never unmapped. The file has these
    // bytes and is never shortened. `SharedRecord` guarantees that any bits are valid.
    Ok(unsafe { start.cast::<T>().as_ref() })
}

/// Opens a file of shared memory again, so that the new descriptor cannot be used for writing (proc(5)).
///
/// # Errors
/// If no descriptor is left, or /proc is not mounted.
pub fn read_only(file: &impl AsRawFd) -> io::Result<OwnedFd> {
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    Ok(File::open(path)?.into())
}

/// A whole file of shared memory, mapped for reading.
#[derive(Debug)]
pub struct ReadOnlyMap {
    start: NonNull<c_void>,
    length: NonZeroUsize,
}

impl ReadOnlyMap {
    /// Maps a file as long as it is now.
    ///
    /// # Errors
    /// ENOMEM; EINVAL if it is empty, or no file of memory that never shrinks.
    pub fn new(file: &OwnedFd) -> io::Result<Self> {
        let seals = fcntl(file, FcntlArg::F_GET_SEALS)?;
        if seals & SealFlag::F_SEAL_SHRINK.bits() == 0 {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let length = File::from(file.try_clone()?).metadata()?.len();
        let length = usize::try_from(length).ok().and_then(NonZeroUsize::new);
        let length = length.ok_or(io::ErrorKind::InvalidInput)?;
        let protection = ProtFlags::PROT_READ;
        // SAFETY: the kernel chooses the address of the new mapping, so it overlaps no other memory.
        let start = unsafe { mmap(None, length, protection, MapFlags::MAP_SHARED, file, 0) }?;
        Ok(ReadOnlyMap { start, length })
    }

    /// The length in bytes.
    pub fn length(&self) -> usize {
        self.length.get()
    }

    /// Returns the record at `offset`; `None` if it is not inside the file, or not aligned. Only read it.
    pub fn record<T: SharedRecord>(&self, offset: usize) -> Option<&T> {
        let end = offset.checked_add(size_of::<T>())?;
        let is_inside = end <= self.length() && offset.is_multiple_of(align_of::<T>());
        // SAFETY: the record is inside the mapping, which is page-aligned and lives as long as `self`. Any
        // bits are a valid `SharedRecord`. The file is sealed, so it does not become shorter.
        is_inside.then(|| unsafe { self.start.byte_add(offset).cast::<T>().as_ref() })
    }
}

impl Drop for ReadOnlyMap {
    fn drop(&mut self) {
        // SAFETY: `new` has mapped this many bytes there, and references into them end with this value.
        let _ = unsafe { munmap(self.start, self.length()) };
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn other_users_cannot_open_shared_memory_again() {
        let (_, records) = array::<AtomicU64>(NonZeroUsize::MIN).unwrap();
        for file in [records, growing_file(4096).unwrap()] {
            let mode = File::from(file).metadata().unwrap().permissions().mode();
            assert_eq!(mode & 0o777, OWNER_ONLY);
        }
    }

    #[test]
    fn a_core_dump_leaves_shared_records_out() {
        let (records, _file) = array::<AtomicU64>(NonZeroUsize::new(4096).unwrap()).unwrap();
        let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let start = format!("{:x}-", records.as_ptr() as usize);
        let own = smaps.lines().skip_while(|line| !line.starts_with(&start));
        let flags = own.skip(1).find(|line| line.starts_with("VmFlags:"));
        assert!(
            flags.unwrap().split(' ').any(|flag| flag == "dd"),
            "{flags:?}"
        );
    }
}
