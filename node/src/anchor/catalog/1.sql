CREATE TABLE caches (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    name TEXT NOT NULL UNIQUE,
    settings TEXT NOT NULL,                 -- as in the bucket's cache.json
    created INTEGER NOT NULL                -- all times: seconds since 1970
) STRICT;

-- One row for each NAR in storage.
CREATE TABLE nars (
    nar_hash BLOB PRIMARY KEY,
    nar_size INTEGER NOT NULL,
    file_hash BLOB NOT NULL,
    file_size INTEGER NOT NULL,
    stored INTEGER NOT NULL,
    unused_since INTEGER                    -- when the collector first saw that no path has it
) STRICT, WITHOUT ROWID;

CREATE TABLE paths (
    cache INTEGER NOT NULL REFERENCES caches (id),
    hash BLOB NOT NULL,
    base_name TEXT NOT NULL,
    nar_hash BLOB NOT NULL REFERENCES nars (nar_hash),
    narinfo TEXT NOT NULL,
    state INTEGER NOT NULL,                 -- 0 its narinfo is being put, 1 ready, 2 it is being deleted
    registered INTEGER NOT NULL,
    last_used INTEGER NOT NULL,
    PRIMARY KEY (cache, hash)
) STRICT, WITHOUT ROWID;
CREATE INDEX paths_of_nar ON paths (nar_hash, cache);
CREATE INDEX paths_unfinished ON paths (state) WHERE state <> 1;

-- References of a path, itself left out.
CREATE TABLE edges (
    cache INTEGER NOT NULL,
    hash BLOB NOT NULL,
    reference BLOB NOT NULL,
    PRIMARY KEY (cache, hash, reference)
) STRICT, WITHOUT ROWID;
CREATE INDEX edges_to ON edges (cache, reference);

-- NARs that `nix copy --to` has put and not yet described, under the name that it gave them.
CREATE TABLE received (
    cache INTEGER NOT NULL REFERENCES caches (id),
    name TEXT NOT NULL,
    nar_hash BLOB NOT NULL REFERENCES nars (nar_hash),
    at INTEGER NOT NULL,
    PRIMARY KEY (cache, name)
) STRICT, WITHOUT ROWID;
CREATE INDEX received_nar ON received (nar_hash);

-- Tokens made here; another anchor's, and Attic's, are known by their digest once revoked.
CREATE TABLE tokens (
    id TEXT PRIMARY KEY,
    subject TEXT NOT NULL,
    claims TEXT NOT NULL,
    issued INTEGER NOT NULL,
    expires INTEGER
) STRICT;
CREATE TABLE revoked (
    id TEXT PRIMARY KEY,                    -- a token's id, or sha256:… of a token without one
    at INTEGER NOT NULL
) STRICT;
