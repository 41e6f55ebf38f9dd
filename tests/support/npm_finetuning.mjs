// A fine-tune by the official npm client: node npm_finetuning.mjs FOLDER_OF_NODE_MODULES BASE_URL KEY ROWS
import { createRequire } from "node:module";
import assert from "node:assert";
import fs from "node:fs";

const [folder, baseURL, apiKey, rows] = process.argv.slice(2);
const OpenAI = createRequire(`${folder}/node_modules/`)("openai").OpenAI;
const client = new OpenAI({ baseURL, apiKey });
const jobs = client.fineTuning.jobs;

async function poll(id) {
  for (let tries = 0; tries < 600; tries++) {
    const job = await jobs.retrieve(id);
    if (["succeeded", "failed", "cancelled"].includes(job.status)) return job;
    await new Promise((resolve) => setTimeout(resolve, 200));
  }
  assert.fail("the job does not end");
}

const file = await client.files.create({ file: fs.createReadStream(rows), purpose: "fine-tune" });
assert.equal(file.bytes, fs.statSync(rows).size);
const method = { type: "supervised", supervised: { hyperparameters: { n_epochs: 2, batch_size: 3 } } };
const made = await jobs.create({ model: "tiny", training_file: file.id, method, seed: 1, metadata: { k: "ü" } });
assert.equal(made.status, "validating_files");
const job = await poll(made.id);
assert.equal(job.status, "succeeded");
assert.equal(job.metadata.k, "ü");

const messages = [];
for await (const event of jobs.listEvents(job.id, { limit: 3 })) messages.push(event.message);
assert(messages.length > 10 && messages.includes("The job has successfully completed"));
const names = [];
for await (const one of jobs.checkpoints.list(job.id, { limit: 1 })) names.push(one.fine_tuned_model_checkpoint);
assert(names.length > 1 && names[0] === job.fine_tuned_model);
const table = await (await client.files.content(job.result_files[0])).text();
assert(table.startsWith("step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy\n1,"));

const second = await jobs.create({ model: "tiny", training_file: file.id });
assert.equal((await jobs.cancel(second.id)).status, "cancelled");
await assert.rejects(jobs.resume(second.id), { status: 400 });
const listed = [];
for await (const one of jobs.list({ limit: 1 })) listed.push(one.id);
assert.deepEqual(listed, [second.id, job.id]);
assert.equal((await client.models.retrieve(job.fine_tuned_model)).id, job.fine_tuned_model);
assert((await client.models.delete(job.fine_tuned_model)).deleted);
await assert.rejects(client.models.retrieve(job.fine_tuned_model), { status: 404, code: "model_not_found" });
await assert.rejects(jobs.create({ model: "gpt-4o-mini", training_file: file.id }), { code: "model_not_available" });
assert((await client.files.delete(file.id)).deleted);
console.log("good");
