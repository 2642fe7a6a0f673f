-- Turns of each task, and what was said in them.

CREATE TABLE turns (
    position      INTEGER PRIMARY KEY,          -- the order in which turns began
    turn_id       TEXT    NOT NULL UNIQUE,
    task_id       TEXT    NOT NULL,
    status        TEXT    NOT NULL CHECK (status IN ('running', 'completed', 'interrupted', 'failed')),
    started_at    INTEGER NOT NULL,             -- milliseconds since the epoch, as every time in the brain
    ended_at      INTEGER,
    input_tokens  INTEGER NOT NULL DEFAULT 0,
    output_tokens INTEGER NOT NULL DEFAULT 0,
    superseded_by TEXT                          -- the turn whose edit or retry took this one out of the history
);

CREATE INDEX turns_of_task ON turns (task_id, position);

-- A task has one running turn at most, whatever the program does.
CREATE UNIQUE INDEX one_running_turn_per_task ON turns (task_id) WHERE status = 'running';

CREATE TABLE messages (
    position   INTEGER PRIMARY KEY,
    message_id TEXT    NOT NULL UNIQUE,
    turn_id    TEXT    NOT NULL REFERENCES turns (turn_id),
    role       TEXT    NOT NULL CHECK (role IN ('user', 'assistant')),
    content    TEXT    NOT NULL,
    media      TEXT,                            -- a JSON array, for messages that carried some
    created_at INTEGER NOT NULL
);

CREATE INDEX messages_of_turn ON messages (turn_id, position);
