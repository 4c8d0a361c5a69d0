//! `granary mesh members`, and `granary mesh pending`: who is in, and who wants to be.

use anyhow::{Context, Result, bail};
use clap::Args;
use granary_protocol::admission::{Asked, FINGERPRINT_LETTERS, Grant, Pending, fingerprint};
use granary_protocol::certificate::{Permissions, UnixTime};
use granary_protocol::peer::PeerId;
use granary_protocol::revocation::SignedRevocations;
use granary_protocol::signature::PublicKey;
use serde_json::{Value, json};

use super::running;
use crate::admission::{self, read_mesh_key};
use crate::cli::{ConfigFile, SECONDS_PER_DAY, print};
use crate::clock::unix_time;
use crate::config::Config;
use crate::mesh::revocations;
use crate::state_folder;
use crate::status::Report;

#[derive(Args)]
pub struct Arguments {
    /// Print JSON, for scripts.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    config: ConfigFile,
}

/// Shows the members that the node of this machine knows, itself first.
pub async fn members(arguments: &Arguments) -> Result<()> {
    let config = arguments.config.load()?;
    let report = running(&config).await?;
    let report = report.context("no node answers here that would know; granary node starts one")?;
    let members = members_of(&report, unix_time());
    if arguments.json {
        return print(&format!("{:#}\n", Value::from(members)));
    }
    let word = |member: &Value, key: &str| match &member[key] {
        Value::String(text) => text.clone(),
        Value::Null => "-".to_owned(),
        other => other.to_string(),
    };
    let mut rows =
        vec![["NAME", "MAY", "EXPIRES IN", "SEEN", "ADDRESS", "PEER ID"].map(str::to_owned)];
    for member in &members {
        let seconds = |key: &str| member[key].as_u64();
        rows.push([
            word(member, "name"),
            word(member, "permissions"),
            seconds("expires_in_seconds").map_or("-".into(), span),
            match seconds("seen_seconds_ago") {
                Some(0) => "here".to_owned(),
                Some(ago) => format!("{} ago", span(ago)),
                // Not since this node started.
                None => "-".to_owned(),
            },
            word(member, "address"),
            word(member, "peer_id"),
        ]);
    }
    print(&table(&rows))
}

fn members_of(report: &Report, now: UnixTime) -> Vec<Value> {
    let own = report.about.mesh.as_ref();
    let own = own.and_then(|mesh| mesh.certificate.as_ref());
    let own = own.map(|own| {
        json!({
            "name": own.name,
            "permissions": own.permissions,
            "expires": own.expires,
            "expires_in_seconds": own.expires.saturating_sub(now.0),
            "seen_seconds_ago": 0,
            "address": null,
            "peer_id": report.about.peer_id,
        })
    });
    // Others are known by an address alone, and are no members yet.
    let peers = report.peers.iter().filter_map(|peer| {
        let expires = peer.expires?;
        Some(json!({
            "name": peer.name,
            "permissions": peer.permissions,
            "expires": expires,
            "expires_in_seconds": expires.saturating_sub(now.0),
            "seen_seconds_ago": peer.seen_seconds_ago,
            "address": peer.address,
            "peer_id": peer.peer_id,
        }))
    });
    own.into_iter().chain(peers).collect()
}

/// Shows who asked this machine to be admitted.
pub fn pending(arguments: &Arguments) -> Result<()> {
    let config = arguments.config.load()?;
    let mesh = read_mesh_key(&config.mesh_key_file())?.public_key();
    let pending = admission::read_pending(&config.pending_file())?;
    let list = revocations::read(&config.revocations_file(), &mesh)?;
    let list = list.as_ref().map(SignedRevocations::claims);
    let was_put_out =
        |asked: &Asked| list.is_some_and(|list| list.revoked.contains_key(&asked.peer));
    let now = unix_time();
    if arguments.json {
        let row = |asked: &Asked| {
            json!({
                "fingerprint": fingerprint(&mesh, &asked.peer),
                "name": asked.name,
                "peer_id": asked.peer.to_string(),
                "asked": asked.at.0,
                "granted": asked.granted.is_some(),
                "was_put_out": was_put_out(asked),
            })
        };
        let rows: Vec<Value> = pending.all().iter().map(row).collect();
        return print(&format!("{:#}\n", Value::from(rows)));
    }
    if pending.all().is_empty() {
        return print("nobody waits to be admitted\n");
    }
    let mut rows = vec![["FINGERPRINT", "CALLS ITSELF", "ASKED", ""].map(str::to_owned)];
    for asked in pending.all() {
        rows.push([
            fingerprint(&mesh, &asked.peer),
            asked.name.clone().unwrap_or_else(|| "-".into()),
            format!("{} ago", span(now.0.saturating_sub(asked.at.0))),
            match (&asked.granted, was_put_out(asked)) {
                (Some(_), _) => "admitted, asks again soon".to_owned(),
                (None, true) => "was put out of this mesh".to_owned(),
                (None, false) => String::new(),
            },
        ]);
    }
    print(&format!(
        "{}\nAdmit one whose screen shows the same fingerprint: granary mesh admit <fingerprint>\n",
        table(&rows)
    ))
}

