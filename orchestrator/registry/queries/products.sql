-- name: insert_product
WITH product AS (
    INSERT INTO products (slug, display_name, policy) VALUES ($1, $2, $3)
    ON CONFLICT (slug) DO NOTHING
    RETURNING id, slug, policy
), key AS (
    INSERT INTO platform_keys (product_id, key_hash, scopes)
    SELECT id, $4, ARRAY['manage'] FROM product
), logged AS (
    INSERT INTO audit_log (product_id, action, actor, metadata)
    SELECT id, 'policy_register', 'admin', jsonb_build_object('slug', slug, 'policy', policy) FROM product
)
SELECT id FROM product

-- name: product_by_id
SELECT id, slug, policy FROM products WHERE id = $1

-- name: product_by_slug
SELECT id, slug, policy FROM products WHERE slug = $1

-- name: update_policy
WITH product AS (
    UPDATE products SET policy = $2 WHERE id = $1 RETURNING id, policy
), logged AS (
    INSERT INTO audit_log (product_id, action, actor, metadata)
    SELECT id, 'policy_update', 'admin', jsonb_build_object('policy', policy) FROM product
)
SELECT id FROM product

-- name: lock_product
-- Serialises what must be exact for one product: the count of its engines.
SELECT policy FROM products WHERE id = $1 FOR NO KEY UPDATE

-- name: replace_platform_key
-- For a development set-up whose key file was lost: one key of the product, known by its hash.
INSERT INTO platform_keys (product_id, key_hash, scopes) VALUES ($1, $2, ARRAY['manage'])
ON CONFLICT (key_hash) DO NOTHING

-- name: deployment_id
SELECT id FROM deployment

-- name: master_key_ids
SELECT DISTINCT master_key_id FROM engine_keys

-- name: revision
SELECT version_num FROM alembic_version
