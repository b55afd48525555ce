// The page: a conversation, one answer at a time. A turn is {role, content, reasoning, ...} and draws itself once.

import { ApiProblem, apiKey, listModels, streamChat } from "./api.js";
import { copyText, element, render } from "./markdown.js";
import * as settings from "./settings.js";

const $ = (id) => document.getElementById(id);
const [thread, scroll, prompt, form, status] = ["thread", "scroll", "prompt", "composer", "status"].map($);
const NARROW = matchMedia("(max-width: 860px)");

let turns = [];
let running = null; // the AbortController of the answer in progress
let follows = true; // whether the view stays at the bottom

// Conversation ---------------------------------------------------------------------------------------------------

function ask(text) {
  const turn = { role: "user", content: text };
  turns.push(turn);
  turn.node = thread.appendChild(drawUser(turn));
  follows = true;
  answer();
}

/** Streams an answer to the conversation as it stands. */
async function answer() {
  const turn = { role: "assistant", content: "", reasoning: "", stats: {} };
  turn.view = drawAssistant(turn);
  turn.node = thread.appendChild(turn.view.node);
  const messages = [...settings.systemMessages(), ...turns.map(({ role, content }) => ({ role, content }))];
  turns.push(turn);
  running = new AbortController();
  refresh();
  toBottom();
  say("Answering");
  const clock = { sent: performance.now() };
  try {
    const body = { model: $("model").value, messages, ...settings.requestFields() };
    for await (const chunk of streamChat(body, running.signal)) take(turn, chunk, clock);
    say("The answer is complete");
  } catch (error) {
    if (error.name === "AbortError") {
      turn.stats.note = "stopped";
      say("Stopped");
    } else {
      turn.problem = error;
      say(`Error: ${error.message}`);
    }
  }
  running = null;
  turn.done = true;
  update(turn);
  refresh();
}

function take(turn, chunk, clock) {
  const now = performance.now();
  const { delta = {}, finish_reason: reason } = chunk.choices[0] ?? {};
  const text = (delta.content ?? "") + (delta.reasoning_content ?? "");
  turn.content += delta.content ?? "";
  turn.reasoning += delta.reasoning_content ?? "";
  if (reason === "length") turn.stats.note = "cut at the token limit";
  const tokens = chunk.usage?.completion_tokens ?? 0;
  if (text && clock.first === undefined) Object.assign(clock, { first: now, firstTokens: tokens });
  if (tokens) {
    turn.stats.tokens = tokens;
    turn.stats.promptTokens = chunk.usage.prompt_tokens;
  }
  if (clock.first !== undefined) {
    turn.stats.firstMs = clock.first - clock.sent;
    // Tokens after the first chunk over the time after it: what decoding alone does.
    if (text && now - clock.first > 50) turn.stats.perSecond = ((tokens - clock.firstTokens) * 1000) / (now - clock.first);
  }
  schedule(turn);
}

function retry() {
  if (running) return;
  while (turns.length && turns.at(-1).role === "assistant") turns.pop().node.remove();
  if (!turns.length) return refresh();
  follows = true;
  answer();
}

/** Drops a message and what follows it, and asks again with the new text. */
function resend(turn, text) {
  for (const old of turns.splice(turns.indexOf(turn))) old.node.remove();
  ask(text);
}

function clear() {
  running?.abort();
  turns = [];
  thread.replaceChildren();
  refresh();
  prompt.focus();
}

// Drawing --------------------------------------------------------------------------------------------------------

function button(label, onClick, className = "") {
  const node = Object.assign(element("button", className), { type: "button", textContent: label });
  node.addEventListener("click", () => onClick(node));
  return node;
}

function drawUser(turn) {
  const node = element("li", "turn user");
  const who = element("span", "hidden");
  who.textContent = "You: ";
  const bubble = element("div", "bubble");
  bubble.append(who, turn.content);
  const actions = element("div", "actions");
  actions.append(button("Edit", () => !running && edit(turn)));
  node.append(bubble, actions);
  return node;
}

