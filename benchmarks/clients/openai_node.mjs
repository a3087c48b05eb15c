// openai from npm: plain calls, streams, typed answers, tools and the tool runner.
import assert from "node:assert/strict";
import OpenAI from "openai";
import { zodResponseFormat, zodTextFormat } from "openai/helpers/zod";
import { main } from "./features.mjs";
import { QUESTION, SCHEMA, TEXT, Weather, tool_result, valid } from "./weather.mjs";

const FUNCTION = { name: "get_weather", description: "Gives the weather.", parameters: SCHEMA };
const TOOL = { type: "function", function: FUNCTION };
const client = (server) => new OpenAI({ baseURL: server.v1, apiKey: server.key, maxRetries: 0 });
const body = (server) => ({ model: server.model, messages: QUESTION, max_tokens: 300 });

await main({
  async models(server) {
    const listed = await client(server).models.list();
    assert.deepEqual(listed.data.map((model) => model.id), [server.model]);
  },
  async chat(server) {
    const answer = await client(server).chat.completions.create(body(server));
    assert.ok(answer.choices[0].message.content);
  },
  async "chat stream"(server) {
    const stream = await client(server).chat.completions.create({ ...body(server), stream: true });
    let text = "";
    for await (const chunk of stream) text += chunk.choices[0]?.delta?.content ?? "";
    assert.ok(text);
  },
  async "chat stream helper"(server) {
    const stream = client(server).chat.completions.stream(body(server));
    let text = "";
    stream.on("content", (delta) => (text += delta));
    assert.equal(await stream.finalContent(), text);
  },
  async parse(server) {
    const answer = await client(server).chat.completions.parse({
      ...body(server),
      response_format: zodResponseFormat(Weather, "weather"),
    });
    valid(answer.choices[0].message.parsed);
  },
  async "tools named"(server) {
    const answer = await client(server).chat.completions.create({
      ...body(server),
      tools: [TOOL],
      tool_choice: { type: "function", function: { name: "get_weather" } },
    });
    const [call] = answer.choices[0].message.tool_calls;
    valid(call.function.arguments);
  },
  async "tool runner"(server) {
    const runner = client(server).chat.completions.runTools({
      ...body(server),
      parallel_tool_calls: false,
      tool_choice: { type: "function", function: { name: "get_weather" } },
      tools: [
        { type: "function", function: { ...FUNCTION, parse: JSON.parse, function: tool_result } },
      ],
    });
    assert.match(await runner.finalFunctionToolCallResult(), /days\.$/);
  },
  async completions(server) {
    const answer = await client(server).completions.create({
      model: server.model,
      prompt: "The capital",
      max_tokens: 8,
    });
    assert.ok(answer.choices[0].text);
  },
  async responses(server) {
    const answer = await client(server).responses.create({ model: server.model, input: TEXT });
    assert.ok(answer.output_text);
  },
  async "responses stream"(server) {
    const stream = await client(server).responses.create({
      model: server.model,
      input: TEXT,
      max_output_tokens: 16,
      stream: true,
    });
    const types = [];
    for await (const event of stream) types.push(event.type);
    assert.equal(types[0], "response.created");
    assert.ok(types.includes("response.output_text.delta"));
  },
  async "responses parse"(server) {
    const answer = await client(server).responses.parse({
      model: server.model,
      input: TEXT,
      text: { format: zodTextFormat(Weather, "weather") },
    });
    valid(answer.output_parsed);
  },
  async "responses tools"(server) {
    const answer = await client(server).responses.create({
      model: server.model,
      input: TEXT,
      tools: [{ type: "function", strict: true, ...FUNCTION }],
      tool_choice: "required",
      parallel_tool_calls: false,
    });
    const [call] = answer.output.filter((item) => item.type === "function_call");
    valid(call.arguments);
  },
  async errors(server) {
    const refused = client(server).chat.completions.create({ ...body(server), temperature: 9 });
    await assert.rejects(refused, (error) => error.status === 400 && error.param === "temperature");
  },
});
