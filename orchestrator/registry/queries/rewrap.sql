-- name: start_rewrap
-- A job under way for this master key goes on; any other one is replaced.
WITH job AS (
    INSERT INTO rewrap_job AS j (master_key_id) VALUES ($1)
    ON CONFLICT (only_one) DO UPDATE SET master_key_id = $1, started_at = now(), finished_at = NULL
    WHERE j.master_key_id <> $1 OR j.finished_at IS NOT NULL
    RETURNING master_key_id
)
INSERT INTO audit_log (action, actor, status, metadata)
SELECT 'rewrap', 'admin', 'running', jsonb_build_object('master_key_id', master_key_id) FROM job

-- name: rewrap_job
SELECT master_key_id, finished_at FROM rewrap_job

-- name: rewrap_progress
SELECT count(*) AS total, count(*) FILTER (WHERE master_key_id = $1) AS done
FROM (SELECT master_key_id FROM engine_keys UNION ALL SELECT master_key_id FROM webhooks) stored

-- name: rewrap_batch
SELECT engine_id, generation, key_enc, master_key_id FROM engine_keys
WHERE master_key_id <> $1 LIMIT $2 FOR UPDATE SKIP LOCKED

-- name: rewrapped
UPDATE engine_keys k SET key_enc = r.key_enc, master_key_id = $4
FROM unnest($1::uuid[], $2::integer[], $3::text[]) AS r (engine_id, generation, key_enc)
WHERE k.engine_id = r.engine_id AND k.generation = r.generation

-- name: rewrap_webhooks_batch
SELECT id, secret_enc, master_key_id FROM webhooks WHERE master_key_id <> $1 LIMIT $2 FOR UPDATE SKIP LOCKED

-- name: rewrapped_webhooks
UPDATE webhooks w SET secret_enc = r.secret_enc, master_key_id = $3
FROM unnest($1::uuid[], $2::text[]) AS r (id, secret_enc)
WHERE w.id = r.id

-- name: finish_rewrap
WITH job AS (
    UPDATE rewrap_job SET finished_at = now() WHERE master_key_id = $1 AND finished_at IS NULL
    RETURNING master_key_id, started_at
)
INSERT INTO audit_log (timestamp, action, status, metadata, duration_ms)
SELECT started_at, 'rewrap', 'done', jsonb_build_object('master_key_id', master_key_id, 'total', $2::bigint),
       least(extract(epoch FROM now() - started_at) * 1000, 2147483647)::integer
FROM job
