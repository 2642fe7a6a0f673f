-- name: rate_take_slot
-- One of the N rights of a minute; no row when none is free.
UPDATE rate_slots SET free_at = clock_timestamp() + interval '60 s'
WHERE (product_id, slot) = (
    SELECT product_id, slot FROM rate_slots
    WHERE product_id = $1 AND free_at <= statement_timestamp()
    ORDER BY free_at
    LIMIT 1
    FOR UPDATE SKIP LOCKED
)
RETURNING slot

-- name: rate_retry_after
-- Seconds until the oldest call that stands in the way leaves the window.
SELECT coalesce(ceil(extract(epoch FROM min(free_at) - clock_timestamp())), 1)::integer
FROM (
    SELECT free_at FROM rate_slots WHERE product_id = $1 AND free_at > clock_timestamp()
    UNION ALL
    SELECT free_at FROM rate_blocks WHERE product_id = $1 AND free_at > clock_timestamp()
      AND NOT EXISTS (SELECT FROM rate_slots WHERE product_id = $1)
) windows

-- name: rate_take_block
-- A block of calls for one process, used within a second and counted from that second's end. Run under the
-- product's rate lock. The nearer the limit, the smaller the block, so that little is left unused at its end.
WITH used AS (
    SELECT coalesce(sum(calls), 0)::integer AS calls FROM rate_blocks
    WHERE product_id = $1 AND free_at > statement_timestamp()
), block AS (
    SELECT least(greatest(1, $2 / 100), greatest(1, ($2 - calls) / 8), $2 - calls) AS calls FROM used
), gone AS (
    DELETE FROM rate_blocks
    WHERE product_id = $1 AND (free_at <= statement_timestamp() OR free_at > statement_timestamp() + interval '70 s')
)
INSERT INTO rate_blocks (product_id, calls, free_at)
SELECT $1, block.calls, clock_timestamp() + interval '61 s' FROM block JOIN products p ON p.id = $1
WHERE block.calls > 0 AND coalesce(p.rate_limit_rpm, $2) > 600  -- not after a change to a small limit
RETURNING id, calls

-- name: rate_settle_blocks
-- What was left of a block when its second ended goes back.
WITH settled AS (
    SELECT * FROM unnest($1::bigint[], $2::integer[]) AS s (id, used)
), emptied AS (
    DELETE FROM rate_blocks b USING settled s WHERE b.id = s.id AND s.used = 0
)
UPDATE rate_blocks b SET calls = s.used FROM settled s WHERE b.id = s.id AND s.used > 0

-- name: rate_lock
SELECT pg_advisory_xact_lock(hashtextextended('orchestrator.rate.' || $1::text, 0))

-- name: rate_lock_slots
-- Whoever is taking one has committed when this returns, and nobody takes another one meanwhile.
SELECT 1 FROM rate_slots WHERE product_id = $1 FOR UPDATE

-- name: rate_resize
-- After a change of the limit: as many slots as calls a minute (none above 600). What the last minute counted is
-- carried over, the most recent calls first; what finds no slot becomes blocks, which a later change carries back.
WITH small AS (
    SELECT CASE WHEN $2 <= 600 THEN $2 ELSE 0 END AS slots
), counted AS (
    SELECT free_at, count(*) AS calls FROM rate_slots WHERE product_id = $1 AND free_at > now() GROUP BY free_at
    UNION ALL
    SELECT free_at, calls FROM rate_blocks WHERE product_id = $1 AND free_at > now()
), carried AS MATERIALIZED (
    SELECT free_at, last - calls AS before, last FROM (
        SELECT free_at, calls, sum(calls) OVER (ORDER BY free_at DESC ROWS UNBOUNDED PRECEDING) AS last FROM counted
    ) ordered
    -- Blocks stay as they are between two large limits: their owners still settle them.
    WHERE $2 <= 600 OR EXISTS (SELECT FROM rate_slots WHERE product_id = $1)
), old_slots AS (
    DELETE FROM rate_slots WHERE product_id = $1 AND slot > (SELECT slots FROM small)
), old_blocks AS (
    DELETE FROM rate_blocks WHERE product_id = $1 AND EXISTS (SELECT FROM carried)
), new_blocks AS (
    INSERT INTO rate_blocks (product_id, calls, free_at)
    SELECT $1, last - greatest(before, slots), free_at FROM carried, small WHERE last > slots
), filled AS (
    SELECT slot, free_at FROM carried, small, generate_series(before + 1, least(last, slots)) AS slot
)
INSERT INTO rate_slots AS r (product_id, slot, free_at)
SELECT $1, g.slot, coalesce(filled.free_at, '-infinity')
FROM small, generate_series(1, slots) AS g (slot)
LEFT JOIN filled ON filled.slot = g.slot
ON CONFLICT (product_id, slot) DO UPDATE SET free_at = excluded.free_at

-- name: rate_forget
-- Blocks that no window covers any more.
DELETE FROM rate_blocks WHERE free_at <= now()

-- name: rate_repair
-- A due time further away than its own interval is due now (the clock was set back).
UPDATE rate_slots SET free_at = now() WHERE free_at > now() + interval '65 s'
