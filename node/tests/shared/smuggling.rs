//! Requests that two readers take for different ones: whoever stands before a listener could be made to let a second
//! request through that it never saw. Shared by the tests of every listener that speaks HTTP.

use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// How long the end of a connection is awaited.
const PATIENCE: Duration = Duration::from_secs(10);

/// What the answer to a hidden request would say.
const MARK: &str = "WantMassQuery";

/// Each case with its name. `asked` is the target of the request that is seen, `hidden` the nix-cache-info that
/// would be answered if the listener took what follows for a request.
pub fn cases(asked: &str, hidden: &str) -> Vec<(&'static str, Vec<u8>)> {
    let hidden = format!("GET {hidden} HTTP/1.1\r\nHost: localhost\r\n\r\n");
    let length = hidden.len();
    let head = |fields: &str| format!("GET {asked} HTTP/1.1\r\nHost: localhost\r\n{fields}\r\n");
    let chunked = "Transfer-Encoding: chunked\r\n";
    let cases = [
        (
            "a body of a GET",
            head(&format!("Content-Length: {length}\r\n")),
        ),
        (
            "a length and chunks",
            head(&format!("Content-Length: {}\r\n{chunked}", length + 5)) + "0\r\n\r\n",
        ),
        (
            "chunks and a length",
            head(&format!("{chunked}Content-Length: {}\r\n", length + 5)) + "0\r\n\r\n",
        ),
        ("chunks", head(chunked) + "0\r\n\r\n"),
        (
            "chunks, twice",
            head(&format!("{chunked}Transfer-Encoding: identity\r\n")) + "0\r\n\r\n",
        ),
        (
            "chunks of another name",
            head("Transfer-Encoding: xchunked\r\n") + "0\r\n\r\n",
        ),
        (
            "chunks after white space",
            head("Transfer-Encoding : chunked\r\n") + "0\r\n\r\n",
        ),
        (
            "chunks with a tab",
            head("Transfer-Encoding:\tchunked\r\n") + "0\r\n\r\n",
        ),
        (
            "two lengths",
            head(&format!(
                "Content-Length: 0\r\nContent-Length: {length}\r\n"
            )),
        ),
        (
            "two lengths in one",
            head(&format!("Content-Length: 0, {length}\r\n")),
        ),
        (
            "a length with a sign",
            head(&format!("Content-Length: +{length}\r\n")),
        ),
        ("a negative length", head("Content-Length: -1\r\n")),
        (
            "a length beyond all numbers",
            head("Content-Length: 18446744073709551616\r\n"),
        ),
        (
            "a length in hexadecimal",
            head(&format!("Content-Length: {length:#x}\r\n")),
        ),
        (
            "a length before white space",
            head(&format!("Content-Length : {length}\r\n")),
        ),
        (
            "a folded line",
            head(&format!("X: y\r\n Content-Length: {length}\r\n")),
        ),
        ("a line without a name", head(&format!(": {length}\r\n"))),
        (
            "a return alone",
            head(&format!("X: y\rContent-Length: {length}\r\n")),
        ),
        (
            "a zero byte",
            head(&format!("X: y\0\r\nContent-Length: {length}\r\n")),
        ),
        ("a chunk of a sign", head(chunked) + "+0\r\n\r\n"),
        (
            "a chunk beyond all numbers",
            head(chunked) + "10000000000000000\r\n",
        ),
        ("a chunk without its end", head(chunked) + "1\r\nx0\r\n\r\n"),
        (
            "chunks of HTTP/1.0",
            head(chunked).replace("HTTP/1.1", "HTTP/1.0") + "0\r\n\r\n",
        ),
        (
            "a version that is none",
            head("").replace("HTTP/1.1", "HTTP/1.1x"),
        ),
    ];
    let bytes = |(name, seen): (&'static str, String)| (name, (seen + &hidden).into_bytes());
    cases.into_iter().map(bytes).collect()
}

/// Sends a case, and asserts that what is hidden in it is not answered: the connection ends before.
pub async fn check(name: &str, bytes: &[u8], mut stream: impl AsyncRead + AsyncWrite + Unpin) {
    // It may be closed while we still write.
    let _ = stream.write_all(bytes).await;
    let _ = stream.flush().await;
    let mut said = Vec::new();
    let read = tokio::time::timeout(PATIENCE, stream.read_to_end(&mut said)).await;
    let said = String::from_utf8_lossy(&said);
    // A reset, or TLS that ends without a word, is an end as well.
    assert!(read.is_ok(), "{name}: the connection stays open: {said}");
    assert!(!said.contains(MARK), "{name}: {said}");
    let answers = said.matches("HTTP/1.").count();
    assert!(answers <= 1, "{name}: {said}");
    assert!(
        answers == 0 || said.starts_with("HTTP/1.1 4"),
        "{name}: {said}"
    );
}
