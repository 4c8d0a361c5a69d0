//! A real browser without a screen, driven as a person drives one: Chromium's DevTools protocol over two pipes.
//!
//! Remembers every address that pages asked for, and everything that they had to complain of.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use data_encoding::BASE64;
use rustix::fs::Mode;
use serde_json::{Value, json};
use tempfile::TempDir;

/// How long anything may take on a machine under load.
const GENEROUS: Duration = Duration::from_secs(60);

pub struct Browser {
    process: Child,
    questions: File,
    answers: BufReader<File>,
    session: Option<String>,
    next: u64,
    /// Addresses that were asked for.
    pub requests: Vec<String>,
    /// What stands on the console, and what went wrong without a word there.
    pub complaints: Vec<String>,
    _profile: TempDir,
}

impl Browser {
    pub fn new() -> Browser {
        let profile = TempDir::new().unwrap();
        let pipe = |name: &str| {
            let path = profile.path().join(name);
            rustix::fs::mkfifoat(rustix::fs::CWD, &path, Mode::RUSR | Mode::WUSR).unwrap();
            path
        };
        let (to, from) = (pipe("to"), pipe("from"));
        let process = Command::new("sh")
            .arg("-c")
            .arg("exec chromium-headless-shell --remote-debugging-pipe --no-sandbox --disable-gpu --no-proxy-server --hide-scrollbars --user-data-dir=\"$0\" 3<\"$1\" 4>\"$2\"")
            .args([&profile.path().to_owned(), &to, &from])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("run sh");
        // Each waits for the other end to be opened.
        let questions = OpenOptions::new().write(true).open(to).unwrap();
        let answers = BufReader::new(File::open(from).unwrap());
        let mut browser = Browser {
            process,
            questions,
            answers,
            session: None,
            next: 0,
            requests: Vec::new(),
            complaints: Vec::new(),
            _profile: profile,
        };
        let target = browser.ask("Target.createTarget", json!({"url": "about:blank"}));
        let target = json!({"targetId": target["targetId"], "flatten": true});
        let session = browser.ask("Target.attachToTarget", target);
        browser.session = session["sessionId"].as_str().map(str::to_owned);
        for domain in ["Page", "Runtime", "Log", "Network"] {
            browser.ask(&format!("{domain}.enable"), json!({}));
        }
        browser
    }

    fn ask(&mut self, method: &str, parameters: Value) -> Value {
        self.next += 1;
        let mut question = json!({"id": self.next, "method": method, "params": parameters});
        if let Some(session) = &self.session {
            question["sessionId"] = json!(session);
        }
        let text = format!("{question}\0");
        self.questions.write_all(text.as_bytes()).unwrap();
        loop {
            let mut message = Vec::new();
            self.answers.read_until(0, &mut message).unwrap();
            message.pop();
            assert!(
                !message.is_empty(),
                "no chromium: Debian's package chromium-headless-shell has it"
            );
            let message: Value = serde_json::from_slice(&message).unwrap();
            if message["id"] == self.next {
                // A page that is about to be replaced answers nothing more.
                let is_leaving =
                    message["error"]["message"] == "Inspected target navigated or closed";
                assert!(
                    is_leaving || message["error"].is_null(),
                    "{method}: {message}"
                );
                return message["result"].clone();
            }
            self.note(&message);
        }
    }

    fn note(&mut self, event: &Value) {
        let parameters = &event["params"];
        match event["method"].as_str().unwrap_or_default() {
            "Network.requestWillBeSent" => {
                let url = parameters["request"]["url"].as_str().unwrap();
                self.requests.push(url.to_owned());
            }
            "Runtime.consoleAPICalled" | "Runtime.exceptionThrown" | "Log.entryAdded" => {
                self.complaints.push(parameters.to_string());
            }
            _ => {}
        }
    }

    /// Goes to an address, and waits for all of the page.
    pub fn open(&mut self, url: &str) {
        let answer = self.ask("Page.navigate", json!({"url": url}));
        assert!(answer["errorText"].is_null(), "{url}: {answer}");
        self.wait_for("document.readyState === 'complete'");
    }

