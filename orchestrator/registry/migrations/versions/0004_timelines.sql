-- What the last operation of an engine did, and what the one under way is doing.

CREATE TABLE timelines (
    engine_id    uuid PRIMARY KEY REFERENCES engines ON DELETE CASCADE,
    operation_id uuid NOT NULL,
    operation    text NOT NULL,
    generation   bigint NOT NULL,
    ended_at     timestamptz,
    phases       jsonb NOT NULL,
    earlier      jsonb NOT NULL DEFAULT '[]',
    stalled_on   text,
    last_log     text
) WITH (fillfactor = 70);
COMMENT ON COLUMN timelines.earlier IS 'Phases of the same operation under the owners before this one.';
