-- name: list_engines
SELECT id, product_id, user_id, status, host, endpoint_port, engine_version, created_at, last_health_at
FROM engines
WHERE user_id IS NOT NULL AND ($1::uuid IS NULL OR product_id = $1) AND ($2::text IS NULL OR status = $2)
ORDER BY created_at, id
LIMIT $3 OFFSET $4

-- name: count_listed
SELECT count(*) FROM engines
WHERE user_id IS NOT NULL AND ($1::uuid IS NULL OR product_id = $1) AND ($2::text IS NULL OR status = $2)

-- name: count_by_status
SELECT product_id, status, count(*) AS engines FROM engines
WHERE user_id IS NOT NULL AND ($1::uuid IS NULL OR product_id = $1)
GROUP BY product_id, status

-- name: restarts
-- Failed engines by what is to follow: a restart, one that an outage has parked, or nothing by itself.
SELECT count(*) FILTER (WHERE restart_parked_until > now() AND next_restart_at IS NOT NULL) AS parked,
       count(*) FILTER (WHERE next_restart_at IS NOT NULL
                          AND (restart_parked_until IS NULL OR restart_parked_until <= now())) AS pending,
       count(*) FILTER (WHERE gave_up_at IS NOT NULL) AS gave_up
FROM engines
WHERE status = 'failed' AND user_id IS NOT NULL AND ($1::uuid IS NULL OR product_id = $1)

-- name: product_slugs
SELECT id, slug FROM products

-- name: engines_by_slug
SELECT p.slug, e.status, count(*) FILTER (WHERE e.user_id IS NOT NULL) AS engines,
       count(*) FILTER (WHERE e.user_id IS NULL) AS pool
FROM engines e JOIN products p ON p.id = e.product_id
GROUP BY p.slug, e.status

-- name: metrics
WITH last_hour AS (
    SELECT count(*) FILTER (WHERE action = 'provision') AS provisions,
           count(*) FILTER (WHERE action IN ('health_failed', 'provision_failed')) AS crashes,
           count(*) FILTER (WHERE action = 'auto_restart_start') AS restarts
    FROM audit_log
    WHERE timestamp > now() - interval '1 hour' AND ($1::uuid IS NULL OR product_id = $1)
), boots AS (
    SELECT (metadata ->> 'boot_ms')::double precision AS ms FROM audit_log
    WHERE action = 'provision' AND metadata ? 'boot_ms' AND ($1::uuid IS NULL OR product_id = $1)
    ORDER BY timestamp DESC LIMIT 100
), lifetime AS (
    SELECT action, count(*) AS count FROM audit_log
    WHERE action IN ('provision', 'destroy') AND ($1::uuid IS NULL OR product_id = $1)
    GROUP BY action
    UNION ALL
    SELECT action, count FROM audit_totals
    WHERE action IN ('provision', 'destroy') AND ($1::uuid IS NULL OR product_id = $1)
)
SELECT last_hour.*,
       (SELECT round(avg(ms)) FROM boots)::integer AS avg_boot_ms,
       (SELECT percentile_disc(ARRAY[0.5, 0.95, 0.99]) WITHIN GROUP (ORDER BY ms) FROM boots) AS boot_ms,
       (SELECT coalesce(sum(count), 0) FROM lifetime WHERE action = 'provision')::bigint AS total_provisions,
       (SELECT coalesce(sum(count), 0) FROM lifetime WHERE action = 'destroy')::bigint AS total_destroys
FROM last_hour
