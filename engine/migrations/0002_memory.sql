-- What the engine knows besides its conversations, and full-text search over all of it.

CREATE TABLE knowledge_store (
    position   INTEGER PRIMARY KEY,
    id         TEXT    NOT NULL UNIQUE,
    title      TEXT    NOT NULL,
    content    TEXT    NOT NULL,
    source     TEXT,                            -- where it comes from, as the writer says
    created_at INTEGER NOT NULL
);

CREATE TABLE social_graph_nodes (
    position   INTEGER PRIMARY KEY,
    id         TEXT    NOT NULL UNIQUE,
    name       TEXT    NOT NULL,
    content    TEXT    NOT NULL,
    created_at INTEGER NOT NULL
);

CREATE TABLE user_skills (
    name         TEXT    PRIMARY KEY,
    description  TEXT    NOT NULL,
    instructions TEXT    NOT NULL,
    created_at   INTEGER NOT NULL,
    updated_at   INTEGER NOT NULL
);

-- The indexes hold words and positions, the text stays in its table alone.
CREATE VIRTUAL TABLE messages_fts USING fts5(
    content, content = 'messages', content_rowid = 'position', tokenize = 'unicode61 remove_diacritics 2');
CREATE VIRTUAL TABLE knowledge_fts USING fts5(
    title, content, content = 'knowledge_store', content_rowid = 'position',
    tokenize = 'unicode61 remove_diacritics 2');
CREATE VIRTUAL TABLE social_fts USING fts5(
    name, content, content = 'social_graph_nodes', content_rowid = 'position',
    tokenize = 'unicode61 remove_diacritics 2');

-- Rows are only added; whoever begins to change or delete them adds the triggers for that.
CREATE TRIGGER messages_indexed AFTER INSERT ON messages BEGIN
    INSERT INTO messages_fts (rowid, content) VALUES (new.position, new.content);
END;
CREATE TRIGGER knowledge_indexed AFTER INSERT ON knowledge_store BEGIN
    INSERT INTO knowledge_fts (rowid, title, content) VALUES (new.position, new.title, new.content);
END;
CREATE TRIGGER social_indexed AFTER INSERT ON social_graph_nodes BEGIN
    INSERT INTO social_fts (rowid, name, content) VALUES (new.position, new.name, new.content);
END;

-- What was said before this schema.
INSERT INTO messages_fts (messages_fts) VALUES ('rebuild');
