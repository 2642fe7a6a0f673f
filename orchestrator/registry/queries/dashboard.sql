-- What the dashboard asks; only the admin key reaches these.

-- name: dashboard_engines
-- $2: text in the user id or the image, or the beginning of an engine id, as given in names of containers too.
SELECT e.id, e.product_id, p.slug, e.user_id, e.status, e.host, e.endpoint_port, e.engine_version, e.created_at,
       e.last_health_at, e.operation, e.restart_attempt, e.last_error ->> 'code' AS error_code
FROM engines e JOIN products p ON p.id = e.product_id
WHERE e.user_id IS NOT NULL
  AND ($1::uuid IS NULL OR e.product_id = $1)
  AND ($2::text = '' OR position(lower($2) IN lower(e.user_id)) > 0 OR position(lower($2) IN lower(e.engine_version)) > 0
       OR ($3::text <> '' AND starts_with(replace(e.id::text, '-', ''), $3)))
  AND ($4::text IS NULL OR e.status = $4)
ORDER BY
    CASE $5 WHEN 'user_id' THEN e.user_id WHEN 'status' THEN e.status WHEN 'product' THEN p.slug END,
    CASE $5 WHEN '-user_id' THEN e.user_id WHEN '-status' THEN e.status WHEN '-product' THEN p.slug END DESC,
    CASE $5 WHEN 'created_at' THEN e.created_at WHEN 'last_health_at' THEN e.last_health_at END,
    CASE $5 WHEN '-last_health_at' THEN e.last_health_at END DESC NULLS LAST,
    e.created_at DESC, e.id
LIMIT $6 OFFSET $7

-- name: dashboard_counts
-- Of what the search finds, by state: the numbers on the filters.
SELECT e.status, count(*) AS engines
FROM engines e
WHERE e.user_id IS NOT NULL
  AND ($1::uuid IS NULL OR e.product_id = $1)
  AND ($2::text = '' OR position(lower($2) IN lower(e.user_id)) > 0 OR position(lower($2) IN lower(e.engine_version)) > 0
       OR ($3::text <> '' AND starts_with(replace(e.id::text, '-', ''), $3)))
GROUP BY e.status

-- name: dashboard_products
SELECT p.id, p.slug, p.display_name, count(e.id) AS engines
FROM products p LEFT JOIN engines e ON e.product_id = p.id AND e.user_id IS NOT NULL
GROUP BY p.id ORDER BY p.slug

-- name: dashboard_engine
SELECT e.*, p.slug, a.last_admit_at
FROM engines e JOIN products p ON p.id = e.product_id LEFT JOIN activity a ON a.engine_id = e.id
WHERE e.id = $1 AND e.user_id IS NOT NULL

-- name: dashboard_tombstone
SELECT t.engine_id, t.product_id, p.slug, t.user_id, t.destroyed_at
FROM tombstones t LEFT JOIN products p ON p.id = t.product_id WHERE t.engine_id = $1

-- name: dashboard_engine_audit
-- Newest first; only rows that have their position.
SELECT id, seq, timestamp, action, actor, status, metadata, duration_ms
FROM audit_log
WHERE engine_id = $1 AND seq IS NOT NULL AND ($2::bigint IS NULL OR id < $2)
ORDER BY id DESC LIMIT $3

