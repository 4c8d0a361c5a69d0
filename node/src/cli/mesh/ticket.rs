//! `granary mesh ticket`: tickets of this machine's mesh, made where its key is.
//!
//! Only the hash of a ticket's secret is written down, in the state folder, where the running node reads it when
//! somebody comes with the ticket.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::Args;
use granary_protocol::admission::{Issued, USES_MAX};
use granary_protocol::certificate::{Permissions, UnixTime};
use granary_protocol::ticket::{TICKET_ADDRESSES_MAX, Ticket};
use zeroize::Zeroizing;

use super::CERTIFICATE_DAYS;
use crate::admission::{self, read_mesh_key};
use crate::cli::{ConfigFile, SECONDS_PER_DAY, print};
use crate::clock::unix_time;
use crate::config::Config;
use crate::mesh::is_reachable;
use crate::state_folder;

/// What who comes with a ticket gets, and until when.
#[derive(Args)]
pub struct Terms {
    /// How many machines may join with it.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=USES_MAX as i64))]
    pub uses: u32,
    /// For how long: `30m`, `12h`, `7d`.
    #[arg(long, default_value = "7d", value_parser = span)]
    pub expires: Duration,
    /// Permissions: share, vouch, `push:<cache pattern>`.
    #[arg(long, default_value = "share,vouch")]
    pub allow: Permissions,
    /// Days that certificates are good for; they renew themselves.
    #[arg(long, default_value_t = CERTIFICATE_DAYS)]
    pub days: u64,
}

#[derive(Args)]
pub struct Arguments {
    #[command(flatten)]
    terms: Terms,
    /// Names or addresses by which the others reach this machine. Default: those of its interfaces.
    #[arg(long)]
    host: Vec<String>,
    #[command(flatten)]
    config: ConfigFile,
}

pub fn run(arguments: Arguments) -> Result<()> {
    let config = arguments.config.load()?;
    let ticket = issue(&config, arguments.terms, &arguments.host)?;
    print(&format!("{}\n", ticket.as_str()))
}

/// Makes a ticket, which the running node of this machine knows at once; returns its line. `hosts` are names or
/// addresses by which others reach this machine, those of its interfaces when there are none.
pub fn issue(config: &Config, terms: Terms, hosts: &[String]) -> Result<Zeroizing<String>> {
    let key_file = config.mesh_key_file();
    let key = read_mesh_key(&key_file)?;
    let public = key.public_key();
    if let Some(configured) = config.mesh.key.as_ref().filter(|other| **other != public) {
        bail!("the key is that of mesh {public}, this machine belongs to {configured}");
    }
    let (admits, peers) = match hosts.is_empty() {
        false => (
            with_port(hosts, &config.mesh.transfer),
            with_port(hosts, &config.mesh.listen),
        ),
        true => (
            reachable(&config.mesh.transfer)?,
            reachable(&config.mesh.listen)?,
        ),
    };
    if admits.is_empty() {
        bail!("this machine has no address but loopback; give --host");
    }
    let now = unix_time();
    let secret = admission::new_secret().context("the system gave no random bytes")?;
    let seconds = terms.days.checked_mul(SECONDS_PER_DAY);
    let expires = UnixTime(now.0.saturating_add(terms.expires.as_secs()));
    let issued = Issued::new(
        &secret,
        expires,
        terms.uses,
        terms.allow,
        seconds.context("--days is too large")?,
    );
    {
        let _lock = state_folder::lock(&config.state_dir)
            .with_context(|| format!("cannot lock {}", config.state_dir.display()))?;
        let file = config.tickets_file();
        let mut tickets = admission::read_tickets(&file)?;
        tickets.add(issued, now)?;
        admission::write_tickets(&file, &tickets)?;
    }
    let ticket = Ticket {
        mesh: public,
        admits,
        peers,
        secret: Some(secret),
        expires,
    };
    Ok(ticket.to_text()?)
}

/// A span of time as a person writes it: `90s`, `30m`, `12h`, `7d`.
pub fn span(text: &str) -> Result<Duration, String> {
    let wrong = || format!("{text:?} is no span of time such as 30m, 12h or 7d");
    let unit = text.chars().next_back().ok_or_else(wrong)?;
    let seconds = match unit {
        's' => 1,
        'm' => 60,
        'h' => 3600,
        'd' => SECONDS_PER_DAY,
        _ => return Err(wrong()),
    };
    let number: u64 = text[..text.len() - 1].parse().map_err(|_| wrong())?;
    let seconds = number.checked_mul(seconds).ok_or_else(wrong)?;
    Ok(Duration::from_secs(seconds))
}

fn with_port(hosts: &[String], listen: &[SocketAddr]) -> Vec<String> {
    let Some(port) = listen.first().map(SocketAddr::port) else {
        return Vec::new();
    };
    let hosts = hosts.iter().take(TICKET_ADDRESSES_MAX);
    let with_port = |host: &String| match host.parse() {
        Ok(ip) => SocketAddr::new(ip, port).to_string(),
        Err(_) => format!("{host}:{port}"),
    };
    hosts.map(with_port).collect()
}

/// Where others reach what listens here.
fn reachable(listen: &[SocketAddr]) -> Result<Vec<String>> {
    let mut found = Vec::new();
    for address in listen {
        if !address.ip().is_unspecified() {
            found.push(*address);
            continue;
        }
        let interfaces = if_addrs::get_if_addrs().context("cannot list the network interfaces")?;
        let ips = interfaces.iter().map(if_addrs::Interface::ip);
        let ips = ips.filter(|ip| ip.is_ipv4() == address.is_ipv4() && is_reachable(*ip));
        found.extend(ips.map(|ip| SocketAddr::new(ip, address.port())));
    }
    let found = found.iter().take(TICKET_ADDRESSES_MAX);
    Ok(found.map(SocketAddr::to_string).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_are_read_as_people_write_them() {
        for (text, seconds) in [("90s", 90), ("30m", 1800), ("12h", 43_200), ("7d", 604_800)] {
            assert_eq!(span(text), Ok(Duration::from_secs(seconds)));
        }
        for text in ["", "7", "d", "-1d", "1w", "99999999999999999999d", "1é"] {
            assert!(span(text).is_err(), "{text}");
        }
    }

    #[test]
    fn hosts_get_the_port_as_a_ticket_has_it() {
        let hosts = ["nas.lan", "10.0.0.1", "fd00::1"].map(str::to_owned);
        let listen = ["0.0.0.0:4728".parse().unwrap()];
        assert_eq!(
            with_port(&hosts, &listen),
            ["nas.lan:4728", "10.0.0.1:4728", "[fd00::1]:4728"]
        );
    }
}
