//! Counts visits, one request at a time and then a thousand at once.
//!
//! ```text
//! cargo run --example counter -- 127.0.0.1:9999
//! ```

use kvs_client::{Answer, Client, Error};

fn main() -> Result<(), Error> {
    let address = std::env::args().nth(1).unwrap_or_else(|| "127.0.0.1:9999".into());
    let mut client = Client::connect(address)?;

    client.delete("visits")?;
    println!("visit number {}", client.increment("visits", 1)?);

    // A pipeline sends all of its requests before it waits for the answers.
    let mut pipeline = client.pipeline();
    for _ in 0..1000 {
        pipeline.increment("visits", 1);
    }
    let answers = pipeline.run()?;
    if let Some(Answer::Number(visits)) = answers.last() {
        println!("visit number {visits}");
    }

    let value = client.get("visits")?.unwrap_or_default();
    println!("the store holds {:?}", String::from_utf8_lossy(&value));
    Ok(())
}