/// Admits a machine that waits here; returns whether it does.
pub fn grant(
    config: &ConfigFile,
    machine: &str,
    name: Option<String>,
    permissions: Permissions,
    days: u64,
) -> Result<bool> {
    let config = config.load()?;
    let key_file = config.mesh_key_file();
    if !key_file.exists() {
        return Ok(false);
    }
    let mesh = read_mesh_key(&key_file)?.public_key();
    let _lock = state_folder::lock(&config.state_dir)
        .with_context(|| format!("cannot lock {}", config.state_dir.display()))?;
    grant_in(&config, &mesh, machine, name, permissions, days)
}

fn grant_in(
    config: &Config,
    mesh: &PublicKey,
    machine: &str,
    name: Option<String>,
    permissions: Permissions,
    days: u64,
) -> Result<bool> {
    let file = config.pending_file();
    let mut pending = admission::read_pending(&file)?;
    let Some(asked) = waiting(&pending, mesh, machine).cloned() else {
        return Ok(false);
    };
    let name = name.or(asked.name);
    if let Some(name) = name.as_ref().filter(|name| !is_name(name)) {
        bail!("{name:?} is no name for a machine");
    }
    let seconds = days.checked_mul(SECONDS_PER_DAY);
    let grant = Grant {
        name: name.clone(),
        permissions,
        seconds: seconds.context("--days is too large")?,
    };
    pending.grant(&asked.peer, grant, unix_time());
    admission::write_pending(&file, &pending)?;
    let name = name.as_deref().unwrap_or("a machine without a name");
    print(&format!(
        "admitted {} as {name}: it gets its certificate when it asks again\n",
        asked.peer
    ))?;
    Ok(true)
}

/// A peer id or a fingerprint, as the command line has them.
pub fn machine(text: &str) -> Result<String, String> {
    let is_of_fingerprints = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-';
    let is_fingerprint = text.len() == FINGERPRINT_LETTERS && text.bytes().all(is_of_fingerprints);
    match is_fingerprint || text.parse::<PeerId>().is_ok() {
        true => Ok(text.to_owned()),
        false => Err("neither a peer id nor a fingerprint".to_owned()),
    }
}

fn is_name(name: &str) -> bool {
    granary_protocol::certificate::Certificate::is_name(name)
}

fn waiting<'a>(pending: &'a Pending, mesh: &PublicKey, machine: &str) -> Option<&'a Asked> {
    let is_it = |asked: &&Asked| {
        asked.peer.to_string() == machine || fingerprint(mesh, &asked.peer) == machine
    };
    pending.all().iter().find(is_it)
}

/// Seconds in the largest unit that leaves a number.
fn span(seconds: u64) -> String {
    match seconds {
        0..120 => format!("{seconds} s"),
        120..7200 => format!("{} min", seconds / 60),
        7200..172_800 => format!("{} h", seconds / 3600),
        _ => format!("{} d", seconds / 86_400),
    }
}

/// Columns as wide as what stands in them.
fn table<const COLUMNS: usize>(rows: &[[String; COLUMNS]]) -> String {
    let mut widths = [0; COLUMNS];
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = cell.chars().count().max(*width);
        }
    }
    let line = |row: &[String; COLUMNS]| {
        let cells = row.iter().zip(widths);
        let cells: Vec<String> = cells
            .map(|(cell, width)| format!("{cell:width$}"))
            .collect();
        format!("{}\n", cells.join("  ").trim_end())
    };
    rows.iter().map(line).collect()
}
