-- name: write_timelines
-- A later owner of the same operation goes on where the one before it was; what that one told stays in `earlier`.
INSERT INTO timelines AS t
    (engine_id, operation_id, operation, generation, ended_at, phases, stalled_on, last_log)
SELECT r.engine_id, r.operation_id, r.operation, r.generation, r.ended_at, r.phases, r.stalled_on, r.last_log
FROM jsonb_to_recordset($1) AS r (
    engine_id uuid, operation_id uuid, operation text, generation bigint, ended_at timestamptz, phases jsonb,
    stalled_on text, last_log text)
JOIN engines e ON e.id = r.engine_id
ORDER BY r.engine_id
FOR KEY SHARE OF e
ON CONFLICT (engine_id) DO UPDATE SET
    operation_id = excluded.operation_id,
    operation = excluded.operation,
    generation = excluded.generation,
    ended_at = excluded.ended_at,
    phases = excluded.phases,
    stalled_on = excluded.stalled_on,
    last_log = excluded.last_log,
    earlier = CASE
        WHEN t.operation_id <> excluded.operation_id THEN '[]'::jsonb
        WHEN t.generation = excluded.generation THEN t.earlier
        WHEN jsonb_array_length(t.earlier) > 200 THEN t.phases
        ELSE t.earlier || t.phases
    END
WHERE t.generation <= excluded.generation

-- name: read_timeline
SELECT operation_id, operation, generation, ended_at, phases, earlier, stalled_on, last_log
FROM timelines WHERE engine_id = $1
