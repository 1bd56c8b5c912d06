// Vercel's AI SDK with its provider for servers that speak OpenAI's dialect.
import { CITY, NANO, PICTURE, QUESTION, SEEING, URL_ROOT } from "./trying.mjs";
import { attempts, check, refuses, tool } from "./trying.mjs";

const { Output, generateText, jsonSchema, stepCountIs, streamText, tool: made } = await tool("ai");
const { createOpenAICompatible } = await tool("@ai-sdk/openai-compatible");
const phimlx = createOpenAICompatible({
  name: "phimlx", baseURL: `${URL_ROOT}/v1`, supportsStructuredOutputs: true, includeUsage: true,
});
const given = (more) => ({
  model: phimlx(NANO), prompt: QUESTION, maxOutputTokens: 60, maxRetries: 0, ...more });
const weather = made({
  description: "Tell it.", inputSchema: jsonSchema(CITY), execute: () => "sunny" });
const forced = (more) => given({ tools: { weather }, toolChoice: "required", ...more });
const output = Output.object({ schema: jsonSchema(CITY) });

await attempts({
  text: async () => {
    const found = await generateText(given());
    check(found.text);
    check(found.usage.outputTokens);
  },
  "text, streamed": async () => {
    const found = streamText(given());
    check(await found.text);
    check((await found.usage).outputTokens);
  },
  tools: async () =>
    check((await generateText(forced({ stopWhen: stepCountIs(2) }))).steps[0].toolResults),
  "tools, streamed": async () => check(await streamText(forced()).toolResults),
  schema: async () => check((await generateText(given({ output }))).output.city),
  "schema, streamed": async () => check((await streamText(given({ output })).output).city),
  picture: async () => {
    const content = [{ type: "text", text: "What is it?" }, { type: "image", image: PICTURE }];
    const shown = { prompt: undefined, messages: [{ role: "user", content }] };
    check((await generateText(given({ model: phimlx(SEEING), ...shown }))).finishReason);
  },
  completion: async () =>
    check((await generateText(given({ model: phimlx.completionModel(NANO) }))).finishReason),
  error: async () => refuses(() => generateText(given({ model: phimlx("absent") }))),
});
