//! What a program that is tried before an upgrade says by its exit status. 0 means that it fits.

/// The segment is of another layout.
pub const OTHER_LAYOUT: u8 = 3;
/// The other server's messages are of another version.
pub const OTHER_CONTROL: u8 = 4;
