CREATE TABLE IF NOT EXISTS orders (
    number    text   PRIMARY KEY,
    net_cents bigint NOT NULL,
    tax_cents bigint NOT NULL
);
