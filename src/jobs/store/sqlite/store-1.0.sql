-- A store as schema 1.0 wrote it, with a job in each state. It never changes.
PRAGMA journal_mode = WAL;
PRAGMA application_id = 1885760098;
PRAGMA user_version = 65536;
CREATE TABLE job (
    seq INTEGER PRIMARY KEY,
    id BLOB NOT NULL,
    method TEXT NOT NULL,
    params TEXT NOT NULL,
    key TEXT,
    priority INTEGER NOT NULL,
    max_attempts INTEGER NOT NULL,
    timeout_ms INTEGER NOT NULL,
    trace TEXT,
    created_at INTEGER NOT NULL,
    due_at INTEGER NOT NULL,
    expires_at INTEGER,
    state INTEGER NOT NULL DEFAULT 0,
    reason INTEGER,
    cause INTEGER,
    outcome TEXT,
    attempt INTEGER NOT NULL DEFAULT 0,
    crashes INTEGER NOT NULL DEFAULT 0,
    interruptions INTEGER NOT NULL DEFAULT 0,
    token INTEGER NOT NULL DEFAULT 0,
    started_at INTEGER,
    finished_at INTEGER
) STRICT;
CREATE UNIQUE INDEX job_id ON job (id);
CREATE INDEX job_end ON job (state, finished_at, seq, method) WHERE state > 0;
CREATE TABLE queue (
    seq INTEGER PRIMARY KEY,
    id BLOB NOT NULL,
    method TEXT NOT NULL,
    key TEXT,
    running INTEGER NOT NULL DEFAULT 0,
    priority INTEGER NOT NULL,
    due_at INTEGER NOT NULL,
    attempt INTEGER NOT NULL DEFAULT 0,
    max_attempts INTEGER NOT NULL,
    timeout_ms INTEGER NOT NULL,
    crashes INTEGER NOT NULL DEFAULT 0,
    interruptions INTEGER NOT NULL DEFAULT 0,
    token INTEGER NOT NULL DEFAULT 0,
    cause INTEGER,
    started_at INTEGER,
    owner BLOB,
    executor INTEGER,
    pid INTEGER,
    pid_start INTEGER,
    cancel INTEGER NOT NULL DEFAULT 0,
    expires_at INTEGER
) STRICT;
CREATE UNIQUE INDEX queue_id ON queue (id);
CREATE INDEX queue_due ON queue (method, priority DESC, due_at, seq) WHERE running = 0;
CREATE UNIQUE INDEX queue_key ON queue (method, key) WHERE key IS NOT NULL;
CREATE INDEX queue_owner ON queue (owner) WHERE running = 1;
CREATE INDEX queue_expiry ON queue (expires_at) WHERE expires_at IS NOT NULL AND running = 0;
CREATE TABLE instance (
    id BLOB PRIMARY KEY NOT NULL,
    host TEXT NOT NULL,
    pid INTEGER NOT NULL,
    version TEXT NOT NULL,
    alive_until INTEGER
) STRICT;
CREATE TABLE method (
    name TEXT PRIMARY KEY NOT NULL,
    paused INTEGER NOT NULL DEFAULT 0
) STRICT;
CREATE TABLE meta (
    name TEXT PRIMARY KEY NOT NULL,
    value BLOB NOT NULL
) STRICT;
INSERT INTO meta VALUES ('secret', x'0102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f20'), ('full', x'00');
INSERT INTO instance VALUES (x'07070707070707070707070707070707', 'host', 4700, '0.1.0', NULL);
INSERT INTO method VALUES ('b', 1);
INSERT INTO job (seq, id, method, params, key, priority, max_attempts, timeout_ms, trace, created_at, due_at, expires_at) VALUES
    (1, x'01010101010101010101010101010101', 'a', '[1]', 'k', -3, 3, 1000, '00-trace', 1799999999000, 1799999999000, 1800009999000);
INSERT INTO queue (seq, id, method, key, priority, due_at, max_attempts, timeout_ms, expires_at) VALUES
    (1, x'01010101010101010101010101010101', 'a', 'k', -3, 1799999999000, 3, 1000, 1800009999000);
INSERT INTO job (seq, id, method, params, priority, max_attempts, timeout_ms, created_at, due_at, outcome) VALUES
    (2, x'02020202020202020202020202020202', 'b', '"two"', 0, 10, 600000, 1799999999000, 1799999999000,
     '{"code":-32001,"name":"timeout","message":"no","started":true}');
INSERT INTO queue (seq, id, method, running, priority, due_at, attempt, max_attempts, timeout_ms, interruptions, token, cause, started_at, owner, executor, pid, pid_start) VALUES
    (2, x'02020202020202020202020202020202', 'b', 1, 0, 1799999999500, 2, 10, 600000, 2, 4, 3, 1799999999600, x'07070707070707070707070707070707', 4701, 4711, 123456);
INSERT INTO job (seq, id, method, params, priority, max_attempts, timeout_ms, created_at, due_at, state, cause, outcome, attempt, token, started_at, finished_at) VALUES
    (3, x'03030303030303030303030303030303', 'a', 'null', 0, 10, 600000, 1799999999000, 1799999999000, 2, 1, '[3]', 1, 1, 1799999999100, 1799999999200);
INSERT INTO job (seq, id, method, params, priority, max_attempts, timeout_ms, created_at, due_at, state, reason, cause, outcome, attempt, token, started_at, finished_at) VALUES
    (4, x'04040404040404040404040404040404', 'a', 'null', 0, 1, 600000, 1799999999000, 1799999999000, 3, 2, 2, '{"code":7,"name":"error","message":"no","started":true}', 1, 1, 1799999999100, 1799999999300);
INSERT INTO job (seq, id, method, params, priority, max_attempts, timeout_ms, created_at, due_at, state, finished_at) VALUES
    (5, x'05050505050505050505050505050505', 'a', 'null', 0, 10, 600000, 1799999999000, 1799999999000, 4, 1799999999400);
