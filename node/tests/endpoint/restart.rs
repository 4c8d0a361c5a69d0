//! Always up: sockets of the service manager, Unix sockets, and restarts under load.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::sync_channel;
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use crate::machine::{GENEROUS, LARGE_BYTES, Machine, SMALL_BYTES, Sample, until};
use crate::process::Node;

/// Clients that ask again and again while a node is restarted.
const CLIENTS: usize = 8;

/// One request; the status, or how the connection failed.
fn status_of(address: SocketAddr, target: &str) -> Result<u16, ErrorKind> {
    let exchange = || {
        let mut stream = TcpStream::connect(address)?;
        stream.set_read_timeout(Some(GENEROUS))?;
        let request =
            format!("GET {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes())?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer)?;
        let length = answer.windows(4).position(|four| four == b"\r\n\r\n");
        let is_whole = length.is_some_and(|head| {
            let text = String::from_utf8_lossy(&answer[..head]).to_lowercase();
            let promised = text.split("content-length: ").nth(1);
            let promised = promised.and_then(|text| text.lines().next()?.parse().ok());
            promised == Some(answer.len() - head - 4)
        });
        let status = answer
            .get(9..12)
            .and_then(|text| str::from_utf8(text).ok()?.parse().ok());
        match (is_whole, status) {
            (true, Some(status)) => Ok(status),
            _ => Err(ErrorKind::UnexpectedEof.into()),
        }
    };
    exchange().map_err(|error: std::io::Error| error.kind())
}

/// Asks from several threads until told to stop; counts what came.
fn under_load(
    address: SocketAddr,
    path: &Sample,
    restart: impl FnOnce(&AtomicU64),
) -> BTreeMap<String, u64> {
    let is_over = AtomicBool::new(false);
    let answered = AtomicU64::new(0);
    let targets = [
        "/nix-cache-info".to_owned(),
        path.narinfo(),
        path.short(),
        "/00bgd045z0d4icpbc2yyz4gx48ak44la.narinfo".to_owned(),
        "/nar/00bgd045z0d4icpbc2yyz4gx48ak44la.nar".to_owned(),
    ];
    thread::scope(|scope| {
        let (is_over, answered, targets) = (&is_over, &answered, &targets);
        let clients: Vec<_> = (0..CLIENTS)
            .map(|client| {
                scope.spawn(move || {
                    let mut counts = BTreeMap::<String, u64>::new();
                    let mut number = client;
                    while !is_over.load(Ordering::Relaxed) {
                        let target = &targets[number % targets.len()];
                        let what = match status_of(address, target) {
                            Ok(status) => status.to_string(),
                            Err(kind) => format!("{kind:?} at {target}"),
                        };
                        *counts.entry(what).or_default() += 1;
                        answered.fetch_add(1, Ordering::Relaxed);
                        number += 1;
                    }
                    counts
                })
            })
            .collect();
        restart(answered);
        is_over.store(true, Ordering::Relaxed);
        let mut all = BTreeMap::<String, u64>::new();
        for client in clients {
            for (what, count) in client.join().unwrap() {
                *all.entry(what).or_default() += count;
            }
        }
        all
    })
}

fn more(answered: &AtomicU64, number: u64) {
    let before = answered.load(Ordering::Relaxed);
    until("answers", || {
        answered.load(Ordering::Relaxed) >= before + number
    });
}

#[test]
fn a_restart_under_load_loses_no_request() {
    let machine = Machine::new();
    let path = machine.add("small", SMALL_BYTES);
    machine.admit();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let mut node = Some(Node::start(&machine, Some(&listener), &[]));
    until("the store", || {
        status_of(address, &path.narinfo()) == Ok(200)
    });
    let counts = under_load(address, &path, |answered| {
        for _ in 0..3 {
            more(answered, 200);
            // One after the other, as systemd does it: the ports of the mesh are free again.
            let log = node.take().unwrap().stop();
            node = Some(Node::start(&machine, Some(&listener), &[]));
            assert!(log.contains(&address.to_string()), "{log}");
            // What is asked before the store is open is 404.
            more(answered, 200);
        }
    });
    node.unwrap().stop();
    let kinds: Vec<_> = counts.keys().map(String::as_str).collect();
    assert_eq!(kinds, ["200", "404"], "{counts:?}");
    assert!(counts["200"] > 200, "{counts:?}");
}

#[test]
fn a_socket_that_is_passed_waits_for_the_next_process() {
    let machine = Machine::new();
    let path = machine.add("small", SMALL_BYTES);
    machine.admit();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let node = Node::start(&machine, Some(&listener), &[]);
    until("the store", || {
        status_of(address, &path.narinfo()) == Ok(200)
    });
    node.stop();
    // Nobody runs: the request waits.
    let waiting = thread::spawn(move || status_of(address, "/nix-cache-info"));
    let node = Node::start(&machine, Some(&listener), &[]);
    assert_eq!(waiting.join().unwrap(), Ok(200));
    until("the store", || {
        status_of(address, &path.narinfo()) == Ok(200)
    });
    node.stop();
}

#[test]
fn a_running_answer_is_finished_and_its_own_listener_answers_until_then() {
    let mut machine = Machine::new();
    let (small, large) = (
        machine.add("small", SMALL_BYTES),
        machine.add("large", LARGE_BYTES),
    );
    machine.admit();
    let free = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    machine.listen = format!("\"{free}\"");
    let node = Node::start(&machine, None, &[]);
    until("the store", || status_of(free, &small.narinfo()) == Ok(200));
    // A client that has read the head and waits; the rest does not fit into the buffers between.
    let mut client = crate::client::Client::new(TcpStream::connect(free).unwrap());
    client.request("GET", &large.short(), "");
    let head = client.head();
    assert!(head.starts_with("HTTP/1.1 200"), "{head}");
    kill_process(Pid::from_child(&node.0), Signal::TERM).unwrap();
    // In a keep-alive connection too, the answer says that it is the last.
    let goodbye = "connection: close";
    let mut last = 200;
    until("the goodbye", || {
        let mut other = crate::client::Client::new(match TcpStream::connect(free) {
            Ok(stream) => stream,
            Err(error) => panic!("refused while an answer was running: {error}"),
        });
        other.request("GET", &small.narinfo(), "");
        let answer = other.answer(false);
        last = answer.status;
        answer.head.to_lowercase().contains(goodbye)
    });
    assert_eq!(last, 200, "the store is still there");
    let since = Instant::now();
    while since.elapsed() < Duration::from_millis(600) {
        assert_eq!(status_of(free, &small.narinfo()), Ok(200));
    }
    while client.rest.len() < large.nar.len() {
        assert!(client.read(), "cut after {} bytes", client.rest.len());
    }
    assert!(client.rest == large.nar);
    drop(client);
    node.stop();
    assert_eq!(status_of(free, "/"), Err(ErrorKind::ConnectionRefused));
}

#[test]
fn the_service_manager_is_told_of_start_life_and_end() {
    let machine = Machine::new();
    machine.admit();
    let socket = machine.folder().join("notify");
    let notices = UnixDatagram::bind(&socket).unwrap();
    notices.set_read_timeout(Some(GENEROUS)).unwrap();
    let notice = || {
        let mut buffer = [0; 256];
        let length = notices.recv(&mut buffer).unwrap();
        String::from_utf8_lossy(&buffer[..length]).trim().to_owned()
    };
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let variables = [
        ("NOTIFY_SOCKET", socket.to_str().unwrap()),
        ("WATCHDOG_USEC", "300000"),
    ];
    let node = Node::start(&machine, Some(&listener), &variables);
    assert_eq!(notice(), "READY=1");
    let address = listener.local_addr().unwrap();
    assert_eq!(status_of(address, "/nix-cache-info"), Ok(200));
    for _ in 0..5 {
        assert_eq!(notice(), "WATCHDOG=1");
    }
    node.stop();
    let rest: Vec<_> = std::iter::from_fn(|| {
        let next = notice();
        (!next.starts_with("EXTEND_TIMEOUT_USEC=")).then_some(next)
    })
    .collect();
    assert_eq!(rest.last().unwrap(), "STOPPING=1");
}

#[test]
fn a_descriptor_that_is_no_listener_is_refused_with_a_word() {
    let machine = Machine::new();
    machine.admit();
    let file = machine.folder().join("granary.toml");
    std::fs::write(&file, machine.config_text()).unwrap();
    let script = "exec 3</dev/null; LISTEN_PID=$$ LISTEN_FDS=1 exec \"$0\" node --config \"$1\"";
    let output = Command::new("sh")
        .args(["-c", script, env!("CARGO_BIN_EXE_granary")])
        .arg(&file)
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("file descriptor 3"), "{said}");
}

