-- Idle engines. Idle means no real work: since the latest of the change to running, the last admit, the activity that
-- the engine tells of, and the end of a keep-alive. A time in the future (the clock was set back) counts as now.

-- name: due_sleeps
-- $2: the threshold where the product has none; 0 = never.
SELECT id, lease_generation, threshold_s FROM (
    SELECT e.id, e.lease_generation,
           coalesce((p.policy ->> 'idle_sleep_threshold_s')::double precision, $2) AS threshold_s,
           greatest(e.running_since, e.last_active_at, e.keep_alive_until, a.last_admit_at) AS active_at
    FROM engines e
    JOIN products p ON p.id = e.product_id
    LEFT JOIN activity a ON a.engine_id = e.id
    WHERE e.location_id = $1 AND e.status = 'running' AND e.operation IS NULL AND e.wish IS NULL
      AND e.consecutive_failures = 0
) candidates
WHERE threshold_s > 0 AND active_at <= now() - make_interval(secs => threshold_s)
ORDER BY active_at LIMIT $3

-- name: idle_for
-- Seconds without an admit, a keep-alive or a change to running; asked again under the lease.
SELECT extract(epoch FROM now() - greatest(e.running_since, e.keep_alive_until, a.last_admit_at))::double precision
FROM engines e LEFT JOIN activity a ON a.engine_id = e.id WHERE e.id = $1

-- name: due_unloads
-- Asleep for long, with the process still there. $2: the threshold where the product has none; 0 = never. What fell
-- asleep a moment ago may have done so after this transaction's now(); only more than that is a clock set back.
SELECT id, lease_generation FROM (
    SELECT e.id, e.lease_generation, e.slept_at,
           coalesce((p.policy ->> 'idle_stop_threshold_s')::double precision, $2) AS threshold_s
    FROM engines e JOIN products p ON p.id = e.product_id
    WHERE e.location_id = $1 AND e.status = 'sleeping' AND e.unloaded_at IS NULL
      AND e.operation IS NULL AND e.wish IS NULL
) asleep
WHERE threshold_s > 0
  AND (slept_at IS NULL OR slept_at <= now() - make_interval(secs => threshold_s) OR slept_at > now() + interval '5 s')
ORDER BY slept_at LIMIT $3

-- name: clock
SELECT extract(epoch FROM clock_timestamp())::double precision

-- name: restart_idle_clocks
-- The clock has jumped: what was active a while ago cannot be told any more, so everybody has been active,
-- or has fallen asleep, just now.
WITH touched AS (
    UPDATE engines SET running_since = now(), last_active_at = least(last_active_at, now()),
                       slept_at = CASE WHEN status = 'sleeping' THEN now() END
    WHERE location_id = $1 AND status IN ('running', 'sleeping') AND operation IS NULL
    RETURNING id, status
), admitted AS (
    UPDATE activity a SET last_admit_at = now() FROM touched t WHERE a.engine_id = t.id AND a.last_admit_at > now()
)
SELECT count(*) FROM touched WHERE status = 'running'
