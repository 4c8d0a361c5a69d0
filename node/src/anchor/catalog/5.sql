-- When a NAR could last not be read, so that the scrub looks at others meanwhile.
ALTER TABLE nars ADD COLUMN unread INTEGER;
