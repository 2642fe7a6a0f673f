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
SELECT id, slug, policy FROM products WHERE id = $1 AND deleting_at IS NULL

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
-- Serialises what must be exact for one product: the count of its engines, keys, webhooks. None being deleted.
SELECT policy FROM products WHERE id = $1 AND deleting_at IS NULL FOR NO KEY UPDATE

-- name: list_products
SELECT p.id, p.slug, p.display_name, p.policy, count(e.id) AS engines
FROM products p LEFT JOIN engines e ON e.product_id = p.id AND e.user_id IS NOT NULL
WHERE p.deleting_at IS NULL
GROUP BY p.id ORDER BY p.created_at, p.id

-- name: lock_product_to_delete
SELECT deleting_at FROM products WHERE id = $1 FOR NO KEY UPDATE

-- name: mark_product_deleting
-- From now on it takes no call. Without a policy its warm pool is given up, too.
WITH keys AS (
    DELETE FROM platform_keys WHERE product_id = $1
)
UPDATE products SET deleting_at = now(), policy = '{}' WHERE id = $1

-- name: deleting_products
SELECT id FROM products WHERE deleting_at IS NOT NULL

-- name: users_of_product
SELECT user_id FROM engines WHERE product_id = $1 AND user_id IS NOT NULL ORDER BY id LIMIT $2

-- name: remove_product
-- When its last engine is gone.
WITH gone AS (
    DELETE FROM products WHERE id = $1 AND deleting_at IS NOT NULL
      AND NOT EXISTS (SELECT FROM engines WHERE product_id = $1)
    RETURNING id, slug, deleting_at
), logged AS (
    INSERT INTO audit_log (timestamp, product_id, action, actor, metadata)
    SELECT deleting_at, id, 'product_delete', 'admin', jsonb_build_object('slug', slug) FROM gone
)
SELECT id FROM gone

-- name: replace_platform_key
-- For a development set-up whose key file was lost: one key of the product, known by its hash.
INSERT INTO platform_keys (product_id, key_hash, scopes) VALUES ($1, $2, ARRAY['manage'])
ON CONFLICT (key_hash) DO NOTHING

-- name: deployment_id
SELECT id FROM deployment

-- name: master_key_ids
SELECT master_key_id FROM engine_keys UNION SELECT master_key_id FROM webhooks

-- name: revision
SELECT version_num FROM alembic_version
