// Enqueues a job in a transaction, with npm's pg.
//
//	npm ci && DATABASE_URL=postgres://… node enqueue.js

import pg from "pg";

const order = { number: "A-17", net_cents: 1000 };

async function enqueue(client, kind, payload) {
  const { rows } = await client.query("SELECT carpool.enqueue($1, $2, queue => $3) AS id", [kind, payload, "low"]);
  return rows[0].id;
}

const client = new pg.Client({ connectionString: process.env.DATABASE_URL });
await client.connect();
try {
  await client.query("BEGIN"); // your own statements go into the transaction too
  let job = await enqueue(client, "order:book", order);
  await client.query("COMMIT");
  console.log("committed", job);

  await client.query("BEGIN");
  job = await enqueue(client, "order:book", order);
  await client.query("ROLLBACK");
  console.log("rolled back", job);
} finally {
  await client.end(); // an open transaction is rolled back
}
