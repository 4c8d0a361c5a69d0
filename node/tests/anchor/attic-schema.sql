-- The tables of an atticd of June 2026, as its migrations leave them.
CREATE TABLE cache (
    id integer NOT NULL PRIMARY KEY AUTOINCREMENT, name varchar(50) NOT NULL UNIQUE, keypair varchar NOT NULL,
    is_public boolean NOT NULL, store_dir varchar NOT NULL, priority integer NOT NULL,
    upstream_cache_key_names varchar NOT NULL, created_at timestamp_with_timezone_text NOT NULL,
    deleted_at timestamp_with_timezone_text NULL, retention_period integer NULL
);
CREATE TABLE nar (
    id integer NOT NULL PRIMARY KEY AUTOINCREMENT, state char(1) NOT NULL, nar_hash varchar NOT NULL,
    nar_size bigint NOT NULL, compression varchar NOT NULL, num_chunks integer NOT NULL DEFAULT 1,
    holders_count integer NOT NULL DEFAULT 0, created_at timestamp_with_timezone_text NOT NULL
);
CREATE TABLE object (
    id integer NOT NULL PRIMARY KEY AUTOINCREMENT, cache_id bigint NOT NULL, nar_id bigint NOT NULL,
    store_path_hash varchar(32) NOT NULL, store_path varchar NOT NULL, "references" varchar NOT NULL,
    system varchar, deriver varchar, sigs varchar NOT NULL, ca varchar,
    created_at timestamp_with_timezone_text NOT NULL, last_accessed_at timestamp_with_timezone_text NULL,
    created_by varchar NULL,
    FOREIGN KEY (cache_id) REFERENCES cache (id) ON DELETE CASCADE,
    FOREIGN KEY (nar_id) REFERENCES nar (id) ON DELETE CASCADE
);
CREATE UNIQUE INDEX "idx-object-cache-hash" ON object (cache_id, store_path_hash);
CREATE TABLE chunk (
    id integer NOT NULL PRIMARY KEY AUTOINCREMENT, state char(1) NOT NULL, chunk_hash varchar NOT NULL,
    chunk_size bigint NOT NULL, file_hash varchar NULL, file_size bigint NULL, compression varchar NOT NULL,
    remote_file varchar NOT NULL, remote_file_id varchar NOT NULL UNIQUE,
    holders_count integer NOT NULL DEFAULT 0, created_at timestamp_with_timezone_text NOT NULL
);
CREATE TABLE chunkref (
    id integer NOT NULL PRIMARY KEY AUTOINCREMENT, nar_id bigint NOT NULL, seq integer NOT NULL,
    chunk_id bigint NULL,
    FOREIGN KEY (chunk_id) REFERENCES chunk (id) ON DELETE SET NULL,
    FOREIGN KEY (nar_id) REFERENCES nar (id) ON DELETE CASCADE
);
CREATE INDEX "idx-chunk-nar-id" ON chunkref (nar_id);
