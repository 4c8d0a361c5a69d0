//! Every key of the configuration, for a person: type, default, unit, and what it does.
//!
//! The manual (`docs/configuration.md`) and the man page `granary.toml(5)` are made of this table. A test
//! (`tests/docs`) holds it against the parser: it has the keys that the parser takes and no other, each default
//! written out here changes nothing, and each example is taken.

/// One table of the file.
#[derive(Debug)]
pub struct Section {
    /// As it stands in the file: `[mesh]`, `[[anchor]]`; empty for the keys before the first table.
    pub header: &'static str,
    /// What it is about, in a sentence or two of Markdown.
    pub about: &'static str,
    pub keys: &'static [Key],
}

/// One key of a table.
#[derive(Debug)]
pub struct Key {
    pub name: &'static str,
    /// What kind of value it takes, for a person.
    pub kind: &'static str,
    pub default: Fallback,
    /// Of a number or what a text stands for; empty where there is none.
    pub unit: &'static str,
    /// Another value than the default, as TOML.
    pub example: &'static str,
    /// What it does, in Markdown.
    pub about: &'static str,
}

/// What holds when a key is not there.
#[derive(Debug)]
pub enum Fallback {
    /// This value, as TOML.
    Value(&'static str),
    /// What these words say.
    Words(&'static str),
    /// Nothing: its table needs the key.
    Required,
}

use Fallback::{Required, Value, Words};

const PUBLIC_KEY: &str = r#"["main-1:6NCHdD59X431o0gWypbMrAURkbJ16ZPMQFGspcDShjY="]"#;

pub const SECTIONS: &[Section] = &[
    Section {
        header: "",
        about: "Before the first table.",
        keys: &[Key {
            name: "state-dir",
            kind: "path",
            default: Words(
                "`$STATE_DIRECTORY`, else `$XDG_STATE_HOME/granary`, else `~/.local/state/granary`",
            ),
            unit: "",
            example: r#""/var/lib/granary""#,
            about: "Where identity, certificate, index and queue are; an anchor's catalog, keys and storage as well.",
        }],
    },
    Section {
        header: "[log]",
        about: "What `granary node`, `anchor` and `up` say about their work. `RUST_LOG` chooses what is said.",
        keys: &[Key {
            name: "format",
            kind: "text",
            default: Words("`journald` where stderr is the journal, else `text`"),
            unit: "",
            example: r#""json""#,
            about: "`text`, `json` (an object a line, on stderr) or `journald` (entries with fields: `journalctl GRANARY_CACHE=team`). `--log-format` and `$GRANARY_LOG_FORMAT` win over it, and hold for every command.",
        }],
    },
    Section {
        header: "[store]",
        about: "The Nix store of this machine.",
        keys: &[
            Key {
                name: "dir",
                kind: "path",
                default: Value(r#""/nix/store""#),
                unit: "",
                example: r#""/gnu/store""#,
                about: "How store paths are spelled.",
            },
            Key {
                name: "real-dir",
                kind: "path",
                default: Words("`store.dir`"),
                unit: "",
                example: r#""/mnt/nix/store""#,
                about: "Where the files are, if elsewhere (a chroot store).",
            },
            Key {
                name: "database",
                kind: "path",
                default: Value(r#""/nix/var/nix/db/db.sqlite""#),
                unit: "",
                example: r#""/mnt/nix/var/nix/db/db.sqlite""#,
                about: "Nix's database, which is read and never written.",
            },
            Key {
                name: "log-dir",
                kind: "path",
                default: Words("`log/nix` beside the `nix` of the database: `/nix/var/log/nix`"),
                unit: "",
                example: r#""/var/log/nix""#,
                about: "Where Nix keeps build logs.",
            },
            Key {
                name: "daemon-socket",
                kind: "path",
                default: Words(
                    "where the daemon of `store.database` has it: `/nix/var/nix/daemon-socket/socket`",
                ),
                unit: "",
                example: r#""/run/nix/socket""#,
                about: "The Nix daemon, asked to keep what is being sent. A node that runs as root does without.",
            },
        ],
    },
    Section {
        header: "[substituter]",
        about: "The endpoint that Nix asks. A socket that systemd holds takes the place of `listen`.",
        keys: &[
            Key {
                name: "listen",
                kind: "address or list of addresses",
                default: Value(r#""127.0.0.1:4726""#),
                unit: "`ip:port` or `unix:/path`",
                example: r#"["127.0.0.1:4726", "unix:/run/granary/socket"]"#,
                about: "Where it answers. Nix can ask `ip:port` alone.",
            },
            Key {
                name: "priority",
                kind: "number",
                default: Value("10"),
                unit: "",
                example: "30",
                about: "Lower is asked first; cache.nixos.org has 40.",
            },
        ],
    },
    Section {
        header: "[mesh]",
        about: "Who belongs, and where they are found.",
        keys: &[
            Key {
                name: "key",
                kind: "public key",
                default: Words("that of the mesh that was joined by a ticket; else none"),
                unit: "",
                example: r#""granary-mesh:6NCHdD59X431o0gWypbMrAURkbJ16ZPMQFGspcDShjY=""#,
                about: "Public half of the mesh key. Without one the node serves this machine alone, and asks anchors and upstreams.",
            },
            Key {
                name: "certificate-file",
                kind: "path",
                default: Words("`certificate` in the state folder"),
                unit: "",
                example: r#""/etc/granary/certificate""#,
                about: "What `granary mesh admit` wrote for this machine, or a ticket brought.",
            },
            Key {
                name: "ticket-file",
                kind: "path",
                default: Words("systemd's credential `ticket`, else none"),
                unit: "",
                example: r#""/run/agenix/granary-ticket""#,
                about: "A ticket (`granary mesh ticket`) with which the node joins at its first start; it says `mesh.key` as well. Of mode 0600.",
            },
            Key {
                name: "listen",
                kind: "list of addresses",
                default: Value(r#"["0.0.0.0:4727", "[::]:4727"]"#),
                unit: "`ip:port`, TCP",
                example: r#"["192.168.1.5:4727"]"#,
                about: "Where members talk to this node.",
            },
            Key {
                name: "transfer",
                kind: "list of addresses",
                default: Value(r#"["0.0.0.0:4728", "[::]:4728"]"#),
                unit: "`ip:port`, TCP",
                example: r#"["192.168.1.5:4728"]"#,
                about: "Where members fetch from this node. Newcomers with a ticket come here as well.",
            },
            Key {
                name: "mdns",
                kind: "true or false",
                default: Value("true"),
                unit: "",
                example: "false",
                about: "Whether members are found by multicast DNS, and this node by them.",
            },
            Key {
                name: "mdns-port",
                kind: "number",
                default: Value("5353"),
                unit: "UDP port",
                example: "15353",
                about: "5353 wherever other machines are to be found.",
            },
            Key {
                name: "peers",
                kind: "list of addresses",
                default: Value("[]"),
                unit: "`host:port`",
                example: r#"["desk.lan:4727"]"#,
                about: "Nodes to find where multicast does not reach, by their `mesh.listen`.",
            },
            Key {
                name: "interfaces",
                kind: "list of names",
                default: Value("[]"),
                unit: "",
                example: r#"["eth0"]"#,
                about: "Network interfaces to discover on; all but loopback when empty.",
            },
            Key {
                name: "networks",
                kind: "list of networks",
                default: Value("[]"),
                unit: "name of an interface, or hardware address of the gateway",
                example: r#"["eth0", "a4:2b:b0:00:00:01"]"#,
                about: "Where this node lets itself be known: it announces itself there, and its ports answer there. In other networks it neither announces itself nor asks by multicast DNS, and closes every connection before the first byte. Everywhere when empty. `ip neighbour` shows the gateway's address; one of IPv4 is needed for it.",
            },
            Key {
                name: "strangers",
                kind: "true or false",
                default: Value("false"),
                unit: "",
                example: "true",
                about: "Whether nodes of other meshes near by that share in public (`share.public`) are asked for what nobody else has ([conference.md](conference.md)). They learn what is looked for; what they say counts if a key in `trust.keys` signed it.",
            },
        ],
    },
    Section {
        header: "[share]",
        about: "What others may fetch: members, and with `http` machines without Granary. `granary hide` keeps single paths here as well.",
        keys: &[
            Key {
                name: "enable",
                kind: "true or false",
                default: Value("true"),
                unit: "",
                example: "false",
                about: "Whether they may fetch anything.",
            },
            Key {
                name: "deny",
                kind: "list of regular expressions",
                default: Value("[]"),
                unit: "",
                example: r#"["^secret-"]"#,
                about: "A path whose name (what follows the hash) matches one stays here.",
            },
            Key {
                name: "http",
                kind: "address or list of addresses",
                default: Value("[]"),
                unit: "`ip:port`, TCP",
                example: r#""0.0.0.0:4729""#,
                about: "Where machines without Granary read what is shared, over plain HTTP ([without-granary.md](without-granary.md)). Nothing is fetched for them.",
            },
            Key {
                name: "http-token-file",
                kind: "path",
                default: Words("none: everybody may read"),
                unit: "",
                example: r#""/etc/granary/share.token""#,
                about: "A file with the token that they must show, as Bearer or as the password of Basic. Of mode 0600, or a credential of systemd.",
            },
            Key {
                name: "http-sign-key-file",
                kind: "path",
                default: Words("none: only paths that carry a signature are given"),
                unit: "Nix's format",
                example: r#""/etc/granary/share.key""#,
                about: "A secret key (`nix-store --generate-binary-cache-key`) that signs all that is given there. Of mode 0600, or a credential of systemd.",
            },
            Key {
                name: "http-hosts",
                kind: "list of names",
                default: Value("[]"),
                unit: "",
                example: r#"["cache.example.org"]"#,
                about: "Names by which it is asked without a token, beside addresses, names without a dot, and those below `.local`, `.lan`, `.home.arpa`, `.internal`. Others may be a web page's own.",
            },
            Key {
                name: "public",
                kind: "true or false",
                default: Value("false"),
                unit: "",
                example: "true",
                about: "Whether nodes of other meshes near by may fetch what a key in `public-keys` signed, and nothing else ([conference.md](conference.md)). They learn which of such paths are here.",
            },
            Key {
                name: "public-keys",
                kind: "list of public keys",
                default: Value(
                    r#"["cache.nixos.org-1:6NCHdD59X431o0gWypbMrAURkbJ16ZPMQFGspcDShjY="]"#,
                ),
                unit: "Nix's format",
                example: PUBLIC_KEY,
                about: "Keys of caches that everybody may read.",
            },
        ],
    },
    Section {
        header: "[trust]",
        about: "Whose word is passed on to Nix.",
        keys: &[
            Key {
                name: "keys",
                kind: "list of public keys",
                default: Value(
                    r#"["cache.nixos.org-1:6NCHdD59X431o0gWypbMrAURkbJ16ZPMQFGspcDShjY="]"#,
                ),
                unit: "Nix's format",
                example: PUBLIC_KEY,
                about: "What one of them signed is believed. A list given here takes the place of the default.",
            },
            Key {
                name: "members",
                kind: "true or false",
                default: Value("true"),
                unit: "",
                example: "false",
                about: "Whether what members built is believed, of those that may vouch.",
            },
        ],
    },
    Section {
        header: "[[anchor]]",
        about: "A binary cache of yours, asked when no member has a path. There may be several; they are asked in this order.",
        keys: &[
            Key {
                name: "url",
                kind: "URL",
                default: Required,
                unit: "http or https",
                example: r#""https://nas.lan:4730/main""#,
                about: "Where its `nix-cache-info` is, without it.",
            },
            Key {
                name: "token-file",
                kind: "path",
                default: Words("none, or what a member gets by itself"),
                unit: "",
                example: r#""/etc/granary/nas.token""#,
                about: "A file with the token that is sent with every request to it. Of mode 0600, or a credential of systemd. Without one, a member whose certificate allows `push:<cache>` gets a token by itself from an anchor of its mesh, which it knows by `public-keys`.",
            },
            Key {
                name: "ca-file",
                kind: "path",
                default: Words("none"),
                unit: "PEM",
                example: r#""/etc/granary/ca.pem""#,
                about: "Certificate authorities that are trusted beside the system's.",
            },
            Key {
                name: "public-keys",
                kind: "list of public keys",
                default: Value("[]"),
                unit: "Nix's format",
                example: PUBLIC_KEY,
                about: "Keys that it signs with, trusted as if they stood in `trust.keys`.",
            },
        ],
    },
    Section {
        header: "[[upstream]]",
        about: "A binary cache of somebody else, asked after members and anchors. There may be several.",
        keys: &[
            Key {
                name: "url",
                kind: "URL",
                default: Required,
                unit: "http or https",
                example: r#""https://cache.nixos.org""#,
                about: "Where its `nix-cache-info` is, without it.",
            },
            Key {
                name: "ca-file",
                kind: "path",
                default: Words("none"),
                unit: "PEM",
                example: r#""/etc/granary/ca.pem""#,
                about: "Certificate authorities that are trusted beside the system's.",
            },
            Key {
                name: "public-keys",
                kind: "list of public keys",
                default: Value("[]"),
                unit: "Nix's format",
                example: PUBLIC_KEY,
                about: "Keys that it signs with, trusted as if they stood in `trust.keys`.",
            },
        ],
    },
    Section {
        header: "[upload]",
        about: "What the node pushes by itself.",
        keys: &[
            Key {
                name: "cache",
                kind: "URL or name",
                default: Words("none: nothing is pushed"),
                unit: "",
                example: r#""main""#,
                about: "The `[[anchor]]` to push builds to, by its `url` or the last word of it. Its token must allow `push`.",
            },
            Key {
                name: "filter",
                kind: "list of regular expressions",
                default: Value("[]"),
                unit: "",
                example: r#"["^linux-"]"#,
                about: "Of what is built here, names that match one are pushed; all when empty.",
            },
            Key {
                name: "sources",
                kind: "true or false",
                default: Value("false"),
                unit: "",
                example: "true",
                about: "Whether sources without a signature are pushed along with what references them; without them it stays here.",
            },
            Key {
                name: "rate",
                kind: "number with its unit",
                default: Words("no limit"),
                unit: "`B/s`, `kB/s`, `MB/s`, `GB/s`",
                example: r#""50MB/s""#,
                about: "The most that pushes send, in bytes a second.",
            },
        ],
    },
    Section {
        header: "[limits]",
        about: "What the node does at most.",
        keys: &[Key {
            name: "streams-per-peer",
            kind: "number",
            default: Value("32"),
            unit: "NARs",
            example: "16",
            about: "Sent to one peer at once. Nix fetches 16 at a time.",
        }],
    },
    Section {
        header: "[anchor-server]",
        about: "What `granary anchor` runs, and `granary up` beside a node.",
        keys: &[
            Key {
                name: "listen",
                kind: "address",
                default: Value(r#""0.0.0.0:4730""#),
                unit: "`ip:port`, TCP",
                example: r#""127.0.0.1:4730""#,
                about: "Where the anchor answers.",
            },
            Key {
                name: "storage",
                kind: "URL",
                default: Words("`file://<state-dir>/storage`"),
                unit: "`file:///folder` or `s3://bucket/prefix`",
                example: r#""s3://builds/granary""#,
                about: "Where it keeps everything.",
            },
            Key {
                name: "default-cache",
                kind: "name",
                default: Value(r#""main""#),
                unit: "",
                example: r#""team""#,
                about: "A cache that is made at the first start; `\"\"` for none.",
            },
            Key {
                name: "member",
                kind: "true or false",
                default: Value("false"),
                unit: "",
                example: "true",
                about: "Whether `granary anchor` is a member of the mesh that `[mesh]` and `granary join` say, and shares what its public caches hold ([anchor.md](anchor.md#the-anchor-in-the-mesh)). `granary up` is one always. With `substituter.listen = []` it has no endpoint.",
            },
            Key {
                name: "nar-bytes-max",
                kind: "number",
                default: Value("137438953472"),
                unit: "bytes, unpacked",
                example: "10737418240",
                about: "The largest NAR taken in. The default is 128 GiB.",
            },
            Key {
                name: "tls-cert",
                kind: "path",
                default: Words("none: plain HTTP"),
                unit: "PEM",
                example: r#""/var/lib/acme/nas.example/fullchain.pem""#,
                about: "The certificate chain that clients are shown. Needs `tls-key`.",
            },
            Key {
                name: "tls-key",
                kind: "path",
                default: Words("none: plain HTTP"),
                unit: "PEM",
                example: r#""/var/lib/acme/nas.example/key.pem""#,
                about: "Its private key, of mode 0640 at most. Needs `tls-cert`.",
            },
            Key {
                name: "scrub-days",
                kind: "number",
                default: Words("none: never"),
                unit: "days, 1 to 3650",
                example: "90",
                about: "Each stored NAR is read again and compared after so many days. On S3 that is traffic to pay for.",
            },
            Key {
                name: "attic-token-key-file",
                kind: "path",
                default: Words("none"),
                unit: "",
                example: r#""/etc/granary/attic-key""#,
                about: "The key that proves tokens of Attic: `hs256:<base64>`, or an RSA public key (PEM, as `openssl rsa -pubout` makes it).",
            },
        ],
    },
    Section {
        header: "[[anchor-server.oidc]]",
        about: "Jobs of CI that get a token for an hour by showing what their system says of them ([ci.md](ci.md)). All entries that fit a job count together.",
        keys: &[
            Key {
                name: "issuer",
                kind: "URL",
                default: Required,
                unit: "",
                example: r#""https://token.actions.githubusercontent.com""#,
                about: "Who speaks for the jobs, exactly as it stands in its tokens.",
            },
            Key {
                name: "audience",
                kind: "text",
                default: Required,
                unit: "",
                example: r#""https://anchor.example:4730""#,
                about: "Whom its tokens must be made for. `granary push --oidc` asks for the anchor's address up to the cache, without a slash at its end, unless `--oidc-audience` says otherwise.",
            },
            Key {
                name: "claims",
                kind: "table of texts",
                default: Required,
                unit: "`*` stands for any characters",
                example: r#"{ repository = "me/project", ref = "refs/heads/main" }"#,
                about: "What the issuer must say of a job, all of it.",
            },
            Key {
                name: "caches",
                kind: "list of texts",
                default: Required,
                unit: "`*` stands for any characters",
                example: r#"["team"]"#,
                about: "The caches that its jobs may use.",
            },
            Key {
                name: "allow",
                kind: "list of texts",
                default: Value(r#"["pull", "push"]"#),
                unit: "",
                example: r#"["push"]"#,
                about: "What for: `pull`, `push`, `delete`, `create`, `configure`, `retention`, `destroy`.",
            },
            Key {
                name: "jwks-url",
                kind: "URL",
                default: Words("what `<issuer>/.well-known/openid-configuration` says"),
                unit: "",
                example: r#""https://issuer.example/keys""#,
                about: "Where the issuer's keys are.",
            },
            Key {
                name: "ca-file",
                kind: "path",
                default: Words("none"),
                unit: "PEM",
                example: r#""/etc/granary/ca.pem""#,
                about: "Certificate authorities that are trusted beside the system's.",
            },
        ],
    },
    Section {
        header: "[anchor-server.s3]",
        about: "What is not in the storage's URL.",
        keys: &[
            Key {
                name: "endpoint",
                kind: "URL",
                default: Words("`$AWS_ENDPOINT`, else AWS"),
                unit: "",
                example: r#""http://127.0.0.1:3900""#,
                about: "Where Garage, MinIO and their like answer.",
            },
            Key {
                name: "region",
                kind: "name",
                default: Words("`$AWS_REGION`"),
                unit: "",
                example: r#""garage""#,
                about: "The bucket's region.",
            },
            Key {
                name: "credentials-file",
                kind: "path",
                default: Words(
                    "systemd's credential `s3`, else `$AWS_ACCESS_KEY_ID` and `$AWS_SECRET_ACCESS_KEY`",
                ),
                unit: "",
                example: r#""/etc/granary/s3""#,
                about: "A file with `aws_access_key_id = …` and `aws_secret_access_key = …`, of mode 0600.",
            },
            Key {
                name: "ca-file",
                kind: "path",
                default: Words("none"),
                unit: "PEM",
                example: r#""/etc/granary/ca.pem""#,
                about: "Certificate authorities that are trusted beside the system's.",
            },
            Key {
                name: "virtual-hosted",
                kind: "true or false",
                default: Value("false"),
                unit: "",
                example: "true",
                about: "Whether the bucket stands in the host name instead of the path.",
            },
            Key {
                name: "redirect",
                kind: "true or false",
                default: Value("false"),
                unit: "",
                example: "true",
                about: "Whether Nix fetches NARs of public caches from S3 itself, by links that are good for an hour. Clients must be able to reach `endpoint`.",
            },
        ],
    },
];
