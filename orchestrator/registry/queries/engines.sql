-- Leases: `operation`, `lease_owner` and `lease_until` are set together. A lease is over when its end has passed,
-- or lies further away than any lease can last (the clock was set back). Every write of an operation names the
-- generation that its claim returned; a later claim makes it miss.

-- name: lock_ports
SELECT pg_advisory_xact_lock(hashtextextended('orchestrator.ports.' || $1::text, 0))

-- name: free_port
-- The first free port after the last one that was given out, then from the beginning; lazily.
SELECT port FROM (
    SELECT generate_series(greatest($2, least($3, 1 + coalesce((
        SELECT port FROM engines WHERE location_id = $1 AND port BETWEEN $2 AND $3
        ORDER BY created_at DESC LIMIT 1), $2 - 1))), $3) AS port
    UNION ALL
    SELECT generate_series($2, $3)
) candidates
WHERE port <> ALL ($4::integer[])
  AND NOT EXISTS (SELECT FROM engines e WHERE e.location_id = $1 AND e.port = candidates.port)
LIMIT 1

-- name: count_engines
SELECT count(*) FROM engines WHERE product_id = $1 AND user_id IS NOT NULL

-- name: insert_engine
INSERT INTO engines (id, product_id, user_id, status, engine_version, location_id, port,
                     operation, operation_id, operation_started_at, operation_actor, deadline_at, former_status,
                     lease_generation, lease_owner, lease_until)
VALUES ($1, $2, $3, 'provisioning', $4, $5, $6,
        'provision', gen_random_uuid(), now(), $7, now() + make_interval(secs => $8), 'failed',
        1, $9, now() + make_interval(secs => $10))
ON CONFLICT (product_id, user_id) WHERE user_id IS NOT NULL DO NOTHING
RETURNING *

-- name: insert_key
INSERT INTO engine_keys (engine_id, generation, key_hash, key_enc, master_key_id) VALUES ($1, $2, $3, $4, $5)
ON CONFLICT (engine_id, generation) DO NOTHING

-- name: idempotency_take
-- The body and the engine that an Idempotency-Key stands for; one older than a day is forgotten.
WITH expired AS (
    DELETE FROM idempotency_keys WHERE product_id = $1 AND key = $2 AND created_at < now() - interval '24 hours'
)
SELECT body_hash, engine_id FROM idempotency_keys
WHERE product_id = $1 AND key = $2 AND created_at >= now() - interval '24 hours'

-- name: idempotency_lock
SELECT pg_advisory_xact_lock(hashtextextended('orchestrator.idempotency.' || $1::text || '.' || $2::text, 0))

-- name: idempotency_put
INSERT INTO idempotency_keys (product_id, key, body_hash, engine_id) VALUES ($1, $2, $3, $4)
ON CONFLICT (product_id, key) DO NOTHING

-- name: idempotency_expire
DELETE FROM idempotency_keys WHERE created_at < now() - interval '24 hours'

-- name: engine_by_id
SELECT * FROM engines WHERE id = $1

-- name: engine_by_user
SELECT * FROM engines WHERE product_id = $1 AND user_id = $2

-- name: engine_keys
-- From the key that the engine has to the newest one.
SELECT generation, key_hash, key_enc, master_key_id,
       greatest(0, extract(epoch FROM overlap_until - now()))::double precision AS overlap_s
FROM engine_keys WHERE engine_id = $1 ORDER BY generation

