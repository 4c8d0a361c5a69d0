//! What stands between: before a holder's transfer port, where a fault happens at a chosen byte, and
//! before a machine's endpoint, where Nix's requests are seen.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;
use std::time::Duration;

use crate::network::Namespace;

/// Bytes carried at once.
const CARRIED_MAX: usize = 16 * 1024;

/// A trickle: some 150 kB/s.
const TRICKLE_BYTES: usize = 1500;
const TRICKLE_PAUSE: Duration = Duration::from_millis(10);

/// How often one that is silent looks whether the fault is over.
const SILENT_POLL: Duration = Duration::from_millis(20);

/// What the proxy does with a connection once the fault has happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Then {
    /// Closes it, as the kernel does for a process that died.
    Close,
    /// Answers with a reset, and so every later one.
    Reset,
    /// Says nothing more.
    Silence,
    /// Carries on.
    Carry,
    /// Carries on, a few bytes at a time.
    Trickle,
}

/// What is done to the holder that is sending, by its number.
type Act = Box<dyn Fn(usize) + Send>;

/// The fault that all proxies of a test wait for: it befalls the holder that first reaches the byte.
#[derive(Clone, Default)]
pub struct Fault(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    armed: Option<Armed>,
    befallen: Option<(usize, Then)>,
    /// Both ends of every connection, to be cut between cases.
    open: Vec<TcpStream>,
}

struct Armed {
    /// Byte of an answer, counted on its connection, encryption included.
    at: u64,
    then: Then,
    act: Act,
}

impl Fault {
    pub fn arm(&self, at: u64, then: Then, act: Act) {
        self.state().armed = Some(Armed { at, then, act });
    }

    /// The holder that it has befallen.
    pub fn befallen(&self) -> Option<usize> {
        self.state().befallen.map(|(holder, _)| holder)
    }

    /// Ends the fault and every connection, so that the next case begins with new ones.
    pub fn clear(&self) {
        let mut state = self.state();
        state.armed = None;
        state.befallen = None;
        for stream in state.open.drain(..) {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().expect("no proxy panicked")
    }

    /// How many more bytes a connection may carry, and what to do if none.
    fn next(&self, holder: usize, carried: u64) -> Result<u64, Then> {
        let mut state = self.state();
        if let Some((_, then)) = state.befallen.filter(|(befallen, _)| *befallen == holder) {
            return Err(then);
        }
        match &state.armed {
            Some(armed) if armed.at <= carried => {
                let Armed { then, act, .. } = state.armed.take().expect("looked at");
                // Within the lock: nothing more is carried before it has happened.
                act(holder);
                state.befallen = Some((holder, then));
                Err(then)
            }
            Some(armed) => Ok(armed.at - carried),
            None => Ok(u64::MAX),
        }
    }

    /// Stands before `behind` in a holder's namespace.
    pub fn stand_before(
        &self,
        holder: usize,
        at: &Namespace,
        port: SocketAddr,
        behind: SocketAddr,
    ) {
        let fault = self.clone();
        let (listener, connect) = listen(at, port, behind);
        thread::spawn(move || {
            for near in listener.incoming() {
                let near = near.expect("accept");
                let is_reset = matches!(fault.state().befallen, Some((befallen, Then::Reset)) if befallen == holder);
                let far = match connect() {
                    Some(far) if !is_reset => far,
                    _ => {
                        reset(&near);
                        continue;
                    }
                };
                let ends = [clone(&near), clone(&far)];
                fault.state().open.extend(ends);
                let (requests, answers) = ((clone(&near), clone(&far)), (far, near));
                thread::spawn(move || carry(requests.0, requests.1));
                let fault = fault.clone();
                thread::spawn(move || fault.answer(holder, answers.0, answers.1));
            }
        });
    }

    fn answer(&self, holder: usize, mut from: TcpStream, mut to: TcpStream) {
        let mut buffer = [0; CARRIED_MAX];
        let mut carried = 0;
        'answer: while let Ok(length @ 1..) = from.read(&mut buffer) {
            let mut rest = &buffer[..length];
            while !rest.is_empty() {
                let count = match self.next(holder, carried) {
                    Ok(count) => usize::try_from(count).unwrap_or(usize::MAX),
                    Err(Then::Carry) => usize::MAX,
                    Err(Then::Trickle) => {
                        thread::sleep(TRICKLE_PAUSE);
                        TRICKLE_BYTES
                    }
                    Err(Then::Close) => break 'answer,
                    Err(Then::Reset) => {
                        reset(&to);
                        break 'answer;
                    }
                    Err(Then::Silence) => {
                        while self.befallen() == Some(holder) {
                            thread::sleep(SILENT_POLL);
                        }
                        break 'answer;
                    }
                };
                let (now, later) = rest.split_at(count.min(rest.len()));
                if to.write_all(now).is_err() {
                    break 'answer;
                }
                carried += now.len() as u64;
                rest = later;
            }
        }
        end(&from, &to);
    }
}

