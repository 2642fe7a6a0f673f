-- Everything the orchestrator knows. Times are the database's own; every wait has its end in a column.

CREATE TABLE deployment (
    id         uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    only_one   boolean NOT NULL DEFAULT true UNIQUE CHECK (only_one),
    created_at timestamptz NOT NULL DEFAULT now()
);
COMMENT ON TABLE deployment IS 'The mark of ownership on every object that this database knows.';
INSERT INTO deployment DEFAULT VALUES;

-- Tenants ------------------------------------------------------------------------------------------------

CREATE TABLE products (
    id             uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    slug           text NOT NULL UNIQUE,
    display_name   text NOT NULL,
    policy         jsonb NOT NULL DEFAULT '{}',
    rate_limit_rpm integer GENERATED ALWAYS AS ((policy ->> 'rate_limit_rpm')::integer) STORED,
    created_at     timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE platform_keys (
    id           uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    product_id   uuid NOT NULL REFERENCES products ON DELETE CASCADE,
    key_hash     text NOT NULL UNIQUE,
    scopes       text[] NOT NULL,
    created_at   timestamptz NOT NULL DEFAULT now(),
    expires_at   timestamptz,
    last_used_at timestamptz
);
CREATE INDEX ON platform_keys (product_id);
COMMENT ON COLUMN platform_keys.key_hash IS 'SHA-256 hex; the key itself is never stored.';

-- Rate limits: a slot is a right to one call, used at most once in any 60 s (limits up to 600 a minute).
CREATE TABLE rate_slots (
    product_id uuid NOT NULL REFERENCES products ON DELETE CASCADE,
    slot       integer NOT NULL,
    free_at    timestamptz NOT NULL DEFAULT '-infinity',
    PRIMARY KEY (product_id, slot)
) WITH (fillfactor = 70);
CREATE INDEX ON rate_slots (product_id, free_at);

-- A block is a number of calls handed to one process for one second (limits above 600 a minute).
CREATE TABLE rate_blocks (
    id         bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    product_id uuid NOT NULL REFERENCES products ON DELETE CASCADE,
    calls      integer NOT NULL,
    free_at    timestamptz NOT NULL
);
CREATE INDEX ON rate_blocks (product_id, free_at);

-- Engines ------------------------------------------------------------------------------------------------

CREATE TABLE engines (
    id                   uuid PRIMARY KEY,
    product_id           uuid NOT NULL REFERENCES products,
    user_id              text,
    status               text NOT NULL CHECK (status IN
                         ('provisioning', 'running', 'sleeping', 'stopped', 'failed', 'destroying')),
    engine_version       text NOT NULL,
    image_id             text,
    created_at           timestamptz NOT NULL DEFAULT now(),

    -- where it lives
    location_id          uuid NOT NULL,
    host                 text,
    port                 integer,
    endpoint_port        integer,
    container_id         text,
    incarnation          integer NOT NULL DEFAULT 0,
    spec_fingerprint     text,

    -- the operation under way: what is wanted, who does it, until when
    operation            text,
    operation_id         uuid,
    operation_started_at timestamptz,
    operation_actor      text,
    operation_parameters jsonb NOT NULL DEFAULT '{}',
    deadline_at          timestamptz,
    former_status        text,
    wish                 text CHECK (wish IN ('wake', 'stop', 'destroy')),
    wish_at              timestamptz,
    wish_actor           text,
    lease_generation     bigint NOT NULL DEFAULT 0,
    lease_owner          text,
    lease_until          timestamptz,
    last_error           jsonb,

    -- keys
    key_generation       integer NOT NULL DEFAULT 1,
    applied_generation   integer NOT NULL DEFAULT 0,

    -- health
    first_healthy_at     timestamptz,
    running_since        timestamptz,
    last_health_at       timestamptz,
    boot_duration_ms     integer,
    next_probe_at        timestamptz,
    consecutive_failures integer NOT NULL DEFAULT 0,
    restart_attempt      integer NOT NULL DEFAULT 0,
    restart_ended_at     timestamptz,
    next_restart_at      timestamptz,
    restart_parked_until timestamptz,
    slept_at             timestamptz,
    keep_alive_until     timestamptz,

    CHECK ((operation IS NULL) = (lease_owner IS NULL)),
    CHECK ((operation IS NULL) = (lease_until IS NULL)),
    -- A state on the way to another one: somebody must be at it, or be asked to be.
    CHECK (status NOT IN ('provisioning', 'destroying') OR operation IS NOT NULL OR wish IS NOT NULL)
) WITH (fillfactor = 80);
CREATE UNIQUE INDEX engines_user ON engines (product_id, user_id) WHERE user_id IS NOT NULL;
CREATE UNIQUE INDEX engines_port ON engines (location_id, port) WHERE port IS NOT NULL;
CREATE UNIQUE INDEX engines_short_id ON engines (left(replace(id::text, '-', ''), 12));
CREATE INDEX engines_order ON engines (product_id, created_at, id) WHERE user_id IS NOT NULL;
CREATE INDEX engines_lease ON engines (location_id, lease_until) WHERE operation IS NOT NULL;
CREATE INDEX engines_newest ON engines (location_id, created_at DESC);
CREATE INDEX engines_wish ON engines (location_id) WHERE wish IS NOT NULL;
COMMENT ON COLUMN engines.user_id IS 'NULL: an engine of the warm pool.';
COMMENT ON COLUMN engines.port IS 'The allocated host port, for life; NULL where none is published.';
COMMENT ON COLUMN engines.operation_id IS 'Of the operation under way, or of the last one.';
COMMENT ON COLUMN engines.operation_parameters IS 'What the call asked of it, for whoever takes it over.';
COMMENT ON COLUMN engines.last_error IS 'Why the last operation failed: {code, message, details}.';
COMMENT ON COLUMN engines.applied_generation IS 'The key generation that the engine itself is known to have.';

-- Keys from the one that the engine has to the newest one, in ciphertext.
CREATE TABLE engine_keys (
    engine_id     uuid NOT NULL REFERENCES engines ON DELETE CASCADE,
    generation    integer NOT NULL,
    key_hash      text NOT NULL,
    key_enc       text NOT NULL,
    master_key_id text NOT NULL,
    overlap_until timestamptz,
    PRIMARY KEY (engine_id, generation)
);
CREATE INDEX ON engine_keys (master_key_id);
COMMENT ON COLUMN engine_keys.overlap_until IS 'When a newer key has replaced it: until when it stays valid.';

-- Written in batches, apart from the wide rows above. Activity survives a restart of every process.
CREATE TABLE activity (
    engine_id     uuid PRIMARY KEY REFERENCES engines ON DELETE CASCADE,
    last_admit_at timestamptz NOT NULL
) WITH (fillfactor = 50);

-- A destroyed engine, so that a left-over object of it can be told from somebody else's.
CREATE TABLE tombstones (
    engine_id    uuid PRIMARY KEY,
    product_id   uuid NOT NULL,
    user_id      text,
    location_id  uuid NOT NULL,
    incarnation  integer NOT NULL,
    destroyed_at timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX ON tombstones (product_id, user_id);

CREATE TABLE idempotency_keys (
    product_id uuid NOT NULL REFERENCES products ON DELETE CASCADE,
    key        text NOT NULL,
    body_hash  text NOT NULL,
    engine_id  uuid NOT NULL REFERENCES engines ON DELETE CASCADE,
    created_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (product_id, key)
);
CREATE INDEX ON idempotency_keys (engine_id);
CREATE INDEX ON idempotency_keys (created_at);

-- Audit --------------------------------------------------------------------------------------------------

-- Rows are inserted without a position; a sequencer gives committed rows seq, prev_hash and hash.
CREATE TABLE audit_log (
    id          bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    timestamp   timestamptz NOT NULL DEFAULT now(),
    product_id  uuid,
    user_id     text,
    engine_id   uuid,
    action      text NOT NULL,
    actor       text NOT NULL DEFAULT 'system',
    status      text,
    metadata    jsonb NOT NULL DEFAULT '{}',
    duration_ms integer,
    chain       text GENERATED ALWAYS AS (coalesce(product_id::text, 'system')) STORED,
    seq         bigint,
    prev_hash   text,
    hash        text
) WITH (fillfactor = 80);
CREATE UNIQUE INDEX audit_log_chain ON audit_log (chain, seq) WHERE seq IS NOT NULL;
CREATE INDEX audit_log_unsequenced ON audit_log (chain, id) WHERE seq IS NULL;
CREATE INDEX audit_log_timestamp ON audit_log (timestamp);
CREATE INDEX audit_log_action ON audit_log (product_id, action, timestamp);
CREATE INDEX audit_log_engine ON audit_log (engine_id, id);
CREATE INDEX audit_log_user ON audit_log (product_id, user_id, id);

CREATE TABLE audit_heads (
    chain       text PRIMARY KEY,
    seq         bigint NOT NULL,
    hash        text NOT NULL,
    anchor_seq  bigint NOT NULL DEFAULT 0,
    anchor_hash text NOT NULL DEFAULT ''
);
COMMENT ON COLUMN audit_heads.anchor_seq IS 'The last row that retention removed; the chain begins after it.';

-- One row per product, user, reason and minute, with a count: a refusal must not cost a row each.
CREATE TABLE admit_denials (
    product_id uuid NOT NULL REFERENCES products ON DELETE CASCADE,
    user_id    text NOT NULL,
    reason     text NOT NULL,
    minute     timestamptz NOT NULL,
    count      integer NOT NULL,
    PRIMARY KEY (product_id, user_id, reason, minute)
);

CREATE TABLE audit_totals (
    product_id uuid NOT NULL,
    action     text NOT NULL,
    count      bigint NOT NULL,
    PRIMARY KEY (product_id, action)
);
COMMENT ON TABLE audit_totals IS 'Lifetime counts of rows that retention removed.';
