//! Questions to a node on this machine, over its own endpoint: `granary status`, `why`, `demo`.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use bytes::Bytes;
use http::StatusCode;
use http_body_util::{BodyExt, Empty, Limited};
use hyper_util::rt::TokioIo;
use tokio::net::{TcpStream, UnixStream};
use tokio_util::either::Either;

use crate::listener::Address;

/// Time that a running node gets for one answer. The demo's largest NAR takes a second or two.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);

/// Largest answer read: more than a thousand peers, or the demo's largest NAR.
const ANSWER_BYTES_MAX: usize = 512 * 1024 * 1024;

/// Asks for a target; `None` for 404.
pub async fn get(address: &Address, target: &str) -> Result<Option<Vec<u8>>> {
    let exchange = async {
        let (socket, host) = match address {
            Address::Tcp(tcp) => (
                TcpStream::connect(tcp).await.map(Either::Left),
                tcp.to_string(),
            ),
            Address::Unix(path) => (
                UnixStream::connect(path).await.map(Either::Right),
                "localhost".to_owned(),
            ),
        };
        let socket = socket.with_context(|| {
            format!(
                "no node answers on {address}; is `granary node` running with this configuration?"
            )
        })?;
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(socket)).await?;
        // Ends when the sender is dropped; its errors reach the sender.
        tokio::spawn(async move { drop(connection.await) });
        let request = http::Request::get(target)
            .header(http::header::HOST, host)
            .body(Empty::<Bytes>::new())?;
        let response = sender.send_request(request).await;
        let response =
            response.with_context(|| format!("{address} gave no answer; is it a granary node?"))?;
        let status = response.status();
        let body = Limited::new(response.into_body(), ANSWER_BYTES_MAX)
            .collect()
            .await;
        let body = body.map_err(|error| anyhow::anyhow!("the answer broke off: {error}"))?;
        match status {
            StatusCode::OK => Ok(Some(body.to_bytes().into())),
            StatusCode::NOT_FOUND => Ok(None),
            status => bail!("{address} answered {status}; is it a granary node?"),
        }
    };
    let answer = tokio::time::timeout(ANSWER_TIMEOUT, exchange).await;
    answer.with_context(|| format!("{address} did not answer within {ANSWER_TIMEOUT:?}"))?
}
