-- What the health, idle and reconcile loops remember. All of it outlives every process.

ALTER TABLE engines
    ADD COLUMN healthy_since   timestamptz,
    ADD COLUMN probe_failed_at timestamptz,
    ADD COLUMN last_active_at  timestamptz,
    ADD COLUMN unloaded_at     timestamptz,
    ADD COLUMN restarts_seen   integer NOT NULL DEFAULT 0,
    ADD COLUMN restarted_at    timestamptz[] NOT NULL DEFAULT '{}',
    ADD COLUMN exited_seen_at  timestamptz,
    ADD COLUMN gave_up_at      timestamptz,
    ADD COLUMN last_log        jsonb;
COMMENT ON COLUMN engines.healthy_since IS 'Since when every probe was good.';
COMMENT ON COLUMN engines.probe_failed_at IS 'The last probe that failed while the process was there.';
COMMENT ON COLUMN engines.last_active_at IS 'The last real work that the engine itself has told of.';
COMMENT ON COLUMN engines.unloaded_at IS 'Asleep with its process ended, too.';
COMMENT ON COLUMN engines.restarts_seen IS 'The backend''s own count of restarts, as last seen.';
COMMENT ON COLUMN engines.restarted_at IS 'When the backend itself restarted it, within the last ten minutes.';
COMMENT ON COLUMN engines.exited_seen_at IS 'First seen exited, with a restart by the backend to come.';
COMMENT ON COLUMN engines.gave_up_at IS 'No further restart by itself, until somebody asks for one.';
COMMENT ON COLUMN engines.last_log IS 'The last lines of its log when it last failed.';

CREATE INDEX engines_probe ON engines (location_id, next_probe_at) WHERE status = 'running';
CREATE INDEX engines_restart ON engines (location_id, next_restart_at) WHERE status = 'failed';
CREATE INDEX engines_asleep ON engines (location_id, slept_at) WHERE status = 'sleeping' AND unloaded_at IS NULL;

CREATE TABLE orphans (
    location_id uuid NOT NULL,
    engine_id   uuid NOT NULL,
    seen_at     timestamptz NOT NULL DEFAULT now(),
    stopped_at  timestamptz,
    PRIMARY KEY (location_id, engine_id)
);
COMMENT ON TABLE orphans IS 'Objects of this deployment that no engine and no tombstone explains.';

-- The engine's own place in the interval: replicas that come and go do not make probes bunch.
CREATE FUNCTION next_probe(engine_id uuid, interval_s double precision) RETURNS timestamptz
LANGUAGE sql STABLE PARALLEL SAFE AS $$
    SELECT to_timestamp(
        (floor((extract(epoch FROM now())::double precision + interval_s * 0.5 - phase) / interval_s) + 1) * interval_s
        + phase)
    FROM (SELECT (hashtextextended(engine_id::text, 0) & 1048575) / 1048576.0 * interval_s AS phase) p
$$;

-- The restarts of the last ten minutes, after the backend's count has been seen as `now_seen`. A lower count than
-- before is that of a new object.
CREATE FUNCTION note_restarts(noted timestamptz[], seen integer, now_seen integer) RETURNS timestamptz[]
LANGUAGE sql VOLATILE AS $$
    SELECT coalesce(array_agg(at ORDER BY at), '{}') FROM (
        SELECT at FROM unnest(
            noted || array_fill(clock_timestamp(), ARRAY[least(20, CASE
                WHEN now_seen IS NULL THEN 0 WHEN now_seen >= seen THEN now_seen - seen ELSE now_seen END)])
        ) AS at
        WHERE at > clock_timestamp() - interval '10 minutes' AND at <= clock_timestamp()
        ORDER BY at DESC LIMIT 20
    ) kept
$$;
