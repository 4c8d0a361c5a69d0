-- Who pushed a path first, by the token's subject; unknown after a rebuild.
ALTER TABLE paths ADD COLUMN subject TEXT;
CREATE INDEX paths_of_subject ON paths (cache, subject) WHERE subject IS NOT NULL;
