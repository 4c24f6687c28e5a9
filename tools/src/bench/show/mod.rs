//! What a run looks like: on a terminal, for programs, as a picture, as a folder.

pub mod csv;
pub mod folder;
pub mod json;
pub mod machine;
pub mod picture;
pub mod table;
