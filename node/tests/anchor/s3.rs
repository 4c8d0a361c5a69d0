//! S3 in this process: `s3s-fs` over a temporary folder, and what may go wrong with it.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use futures::StreamExt;
use granary::anchor::object_store::{ObjectStore, S3Options};
use http::{Request, Response, StatusCode};
use http_body::Frame;
use http_body_util::{BodyExt, Full, StreamBody, combinators::UnsyncBoxBody};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use s3s::auth::SimpleAuth;
use s3s::service::{S3Service, S3ServiceBuilder};
use tempfile::TempDir;
use tokio::net::TcpListener;

const BUCKET: &str = "granary-test";

/// What the server does to the next request that a test's filter picks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// 503 with the code by which S3 asks for patience.
    SlowDown,
    InternalError,
    /// 403, as for one object whose rights somebody changed.
    Denied,
    /// The connection ends in the middle of the body.
    CutBody,
    /// No answer, for as long as the client cares to wait.
    Silence,
}

type Filter = Box<dyn Fn(&str, &str) -> bool + Send>;

/// A running server; it ends with the test's process.
pub struct S3 {
    pub folder: TempDir,
    address: SocketAddr,
    faults: Faults,
    requests: Arc<Mutex<Vec<String>>>,
}

type Faults = Arc<Mutex<VecDeque<(Filter, Fault)>>>;

impl S3 {
    pub async fn start() -> S3 {
        S3::on(std::net::TcpListener::bind("127.0.0.1:0").unwrap())
    }

    /// Serves on a listener, which may stand in another network namespace. Needs a runtime around it.
    pub fn on(listener: std::net::TcpListener) -> S3 {
        let folder = TempDir::new().unwrap();
        std::fs::create_dir(folder.path().join(BUCKET)).unwrap();
        let files = s3s_fs::FileSystem::new(folder.path()).unwrap();
        let mut builder = S3ServiceBuilder::new(files);
        builder.set_auth(SimpleAuth::from_single("key", "secret"));
        let service = builder.build();
        listener.set_nonblocking(true).unwrap();
        let listener = TcpListener::from_std(listener).unwrap();
        let address = listener.local_addr().unwrap();
        let faults = Faults::default();
        let requests = Arc::new(Mutex::new(Vec::new()));
        let s3 = S3 {
            folder,
            address,
            faults: faults.clone(),
            requests: requests.clone(),
        };
        // s3s-fs checks and then renames: without a lock two conditional puts could both win.
        let lock = Arc::new(tokio::sync::Mutex::new(()));
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                stream.set_nodelay(true).unwrap();
                let (service, faults) = (service.clone(), faults.clone());
                let (lock, requests) = (lock.clone(), requests.clone());
                tokio::spawn(async move {
                    let answer = service_fn(move |request| {
                        let (service, lock) = (service.clone(), lock.clone());
                        let what = format!("{} {}", request.method(), request.uri());
                        requests.lock().unwrap().push(what);
                        let fault = next_fault(&faults, &request);
                        async move { answer(service, lock, fault, request).await }
                    });
                    // A connection that a fault cut ends in an error, as it should.
                    let _ = hyper::server::conn::http1::Builder::new()
                        .serve_connection(TokioIo::new(stream), answer)
                        .await;
                });
            }
        });
        s3
    }

    /// Makes the next request whose method and target the filter accepts go wrong.
    pub fn fail(&self, fault: Fault, filter: impl Fn(&str, &str) -> bool + Send + 'static) {
        let mut faults = self.faults.lock().unwrap();
        faults.push_back((Box::new(filter), fault));
    }

    pub fn faults_left(&self) -> usize {
        self.faults.lock().unwrap().len()
    }

    pub fn requests(&self) -> Vec<String> {
        self.requests.lock().unwrap().clone()
    }

    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    pub fn options(&self) -> S3Options {
        let credentials = self.folder.path().join("credentials");
        let text = "[default]\naws_access_key_id = key\naws_secret_access_key = secret\n";
        std::fs::write(&credentials, text).unwrap();
        use std::os::unix::fs::PermissionsExt;
        std::fs::set_permissions(&credentials, std::fs::Permissions::from_mode(0o600)).unwrap();
        S3Options {
            endpoint: Some(self.endpoint()),
            region: Some("us-east-1".to_owned()),
            credentials_file: Some(credentials),
            ..S3Options::default()
        }
    }

    pub fn store(&self) -> ObjectStore {
        ObjectStore::open(&format!("s3://{BUCKET}/some/prefix"), &self.options()).unwrap()
    }
}

fn next_fault(faults: &Faults, request: &Request<Incoming>) -> Option<Fault> {
    let mut faults = faults.lock().unwrap();
    let method = request.method().as_str();
    let target = request.uri().to_string();
    let position = faults
        .iter()
        .position(|(filter, _)| filter(method, &target))?;
    faults.remove(position).map(|(_, fault)| fault)
}

type Body = UnsyncBoxBody<Bytes, std::io::Error>;

async fn answer(
    service: S3Service,
    lock: Arc<tokio::sync::Mutex<()>>,
    fault: Option<Fault>,
    request: Request<Incoming>,
) -> Result<Response<Body>, Infallible> {
    match fault {
        Some(Fault::SlowDown) => return Ok(refusal(StatusCode::SERVICE_UNAVAILABLE, "SlowDown")),
        Some(Fault::InternalError) => {
            return Ok(refusal(StatusCode::INTERNAL_SERVER_ERROR, "InternalError"));
        }
        Some(Fault::Denied) => return Ok(refusal(StatusCode::FORBIDDEN, "AccessDenied")),
        Some(Fault::Silence) => std::future::pending().await,
        Some(Fault::CutBody) | None => {}
    }
    let _held = lock.lock().await;
    let response = service.call(request.map(s3s::Body::from)).await.unwrap();
    let (parts, body) = response.into_parts();
    if fault == Some(Fault::CutBody) {
        let whole = BodyExt::collect(body).await.unwrap().to_bytes();
        let half = whole.slice(..whole.len() / 2);
        let pieces = [
            Ok(Frame::data(half)),
            Err(std::io::ErrorKind::BrokenPipe.into()),
        ];
        let body = StreamBody::new(futures::stream::iter(pieces)).boxed_unsync();
        return Ok(Response::from_parts(parts, body));
    }
    let frames = body
        .into_data_stream()
        .map(|piece| piece.map(Frame::data).map_err(std::io::Error::other));
    Ok(Response::from_parts(
        parts,
        StreamBody::new(frames).boxed_unsync(),
    ))
}

fn refusal(status: StatusCode, code: &str) -> Response<Body> {
    let text =
        format!("<?xml version=\"1.0\"?><Error><Code>{code}</Code><Message>no</Message></Error>");
    let body = Full::new(Bytes::from(text)).map_err(|never| match never {});
    let mut response = Response::new(body.boxed_unsync());
    *response.status_mut() = status;
    response
}
