// The sampling controls: what they are, how they are drawn and kept, and the request fields they give.

import { element } from "./markdown.js";

const STORE = "jaxllama.settings";

// `usual` is where the slider rests while the field is empty; an empty field is not sent.
const NUMBERS = [
  { name: "temperature", label: "Temperature", min: 0, max: 2, step: 0.05, usual: 1 },
  { name: "top_p", label: "Top-p", min: 0.01, max: 1, step: 0.01, usual: 1 },
  { name: "min_p", label: "Min-p", min: 0, max: 1, step: 0.01, usual: 0 },
  { name: "top_k", label: "Top-k", min: 0, max: 999, step: 1, usual: 0, rest: "off" },
  { name: "max_tokens", label: "Max tokens", min: 0, max: 1000000, step: 1, plain: true, rest: "no limit" },
  { name: "presence_penalty", label: "Presence penalty", min: -2, max: 2, step: 0.1, usual: 0 },
  { name: "frequency_penalty", label: "Frequency penalty", min: -2, max: 2, step: 0.1, usual: 0 },
  { name: "repetition_penalty", label: "Repetition penalty", min: 0.01, max: 5, step: 0.01, slider: [0.5, 2], usual: 1 },
  { name: "seed", label: "Seed", min: 0, max: Number.MAX_SAFE_INTEGER, step: 1, plain: true, rest: "random" },
];

const texts = () => ["system", "stop", "schema", "tools"].map((id) => document.getElementById(id));
const tokens = () => document.getElementById("show-tokens");

/** Builds the controls and restores what was kept. */
export function setUp() {
  const box = document.getElementById("numbers");
  for (const spec of NUMBERS) box.append(control(spec));
  let kept = {};
  try {
    kept = JSON.parse(localStorage.getItem(STORE)) ?? {};
  } catch {
    // Kept by another version, or storage is off: begin with the defaults.
  }
  for (const field of fields()) {
    if (typeof kept[field.id] === "string") field.value = kept[field.id];
    field.dispatchEvent(new Event("input"));
    field.addEventListener("input", keep);
  }
  tokens().checked = kept["show-tokens"] === true;
  tokens().addEventListener("change", keep);
  for (const id of ["schema", "tools"]) {
    const field = document.getElementById(id);
    field.addEventListener("input", () => field.removeAttribute("aria-invalid"));
  }
}

/** Empties every control. */
export function reset() {
  for (const field of fields()) {
    field.value = "";
    field.dispatchEvent(new Event("input"));
  }
  tokens().checked = false;
  keep();
}

/** Returns the request fields that the filled controls stand for. Throws Error, in words for the user, for bad JSON. */
export function requestFields() {
  const result = {};
  for (const { name } of NUMBERS) {
    const field = document.getElementById(name);
    if (field.value.trim() !== "") result[name] = Number(field.value);
  }
  const stop = document.getElementById("stop").value.split("\n").filter((line) => line !== "");
  if (stop.length) result.stop = stop;
  const schema = json("schema", "The answer's schema");
  if (schema) result.response_format = { type: "json_schema", json_schema: { name: "answer", schema } };
  const given = json("tools", "The tools");
  // One or several, with OpenAI's envelope or without.
  if (given) result.tools = [given].flat().map((tool) => (tool?.type === "function" ? tool : { type: "function", function: tool }));
  if (tokens().checked) Object.assign(result, { logprobs: true, top_logprobs: 5 });
  return result;
}

function json(id, what) {
  const field = document.getElementById(id);
  if (!field.value.trim()) return null;
  try {
    const value = JSON.parse(field.value);
    if (value === null || typeof value !== "object") throw new Error("no object");
    return value;
  } catch (error) {
    field.setAttribute("aria-invalid", "true");
    throw new Error(`${what} in the settings are not JSON: ${error.message}`);
  }
}

/** Returns the system message as a list of none or one. */
export function systemMessages() {
  const content = document.getElementById("system").value.trim();
  return content ? [{ role: "system", content }] : [];
}

const fields = () => [...NUMBERS.map(({ name }) => document.getElementById(name)), ...texts()];

function keep() {
  try {
    const values = fields().map((field) => [field.id, field.value]);
    localStorage.setItem(STORE, JSON.stringify({ ...Object.fromEntries(values), "show-tokens": tokens().checked }));
  } catch {
    // Private windows may refuse storage; the controls still work.
  }
}

function control({ name, label, min, max, step, usual, slider, plain, rest }) {
  const row = element("div", "number");
  const title = element("label");
  title.htmlFor = name;
  title.textContent = label;
  const field = Object.assign(element("input"), { type: "number", id: name, min, max, step: plain ? 1 : "any" });
  field.placeholder = rest ?? String(usual);
  field.inputMode = Number.isInteger(step) ? "numeric" : "decimal";
  row.append(title, field);
  if (plain) return row;
  const range = Object.assign(element("input"), { type: "range", step });
  [range.min, range.max] = slider ?? (name === "top_k" ? [0, 200] : [min, max]);
  range.setAttribute("aria-label", `${label} slider`);
  range.addEventListener("input", () => {
    field.value = range.value;
    keep();
  });
  field.addEventListener("input", () => (range.value = field.value === "" ? usual : field.value));
  row.append(range);
  return row;
}
