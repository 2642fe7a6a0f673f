-- name: count_valid_keys
SELECT count(*) FROM platform_keys WHERE product_id = $1 AND (expires_at IS NULL OR expires_at > now())

-- name: forget_expired_keys
DELETE FROM platform_keys WHERE product_id = $1 AND expires_at < now() - interval '30 days'

-- name: issue_key
-- No row when the key would have expired already. $5: what else the audit row says.
WITH key AS (
    INSERT INTO platform_keys (product_id, key_hash, scopes, expires_at)
    SELECT $1, $2, $3, $4 WHERE $4::timestamptz IS NULL OR $4 > now()
    RETURNING id, product_id, scopes, created_at, expires_at, last_used_at
), logged AS (
    INSERT INTO audit_log (product_id, action, actor, metadata)
    SELECT product_id, 'key_issue', 'admin',
           jsonb_build_object('key_id', id, 'scopes', scopes, 'expires_at', expires_at) || $5::jsonb
    FROM key
)
SELECT * FROM key

-- name: list_keys
SELECT id, product_id, scopes, created_at, expires_at, last_used_at
FROM platform_keys WHERE product_id = $1 ORDER BY created_at, id

-- name: revoke_key
WITH key AS (
    DELETE FROM platform_keys WHERE product_id = $1 AND id = $2 RETURNING id, product_id
), logged AS (
    INSERT INTO audit_log (product_id, action, actor, metadata)
    SELECT product_id, 'key_revoke', 'admin', jsonb_build_object('key_id', id) FROM key
)
SELECT id FROM key

-- name: expire_manage_keys
-- The keys that a rotation replaces: each stays valid for the overlap, or as long as it would have been anyway.
WITH key AS (
    UPDATE platform_keys SET expires_at = least(expires_at, now() + make_interval(secs => $2))
    WHERE product_id = $1 AND 'manage' = ANY (scopes) AND (expires_at IS NULL OR expires_at > now())
    RETURNING id, product_id, expires_at
), logged AS (
    INSERT INTO audit_log (product_id, action, actor, metadata)
    SELECT product_id, 'key_revoke', 'admin', jsonb_build_object('key_id', id, 'expires_at', expires_at, 'rotated', true)
    FROM key
)
SELECT id FROM key
