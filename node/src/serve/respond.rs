//! Answers: every status and header that leaves this node over HTTP.
//!
//! Nix takes anything but 200 and 404 for a narinfo as a reason to fail the build, and a 404 for a
//! NAR as the one failure it survives (NIX.md §0). So trouble of any kind is "not here". Nothing
//! has a Content-Encoding, not even `identity`, which breaks Nix before 2.34.

use std::io;

use bytes::Bytes;
use futures::{Stream, TryStreamExt};
use http::header::{
    ACCEPT_RANGES, ALLOW, CACHE_CONTROL, CONNECTION, CONTENT_LENGTH, CONTENT_SECURITY_POLICY,
    CONTENT_TYPE, REFERRER_POLICY, WWW_AUTHENTICATE, X_CONTENT_TYPE_OPTIONS,
};
use http::{HeaderValue, Response, StatusCode};
use http_body::Frame;
use http_body_util::{BodyExt, Full, StreamBody, combinators::UnsyncBoxBody};

/// What hyper sends. An error cuts the connection, which is how a client learns that a body is short.
pub type Body = UnsyncBoxBody<Bytes, io::Error>;

pub const TEXT: &str = "text/plain; charset=utf-8";

/// A small answer, with header and body in one segment.
pub fn small(
    status: StatusCode,
    content_type: &'static str,
    text: impl Into<Bytes>,
) -> Response<Body> {
    let text = text.into();
    let mut response = Response::new(Body::default());
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    headers.insert(CONTENT_LENGTH, HeaderValue::from(text.len()));
    *response.body_mut() = Full::new(text)
        .map_err(|never| match never {})
        .boxed_unsync();
    response
}

/// The answer to what is not here. Caches between us and Nix must not remember it.
pub fn not_found(is_nar: bool) -> Response<Body> {
    let mut response = small(StatusCode::NOT_FOUND, TEXT, "");
    response
        .headers_mut()
        .insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    with_ranges(response, is_nar)
}

pub fn method_not_allowed(is_nar: bool) -> Response<Body> {
    let mut response = small(StatusCode::METHOD_NOT_ALLOWED, TEXT, "");
    response
        .headers_mut()
        .insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
    with_ranges(response, is_nar)
}

/// The answer to a request that announces a body, where none has one. What follows it on the connection is not read.
pub fn no_body(is_nar: bool) -> Response<Body> {
    let text = "requests have no body here\n";
    closing(with_ranges(
        small(StatusCode::BAD_REQUEST, TEXT, text),
        is_nar,
    ))
}

/// The last answer of its connection.
pub fn closing(mut response: Response<Body>) -> Response<Body> {
    let headers = response.headers_mut();
    headers.insert(CONNECTION, HeaderValue::from_static("close"));
    response
}

/// The answer to a Host header that is not ours.
pub fn foreign_host(is_nar: bool) -> Response<Body> {
    let text = "this endpoint answers requests to loopback names only\n";
    with_ranges(small(StatusCode::FORBIDDEN, TEXT, text), is_nar)
}

/// The answer on the LAN to a Host header that may be a web page's own.
pub fn unknown_host(is_nar: bool) -> Response<Body> {
    let text = "ask by address or by a name of this network, or add this one to share.http-hosts\n";
    with_ranges(small(StatusCode::FORBIDDEN, TEXT, text), is_nar)
}

/// The answer to who shows no token, or a wrong one. Nix takes it for "not here".
pub fn unauthorized(is_nar: bool) -> Response<Body> {
    let mut response = small(StatusCode::UNAUTHORIZED, TEXT, "a token is needed\n");
    response.headers_mut().insert(
        WWW_AUTHENTICATE,
        HeaderValue::from_static("Basic realm=\"granary\""),
    );
    with_ranges(response, is_nar)
}

/// The answer to a member that has as many NARs under way as it may have.
pub fn busy() -> Response<Body> {
    with_ranges(
        small(
            StatusCode::SERVICE_UNAVAILABLE,
            TEXT,
            "too many transfers\n",
        ),
        true,
    )
}

pub fn cache_info(text: String) -> Response<Body> {
    small(StatusCode::OK, "text/x-nix-cache-info", text)
}

pub fn narinfo(text: String) -> Response<Body> {
    small(StatusCode::OK, "text/x-nix-narinfo", text)
}

pub fn json(text: String) -> Response<Body> {
    small(StatusCode::OK, "application/json", text)
}

/// A page of ours, which may do what `policy` says, and which nothing remembers.
pub fn page(html: String, policy: &'static str) -> Response<Body> {
    let mut response = small(StatusCode::OK, "text/html; charset=utf-8", html);
    let headers = response.headers_mut();
    for (name, value) in [
        (CONTENT_SECURITY_POLICY, policy),
        (X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (REFERRER_POLICY, "no-referrer"),
        (CACHE_CONTROL, "no-store"),
    ] {
        headers.insert(name, HeaderValue::from_static(value));
    }
    response
}

/// What a monitor hears while the store is not open. Nix never asks for this.
pub fn not_ready(text: String) -> Response<Body> {
    small(StatusCode::SERVICE_UNAVAILABLE, "application/json", text)
}

pub fn metrics(text: String) -> Response<Body> {
    small(
        StatusCode::OK,
        "text/plain; version=0.0.4; charset=utf-8",
        text,
    )
}

/// A number of bytes that come as a stream. The connection is cut when they do not all come.
pub fn sized(content_type: &'static str, size: u64, body: Body) -> Response<Body> {
    let mut response = Response::new(body);
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    headers.insert(CONTENT_LENGTH, HeaderValue::from(size));
    response
}

/// A body that comes as a stream; its length is promised by the caller's Content-Length.
pub fn stream<E>(stream: impl Stream<Item = Result<Bytes, E>> + Send + 'static) -> Body
where
    E: std::error::Error + Send + Sync + 'static,
{
    StreamBody::new(stream.map_ok(Frame::data).map_err(io::Error::other)).boxed_unsync()
}

/// Everything below `/nar/` says that ranges are fine: Nix gives up resuming when one answer does not.
pub fn with_ranges(mut response: Response<Body>, is_nar: bool) -> Response<Body> {
    if is_nar {
        response
            .headers_mut()
            .insert(ACCEPT_RANGES, HeaderValue::from_static("bytes"));
    }
    response
}