function edit(turn) {
  const box = element("div", "editor");
  const field = element("textarea");
  field.value = turn.content;
  field.rows = Math.min(8, turn.content.split("\n").length + 1);
  field.setAttribute("aria-label", "Edit your message");
  const stop = () => {
    const fresh = drawUser(turn);
    turn.node.replaceWith(fresh);
    turn.node = fresh;
    fresh.querySelector("button").focus();
  };
  const save = () => field.value.trim() && !running && resend(turn, field.value.trim());
  field.addEventListener("keydown", (event) => {
    if (event.key === "Escape") stop();
    else if (isSend(event)) {
      event.preventDefault();
      save();
    }
  });
  const actions = element("div", "actions");
  actions.append(button("Cancel", stop), button("Send again", save, "main"));
  box.append(field, actions);
  turn.node.replaceChildren(box);
  field.focus();
}

function drawAssistant() {
  const node = element("li", "turn assistant");
  const who = element("span", "hidden");
  who.textContent = "Assistant: ";
  const details = element("details", "reasoning live");
  details.hidden = true;
  const summary = element("summary");
  const title = element("span");
  title.textContent = "Thinking…";
  summary.append(title);
  const inner = element("div", "inner");
  details.append(summary, inner);
  const text = element("div", "text");
  const waiting = element("div", "waiting");
  waiting.setAttribute("aria-label", "Waiting for the first token");
  waiting.append(element("i"), element("i"), element("i"));
  const actions = element("div", "actions");
  const stats = element("div", "stats");
  actions.append(stats);
  node.append(who, details, text, waiting, actions);
  node.setAttribute("aria-busy", "true");
  return { node, details, title, inner, text, waiting, actions, stats };
}

let frame = 0;
function schedule(turn) {
  frame ||= requestAnimationFrame(() => {
    frame = 0;
    update(turn);
  });
}

function update(turn) {
  const { node, details, title, inner, text, waiting, actions, stats } = turn.view;
  const answering = Boolean(turn.content);
  if (turn.reasoning) {
    if (details.hidden) details.open = true;
    details.hidden = false;
    inner.textContent = turn.reasoning;
    if ((answering || turn.done) && details.classList.contains("live")) {
      details.classList.remove("live");
      details.open = !answering;
      title.textContent = "Thoughts";
    }
  }
  render(text, turn.content);
  waiting.hidden = turn.done || answering || Boolean(turn.reasoning);
  drawStats(stats, turn.stats);
  if (turn.done && node.hasAttribute("aria-busy")) {
    node.removeAttribute("aria-busy");
    if (turn.problem) text.after(drawProblem(turn.problem));
    else if (!turn.content && !turn.reasoning) {
      const empty = element("p", "empty");
      empty.textContent = "The answer is empty.";
      text.replaceChildren(empty);
    }
    if (turn.content) actions.prepend(button("Copy", (self) => copyText(turn.content, self)));
    const again = button("Retry", retry, "retry");
    if (!turn.problem) stats.before(again);
  }
  if (follows) toBottom();
}

function drawStats(node, { tokens, promptTokens, firstMs, perSecond, note }) {
  const parts = [];
  if (perSecond > 0) parts.push(`${perSecond.toFixed(perSecond < 10 ? 1 : 0)} tokens/s`);
  if (firstMs !== undefined) parts.push(firstMs < 1000 ? `first after ${firstMs.toFixed(0)} ms` : `first after ${(firstMs / 1000).toFixed(1)} s`);
  if (tokens) parts.push(`${promptTokens} in, ${tokens} out`);
  node.replaceChildren(...parts.map((text) => Object.assign(element("span"), { textContent: text })));
  if (note) node.append(Object.assign(element("span", "note"), { textContent: note }));
}

function drawProblem(problem) {
  const node = element("div", "problem");
  node.setAttribute("role", "alert");
  const needsKey = problem.status === 401;
  const title = element("strong");
  title.textContent = needsKey ? "This server needs an API key" : problem.status === 429 || problem.status === 503 ? "The server is busy" : "That did not work";
  const message = element("p");
  message.textContent = problem instanceof ApiProblem ? problem.message : "The page itself failed. Reload it and try again.";
  const detail = element("p", "detail");
  detail.textContent = [problem.status && `status ${problem.status}`, problem.code, problem.param, problem.message.includes(problem.requestId) ? null : problem.requestId].filter(Boolean).join(" · ");
  node.append(title, message);
  if (detail.textContent) node.append(detail);
  if (needsKey) node.append(keyForm());
  else node.append(button("Try again", retry, "quiet small"));
  return node;
}