#[test]
fn unix_sockets_and_several_addresses_are_answered_alike() {
    let mut machine = Machine::new();
    let path = machine.add("small", SMALL_BYTES);
    machine.admit();
    let socket = machine.folder().join("endpoint");
    machine.listen = format!(
        "[\"unix:{}\", \"127.0.0.1:0\", \"[::1]:0\"]",
        socket.display()
    );
    let node = Node::start(&machine, None, &[]);
    let ask = |target: &str, host: &str| {
        let mut stream = UnixStream::connect(&socket)?;
        let request = format!("GET {target} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes())?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer)?;
        Ok::<_, std::io::Error>(answer)
    };
    until("the store", || {
        ask(&path.narinfo(), "localhost").is_ok_and(|answer| answer.starts_with(b"HTTP/1.1 200"))
    });
    // No web page gets here, so any name will do.
    let answer = ask(&path.short(), "granary.example").unwrap();
    assert!(answer.ends_with(&path.nar));
    // Like any other user of the machine, the command line asks there too.
    let file = machine.folder().join("granary.toml");
    let status = Command::new(env!("CARGO_BIN_EXE_granary"))
        .args(["why", &path.hash, "--config", file.to_str().unwrap()])
        .output()
        .unwrap();
    assert!(String::from_utf8_lossy(&status.stdout).contains("200 from the local store"));

    let log = node.stop();
    assert!(!socket.exists(), "removed at the end");
    let mut tcp = Vec::new();
    for line in log.lines().filter(|line| line.contains("answering Nix")) {
        tcp.extend(line.split("address=").nth(1).map(str::to_owned));
    }
    assert_eq!(tcp.len(), 3, "{log}");
    assert!(tcp.iter().any(|address| address.starts_with("[::1]:")));
}

#[test]
fn what_a_killed_node_left_behind_is_replaced() {
    let mut machine = Machine::new();
    machine.admit();
    let socket = machine.folder().join("endpoint");
    machine.listen = format!("\"unix:{}\"", socket.display());
    let start = || {
        let mut node = Node::start(&machine, None, &[]);
        let (sender, line) = sync_channel(1);
        let stderr = node.0.stderr.take().unwrap();
        thread::spawn(move || {
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                if line.contains("answering Nix") {
                    // The receiver is gone once it has what it waits for.
                    let _ = sender.try_send(line);
                }
            }
        });
        line.recv_timeout(Duration::from_secs(20)).unwrap();
        node
    };
    let mut node = start();
    node.0.kill().unwrap();
    node.0.wait().unwrap();
    assert!(socket.exists());
    let node = start();
    assert!(UnixStream::connect(&socket).is_ok());
    drop(node);
}
