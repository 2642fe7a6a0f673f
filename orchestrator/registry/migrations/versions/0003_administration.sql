-- The order in which the sequencers placed rows, over all chains: what reads them all needs one place to go on from.
ALTER TABLE audit_log ADD COLUMN position bigint;
COMMENT ON COLUMN audit_log.position IS 'Place among the sequenced rows of all chains; rises with seq in each.';

CREATE TABLE audit_stream (
    only_one boolean PRIMARY KEY DEFAULT true CHECK (only_one),
    position bigint NOT NULL DEFAULT 0
);
COMMENT ON TABLE audit_stream IS 'The last position given out; its row is locked until the rows that got one commit.';
INSERT INTO audit_stream DEFAULT VALUES;

UPDATE audit_log a SET position = placed.position
FROM (SELECT id, row_number() OVER (ORDER BY chain, seq) AS position FROM audit_log WHERE seq IS NOT NULL) placed
WHERE placed.id = a.id;
UPDATE audit_stream SET position = (SELECT coalesce(max(position), 0) FROM audit_log);
CREATE UNIQUE INDEX audit_log_position ON audit_log (position) WHERE position IS NOT NULL;

ALTER TABLE products ADD COLUMN deleting_at timestamptz;
COMMENT ON COLUMN products.deleting_at IS 'Its deletion is wanted: it takes no call any more, and its engines are destroyed.';

CREATE TABLE rewrap_job (
    only_one      boolean PRIMARY KEY DEFAULT true CHECK (only_one),
    master_key_id text NOT NULL,
    started_at    timestamptz NOT NULL DEFAULT now(),
    finished_at   timestamptz
);
COMMENT ON TABLE rewrap_job IS 'The re-encryption of all stored keys under one master key; any replica that has it works.';
