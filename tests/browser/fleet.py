"""A large fleet with a day behind it, as rows: no process could be started for each."""

from __future__ import annotations

from typing import TYPE_CHECKING
from uuid import UUID

from tests.integration.checks import database

if TYPE_CHECKING:
    from tests.integration.conftest import Served

LOCK = "SELECT pg_advisory_xact_lock(hashtextextended('orchestrator.audit.' || $1::text, 0))"

ENGINES = """
INSERT INTO engines (id, product_id, user_id, status, engine_version, location_id, host, endpoint_port, created_at,
                     last_health_at, first_healthy_at, running_since, boot_duration_ms, restart_attempt, last_error)
SELECT gen_random_uuid(), $1, format('user-%s', lpad(n::text, 5, '0')),
       CASE WHEN n % 97 = 0 THEN 'failed' WHEN n % 23 = 0 THEN 'stopped' WHEN n % 3 = 0 THEN 'running'
            ELSE 'sleeping' END,
       CASE WHEN n % 10 = 0 THEN 'engine:2.4.0-rc1' ELSE 'engine:2.3.0' END,
       gen_random_uuid(), '127.0.0.1', 9000 + n, now() - n * interval '7 minutes',
       now() - (n % 40) * interval '1 second', now() - n * interval '7 minutes', now() - n * interval '1 minute',
       600 + n % 300, CASE WHEN n % 97 = 0 THEN 1 + n % 5 ELSE 0 END,
       CASE WHEN n % 97 = 0 THEN '{"code": "BOOT_TIMEOUT", "message": "Not healthy within 60 s."}'::jsonb END
FROM generate_series(1, $2::integer) n
"""

# Each engine was provisioned when it was made; some slept, woke, failed and came back during the last day.
AUDIT = """
WITH happened AS (
    SELECT e.id, e.user_id, e.created_at AS at, 'provision' AS action, 'running' AS status, 'shop' AS actor,
           jsonb_build_object('boot_ms', 500 + 400 * random(), 'cold', true) AS metadata, 900 AS ms
    FROM engines e WHERE e.product_id = $1
    UNION ALL
    SELECT e.id, e.user_id, now() - turn * interval '37 minutes' - 900 * random() * interval '1 second', what.*
    FROM engines e, generate_series(1, 38) turn,
         LATERAL (SELECT * FROM (VALUES
            ('sleep', 'sleeping', 'system', '{"frozen": true}'::jsonb, 40),
            ('wake', 'running', 'shop', '{"boot_ms": 3, "cold": false}'::jsonb, (6 + 14 * random())::integer),
            ('health_failed', 'failed', 'system', '{"message": "3 probes failed"}'::jsonb, NULL),
            ('auto_restart_start', 'provisioning', 'system', '{"attempt": 1}'::jsonb, NULL),
            ('auto_restart_success', 'running', 'system', '{"boot_ms": 700, "cold": true}'::jsonb, 800)
         ) AS v (action, status, actor, metadata, ms)
         OFFSET (hashtext(e.id::text || turn) & 1023) % 5 LIMIT 1) AS what
    WHERE e.product_id = $1 AND right(e.user_id, 2) IN ('07', '31', '64')
    UNION ALL
    SELECT NULL, 'user-00007', now() - turn * interval '11 minutes', 'admit_denied', NULL, 'shop',
           jsonb_build_object('reason', CASE WHEN turn % 3 = 0 THEN 'RATE_LIMITED' ELSE 'engine_sleeping' END,
                              'count', (20 * random())::integer + 1), NULL
    FROM generate_series(1, 120) turn
), numbered AS (
    SELECT *, row_number() OVER (ORDER BY at)
              + (SELECT coalesce(max(seq), 0) FROM audit_log WHERE product_id = $1) AS seq
    FROM happened
), inserted AS (
    INSERT INTO audit_log (timestamp, product_id, user_id, engine_id, action, status, actor, metadata, duration_ms, seq,
                           prev_hash, hash)
    SELECT at, $1, user_id, id, action, status, actor, metadata, ms, seq, '', seq::text FROM numbered ORDER BY at
    RETURNING seq
)
INSERT INTO audit_heads (chain, seq, hash) SELECT $1::text, max(seq), max(seq)::text FROM inserted
ON CONFLICT (chain) DO UPDATE SET seq = excluded.seq, hash = excluded.hash
"""


async def put_fleet(served: Served, product_id: str, engines: int) -> None:
    """`engines` engines of a product, users `user-00001` and so on, with their audit."""
    async with database(served.deployment.variables["ORCH_DATABASE_URL"]) as connection:
        async with connection.transaction():
            # As the sequencer does: one at a time gives positions.
            await connection.execute(LOCK, product_id)
            await connection.execute(ENGINES, UUID(product_id), engines)
            await connection.execute(AUDIT, UUID(product_id))
        await connection.execute("ANALYZE")
