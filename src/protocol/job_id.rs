//! Makes and parses the ids of jobs, which are UUIDs (RFC 9562).
//!
//! An id of the server is a version 7: 48 bits of time, then 74 random bits. So new ids are close together
//! in the index of the store. An id that belongs to an `Idempotency-Key` is a version 8 with 122 bits of an
//! HMAC. Clients may use any UUID.

use std::fmt;

use hmac_sha256::HMAC;

/// The id of a job.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct JobId(pub [u8; 16]);

/// The number of characters of an id.
const ID_LENGTH: usize = 36;

/// The positions of the hyphens.
const HYPHENS: [usize; 4] = [8, 13, 18, 23];

impl JobId {
    /// Creates an id of version 7 from the time, in milliseconds since 1970 (UTC), and random bits. Of the 80 bits, 74
    /// are used.
    pub fn at(now: u64, random: [u8; 10]) -> Self {
        let mut bytes = [0; 16];
        bytes[..6].copy_from_slice(&now.to_be_bytes()[2..]);
        bytes[6..].copy_from_slice(&random);
        JobId(bytes).with_version(7)
    }

    /// Derives the id with this number from a random one. Number 0 is the id itself. The others have its time, and bits
    /// that are computed from it. No derived id can be computed from another one.
    pub fn nth(self, number: usize) -> Self {
        if number == 0 {
            return self;
        }
        let random = HMAC::mac((number as u64).to_be_bytes(), self.0);
        let mut bytes = self.0;
        bytes[6..].copy_from_slice(&random[..10]);
        JobId(bytes).with_version(7)
    }

    /// Derives the id for a method and the `Idempotency-Key` of a request. Without the secret of the store it
    /// cannot be computed, so a client that knows the key of another client still cannot read its job.
    pub fn derived(secret: &[u8], method: &str, key: &str) -> Self {
        let mut mac = HMAC::new(secret);
        // The length keeps ("ab", "c") and ("a", "bc") apart.
        mac.update((method.len() as u64).to_be_bytes());
        mac.update(method);
        mac.update(key);
        let mut bytes = [0; 16];
        bytes.copy_from_slice(&mac.finalize()[..16]);
        JobId(bytes).with_version(8)
    }

    /// Returns whether the id has version 8. The server derives such ids from an `Idempotency-Key`, and a client may
    /// choose one.
    pub fn is_derived(self) -> bool {
        self.0[6] >> 4 == 8
    }

    /// Parses the text form: 32 hexadecimal digits in either case, with hyphens. `None` for anything else.
    pub fn parse(text: &str) -> Option<Self> {
        if text.len() != ID_LENGTH {
            return None;
        }
        let mut bytes = [0_u8; 16];
        let mut digits = 0;
        for (at, byte) in text.bytes().enumerate() {
            if HYPHENS.contains(&at) {
                if byte != b'-' {
                    return None;
                }
                continue;
            }
            let digit = char::from(byte).to_digit(16)? as u8;
            bytes[digits / 2] = (bytes[digits / 2] << 4) | digit;
            digits += 1;
        }
        Some(JobId(bytes))
    }

    fn with_version(mut self, version: u8) -> Self {
        self.0[6] = (self.0[6] & 0x0f) | (version << 4);
        // The variant of RFC 9562.
        self.0[8] = (self.0[8] & 0x3f) | 0x80;
        self
    }
}

impl fmt::Display for JobId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, byte) in self.0.iter().enumerate() {
            if [4, 6, 8, 10].contains(&at) {
                f.write_str("-")?;
            }
            write!(f, "{byte:02x}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for JobId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "JobId({self})")
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn an_id_of_the_server_has_the_time_version_and_variant_of_rfc_9562() {
        // The example of RFC 9562, appendix A.6.
        let random = [0x0c, 0xc3, 0x18, 0xc4, 0xdc, 0x0c, 0x0c, 0x07, 0x39, 0x8f];
        let id = JobId::at(0x017F_22E2_79B0, random);
        assert_eq!(id.to_string(), "017f22e2-79b0-7cc3-98c4-dc0c0c07398f");
    }

    #[test]
    fn ids_of_an_array_follow_from_the_first_one() {
        let first = JobId::at(0x017F_22E2_79B0, [7; 10]);
        assert_eq!(first.nth(0), first);
        let all: std::collections::BTreeSet<JobId> = (0..1000).map(|at| first.nth(at)).collect();
        assert_eq!(all.len(), 1000);
        assert!(all.iter().all(|id| id.0[..6] == first.0[..6]));
        assert_eq!(first.nth(5), first.nth(5));
        let (one, other) = (first.nth(1).to_string(), JobId([9; 16]).nth(1).to_string());
        assert!(one.as_bytes()[14] == b'7' && other.as_bytes()[14] == b'7');
    }

    #[test]
    fn ids_of_the_server_use_74_random_bits() {
        let ids = (0..80).map(|bit| {
            let mut random = [0_u8; 10];
            random[bit / 8] = 1 << (bit % 8);
            JobId::at(1, random)
        });
        let zero = JobId::at(1, [0; 10]);
        assert_eq!(ids.filter(|id| *id != zero).count(), 74);
    }

    #[test]
    fn later_ids_sort_behind_earlier_ones() {
        assert!(JobId::at(1_000, [0xff; 10]) < JobId::at(1_001, [0; 10]));
    }

    #[test]
    fn a_derived_id_depends_on_secret_method_and_key() {
        let id = JobId::derived(b"secret", "mail", "k1");
        assert_eq!(id, JobId::derived(b"secret", "mail", "k1"));
        for (secret, method, key) in [
            ("other", "mail", "k1"),
            ("secret", "mai", "lk1"),
            ("secret", "mail", "k2"),
        ] {
            assert_ne!(
                id,
                JobId::derived(secret.as_bytes(), method, key),
                "{method}"
            );
        }
        assert_eq!((id.0[6] >> 4, id.0[8] >> 6), (8, 2));
    }

    #[test]
    fn only_the_text_form_of_a_uuid_is_an_id() {
        let id = JobId::parse("017F22E2-79b0-7cc3-98c4-dc0c0c07398f").unwrap();
        assert_eq!(id.to_string(), "017f22e2-79b0-7cc3-98c4-dc0c0c07398f");
        for text in [
            "",
            "017f22e279b07cc398c4dc0c0c07398f",
            "{017f22e2-79b0-7cc3-98c4-dc0c0c07398f}",
            "017f22e2-79b0-7cc3-98c4-dc0c0c07398g",
            "017f22e2-79b0-7cc3-98c4+dc0c0c07398f",
            "017f22e2-79b0-7cc3-98c4-dc0c0c0739f",
            "017f22e2-79b0-7cc3-98c4-dc0c0c0739é",
        ] {
            assert_eq!(JobId::parse(text), None, "{text}");
        }
    }

    proptest! {
        #[test]
        fn each_id_is_read_back(bytes: [u8; 16]) {
            prop_assert_eq!(JobId::parse(&JobId(bytes).to_string()), Some(JobId(bytes)));
        }
    }
}
