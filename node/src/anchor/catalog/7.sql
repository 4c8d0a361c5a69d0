-- Paths that came, went, or were found damaged or whole again, by their hash; without one, settings of a cache changed.
-- Who tells others what is here follows it. The database writes it itself, so that no change can forget to, in
-- whichever process; the last 65,536 are kept.
CREATE TABLE changes (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    hash BLOB
) STRICT;
CREATE TRIGGER path_came AFTER INSERT ON paths WHEN new.state = 1 BEGIN
    INSERT INTO changes (hash) VALUES (new.hash);
END;
CREATE TRIGGER path_changed AFTER UPDATE OF state ON paths WHEN (new.state = 1) <> (old.state = 1) BEGIN
    INSERT INTO changes (hash) VALUES (new.hash);
END;
CREATE TRIGGER path_went AFTER DELETE ON paths WHEN old.state = 1 BEGIN
    INSERT INTO changes (hash) VALUES (old.hash);
END;
CREATE TRIGGER nar_changed AFTER UPDATE OF damaged ON nars WHEN (new.damaged IS NULL) <> (old.damaged IS NULL) BEGIN
    INSERT INTO changes (hash) SELECT hash FROM paths WHERE nar_hash = new.nar_hash AND state = 1;
END;
CREATE TRIGGER cache_changed AFTER UPDATE OF settings ON caches WHEN new.settings <> old.settings BEGIN
    INSERT INTO changes (hash) VALUES (NULL);
END;
CREATE TRIGGER changes_kept AFTER INSERT ON changes BEGIN
    DELETE FROM changes WHERE number <= new.number - 65536;
END;
