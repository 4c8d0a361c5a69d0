-- Caches whose signing keys are being rotated: until the row is gone, some paths may not be signed by all keys.
CREATE TABLE rotations (
    cache INTEGER PRIMARY KEY
) STRICT;
