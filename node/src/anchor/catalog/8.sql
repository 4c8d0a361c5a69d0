-- Caches that were deleted and of which storage may still have something.
CREATE TABLE deletions (
    cache TEXT PRIMARY KEY
) STRICT, WITHOUT ROWID;
