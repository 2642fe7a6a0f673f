-- Probes, and restarts of what has failed. Due engines are claimed in batches; replicas share the work.

-- name: claim_probes
-- $2: seconds between two probes. A due time further away than that can be is due now (the clock was set back).
UPDATE engines SET next_probe_at = next_probe(id, $2)
WHERE id IN (
    SELECT id FROM engines
    WHERE location_id = $1 AND status = 'running' AND operation IS NULL AND wish IS NULL
      AND (next_probe_at IS NULL OR next_probe_at <= now() OR next_probe_at > now() + make_interval(secs => $2 * 1.6))
    ORDER BY next_probe_at NULLS FIRST
    LIMIT $3
    FOR UPDATE SKIP LOCKED
)
RETURNING id, product_id, user_id, host, endpoint_port, lease_generation, consecutive_failures,
          extract(epoch FROM now() - last_health_at)::double precision AS last_good_age_s

-- name: record_probes
-- One statement for a batch. `ok`; `counted`: it failed, and that says something about the engine; `active_ago_s`:
-- since the last work it tells of; `restarts`: the backend's count, and `started_at` of the process that it was seen
-- with; `exited`: the backend is about to restart it. An engine that has just exited does not speak for an outage.
WITH results AS (
    SELECT * FROM unnest($1::uuid[], $2::bigint[], $3::boolean[], $4::boolean[], $5::double precision[],
                         $6::integer[], $7::boolean[], $8::boolean[], $9::text[], $10::timestamptz[])
        AS r (id, generation, ok, counted, active_ago_s, restarts, exited, audited, reason, started_at)
), written AS (
    UPDATE engines e SET
        last_health_at = CASE WHEN r.ok THEN now() ELSE e.last_health_at END,
        consecutive_failures = CASE WHEN r.ok THEN 0 WHEN r.counted THEN e.consecutive_failures + 1
                                    ELSE e.consecutive_failures END,
        probe_failed_at = CASE WHEN r.counted AND NOT r.exited AND cardinality(note_restarts(
                e.restarted_at, e.restarts_seen,
                news_of_restarts(e.restarts_seen, e.process_started_at, r.restarts, r.started_at))) = 0
            THEN now() ELSE e.probe_failed_at END,
        healthy_since = CASE WHEN r.ok THEN least(coalesce(e.healthy_since, now()), now())
                             WHEN r.counted THEN NULL ELSE e.healthy_since END,
        restart_attempt = CASE WHEN r.ok AND e.healthy_since < now() - interval '10 minutes' THEN 0
                               ELSE e.restart_attempt END,
        last_active_at = CASE WHEN r.active_ago_s IS NULL THEN e.last_active_at
                              ELSE now() - make_interval(secs => r.active_ago_s) END,
        restarted_at = note_restarts(e.restarted_at, e.restarts_seen,
            news_of_restarts(e.restarts_seen, e.process_started_at, r.restarts, r.started_at)),
        restarts_seen = coalesce(
            news_of_restarts(e.restarts_seen, e.process_started_at, r.restarts, r.started_at), e.restarts_seen),
        process_started_at = greatest(e.process_started_at, r.started_at),
        exited_seen_at = CASE WHEN r.exited THEN coalesce(e.exited_seen_at, now())
                              WHEN r.ok OR r.counted THEN NULL ELSE e.exited_seen_at END
    FROM results r
    WHERE e.id = r.id AND e.lease_generation = r.generation AND e.status = 'running' AND e.operation IS NULL
    RETURNING e.*, r.ok, r.audited, r.reason
), logged AS (
    INSERT INTO audit_log (product_id, user_id, engine_id, action, status, metadata)
    SELECT product_id, user_id, id, 'health_check', status,
           jsonb_strip_nulls(jsonb_build_object('healthy', ok, 'failures', consecutive_failures, 'reason', reason))
    FROM written WHERE audited
)
SELECT id, ok, consecutive_failures, cardinality(restarted_at) AS restarts,
       extract(epoch FROM now() - (SELECT max(at) FROM unnest(restarted_at) AS at))::double precision AS restarted_ago_s,
       extract(epoch FROM now() - exited_seen_at)::double precision AS exited_for_s
FROM written

-- name: note_restart_count
-- What an event told: how often the backend itself has restarted the engine within ten minutes.
UPDATE engines SET
    restarted_at = note_restarts(restarted_at, restarts_seen,
        news_of_restarts(restarts_seen, process_started_at, $3, $4)),
    restarts_seen = coalesce(news_of_restarts(restarts_seen, process_started_at, $3, $4), restarts_seen),
    process_started_at = greatest(process_started_at, $4)
WHERE id = $1 AND lease_generation = $2 AND status = 'running' AND operation IS NULL
RETURNING cardinality(restarted_at) AS restarts

-- name: probe_now
UPDATE engines SET next_probe_at = now()
WHERE id = ANY ($1::uuid[]) AND status = 'running' AND operation IS NULL

-- name: park_outages
-- More than half and at least five of a product's engines, or of an image's, fail their probes within one sweep
-- ($1 seconds): the trouble is outside, and restarts of these wait a minute. An exit is no failed probe.
WITH sweep AS (
    SELECT id, product_id, engine_version,
           coalesce(probe_failed_at > now() - make_interval(secs => $1) AND (status = 'failed' OR consecutive_failures > 0),
                    false) AS failing
    FROM engines WHERE status IN ('running', 'failed')
      AND (status = 'running' OR probe_failed_at > now() - make_interval(secs => $1))
), products_out AS (
    SELECT product_id FROM sweep GROUP BY product_id
    HAVING count(*) FILTER (WHERE failing) >= 5 AND 2 * count(*) FILTER (WHERE failing) > count(*)
), images_out AS (
    SELECT engine_version FROM sweep GROUP BY engine_version
    HAVING count(*) FILTER (WHERE failing) >= 5 AND 2 * count(*) FILTER (WHERE failing) > count(*)
), due AS (
    SELECT s.id, e.restart_parked_until IS NULL OR e.restart_parked_until < now()
                 OR e.restart_parked_until > now() + interval '61 s' AS newly
    FROM sweep s JOIN engines e USING (id)
    WHERE s.failing AND (s.product_id IN (SELECT product_id FROM products_out)
                         OR s.engine_version IN (SELECT engine_version FROM images_out))
      AND (e.restart_parked_until IS NULL OR e.restart_parked_until < now() + interval '30 s'
           OR e.restart_parked_until > now() + interval '61 s')
    ORDER BY s.id
    FOR UPDATE OF e SKIP LOCKED
), parked AS (
    UPDATE engines e SET restart_parked_until = now() + interval '60 s' FROM due WHERE e.id = due.id
    RETURNING e.product_id, due.newly
), counted AS (
    SELECT product_id, count(*) AS engines FROM parked WHERE newly GROUP BY product_id
), logged AS (
    INSERT INTO audit_log (product_id, action, status, metadata)
    SELECT product_id, 'auto_restart_parked', 'failed', jsonb_build_object('engines', engines, 'seconds', 60) FROM counted
)
SELECT product_id, engines FROM counted

-- name: due_restarts
-- $2: the longest delay. Not while an outage parks them.
SELECT id, lease_generation, restart_attempt FROM engines
WHERE location_id = $1 AND status = 'failed' AND operation IS NULL AND wish IS NULL
  AND (next_restart_at <= now() OR next_restart_at > now() + make_interval(secs => $2))
  AND (restart_parked_until IS NULL OR restart_parked_until <= now()
       OR restart_parked_until > now() + interval '61 s')
ORDER BY next_restart_at LIMIT $3
