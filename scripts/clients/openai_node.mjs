// OpenAI's client for JavaScript.
import { createReadStream } from "node:fs";
import { CITY, CLIP, NANO, PICTURE_URL, QUESTION, SEEING, URL_ROOT } from "./trying.mjs";
import { attempts, check, refuses, tool } from "./trying.mjs";

const { OpenAI } = await tool("openai");
const client = new OpenAI({ baseURL: `${URL_ROOT}/v1`, apiKey: "none", maxRetries: 0 });
const ask = [{ role: "user", content: QUESTION }];
const weather = { type: "function", function: { name: "weather", parameters: CITY } };
const create = (more) =>
  client.chat.completions.create({ model: NANO, messages: ask, max_tokens: 40, ...more });

await attempts({
  models: async () => check((await client.models.list()).data),
  chat: async () => check((await create()).choices[0].message.content),
  "chat, streamed": async () => {
    const stream = client.chat.completions.stream({ model: NANO, messages: ask, max_tokens: 40 });
    check(await stream.finalContent());
  },
  tools: async () => {
    const found = await create({ tools: [weather], tool_choice: "required" });
    check(found.choices[0].message.tool_calls);
  },
  "tools, streamed and run": async () => {
    const run = client.chat.completions.runTools({
      model: NANO, messages: ask, stream: true, max_tokens: 60,
      tool_choice: { type: "function", function: { name: "weather" } },
      tools: [{ type: "function", function: {
        name: "weather", parameters: CITY, parse: JSON.parse, function: () => "sunny" } }],
    });
    check(await run.finalFunctionToolCallResult());
  },
  schema: async () => {
    const format = { type: "json_schema", json_schema: { name: "c", schema: CITY, strict: true } };
    check(JSON.parse((await create({ response_format: format })).choices[0].message.content).city);
  },
  picture: async () => {
    const content = [{ type: "text", text: "What is it?" },
                     { type: "image_url", image_url: { url: PICTURE_URL } }];
    check((await create({ model: SEEING, messages: [{ role: "user", content }] })).choices);
  },
  responses: async () => {
    const given = { model: NANO, input: QUESTION, max_output_tokens: 40 };
    check((await client.responses.create(given)).output_text);
    check((await client.responses.stream(given).finalResponse()).output);
  },
  transcription: async () => {
    const file = createReadStream(CLIP);
    const found = await client.audio.transcriptions.create({ model: SEEING, file });
    check(typeof found.text === "string");
  },
  error: async () => refuses(() => create({ model: "absent" })),
});