/// A request that Nix makes of its endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    NarInfo,
    Nar,
}

/// What happens before a request is passed on.
type Before = Box<dyn FnOnce() + Send>;

/// Stands before a machine's endpoint and notes what Nix asks for.
#[derive(Clone, Default)]
pub struct Watch(Arc<Mutex<Watched>>);

#[derive(Default)]
struct Watched {
    nars: usize,
    before: Option<(Request, Before)>,
}

impl Watch {
    /// Forgets what was asked; `before` happens before the next such request.
    pub fn expect(&self, request: Request, before: Before) {
        *self.0.lock().expect("no proxy panicked") = Watched {
            nars: 0,
            before: Some((request, before)),
        };
    }

    /// How often a NAR was asked for.
    pub fn nars(&self) -> usize {
        self.0.lock().expect("no proxy panicked").nars
    }

    pub fn stand_before(&self, at: &Namespace, port: SocketAddr, behind: SocketAddr) {
        let watch = self.clone();
        let (listener, connect) = listen(at, port, behind);
        thread::spawn(move || {
            for near in listener.incoming() {
                let near = near.expect("accept");
                let Some(far) = connect() else { continue };
                let (requests, answers) = ((clone(&near), clone(&far)), (far, near));
                thread::spawn(move || carry(answers.0, answers.1));
                let watch = watch.clone();
                thread::spawn(move || watch.pass(requests.0, requests.1));
            }
        });
    }

    /// Passes requests on, head by head: Nix's have no body.
    fn pass(&self, mut from: TcpStream, mut to: TcpStream) {
        let mut heard = Vec::new();
        let mut buffer = [0; CARRIED_MAX];
        while let Ok(length @ 1..) = from.read(&mut buffer) {
            heard.extend_from_slice(&buffer[..length]);
            while let Some(end) = heard.windows(4).position(|end| end == b"\r\n\r\n") {
                let head: Vec<u8> = heard.drain(..end + 4).collect();
                self.note(&String::from_utf8_lossy(&head));
                if to.write_all(&head).is_err() {
                    return end_requests(&from, &to);
                }
            }
        }
        end_requests(&from, &to);
    }

    fn note(&self, head: &str) {
        let target = head.split(' ').nth(1).unwrap_or_default();
        let request = match target {
            nar if nar.starts_with("/nar/") => Request::Nar,
            narinfo if narinfo.ends_with(".narinfo") => Request::NarInfo,
            _ => return,
        };
        let mut watched = self.0.lock().expect("no proxy panicked");
        watched.nars += usize::from(request == Request::Nar);
        if watched
            .before
            .as_ref()
            .is_some_and(|(wanted, _)| *wanted == request)
            && let Some((_, before)) = watched.before.take()
        {
            before();
        }
    }
}

/// Listens inside a namespace; the function connects to what is behind, inside as well.
fn listen(
    at: &Namespace,
    port: SocketAddr,
    behind: SocketAddr,
) -> (TcpListener, impl Fn() -> Option<TcpStream> + Send + 'static) {
    let listener = at.inside(|| TcpListener::bind(port).expect("listen"));
    let enter = at.entrance();
    let connect = move || {
        let enter = enter.clone();
        let connect = move || {
            enter.enter();
            TcpStream::connect(behind).ok()
        };
        thread::spawn(connect).join().expect("connect")
    };
    (listener, connect)
}

fn carry(mut from: TcpStream, mut to: TcpStream) {
    let mut buffer = [0; CARRIED_MAX];
    while let Ok(length @ 1..) = from.read(&mut buffer) {
        if to.write_all(&buffer[..length]).is_err() {
            break;
        }
    }
    end(&from, &to);
}

fn clone(stream: &TcpStream) -> TcpStream {
    stream.try_clone().expect("duplicate socket")
}

fn end(from: &TcpStream, to: &TcpStream) {
    for stream in [from, to] {
        let _ = stream.shutdown(Shutdown::Both);
    }
}

/// Nothing more is asked; what is being answered goes on.
fn end_requests(from: &TcpStream, to: &TcpStream) {
    let _ = to.shutdown(Shutdown::Write);
    let _ = from.shutdown(Shutdown::Read);
}

/// Lets the next close, or this one, be a reset.
fn reset(stream: &TcpStream) {
    rustix::net::sockopt::set_socket_linger(stream, Some(Duration::ZERO)).expect("set linger");
}