function keyForm() {
  const box = element("form");
  const field = Object.assign(element("input"), { type: "password", placeholder: "API key", autocomplete: "off" });
  field.setAttribute("aria-label", "API key");
  const save = Object.assign(element("button", "quiet small"), { type: "submit", textContent: "Use this key" });
  box.append(field, save);
  box.addEventListener("submit", async (event) => {
    event.preventDefault();
    setKey(field.value.trim());
    await connect();
    if (turns.length) retry();
  });
  return box;
}

// The frame around it --------------------------------------------------------------------------------------------

function refresh() {
  document.body.classList.toggle("busy", Boolean(running));
  $("welcome").hidden = turns.length > 0;
  $("new-chat").disabled = !turns.length;
  $("send").setAttribute("aria-label", running ? "Stop" : "Send");
  $("send").disabled = !running && !prompt.value.trim();
  // Only the last answer can be retried.
  const retries = [...thread.querySelectorAll(".retry")];
  retries.forEach((node, i) => (node.hidden = Boolean(running) || i < retries.length - 1));
  for (const node of thread.querySelectorAll(".user .actions button")) node.disabled = Boolean(running);
}

function say(text) {
  status.textContent = text;
}

function toBottom() {
  scroll.scrollTop = scroll.scrollHeight;
}

scroll.addEventListener("scroll", () => {
  follows = scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight < 60;
  $("jump").hidden = follows;
});
$("jump").addEventListener("click", () => {
  follows = true;
  toBottom();
});

const isSend = (event) => event.key === "Enter" && !event.shiftKey && !event.isComposing;

form.addEventListener("submit", (event) => {
  event.preventDefault();
  if (running) return running.abort();
  const text = prompt.value.trim();
  if (!text) return;
  prompt.value = "";
  grow();
  ask(text);
});
prompt.addEventListener("keydown", (event) => {
  if (!isSend(event)) return;
  event.preventDefault();
  if (!running) form.requestSubmit();
});
prompt.addEventListener("input", () => {
  grow();
  refresh();
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  if (running) running.abort();
  else if (NARROW.matches) openSettings(false);
});

/** For browsers without `field-sizing`: the field grows with its text. */
function grow() {
  if (CSS.supports("field-sizing", "content")) return;
  prompt.style.height = "auto";
  prompt.style.height = `${prompt.scrollHeight + 2}px`;
}

$("ideas").addEventListener("click", (event) => {
  const idea = event.target.closest("button");
  if (idea && !running) ask(idea.textContent);
});
$("new-chat").addEventListener("click", clear);

function openSettings(open) {
  document.body.classList.toggle("settings-closed", !open);
  $("scrim").hidden = !open;
  $("toggle-settings").setAttribute("aria-expanded", String(open));
}
$("toggle-settings").addEventListener("click", () => openSettings(document.body.classList.contains("settings-closed")));
for (const id of ["close-settings", "scrim"]) {
  $(id).addEventListener("click", () => {
    openSettings(false);
    $("toggle-settings").focus();
  });
}
$("reset").addEventListener("click", settings.reset);
$("controls").addEventListener("submit", (event) => event.preventDefault());

function setKey(value) {
  apiKey.set(value);
  $("api-key").value = value;
}
$("api-key").addEventListener("change", () => {
  setKey($("api-key").value.trim());
  connect();
});

/** Asks for the model names; shows the key field when the server wants one. */
async function connect() {
  const select = $("model");
  try {
    const models = await listModels();
    const chosen = select.value;
    select.replaceChildren(...models.map(({ id }) => new Option(id, id, false, id === chosen)));
    select.disabled = models.length < 2;
    $("key-field").hidden = !apiKey.get();
  } catch (error) {
    select.replaceChildren(new Option(error.status === 401 ? "API key needed" : "not connected", "default"));
    if (error.status === 401) {
      $("key-field").hidden = false;
      openSettings(true);
      $("api-key").focus();
    } else {
      setTimeout(connect, 3000);
    }
  }
}

settings.setUp();
setKey(apiKey.get());
openSettings(!NARROW.matches);
refresh();
connect();
prompt.focus();
