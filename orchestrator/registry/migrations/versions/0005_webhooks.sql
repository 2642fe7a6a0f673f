-- What is still to be delivered stands in the audit log, after `seq`: there is no queue that could grow.
CREATE TABLE webhooks (
    id               uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    product_id       uuid NOT NULL REFERENCES products ON DELETE CASCADE,
    url              text NOT NULL,
    events           text[] NOT NULL,
    secret_enc       text NOT NULL,
    master_key_id    text NOT NULL,
    created_at       timestamptz NOT NULL DEFAULT now(),
    seq              bigint NOT NULL,
    attempts         integer NOT NULL DEFAULT 0,
    next_attempt_at  timestamptz NOT NULL DEFAULT now(),
    lease_generation bigint NOT NULL DEFAULT 0,
    lease_until      timestamptz
) WITH (fillfactor = 70);
CREATE INDEX ON webhooks (product_id);
COMMENT ON COLUMN webhooks.seq IS 'The last row of the product''s chain that was dealt with.';
COMMENT ON COLUMN webhooks.attempts IS 'Of the row after it that failed so far.';
COMMENT ON COLUMN webhooks.events IS 'Actions; empty: all.';

CREATE TABLE webhook_deliveries (
    webhook_id       uuid NOT NULL REFERENCES webhooks ON DELETE CASCADE,
    seq              bigint NOT NULL,
    action           text NOT NULL,
    status           text NOT NULL CHECK (status IN ('pending', 'delivered', 'parked')),
    attempts         integer NOT NULL,
    first_attempt_at timestamptz NOT NULL,
    last_attempt_at  timestamptz NOT NULL,
    next_attempt_at  timestamptz,
    response_status  integer,
    error            text,
    PRIMARY KEY (webhook_id, seq)
);
COMMENT ON TABLE webhook_deliveries IS 'What was tried: the last 200 of each webhook.';