-- name: dashboard_states
-- How many engines entered and left each state, by step of $3 seconds since $2; steps are NULL for the present.
-- The past is today's counts less what changed since. An engine on its way counts as what it last was.
WITH changes AS (
    SELECT id, engine_id, floor(extract(epoch FROM timestamp - $2::timestamptz) / $3::double precision)::integer AS step,
           status, lag(status) OVER engine AS former, row_number() OVER engine = 1 AS is_first
    FROM audit_log
    WHERE timestamp >= $2 AND ($1::uuid IS NULL OR product_id = $1)
      AND engine_id IS NOT NULL AND user_id IS NOT NULL AND status IS NOT NULL
    WINDOW engine AS (PARTITION BY engine_id ORDER BY id)
), moves AS (
    SELECT step, status, CASE WHEN is_first THEN (
        SELECT p.status FROM audit_log p
        WHERE p.engine_id = c.engine_id AND p.id < c.id AND p.status IS NOT NULL AND p.user_id IS NOT NULL
        ORDER BY p.id DESC LIMIT 1
    ) ELSE former END AS former
    FROM changes c
), present AS (
    SELECT CASE WHEN status IN ('provisioning', 'destroying') THEN (
        SELECT a.status FROM audit_log a
        WHERE a.engine_id = e.id AND a.status IS NOT NULL AND a.user_id IS NOT NULL ORDER BY a.id DESC LIMIT 1
    ) ELSE status END AS state
    FROM engines e WHERE e.user_id IS NOT NULL AND ($1::uuid IS NULL OR e.product_id = $1)
)
SELECT step, state, sum(change)::bigint AS change FROM (
    SELECT step, status AS state, 1 AS change FROM moves WHERE status IS DISTINCT FROM former
    UNION ALL
    SELECT step, former, -1 FROM moves WHERE status IS DISTINCT FROM former AND former IS NOT NULL
    UNION ALL
    SELECT NULL, state, 1 FROM present WHERE state IS NOT NULL
) all_changes
GROUP BY step, state

-- name: dashboard_series
-- What happened in each step of $3 seconds since $2. Durations are milliseconds: of boots what the engine needed to
-- become ready, of wakes what the caller waited.
WITH rows AS (
    SELECT floor(extract(epoch FROM timestamp - $2::timestamptz) / $3::double precision)::integer AS step,
           action, metadata, duration_ms
    FROM audit_log
    WHERE timestamp >= $2 AND ($1::uuid IS NULL OR product_id = $1)
      AND action IN ('provision', 'start', 'wake', 'recover', 'provision_failed', 'health_failed', 'admit_denied',
                     'auto_restart_start', 'auto_restart_success', 'auto_restart_failed', 'auto_restart_gave_up')
    UNION ALL
    SELECT floor(extract(epoch FROM minute - $2::timestamptz) / $3::double precision)::integer,
           'admit_denied', jsonb_build_object('reason', reason, 'count', count), NULL
    FROM admit_denials WHERE minute >= $2 AND ($1::uuid IS NULL OR product_id = $1)
)
SELECT step,
       percentile_cont(ARRAY[0.5, 0.95]) WITHIN GROUP (ORDER BY (metadata ->> 'boot_ms')::double precision)
           FILTER (WHERE action <> 'wake' AND (metadata ->> 'cold')::boolean IS NOT FALSE) AS boot_ms,
       percentile_cont(ARRAY[0.5, 0.95]) WITHIN GROUP (ORDER BY duration_ms::double precision)
           FILTER (WHERE action = 'wake') AS wake_ms,
       count(*) FILTER (WHERE action = 'provision') AS provisions,
       count(*) FILTER (WHERE action = 'wake') AS wakes,
       count(*) FILTER (WHERE action IN ('health_failed', 'provision_failed')) AS failures,
       count(*) FILTER (WHERE action = 'auto_restart_start') AS restarts,
       count(*) FILTER (WHERE action = 'auto_restart_gave_up') AS gave_up,
       coalesce(sum((metadata ->> 'count')::bigint)
           FILTER (WHERE action = 'admit_denied' AND metadata ->> 'reason' = 'RATE_LIMITED'), 0)::bigint AS rate_limited,
       coalesce(sum((metadata ->> 'count')::bigint)
           FILTER (WHERE action = 'admit_denied' AND metadata ->> 'reason' <> 'RATE_LIMITED'), 0)::bigint AS refused
FROM rows WHERE step >= 0
GROUP BY step

-- name: dashboard_now
SELECT now()
