-- When a NAR was last read and found whole, or taken in.
ALTER TABLE nars ADD COLUMN scrubbed INTEGER NOT NULL DEFAULT 0;
UPDATE nars SET scrubbed = stored;
CREATE INDEX nars_scrubbed ON nars (scrubbed);
-- Since when what lies in storage is known not to be this NAR: it is not served until it is pushed again.
ALTER TABLE nars ADD COLUMN damaged INTEGER;
CREATE INDEX nars_damaged ON nars (damaged) WHERE damaged IS NOT NULL;
