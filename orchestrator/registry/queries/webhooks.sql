-- name: count_webhooks
SELECT count(*) FROM webhooks WHERE product_id = $1

-- name: insert_webhook
-- It begins with what is sequenced from now on.
INSERT INTO webhooks (product_id, url, events, secret_enc, master_key_id, seq)
VALUES ($1, $2, $3, $4, $5, coalesce((SELECT seq FROM audit_heads WHERE chain = $1::uuid::text), 0))
RETURNING id, url, events, created_at

-- name: list_webhooks
SELECT id, url, events, created_at FROM webhooks WHERE product_id = $1 ORDER BY created_at, id

-- name: delete_webhook
DELETE FROM webhooks WHERE product_id = $1 AND id = $2 RETURNING id

-- name: webhook
SELECT id FROM webhooks WHERE product_id = $1 AND id = $2

-- name: list_deliveries
SELECT seq, action, status, attempts, first_attempt_at, last_attempt_at, next_attempt_at, response_status, error
FROM webhook_deliveries WHERE webhook_id = $1 ORDER BY seq DESC LIMIT $2

-- name: claim_webhooks
-- Those that have something to deliver now, each for one worker at a time. A time further away than any can be set
-- means that the clock was set back.
UPDATE webhooks SET lease_generation = lease_generation + 1, lease_until = now() + make_interval(secs => $1)
WHERE id IN (
    SELECT w.id FROM webhooks w JOIN audit_heads h ON h.chain = w.product_id::text
    WHERE h.seq > w.seq
      AND (w.next_attempt_at <= now() OR w.next_attempt_at > now() + make_interval(secs => $2 + 1))
      AND (w.lease_until IS NULL OR w.lease_until < now() OR w.lease_until > now() + make_interval(secs => $1 + 1))
    ORDER BY w.next_attempt_at
    LIMIT $3
    FOR UPDATE OF w SKIP LOCKED
)
RETURNING id, product_id, url, events, secret_enc, master_key_id, seq, attempts, lease_generation,
          extract(epoch FROM now())::double precision AS now_s

-- name: record_delivery
-- One attempt: after a failure ($5 = 'pending') the row is tried again after $8 s, else the webhook goes on behind it.
-- No row when another has claimed the webhook since, or it is gone.
WITH hook AS (
    UPDATE webhooks SET
        seq = CASE WHEN $5 = 'pending' THEN seq ELSE $3 END,
        attempts = CASE WHEN $5 = 'pending' THEN attempts + 1 ELSE 0 END,
        next_attempt_at = now() + make_interval(secs => $8),
        lease_until = CASE WHEN $5 = 'pending' THEN NULL ELSE now() + make_interval(secs => $9) END
    WHERE id = $1 AND lease_generation = $2
    RETURNING id, next_attempt_at
)
INSERT INTO webhook_deliveries AS d
    (webhook_id, seq, action, status, attempts, first_attempt_at, last_attempt_at, next_attempt_at,
     response_status, error)
SELECT id, $3, $4, $5, 1, now(), now(), CASE WHEN $5 = 'pending' THEN next_attempt_at END, $6, $7 FROM hook
ON CONFLICT (webhook_id, seq) DO UPDATE SET
    status = excluded.status, attempts = d.attempts + 1, last_attempt_at = now(),
    next_attempt_at = excluded.next_attempt_at, response_status = excluded.response_status, error = excluded.error
RETURNING webhook_id

-- name: release_webhook
UPDATE webhooks SET seq = greatest(seq, $3), lease_until = NULL WHERE id = $1 AND lease_generation = $2

-- name: prune_deliveries
DELETE FROM webhook_deliveries
WHERE webhook_id = $1 AND seq < (
    SELECT min(seq) FROM (
        SELECT seq FROM webhook_deliveries WHERE webhook_id = $1 ORDER BY seq DESC LIMIT $2
    ) kept
)
