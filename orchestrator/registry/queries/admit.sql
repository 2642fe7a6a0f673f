-- The hot path: one statement answers who calls, whether the call counts, and what the user's engine is.

-- name: admit_by_key
SELECT k.id AS key_id, k.scopes, p.id AS product_id, p.slug, p.rate_limit_rpm,
       e.id, e.user_id, e.status, e.host, e.endpoint_port, e.engine_version, e.created_at, e.last_health_at,
       e.location_id, e.key_generation, e.first_healthy_at, ek.key_enc, ek.master_key_id
FROM platform_keys k
JOIN products p ON p.id = k.product_id
LEFT JOIN engines e ON e.product_id = p.id AND e.user_id = $2
LEFT JOIN engine_keys ek ON ek.engine_id = e.id AND ek.generation = e.key_generation
WHERE k.key_hash = $1 AND (k.expires_at IS NULL OR k.expires_at > now())

-- name: admit_by_key_counted
-- The same for a limit of up to 600 a minute: takes one slot of the product, if it has such a limit (still) and the
-- key may admit at all.
WITH caller AS MATERIALIZED (
    SELECT k.id AS key_id, k.scopes, p.id AS product_id, p.slug, p.rate_limit_rpm
    FROM platform_keys k
    JOIN products p ON p.id = k.product_id
    WHERE k.key_hash = $1 AND (k.expires_at IS NULL OR k.expires_at > now())
), taken AS (
    UPDATE rate_slots SET free_at = clock_timestamp() + interval '60 s'
    WHERE (product_id, slot) = (
        SELECT r.product_id, r.slot FROM rate_slots r
        WHERE r.product_id = (
            SELECT product_id FROM caller WHERE rate_limit_rpm <= 600 AND scopes && ARRAY['admit', 'manage']
        )
          AND r.free_at <= statement_timestamp()
        ORDER BY r.free_at
        LIMIT 1
        FOR UPDATE SKIP LOCKED
    )
    RETURNING 1
)
SELECT c.*, EXISTS (SELECT FROM taken) AS counted,
       e.id, e.user_id, e.status, e.host, e.endpoint_port, e.engine_version, e.created_at, e.last_health_at,
       e.location_id, e.key_generation, e.first_healthy_at, ek.key_enc, ek.master_key_id
FROM caller c
LEFT JOIN engines e ON e.product_id = c.product_id AND e.user_id = $2
LEFT JOIN engine_keys ek ON ek.engine_id = e.id AND ek.generation = e.key_generation

-- name: caller_by_key
SELECT k.id AS key_id, k.scopes, p.id AS product_id, p.slug
FROM platform_keys k
JOIN products p ON p.id = k.product_id
WHERE k.key_hash = $1 AND (k.expires_at IS NULL OR k.expires_at > now())

-- name: look_up
SELECT e.id, e.user_id, e.status, e.host, e.endpoint_port, e.engine_version, e.created_at, e.last_health_at,
       e.location_id, e.key_generation, e.first_healthy_at, ek.key_enc, ek.master_key_id
FROM engines e
LEFT JOIN engine_keys ek ON ek.engine_id = e.id AND ek.generation = e.key_generation
WHERE e.product_id = $1 AND e.user_id = $2

-- name: record_activity
-- One write for everything that was admitted since the last one.
INSERT INTO activity (engine_id, last_admit_at)
SELECT a.engine_id, now() - make_interval(secs => a.age_s)
FROM unnest($1::uuid[], $2::double precision[]) AS a (engine_id, age_s)
JOIN engines e ON e.id = a.engine_id
ON CONFLICT (engine_id) DO UPDATE SET last_admit_at = greatest(activity.last_admit_at, excluded.last_admit_at)

-- name: record_key_use
UPDATE platform_keys SET last_used_at = now()
WHERE id = ANY ($1::uuid[]) AND (last_used_at IS NULL OR last_used_at < now() - interval '1 minute')

-- name: record_denials
WITH denied AS (
    SELECT * FROM unnest($1::uuid[], $2::text[], $3::text[], $4::integer[]) AS d (product_id, user_id, reason, count)
)
INSERT INTO admit_denials AS d (product_id, user_id, reason, minute, count)
SELECT denied.product_id, user_id, reason, date_trunc('minute', now()), count
FROM denied JOIN products p ON p.id = denied.product_id
ON CONFLICT (product_id, user_id, reason, minute) DO UPDATE SET count = d.count + excluded.count

-- name: close_denials
-- A minute that has ended becomes one audit row.
WITH ended AS (
    DELETE FROM admit_denials WHERE minute < date_trunc('minute', now()) RETURNING *
)
INSERT INTO audit_log (timestamp, product_id, user_id, action, metadata)
SELECT minute, product_id, user_id, 'admit_denied', jsonb_build_object('reason', reason, 'count', count)
FROM ended
