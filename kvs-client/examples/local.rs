//! Reads straight from the shared memory of a store on this machine, whether a server runs or not: the value of each key that comes
//! on standard input, one a line.
//!
//! ```text
//! echo greeting | cargo run --example local -- kvs
//! ```

use std::io::{BufWriter, Write, stdin, stdout};

use kvs_client::{Error, LocalReader};

fn main() -> Result<(), Error> {
    let name = std::env::args().nth(1).unwrap_or_else(|| "kvs".into());
    let mut reader = LocalReader::open(&name)?;
    let (mut output, mut value) = (BufWriter::new(stdout().lock()), Vec::new());
    for key in stdin().lines().map_while(Result::ok) {
        let line =
            if reader.get_into(&key, &mut value)? { String::from_utf8_lossy(&value) } else { "none".into() };
        // Nobody may want to know any more.
        if writeln!(output, "{key}: {line}").is_err() {
            break;
        }
    }
    Ok(())
}
