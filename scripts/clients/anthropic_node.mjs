// Anthropic's client for JavaScript.
import { CITY, NANO, PICTURE_DATA, QUESTION, SEEING, URL_ROOT } from "./trying.mjs";
import { attempts, check, refuses, tool } from "./trying.mjs";

const { Anthropic } = await tool("@anthropic-ai/sdk");
const client = new Anthropic({ baseURL: URL_ROOT, apiKey: "none", maxRetries: 0 });
const ask = [{ role: "user", content: QUESTION }];
const tools = [{ name: "weather", input_schema: CITY }];
const given = (more) => ({ model: NANO, messages: ask, max_tokens: 60, ...more });

await attempts({
  models: async () => check((await client.models.list()).data),
  messages: async () => check((await client.messages.create(given())).content[0].text),
  "messages, streamed": async () => check(await client.messages.stream(given()).finalText()),
  tools: async () => {
    const found = await client.messages.create(given({ tools, tool_choice: { type: "any" } }));
    check(found.content.some((block) => block.type === "tool_use"));
  },
  "tools, streamed": async () => {
    const named = { tools, tool_choice: { type: "tool", name: "weather" } };
    check((await client.messages.stream(given(named)).finalMessage()).content.at(-1).input.city);
  },
  schema: async () => {
    const held = { output_config: { format: { type: "json_schema", schema: CITY } } };
    check(JSON.parse((await client.messages.create(given(held))).content[0].text).city);
  },
  picture: async () => {
    const source = { type: "base64", media_type: "image/png", data: PICTURE_DATA };
    const content = [{ type: "image", source }, { type: "text", text: "What is it?" }];
    const messages = [{ role: "user", content }];
    check(await client.messages.create(given({ model: SEEING, messages })));
  },
  "count of tokens": async () =>
    check((await client.messages.countTokens({ model: NANO, messages: ask })).input_tokens),
  error: async () => refuses(() => client.messages.create(given({ model: "absent" }))),
});
