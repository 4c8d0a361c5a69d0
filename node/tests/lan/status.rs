//! What `granary status --json` says; the one place that knows its shape.

use serde_json::Value;

pub struct Status(Value);

impl Status {
    pub fn parse(text: &str) -> Status {
        Status(
            serde_json::from_str(text)
                .unwrap_or_else(|error| panic!("status is not JSON ({error}): {text}")),
        )
    }

    /// The ids of the peers that are linked.
    pub fn linked(&self) -> Vec<String> {
        let peers = self.0["peers"].as_array().into_iter().flatten();
        peers
            .filter(|peer| peer["state"].as_str() == Some("linked"))
            .filter_map(|peer| peer["peer_id"].as_str().map(str::to_owned))
            .collect()
    }

    /// How many peers are linked and known to hold so many paths.
    pub fn linked_with_paths(&self, paths: u64) -> usize {
        let peers = self.0["peers"].as_array().into_iter().flatten();
        peers
            .filter(|peer| peer["state"].as_str() == Some("linked"))
            .filter(|peer| peer["paths"].as_u64() >= Some(paths))
            .count()
    }

    /// How many paths the peer says it holds.
    pub fn paths_of(&self, peer_id: &str) -> Option<u64> {
        let mut peers = self.0["peers"].as_array().into_iter().flatten();
        peers.find(|peer| peer["peer_id"].as_str() == Some(peer_id))?["paths"].as_u64()
    }

    pub fn is_quarantined(&self, peer_id: &str) -> bool {
        let mut peers = self.0["peers"].as_array().into_iter().flatten();
        peers.any(|peer| peer["peer_id"].as_str() == Some(peer_id) && !peer["quarantine"].is_null())
    }

    /// How many paths this node holds for others.
    pub fn paths_held(&self) -> u64 {
        self.0["paths_held"]
            .as_u64()
            .unwrap_or_else(|| panic!("no paths_held in {self}"))
    }

    pub fn bytes_received(&self) -> u64 {
        self.0["bytes"]["received"]
            .as_u64()
            .unwrap_or_else(|| panic!("no bytes.received in {self}"))
    }

    pub fn bytes_sent(&self) -> u64 {
        self.0["bytes"]["sent"]
            .as_u64()
            .unwrap_or_else(|| panic!("no bytes.sent in {self}"))
    }

    /// How often somebody was refused for this reason.
    pub fn refusals_of(&self, reason: &str) -> u64 {
        self.0["refusals"][reason].as_u64().unwrap_or(0)
    }

    /// The number of the newest list of revocations.
    pub fn revocations(&self) -> u64 {
        self.0["revocations"].as_u64().unwrap_or(0)
    }

    /// How often somebody was refused, whatever the reason.
    pub fn refusals(&self) -> u64 {
        let refusals = self.0["refusals"]
            .as_object()
            .unwrap_or_else(|| panic!("no refusals in {self}"));
        refusals.values().filter_map(Value::as_u64).sum()
    }
}

impl std::fmt::Display for Status {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:#}", self.0)
    }
}
