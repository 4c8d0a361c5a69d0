//! Pages that a browser is given, with the policy that they come with.

use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use granary::page::policy;

/// Answers `/` with one page after another, the last for ever; counts requests for anything else.
pub struct Pages {
    address: SocketAddr,
    elsewhere: Arc<AtomicUsize>,
    is_away: Arc<AtomicBool>,
}

impl Pages {
    pub fn new(pages: Vec<String>) -> Pages {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let served = Pages {
            address: listener.local_addr().unwrap(),
            elsewhere: Arc::default(),
            is_away: Arc::default(),
        };
        let (elsewhere, is_away) = (served.elsewhere.clone(), served.is_away.clone());
        std::thread::spawn(move || {
            let mut rounds = 0;
            for socket in listener.incoming() {
                let Ok(mut socket) = socket else { return };
                let mut lines = BufReader::new(&socket).lines().map_while(Result::ok);
                // A connection that a browser opens ahead and closes unused says nothing.
                let Some(request) = lines.next() else {
                    continue;
                };
                for line in lines.by_ref() {
                    if line.is_empty() {
                        break;
                    }
                }
                if request.split(' ').nth(1) != Some("/") {
                    elsewhere.fetch_add(1, Ordering::Relaxed);
                    continue;
                }
                if rounds > 0 && is_away.load(Ordering::Relaxed) {
                    // The connection is cut without an answer.
                    continue;
                }
                let page = &pages[rounds.min(pages.len() - 1)];
                rounds += 1;
                let _ = write!(
                    socket,
                    "HTTP/1.1 200 OK\r\nContent-Type: text/html; charset=utf-8\r\nContent-Security-Policy: {}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{page}",
                    policy(),
                    page.len(),
                );
            }
        });
        served
    }

    pub fn url(&self) -> String {
        format!("http://{}/", self.address)
    }

    /// How many requests were for anything but `/`.
    pub fn elsewhere(&self) -> usize {
        self.elsewhere.load(Ordering::Relaxed)
    }

    /// From here on connections are cut, but for the first.
    #[allow(dead_code, reason = "that is tested with one page, and holds for all")]
    pub fn go_away(&self) {
        self.is_away.store(true, Ordering::Relaxed);
    }
}
