// Vercel's AI SDK with its DeepInfra provider: text, stream, tools and objects.

import assert from "node:assert/strict";
import { test } from "node:test";
import { createDeepInfra } from "@ai-sdk/deepinfra";
import { generateObject, generateText, stepCountIs, streamObject, streamText, tool } from "ai";
import { z } from "zod";

const provider = createDeepInfra({ baseURL: `${process.env.JAXLLAMA_URL}/v1`, apiKey: "none" });
const model = provider("org/model");
const options = { timeout: 30_000 };
const weather = tool({
  description: "The weather of a city",
  inputSchema: z.object({ city: z.string(), days: z.number().int().min(1).max(7) }),
  execute: async ({ city, days }) => `${city}: sun for ${days} days`,
});
const question = "Weather in 'Paris' for 3 days?";

test("generateText", options, async () => {
  const { text, finishReason, usage } = await generateText({ model, prompt: "Hi", temperature: 0.5, maxOutputTokens: 50, seed: 7 });
  assert.equal(text, "You said: Hi");
  assert.equal(finishReason, "stop");
  assert.equal(usage.totalTokens, usage.inputTokens + usage.outputTokens);
});

test("generateText with a history and a system message", options, async () => {
  const messages = [
    { role: "user", content: "One" },
    { role: "assistant", content: [{ type: "reasoning", text: "Hm" }, { type: "text", text: "Two" }] },
    { role: "user", content: [{ type: "text", text: "Three" }] },
  ];
  const { text } = await generateText({ model, system: "Be brief", messages, stopSequences: ["never"], topP: 0.9, frequencyPenalty: 0.1 });
  assert.equal(text, "You said: Three");
});

test("streamText", options, async () => {
  const result = streamText({ model, prompt: "Hi" });
  let text = "", pieces = 0;
  for await (const piece of result.textStream) { text += piece; pieces += 1; }
  assert.equal(text, "You said: Hi");
  assert.ok(pieces > 1);
  assert.equal(await result.finishReason, "stop");
});

test("generateText with a tool, its result and an answer", options, async () => {
  const { text, steps } = await generateText({ model, prompt: question, tools: { weather }, stopWhen: stepCountIs(3) });
  assert.equal(steps.length, 2);
  assert.deepEqual(steps[0].toolCalls[0].input, { city: "Paris", days: 3 });
  assert.match(text, /Paris: sun for 3 days/);
});

test("streamText with a tool that is required", options, async () => {
  const result = streamText({ model, prompt: question, tools: { weather }, toolChoice: "required" });
  const calls = [];
  for await (const part of result.fullStream) {
    assert.notEqual(part.type, "error", String(part.error));
    if (part.type === "tool-call") calls.push(part);
  }
  assert.equal(calls.length, 1);
  assert.deepEqual(calls[0].input, { city: "Paris", days: 3 });
  assert.equal(await result.finishReason, "tool-calls");
});

test("generateText with a named tool", options, async () => {
  const other = tool({ description: "Another", inputSchema: z.object({}), execute: async () => "no" });
  const { toolCalls } = await generateText({ model, prompt: question, tools: { other, weather }, toolChoice: { type: "tool", toolName: "weather" } });
  assert.deepEqual(toolCalls.map((call) => call.toolName), ["weather"]);
});

const schema = z.object({ name: z.string(), steps: z.array(z.object({ minutes: z.number() })) });

test("generateObject", options, async () => {
  const { object } = await generateObject({ model, schema, prompt: "A recipe called 'Lasagne', 20 minutes" });
  assert.deepEqual(object, { name: "Lasagne", steps: [{ minutes: 20 }] });
});

test("streamObject", options, async () => {
  const { partialObjectStream, object } = streamObject({ model, schema, prompt: "A recipe called 'Lasagne', 20 minutes" });
  for await (const partial of partialObjectStream) assert.equal(typeof partial, "object");
  assert.deepEqual(await object, { name: "Lasagne", steps: [{ minutes: 20 }] });
});

test("an unknown model is an error with the server's message", options, async () => {
  await assert.rejects(generateText({ model: provider("nobody/knows"), prompt: "Hi", maxRetries: 0 }), /nobody\/knows/);
});
