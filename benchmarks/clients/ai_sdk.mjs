// Vercel's AI SDK: its providers for compatible servers, for OpenAI and for Anthropic.
import assert from "node:assert/strict";
import { createAnthropic } from "@ai-sdk/anthropic";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { Output, generateText, isStepCount, streamText, tool } from "ai";
import { z } from "zod";
import { main } from "./features.mjs";
import { TEXT, Weather, tool_result, valid } from "./weather.mjs";

const MODELS = {
  compatible: (server) =>
    createOpenAICompatible({
      name: "mixtral",
      baseURL: server.v1,
      apiKey: server.key,
      includeUsage: true,
      supportsStructuredOutputs: true,
    })(server.model),
  "openai chat": (server) =>
    createOpenAI({ baseURL: server.v1, apiKey: server.key }).chat(server.model),
  "openai responses": (server) =>
    createOpenAI({ baseURL: server.v1, apiKey: server.key })(server.model),
  anthropic: (server) =>
    createAnthropic({ baseURL: server.v1, apiKey: server.key })(server.model),
};
const city = z.object({ city: z.enum(["Paris", "London"]), days: z.number().int().min(1).max(7) });
const get_weather = tool({
  description: "Gives the weather.",
  inputSchema: city,
  execute: async (input) => tool_result(input),
});
const checks = {};

for (const [name, model] of Object.entries(MODELS)) {
  const common = (server) => ({
    model: model(server),
    prompt: TEXT,
    maxOutputTokens: 300,
    maxRetries: 0,
  });
  checks[`${name}: generateText`] = async (server) => {
    const { text, usage } = await generateText({ ...common(server), system: "Be short." });
    assert.ok(text);
    assert.ok(usage.outputTokens > 0);
  };
  checks[`${name}: streamText`] = async (server) => {
    const result = streamText(common(server));
    let text = "";
    for await (const delta of result.textStream) text += delta;
    assert.ok(text);
    assert.equal(await result.text, text);
  };
  checks[`${name}: typed output`] = async (server) => {
    const result = await generateText({
      ...common(server),
      output: Output.object({ schema: Weather }),
    });
    valid(result.output);
  };
  checks[`${name}: typed output stream`] = async (server) => {
    const result = streamText({ ...common(server), output: Output.object({ schema: Weather }) });
    for await (const part of result.partialOutputStream) assert.equal(typeof part, "object");
    valid(await result.output);
  };
  checks[`${name}: tools`] = async (server) => {
    const result = await generateText({
      ...common(server),
      tools: { get_weather },
      toolChoice: { type: "tool", toolName: "get_weather" },
    });
    assert.ok(result.toolResults.length > 0);
    assert.match(result.toolResults[0].output, /days\.$/);
  };
  checks[`${name}: tools stream, then an answer`] = async (server) => {
    const result = streamText({
      ...common(server),
      tools: { get_weather },
      stopWhen: isStepCount(2),
      prepareStep: ({ stepNumber }) => ({ toolChoice: stepNumber ? "none" : { type: "tool", toolName: "get_weather" } }),
    });
    await result.consumeStream();
    const steps = await result.steps;
    assert.equal(steps.length, 2);
    assert.match(steps[0].toolResults[0].output, /days\.$/);
    assert.ok(steps[1].text);
  };
}

await main(checks);
