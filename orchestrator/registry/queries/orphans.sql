-- Objects of this deployment that no row explains.

-- name: explained
-- Which of these have a row now, and which have a tombstone.
SELECT id AS engine_id, false AS destroyed FROM engines WHERE id = ANY ($1::uuid[])
UNION ALL
SELECT engine_id, true FROM tombstones WHERE engine_id = ANY ($1::uuid[])

-- name: note_orphan
-- First seen now, or before: its audit row once, and since when it is known.
WITH noted AS (
    INSERT INTO orphans (location_id, engine_id) VALUES ($1, $2) ON CONFLICT DO NOTHING RETURNING engine_id
), logged AS (
    INSERT INTO audit_log (engine_id, action, status, metadata)
    SELECT engine_id, 'reconcile_orphan', $3::text, jsonb_build_object('incarnation', $4::integer) FROM noted
)
SELECT coalesce(extract(epoch FROM now() - o.seen_at), 0)::double precision AS known_for_s, o.stopped_at IS NOT NULL AS stopped
FROM (SELECT 1) one LEFT JOIN orphans o ON o.location_id = $1 AND o.engine_id = $2

-- name: orphan_stopped
WITH stopped AS (
    UPDATE orphans SET stopped_at = now() WHERE location_id = $1 AND engine_id = $2 RETURNING engine_id
)
INSERT INTO audit_log (engine_id, action, status, metadata)
SELECT engine_id, 'reconcile_orphan', 'stopped', '{"stopped": true}' FROM stopped

-- name: orphan_removed
-- $3: purged by a person's order, or explained by a tombstone.
WITH gone AS (
    DELETE FROM orphans WHERE location_id = $1 AND engine_id = $2
)
INSERT INTO audit_log (engine_id, action, actor, status, metadata)
VALUES ($2, 'reconcile_orphan', $3, 'destroyed', jsonb_build_object('purged', $3::text <> 'system'))

-- name: forget_orphans
-- Those that are not there any more.
DELETE FROM orphans WHERE location_id = $1 AND engine_id <> ALL ($2::uuid[])