-- name: claim
-- A wish that waits is overtaken only by what fulfils it; $11: only if nobody claimed the engine since that generation.
WITH claimed AS (
    UPDATE engines SET
        lease_generation = lease_generation + 1,
        lease_owner = $3,
        lease_until = CASE WHEN $3 = 'nobody' THEN now() ELSE now() + make_interval(secs => $4) END,
        operation = $5,
        operation_id = gen_random_uuid(),
        operation_started_at = now(),
        operation_actor = $7,
        operation_parameters = $12,
        deadline_at = now() + make_interval(secs => $8),
        former_status = CASE status WHEN 'provisioning' THEN 'failed' WHEN 'destroying' THEN former_status
                                    ELSE status END,
        status = $6,
        wish = NULL,
        wish_at = NULL,
        wish_actor = NULL,
        last_error = NULL,
        -- An attempt counts from its beginning; whoever asks for the engine begins anew.
        restart_attempt = CASE $5 WHEN 'restart' THEN restart_attempt + 1
                                  WHEN 'start' THEN 0 WHEN 'recover' THEN 0 WHEN 'wake' THEN 0
                                  ELSE restart_attempt END,
        engine_version = coalesce($10, engine_version),
        -- Another version, or the same name looked up again.
        image_id = CASE WHEN $10::text IS NULL THEN image_id END
    WHERE id = $1
      AND status = ANY ($2::text[])
      AND ($11::bigint IS NULL OR lease_generation = $11)
      AND (wish IS NULL OR wish = 'wake' OR wish = $5 OR $5 = 'destroy')
      AND (operation IS NULL OR ($9 AND (wish_at < now() - make_interval(secs => $4)
                                         OR lease_until < now()
                                         OR lease_until > now() + make_interval(secs => $4 + 1))))
    RETURNING *
), logged AS (
    INSERT INTO audit_log (product_id, user_id, engine_id, action, actor, status, metadata)
    SELECT product_id, user_id, id, $13::text, operation_actor, status, $12 FROM claimed WHERE $13::text IS NOT NULL
)
SELECT *, pg_notify('orchestrator_engine', id::text) FROM claimed

-- name: take_over
-- Operations at this location whose owner is gone, with their direction unchanged. Not those that somebody wishes
-- to end (`due_wishes`), and none that this version does not know.
UPDATE engines SET
    lease_generation = lease_generation + 1,
    lease_owner = $2,
    lease_until = now() + make_interval(secs => $3)
WHERE id IN (
    SELECT id FROM engines
    WHERE location_id = $1 AND operation = ANY ($5::text[]) AND (wish IS NULL OR wish = 'wake')
      AND (lease_until < now() OR lease_until > now() + make_interval(secs => $3 + 1))
    ORDER BY lease_until
    LIMIT $4
    FOR UPDATE SKIP LOCKED
)
RETURNING *, extract(epoch FROM deadline_at - now())::double precision AS deadline_left_s

-- name: renew
UPDATE engines e SET lease_until = now() + make_interval(secs => $3)
FROM unnest($1::uuid[], $2::bigint[]) AS held (id, generation)
WHERE e.id = held.id AND e.lease_generation = held.generation AND e.operation IS NOT NULL
RETURNING e.id, e.lease_generation, e.wish

-- name: set_wish
-- Ask the holder of the lease to give up this operation in favour of something stronger; a destroy shows at once.
UPDATE engines SET
    wish = $3,
    wish_at = now(),
    wish_actor = $4,
    former_status = CASE WHEN $3 = 'destroy' AND status NOT IN ('destroying', 'provisioning') THEN status
                         ELSE former_status END,
    status = CASE WHEN $3 = 'destroy' THEN 'destroying' ELSE status END
WHERE id = $1 AND operation_id = $2 AND operation IS NOT NULL AND operation <> 'destroy'
  AND coalesce(array_position(ARRAY['wake', 'stop', 'destroy'], wish), 0)
      < array_position(ARRAY['wake', 'stop', 'destroy'], $3)
RETURNING id, pg_notify('orchestrator_engine', id::text), pg_notify('orchestrator_wish', id::text)

-- name: due_wishes
-- Wishes that nobody carries out: the holder is gone or does not answer, or has let go and the asker is gone.
SELECT id, wish, wish_actor, lease_generation FROM engines
WHERE location_id = $1 AND wish IN ('stop', 'destroy')
  AND (operation IS NULL OR wish_at < now() - make_interval(secs => $2 + 1)
       OR lease_until < now() OR lease_until > now() + make_interval(secs => $2 + 1))
ORDER BY wish_at LIMIT $3

-- name: begin_create
UPDATE engines SET incarnation = incarnation + 1, spec_fingerprint = $3, image_id = $4, container_id = NULL
WHERE id = $1 AND lease_generation = $2 AND operation IS NOT NULL
RETURNING *

