-- Complete paths whose narinfo is being replaced in the bucket: which of the two lies there is known when
-- the row is gone.
CREATE TABLE rewrites (
    cache INTEGER NOT NULL,
    hash BLOB NOT NULL,
    PRIMARY KEY (cache, hash)
) STRICT, WITHOUT ROWID;
