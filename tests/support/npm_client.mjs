// The official npm client against a gateway: node npm_client.mjs FOLDER_OF_NODE_MODULES BASE_URL KEY
import { createRequire } from "node:module";
import assert from "node:assert";

const [folder, baseURL, apiKey] = process.argv.slice(2);
const OpenAI = createRequire(`${folder}/node_modules/`)("openai").OpenAI;
const client = new OpenAI({ baseURL, apiKey, maxRetries: 0 });

const names = [];
for await (const model of client.models.list()) names.push(model.id);
assert(names.includes("first"));
const ask = { model: "first", messages: [{ role: "user", content: "a b c" }] };
const answer = await client.chat.completions.create(ask);
assert.equal(answer.choices[0].message.content, "a b c");
let text = "";
for await (const chunk of await client.chat.completions.create({ ...ask, stream: true })) text += chunk.choices[0].delta.content;
assert.equal(text, "abc");
await assert.rejects(client.chat.completions.create({ ...ask, temperature: 9 }), { status: 400, param: "temperature" });
await assert.rejects(client.chat.completions.create({ ...ask, model: "nothing" }), { status: 404, code: "model_not_found" });
await assert.rejects(new OpenAI({ baseURL, apiKey: "no", maxRetries: 0 }).models.list(), { status: 401 });
console.log("good");