-- name: record_endpoint
UPDATE engines SET host = $3, endpoint_port = $4, container_id = $5, restarts_seen = 0, process_started_at = NULL,
                   deadline_at = now() + make_interval(secs => $6)
WHERE id = $1 AND lease_generation = $2 AND operation IS NOT NULL
RETURNING *

-- name: change_port
WITH moved AS (
    UPDATE engines SET port = $3 WHERE id = $1 AND lease_generation = $2 AND operation IS NOT NULL RETURNING *
), logged AS (
    INSERT INTO audit_log (product_id, user_id, engine_id, action, status, metadata)
    SELECT product_id, user_id, id, 'port_changed', status, jsonb_build_object('old', $4::integer, 'new', $3::integer)
    FROM moved
)
SELECT * FROM moved

-- name: finish
-- The end of an operation, its audit row, and the word to whoever waits. Misses when the generation is not the
-- current one any more, or when a wish arrived that this end does not answer.
WITH done AS (
    UPDATE engines SET
        status = $3,
        last_error = $4,
        operation = NULL,
        lease_owner = NULL,
        lease_until = NULL,
        deadline_at = NULL,
        wish = NULL,
        wish_at = NULL,
        wish_actor = NULL,
        first_healthy_at = CASE WHEN $5 THEN coalesce(first_healthy_at, now()) ELSE first_healthy_at END,
        last_health_at = CASE WHEN $5 THEN now() ELSE last_health_at END,
        running_since = CASE WHEN $5 THEN now() WHEN $3 = 'running' THEN running_since END,
        healthy_since = CASE WHEN $5 THEN now() WHEN $3 = 'running' THEN healthy_since END,
        consecutive_failures = CASE WHEN $5 THEN 0 ELSE consecutive_failures END,
        restarted_at = CASE WHEN $5 THEN '{}' ELSE restarted_at END,
        restarts_seen = coalesce($19, restarts_seen),
        exited_seen_at = NULL,
        next_probe_at = CASE WHEN $5 THEN next_probe(id, $15) ELSE next_probe_at END,
        last_active_at = CASE WHEN $12::double precision IS NULL THEN last_active_at
                              ELSE now() - make_interval(secs => $12) END,
        boot_duration_ms = coalesce($6, boot_duration_ms),
        applied_generation = coalesce($7, applied_generation),
        key_generation = greatest(key_generation, coalesce($8, 0)),
        -- $13: what follows a failure; 'keep' where this end is none.
        restart_ended_at = CASE WHEN $13 <> 'keep' THEN now() ELSE restart_ended_at END,
        next_restart_at = CASE WHEN $3 <> 'failed' THEN NULL
                               WHEN $13 = 'restart' THEN now() + make_interval(secs => $14)
                               WHEN $13 = 'keep' THEN next_restart_at END,
        gave_up_at = CASE WHEN $3 <> 'failed' THEN NULL WHEN $13 = 'give_up' THEN now()
                          WHEN $13 = 'keep' THEN gave_up_at END,
        restart_attempt = greatest(0, restart_attempt - $16::integer),
        slept_at = CASE WHEN $3 = 'sleeping' THEN coalesce(slept_at, now()) END,
        unloaded_at = CASE WHEN $3 = 'sleeping' THEN CASE WHEN $17 THEN now() ELSE unloaded_at END END,
        last_log = coalesce($18, last_log)
    WHERE id = $1 AND lease_generation = $2 AND operation IS NOT NULL AND (wish IS NULL OR wish = $9)
    RETURNING *
), logged AS (
    INSERT INTO audit_log (timestamp, product_id, user_id, engine_id, action, actor, status, metadata, duration_ms)
    SELECT operation_started_at, product_id, user_id, id, $10::text, operation_actor, $3, $11,
           (extract(epoch FROM clock_timestamp() - operation_started_at) * 1000)::integer
    FROM done WHERE $10::text IS NOT NULL
    RETURNING id
), gave_up AS (
    -- Joined, so that it stands after the failure that it follows from.
    INSERT INTO audit_log (product_id, user_id, engine_id, action, status, metadata)
    SELECT product_id, user_id, done.id, 'auto_restart_gave_up', $3, jsonb_build_object('attempts', restart_attempt)
    FROM done LEFT JOIN logged ON true WHERE $13 = 'give_up'
), unneeded_keys AS (
    -- Older than the engine's own. A newer one stays, whatever failed: the engine may have heard of it.
    DELETE FROM engine_keys k USING done WHERE k.engine_id = done.id AND k.generation < done.applied_generation
), freed AS (
    -- Only a success is kept, and there was none yet.
    DELETE FROM idempotency_keys i USING done WHERE i.engine_id = done.id AND done.first_healthy_at IS NULL
)
SELECT done.*, pg_notify('orchestrator_engine', id::text) FROM done

