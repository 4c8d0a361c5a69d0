//! A client that sees the bytes of HTTP as they are.

use std::io::{Read, Write};
use std::net::TcpStream;

use crate::machine::GENEROUS;

/// A connection that sends and sees bytes as they are.
pub struct Client {
    pub stream: TcpStream,
    /// What was read beyond the last answer.
    pub rest: Vec<u8>,
}

#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub head: String,
    pub body: Vec<u8>,
    pub is_complete: bool,
}

impl Client {
    pub fn new(stream: TcpStream) -> Client {
        stream.set_read_timeout(Some(GENEROUS)).unwrap();
        Client {
            stream,
            rest: Vec::new(),
        }
    }

    pub fn send(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).unwrap();
    }

    pub fn request(&mut self, method: &str, target: &str, headers: &str) {
        let host = match headers.contains("Host:") {
            true => "",
            false => "Host: localhost\r\n",
        };
        self.send(format!("{method} {target} HTTP/1.1\r\n{host}{headers}\r\n").as_bytes());
    }

    /// False at the end, however it came.
    pub fn read(&mut self) -> bool {
        let mut buffer = vec![0; 256 * 1024];
        match self.stream.read(&mut buffer) {
            Ok(0) => false,
            Ok(length) => {
                self.rest.extend_from_slice(&buffer[..length]);
                true
            }
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => false,
            Err(error) => panic!("{error}"),
        }
    }

    pub fn head(&mut self) -> String {
        loop {
            if let Some(end) = self.rest.windows(4).position(|four| four == b"\r\n\r\n") {
                let body = self.rest.split_off(end + 4);
                let head = std::mem::replace(&mut self.rest, body);
                return String::from_utf8(head).unwrap();
            }
            assert!(
                self.read(),
                "no answer: {:?}",
                self.rest.escape_ascii().to_string()
            );
        }
    }

    pub fn answer(&mut self, is_head: bool) -> Answer {
        let head = self.head();
        let mut answer = Answer {
            status: head[9..12].parse().unwrap(),
            head,
            body: Vec::new(),
            is_complete: true,
        };
        let length = match (is_head, answer.header("content-length")) {
            (false, Some(length)) => length.parse().unwrap(),
            (true, _) => 0,
            (false, None) => panic!("no Content-Length: {}", answer.head),
        };
        while self.rest.len() < length && answer.is_complete {
            answer.is_complete = self.read();
        }
        let rest = self.rest.split_off(length.min(self.rest.len()));
        answer.body = std::mem::replace(&mut self.rest, rest);
        answer
    }

    pub fn is_closed(&mut self) -> bool {
        !self.read()
    }
}

impl Answer {
    pub fn header(&self, name: &str) -> Option<&str> {
        let mut lines = self.head.split("\r\n").skip(1);
        lines.find_map(|line| {
            let (found, value) = line.split_once(": ")?;
            found.eq_ignore_ascii_case(name).then_some(value)
        })
    }

    /// The head's lines, sorted, without what the time of day changes.
    pub fn timeless(&self) -> Vec<&str> {
        let mut lines: Vec<_> = self.head.split("\r\n").collect();
        lines.retain(|line| !line.to_lowercase().starts_with("date:"));
        lines.sort_unstable();
        lines
    }

    pub fn line(&self, key: &str) -> Option<&str> {
        let text = str::from_utf8(&self.body).unwrap();
        text.lines()
            .find_map(|line| line.strip_prefix(key)?.strip_prefix(": "))
    }

    /// What holds for every answer below /nar/.
    pub fn assert_below_nar(&self) {
        assert_eq!(self.header("accept-ranges"), Some("bytes"), "{}", self.head);
        assert_eq!(self.header("content-encoding"), None, "{}", self.head);
        assert!(self.header("content-length").is_some(), "{}", self.head);
    }
}
