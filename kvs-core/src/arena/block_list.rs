//! Many blocks strung together, for what is larger than one.
