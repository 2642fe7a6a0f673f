-- name: insert_audit
INSERT INTO audit_log (product_id, user_id, engine_id, action, actor, status, metadata, duration_ms)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8)

-- name: unsequenced_chains
SELECT DISTINCT chain FROM audit_log WHERE seq IS NULL LIMIT 100

-- name: lock_chain
-- A sequencer that stands still with the lock is cut off, so that another can go on.
SELECT pg_try_advisory_xact_lock(hashtextextended('orchestrator.audit.' || $1::text, 0)),
       set_config('idle_in_transaction_session_timeout', '10s', true)

-- name: chain_head
SELECT seq, hash FROM audit_heads WHERE chain = $1

-- name: unsequenced_rows
SELECT id, timestamp, product_id, user_id, engine_id, action, actor, status, metadata, duration_ms
FROM audit_log WHERE chain = $1 AND seq IS NULL ORDER BY id LIMIT 1000

-- name: take_positions
-- The last of the next $1 positions. The row stays locked to the end of the transaction: positions commit in order.
UPDATE audit_stream SET position = position + $1 RETURNING position

-- name: place_rows
UPDATE audit_log a SET seq = p.seq, prev_hash = p.prev_hash, hash = p.hash, position = $5::bigint + p.number
FROM unnest($1::bigint[], $2::bigint[], $3::text[], $4::text[]) WITH ORDINALITY AS p (id, seq, prev_hash, hash, number)
WHERE a.id = p.id AND a.seq IS NULL

-- name: set_chain_head
WITH head AS (
    INSERT INTO audit_heads (chain, seq, hash) VALUES ($1, $2, $3)
    ON CONFLICT (chain) DO UPDATE SET seq = excluded.seq, hash = excluded.hash
    RETURNING chain
)
SELECT pg_notify('orchestrator_audit', chain) FROM head

-- name: chain_heads
-- Also chains that have rows and, against all rules, no head.
SELECT chain, coalesce(h.seq, 0) AS seq, coalesce(h.hash, '') AS hash,
       coalesce(h.anchor_seq, 0) AS anchor_seq, coalesce(h.anchor_hash, '') AS anchor_hash
FROM audit_heads h
FULL JOIN (SELECT DISTINCT chain FROM audit_log WHERE seq IS NOT NULL) rows USING (chain)
ORDER BY chain

-- name: sequenced_rows
SELECT id, timestamp, product_id, user_id, engine_id, action, actor, status, metadata, duration_ms,
       seq, prev_hash, hash
FROM audit_log WHERE chain = $1 AND seq > $2 ORDER BY seq LIMIT $3

-- name: sequenced_rows_of_all
SELECT id, timestamp, product_id, user_id, engine_id, action, actor, status, metadata, duration_ms,
       seq, prev_hash, hash, position
FROM audit_log WHERE position > $1 ORDER BY position LIMIT $2

-- name: last_seq
SELECT seq FROM audit_heads WHERE chain = $1

-- name: last_position
SELECT position FROM audit_stream

-- name: oldest_unsequenced
SELECT count(*) AS rows, coalesce(extract(epoch FROM now() - min(timestamp)), 0)::double precision AS age_s
FROM audit_log WHERE seq IS NULL

-- name: custom_plans
-- Filters that are not given must not decide the plan of those that are.
SELECT set_config('plan_cache_mode', 'force_custom_plan', true)

-- name: audit_of_chain
SELECT id, timestamp, product_id, user_id, engine_id, action, actor, status, metadata, duration_ms,
       seq, prev_hash, hash, position
FROM audit_log
WHERE chain = $1 AND seq > $2 AND ($3::text IS NULL OR user_id = $3) AND ($4::text IS NULL OR action = $4)
  AND ($5::timestamptz IS NULL OR timestamp >= $5) AND ($6::timestamptz IS NULL OR timestamp < $6)
ORDER BY seq LIMIT $7

-- name: audit_of_chain_newest
SELECT id, timestamp, product_id, user_id, engine_id, action, actor, status, metadata, duration_ms,
       seq, prev_hash, hash, position
FROM audit_log
WHERE chain = $1 AND seq < $2 AND ($3::text IS NULL OR user_id = $3) AND ($4::text IS NULL OR action = $4)
  AND ($5::timestamptz IS NULL OR timestamp >= $5) AND ($6::timestamptz IS NULL OR timestamp < $6)
ORDER BY seq DESC LIMIT $7

-- name: audit_of_all
SELECT id, timestamp, product_id, user_id, engine_id, action, actor, status, metadata, duration_ms,
       seq, prev_hash, hash, position
FROM audit_log
WHERE position > $1 AND ($2::text IS NULL OR user_id = $2) AND ($3::text IS NULL OR action = $3)
  AND ($4::timestamptz IS NULL OR timestamp >= $4) AND ($5::timestamptz IS NULL OR timestamp < $5)
ORDER BY position LIMIT $6

-- name: audit_of_all_newest
SELECT id, timestamp, product_id, user_id, engine_id, action, actor, status, metadata, duration_ms,
       seq, prev_hash, hash, position
FROM audit_log
WHERE position < $1 AND ($2::text IS NULL OR user_id = $2) AND ($3::text IS NULL OR action = $3)
  AND ($4::timestamptz IS NULL OR timestamp >= $4) AND ($5::timestamptz IS NULL OR timestamp < $5)
ORDER BY position DESC LIMIT $6
