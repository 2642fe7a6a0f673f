-- A look at the backend may be written after a later one: of another replica, or of a probe that waited for its batch.

ALTER TABLE engines ADD COLUMN process_started_at timestamptz;
COMMENT ON COLUMN engines.process_started_at IS 'Start of the process, by the backend''s clock, that the last count of restarts was seen with.';

-- The count, where it tells of the same process as what was seen last, or of a later one; else NULL.
CREATE FUNCTION news_of_restarts(seen integer, seen_at timestamptz, count integer, count_at timestamptz)
RETURNS integer LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT CASE WHEN count_at < seen_at OR (count_at = seen_at AND count < seen) THEN NULL ELSE count END
$$;
