// Ollama's client for JavaScript.
import { CITY, NANO, PICTURE, QUESTION, SEEING, URL_ROOT } from "./trying.mjs";
import { attempts, check, refuses, tool } from "./trying.mjs";

const { Ollama } = await tool("ollama");
const client = new Ollama({ host: URL_ROOT });
const ask = [{ role: "user", content: QUESTION }];
const given = (more) => ({ model: NANO, messages: ask, options: { num_predict: 40 }, ...more });

await attempts({
  models: async () => {
    check((await client.list()).models);
    check((await client.show({ model: SEEING })).capabilities.includes("vision"));
  },
  chat: async () => check((await client.chat(given())).message.content),
  "chat, streamed": async () => {
    let text = "";
    for await (const part of await client.chat(given({ stream: true }))) text += part.message.content;
    check(text);
  },
  generate: async () => check((await client.generate({ model: NANO, prompt: QUESTION })).response),
  tools: async () => {
    const tools = [{ type: "function", function: { name: "weather", parameters: CITY } }];
    check((await client.chat(given({ tools }))).message);
  },
  schema: async () => check(JSON.parse((await client.chat(given({ format: CITY }))).message.content).city),
  picture: async () => {
    const messages = [{ role: "user", content: "What is it?", images: [new Uint8Array(PICTURE)] }];
    check((await client.chat(given({ model: SEEING, messages }))).done);
  },
  error: async () => refuses(() => client.chat(given({ model: "absent" })), "absent"),
});
