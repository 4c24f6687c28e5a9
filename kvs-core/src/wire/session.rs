//! What a client's session is known by.
//!
//! Invariant: a token is a secret. It is compared in a time that says nothing about it, and shown to nobody.

use std::fmt;
use std::hash::{Hash, Hasher};

use serde::{Deserialize, Serialize};

/// Bytes of a token.
pub const SESSION_TOKEN_BYTES: usize = 16;

/// What a client's session is known by: random bytes of the client's choice, not all of them zero.
#[derive(Clone, Copy, Serialize, Deserialize)]
#[serde(transparent)]
pub struct SessionToken([u8; SESSION_TOKEN_BYTES]);

impl SessionToken {
    /// Of these bytes.
    pub const fn new(bytes: [u8; SESSION_TOKEN_BYTES]) -> Self {
        Self(bytes)
    }

    /// As it is kept in two words.
    pub const fn words(self) -> [u64; 2] {
        let all = u128::from_le_bytes(self.0);
        [all as u64, (all >> 64) as u64]
    }

    /// Of what is kept in two words.
    pub const fn from_words([low, high]: [u64; 2]) -> Self {
        Self(((high as u128) << 64 | low as u128).to_le_bytes())
    }

    /// Whether it is none.
    pub const fn is_zero(self) -> bool {
        u128::from_le_bytes(self.0) == 0
    }
}

impl PartialEq for SessionToken {
    /// Takes as long whatever the bytes are.
    fn eq(&self, other: &Self) -> bool {
        let differences = self.0.iter().zip(&other.0).fold(0, |all, (one, two)| all | (one ^ two));
        std::hint::black_box(differences) == 0
    }
}

impl Eq for SessionToken {}

impl Hash for SessionToken {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write(&self.0);
    }
}

impl fmt::Debug for SessionToken {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("SessionToken(secret)")
    }
}