-- name: rotated_key
-- The next key, recorded before the engine hears of it; the one before it stays valid for the overlap.
WITH fenced AS (
    SELECT id FROM engines WHERE id = $1 AND lease_generation = $2 AND operation IS NOT NULL FOR UPDATE
), superseded AS (
    UPDATE engine_keys SET overlap_until = now() + make_interval(secs => $7)
    FROM fenced WHERE engine_id = fenced.id AND generation = $3 - 1
)
INSERT INTO engine_keys (engine_id, generation, key_hash, key_enc, master_key_id)
SELECT id, $3, $4, $5, $6 FROM fenced
ON CONFLICT (engine_id, generation) DO NOTHING

-- name: release
-- The holder gives up without an end of its own: a stronger wish takes over. A wake is none that anybody carries out.
UPDATE engines SET operation = NULL, lease_owner = NULL, lease_until = NULL, deadline_at = NULL,
                   wish = nullif(wish, 'wake')
WHERE id = $1 AND lease_generation = $2 AND operation IS NOT NULL
RETURNING id, pg_notify('orchestrator_engine', id::text)

-- name: requeue
-- The operation stays wanted; whoever looks after the delay takes it over.
UPDATE engines SET lease_until = now() + make_interval(secs => $4), lease_generation = lease_generation + 1,
                   lease_owner = 'nobody', last_error = $3
WHERE id = $1 AND lease_generation = $2 AND operation IS NOT NULL
RETURNING id, pg_notify('orchestrator_engine', id::text)

-- name: remove_engine
-- The row gives way to a tombstone.
WITH gone AS (
    DELETE FROM engines WHERE id = $1 AND lease_generation = $2 AND operation IS NOT NULL RETURNING *
), tombstone AS (
    INSERT INTO tombstones (engine_id, product_id, user_id, location_id, incarnation)
    SELECT id, product_id, user_id, location_id, incarnation FROM gone
), logged AS (
    INSERT INTO audit_log (timestamp, product_id, user_id, engine_id, action, actor, status, metadata, duration_ms)
    SELECT operation_started_at, product_id, user_id, id, $3::text, operation_actor, $4::text, $5::jsonb,
           (extract(epoch FROM clock_timestamp() - operation_started_at) * 1000)::integer
    FROM gone
)
SELECT id, pg_notify('orchestrator_engine', id::text) FROM gone

-- name: last_rotation
SELECT metadata FROM audit_log WHERE engine_id = $1 AND action = 'rotate_key' ORDER BY id DESC LIMIT 1

-- name: restart_wait
-- Seconds until an admit may restart a failed engine: after the last attempt, and while restarts are parked.
SELECT greatest(0,
    CASE WHEN restart_ended_at <= now() THEN extract(epoch FROM restart_ended_at + make_interval(secs => $2) - now()) END,
    CASE WHEN restart_parked_until <= now() + interval '61 s' THEN extract(epoch FROM restart_parked_until - now()) END
)::double precision
FROM engines WHERE id = $1

-- name: set_keep_alive
UPDATE engines SET keep_alive_until = CASE WHEN $3 > 0 THEN now() + make_interval(secs => $3) END
WHERE id = $1 AND status = ANY ($2::text[])
RETURNING *

-- name: engines_here
SELECT id, product_id, user_id, status, operation, wish, lease_generation, incarnation, container_id, first_healthy_at
FROM engines WHERE location_id = $1 AND ($2::uuid IS NULL OR id = $2)

-- name: locations
SELECT DISTINCT location_id FROM engines
