// The question, the typed answer and the tool that the programs for node share.
import assert from "node:assert/strict";
import { z } from "zod";

export const TEXT = "What is the weather in Paris?";
export const QUESTION = [{ role: "user", content: TEXT }];
export const Weather = z.object({
  city: z.enum(["Paris", "London"]),
  days: z.number().int().min(1).max(7),
});
export const SCHEMA = {
  type: "object",
  properties: {
    city: { type: "string", enum: ["Paris", "London"] },
    days: { type: "integer", minimum: 1, maximum: 7 },
  },
  required: ["city", "days"],
  additionalProperties: false,
};

export function valid(value) {
  return Weather.parse(typeof value === "string" ? JSON.parse(value) : value);
}

export function tool_result({ city, days }) {
  assert.ok(city && days);
  return `${city}: sun for ${days} days.`;
}