    /// What an expression of JavaScript is worth in the page.
    pub fn value(&mut self, expression: &str) -> Value {
        let answer = self.evaluate(expression);
        assert!(
            answer["exceptionDetails"].is_null(),
            "{expression}: {answer}"
        );
        answer["result"]["value"].clone()
    }

    fn evaluate(&mut self, expression: &str) -> Value {
        let question =
            json!({"expression": expression, "returnByValue": true, "awaitPromise": true});
        self.ask("Runtime.evaluate", question)
    }

    /// Waits until an expression is true; a page that is only half there may throw.
    pub fn wait_for(&mut self, expression: &str) {
        let deadline = Instant::now() + GENEROUS;
        while self.evaluate(expression)["result"]["value"] != true {
            assert!(
                Instant::now() < deadline,
                "waited too long for {expression}: {}",
                self.text()
            );
        }
    }

    /// The text that a person reads.
    pub fn text(&mut self) -> String {
        let text = self.value("document.body.innerText");
        text.as_str().unwrap_or_default().to_owned()
    }

    pub fn press(&mut self, key: &str, code: u32) {
        let text = if key == "Enter" { "\r" } else { "" };
        let event = |kind: &str| json!({"type": kind, "key": key, "code": key, "windowsVirtualKeyCode": code, "text": text});
        self.ask("Input.dispatchKeyEvent", event("keyDown"));
        self.ask("Input.dispatchKeyEvent", event("keyUp"));
    }

    pub fn tab(&mut self) {
        self.press("Tab", 9);
    }

    pub fn enter(&mut self) {
        self.press("Enter", 13);
    }

    pub fn type_text(&mut self, text: &str) {
        self.ask("Input.insertText", json!({"text": text}));
    }

    /// A window of this size, by day or by night.
    pub fn look(&mut self, width: u32, height: u32, is_dark: bool) {
        let metrics = json!({"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600});
        self.ask("Emulation.setDeviceMetricsOverride", metrics);
        let scheme = if is_dark { "dark" } else { "light" };
        let feature = json!({"name": "prefers-color-scheme", "value": scheme});
        self.ask("Emulation.setEmulatedMedia", json!({"features": [feature]}));
    }

    /// Keeps a picture of the whole page.
    pub fn picture(&mut self, file: &std::path::Path) {
        let question = json!({"format": "png", "captureBeyondViewport": true});
        let answer = self.ask("Page.captureScreenshot", question);
        let bytes = BASE64.decode(answer["data"].as_str().unwrap().as_bytes());
        std::fs::write(file, bytes.unwrap()).unwrap();
    }

    /// Walks with the Tab key through what can be focused, from the top; each must show that it is, and the
    /// walk must leave the page at its end. Returns what was walked through.
    pub fn walk(&mut self) -> Vec<String> {
        self.value("document.activeElement.blur(), 0");
        let mut walked = Vec::new();
        for _ in 0..100 {
            self.tab();
            let stop = self.value(
                "(() => { const one = document.activeElement; if (one === document.body || !one) return null;
                   const style = getComputedStyle(one); const box = one.getBoundingClientRect();
                   return { name: one.getAttribute('aria-label') || one.innerText || one.name,
                     shows: style.outlineStyle !== 'none' && parseFloat(style.outlineWidth) >= 1,
                     onScreen: box.width > 0 && box.top < innerHeight && box.bottom > 0 }; })()",
            );
            if stop.is_null() {
                return walked;
            }
            assert!(stop["shows"] == true && stop["onScreen"] == true, "{stop}");
            let name = stop["name"].as_str().unwrap_or_default().to_owned();
            // A browser without a frame of its own begins again at the top.
            if walked.first() == Some(&name) {
                return walked;
            }
            walked.push(name);
        }
        panic!("the keyboard is trapped in {walked:?}");
    }

    /// Whether the page is wider than its window, which nobody wants to scroll.
    pub fn is_too_wide(&mut self) -> bool {
        self.value("document.documentElement.scrollWidth > document.documentElement.clientWidth")
            == true
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        // It is ours alone, and has nothing to lose.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
