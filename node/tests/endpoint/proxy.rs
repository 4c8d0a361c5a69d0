//! A proxy before a provider: decides how much of an answer gets through.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;

use crate::machine::{Machine, TRANSFER_PORT, own_address};

/// Stands at a provider's address and lets a number of bytes through to those who fetch.
pub struct Proxy {
    pub passed: AtomicU64,
    /// Bytes of answers that each connection may carry.
    pub allowed: Mutex<u64>,
    pub opened: Condvar,
    /// Connections that wait to carry more.
    pub stuck: AtomicU64,
    pub accepted: AtomicU64,
    /// Changes a byte of every piece of an answer after the first, which is the handshake's.
    pub tampers: AtomicBool,
    pub open: Mutex<Vec<TcpStream>>,
}

impl Proxy {
    pub fn before(machine: &mut Machine) -> Arc<Proxy> {
        let behind = own_address();
        machine.transfer = Some(behind);
        let listener = TcpListener::bind((machine.address, TRANSFER_PORT)).unwrap();
        let proxy = Arc::new(Proxy {
            passed: AtomicU64::new(0),
            allowed: Mutex::new(u64::MAX),
            opened: Condvar::new(),
            stuck: AtomicU64::new(0),
            accepted: AtomicU64::new(0),
            tampers: AtomicBool::new(false),
            open: Mutex::default(),
        });
        let this = proxy.clone();
        thread::spawn(move || {
            for near in listener.incoming() {
                let near = near.unwrap();
                let Ok(far) = TcpStream::connect((behind, TRANSFER_PORT)) else {
                    continue;
                };
                // Otherwise the kernel would take in more than a whole NAR.
                rustix::net::sockopt::set_socket_recv_buffer_size(&far, 128 * 1024).unwrap();
                this.accepted.fetch_add(1, Ordering::SeqCst);
                let clone = |stream: &TcpStream| stream.try_clone().unwrap();
                this.open
                    .lock()
                    .unwrap()
                    .extend([clone(&near), clone(&far)]);
                let (requests, answers) = ((clone(&near), clone(&far)), (far, near));
                let (up, down) = (this.clone(), this.clone());
                thread::spawn(move || up.pass(requests.0, requests.1, false));
                thread::spawn(move || down.pass(answers.0, answers.1, true));
            }
        });
        proxy
    }

    pub fn pass(&self, mut from: TcpStream, mut to: TcpStream, is_counted: bool) {
        let mut buffer = vec![0; 64 * 1024];
        let mut passed = 0;
        while let Ok(length @ 1..) = from.read(&mut buffer) {
            let is_stuck = |allowed: &mut u64| is_counted && passed >= *allowed;
            let mut allowed = self.allowed.lock().unwrap();
            if is_stuck(&mut allowed) {
                self.stuck.fetch_add(1, Ordering::SeqCst);
                allowed = self.opened.wait_while(allowed, is_stuck).unwrap();
                self.stuck.fetch_sub(1, Ordering::SeqCst);
            }
            drop(allowed);
            if is_counted && passed > 0 && self.tampers.load(Ordering::SeqCst) {
                buffer[length / 2] ^= 1;
            }
            passed += length as u64;
            if to.write_all(&buffer[..length]).is_err() {
                break;
            }
            if is_counted {
                self.passed.fetch_add(length as u64, Ordering::SeqCst);
            }
        }
        for end in [from, to] {
            let _ = end.shutdown(Shutdown::Both);
        }
    }

    pub fn allow(&self, bytes: u64) {
        *self.allowed.lock().unwrap() = bytes;
        self.opened.notify_all();
    }

    pub fn is_stuck(&self) -> bool {
        self.stuck.load(Ordering::SeqCst) > 0
    }

    pub fn cut(&self) {
        for stream in self.open.lock().unwrap().drain(..) {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}
