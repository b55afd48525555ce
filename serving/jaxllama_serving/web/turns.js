// How the messages of a conversation look. Each is a list item; what is done with it comes in as `on`.

import { ApiProblem } from "./api.js";
import { copyText, element, render } from "./markdown.js";
import { drawTokens } from "./tokens.js";

export function button(label, onClick, className = "") {
  const node = Object.assign(element("button", className), { type: "button", textContent: label });
  node.addEventListener("click", () => onClick(node));
  return node;
}

function spoken(text) {
  return Object.assign(element("span", "hidden"), { textContent: text });
}

/** "‹ 2 of 3 ›" where a message has branches beside it. */
function branches({ index, count, step }, what) {
  const box = element("span", "branches");
  if (count < 2) return box;
  const move = (label, by, text) => {
    const node = button(text, () => step(by));
    node.setAttribute("aria-label", label);
    return node;
  };
  const place = element("span");
  place.textContent = `${index + 1} of ${count}`;
  box.setAttribute("role", "group");
  box.setAttribute("aria-label", `Branches of this ${what}`);
  box.append(move("Previous branch", -1, "‹"), place, move("Next branch", 1, "›"));
  return box;
}

// What the user says ---------------------------------------------------------------------------------------------

/** `on`: `branch` ({index, count, step}) and `edit(text)`, which answers anew in a branch. */
export function drawUser(turn, on) {
  const node = element("li", "turn user");
  const fill = () => {
    const bubble = element("div", "bubble");
    bubble.append(spoken("You: "), turn.content);
    const parts = turn.content ? [bubble] : [];
    if (turn.files?.length) parts.push(drawFiles(turn.files));
    const actions = element("div", "actions");
    actions.append(branches(on.branch, "message"), button("Edit", () => drawEditor(node, turn, on.edit, fill)));
    node.replaceChildren(...parts, actions);
  };
  fill();
  return node;
}

function drawFiles(files) {
  const list = element("ul", "files");
  for (const { name, text } of files) {
    const item = element("li");
    const details = element("details");
    const summary = element("summary");
    summary.textContent = `${name}, ${text.length.toLocaleString()} characters`;
    const body = element("pre");
    body.tabIndex = 0;
    body.textContent = text;
    details.append(summary, body);
    item.append(details);
    list.append(item);
  }
  return list;
}

function drawEditor(node, turn, onSend, onCancel) {
  const box = element("div", "editor");
  const field = element("textarea");
  field.value = turn.content;
  field.rows = Math.min(8, turn.content.split("\n").length + 1);
  field.setAttribute("aria-label", "Edit your message");
  const cancel = () => {
    onCancel();
    node.querySelector(".actions > button").focus();
  };
  const send = () => (field.value.trim() || turn.files?.length) && onSend(field.value.trim());
  field.addEventListener("keydown", (event) => {
    if (event.key === "Escape") {
      event.stopPropagation();
      cancel();
    } else if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      send();
    }
  });
  const actions = element("div", "actions");
  actions.append(button("Cancel", cancel), button("Send again", send, "main"));
  box.append(field, actions);
  node.replaceChildren(box);
  field.focus();
}

// What a tool says -----------------------------------------------------------------------------------------------

export function drawToolResult(turn) {
  const node = element("li", "turn tool");
  const details = element("details", "reasoning");
  const summary = element("summary");
  summary.append(Object.assign(element("span"), { textContent: `Result of ${turn.name ?? "a tool"}` }));
  const inner = element("div", "inner");
  inner.textContent = turn.content;
  details.append(summary, inner);
  node.append(details);
  return node;
}

// What the model says --------------------------------------------------------------------------------------------

/** A message that may still grow: returns its nodes, for `updateAssistant`. */
export function drawAssistant() {
  const node = element("li", "turn assistant");
  const details = element("details", "reasoning live");
  details.hidden = true;
  const summary = element("summary");
  const title = element("span");
  title.textContent = "Thinking…";
  summary.append(title);
  const inner = element("div", "inner");
  details.append(summary, inner);
  const text = element("div", "text");
  const calls = element("div", "calls");
  const waiting = element("div", "waiting");
  waiting.append(spoken("Waiting for the first token"), element("i"), element("i"), element("i"));
  const actions = element("div", "actions");
  const stats = element("div", "stats");
  actions.append(stats);
  node.append(spoken("Assistant: "), details, text, calls, waiting, actions);
  node.setAttribute("aria-busy", "true");
  return { node, details, title, inner, text, calls, waiting, actions, stats };
}

/** Draws what has come since the last call; with `turn.done` also what can be done with it. */
export function updateAssistant(view, turn, on) {
  const { node, details, title, inner, text, waiting, stats } = view;
  const answering = Boolean(turn.content || turn.calls?.length);
  if (turn.reasoning) {
    if (details.hidden) details.open = !turn.done;
    details.hidden = false;
    inner.textContent = turn.reasoning;
    if ((answering || turn.done) && details.classList.contains("live")) {
      details.classList.remove("live");
      if (answering) details.open = false;
      title.textContent = turn.stats?.thoughtMs ? `Thought for ${seconds(turn.stats.thoughtMs)}` : "Thoughts";
    }
  }
  if (!view.showsTokens) render(text, turn.content);
  waiting.hidden = Boolean(turn.done || answering || turn.reasoning);
  drawStats(stats, turn.stats ?? {});
  if (!turn.done || !node.hasAttribute("aria-busy")) return;
  node.removeAttribute("aria-busy");
  if (turn.problem) text.after(drawProblem(turn.problem, on));
  else if (!turn.content && !turn.reasoning && !turn.calls?.length) {
    text.replaceChildren(Object.assign(element("p", "empty"), { textContent: "The answer is empty." }));
  }
  drawCalls(view.calls, turn, on);
  const actions = [branches(on.branch, "answer")];
  if (turn.content) actions.push(button("Copy", (self) => copyText(turn.content, self)));
  if (turn.tokens?.length) actions.push(tokensButton(view, turn, on));
  if (!turn.problem) actions.push(button("Retry", on.retry, "retry"));
  stats.before(...actions);
}

function tokensButton(view, turn, on) {
  const toggle = button("Tokens", () => {
    view.showsTokens = !view.showsTokens;
    toggle.setAttribute("aria-pressed", String(view.showsTokens));
    view.text.blocks = [];
    if (view.showsTokens) drawTokens(view.text, turn.tokens, on.continueFrom);
    else render(view.text, turn.content);
  });
  toggle.setAttribute("aria-pressed", "false");
  return toggle;
}

/** The model's calls of tools, and for those without a result a field to answer them by hand. */
function drawCalls(target, turn, on) {
  const open = on.isLast && turn.calls?.length && !turn.problem;
  const fields = [];
  target.replaceChildren();
  for (const call of turn.calls ?? []) {
    const box = element("div", "call");
    const name = element("p");
    name.append("Calls ", Object.assign(element("code"), { textContent: call.name }));
    const args = element("pre");
    args.tabIndex = 0;
    args.textContent = pretty(call.args);
    box.append(name, args);
    if (open) {
      const label = element("label");
      label.append(`Result of ${call.name}`);
      const field = element("textarea");
      field.rows = 2;
      label.append(field);
      fields.push(field);
      box.append(label);
    }
    target.append(box);
  }
  if (!open) return;
  const send = () => on.answerCalls(turn.calls.map((call, i) => ({ callId: call.id, name: call.name, content: fields[i].value })));
  target.append(button(fields.length > 1 ? "Send the results" : "Send the result", send, "quiet small"));
}

function pretty(json) {
  try {
    return JSON.stringify(JSON.parse(json), null, 2);
  } catch {
    return json;
  }
}

const seconds = (ms) => (ms < 1000 ? `${ms.toFixed(0)} ms` : `${(ms / 1000).toFixed(1)} s`);

function drawStats(node, { tokens, promptTokens, firstMs, perSecond, accepted, note }) {
  const parts = [];
  if (perSecond > 0) parts.push(`${perSecond.toFixed(perSecond < 10 ? 1 : 0)} tokens/s`);
  if (firstMs !== undefined) parts.push(`first after ${seconds(firstMs)}`);
  if (tokens) parts.push(`${promptTokens} in, ${tokens} out`);
  if (accepted > 0) parts.push(`${(tokens / (tokens - accepted)).toFixed(1)} tokens a step`);
  node.replaceChildren(...parts.map((text) => Object.assign(element("span"), { textContent: text })));
  if (note) node.append(Object.assign(element("span", "note"), { textContent: note }));
}

/** What went wrong, as it is kept with the message. */
export function problemOf(error) {
  const { status = 0, code = null, param = null, requestId = null } = error;
  const message = error instanceof ApiProblem ? error.message : "The page itself failed. Reload it and try again.";
  return { message, status, code, param, requestId };
}

function drawProblem(problem, on) {
  const node = element("div", "problem");
  node.setAttribute("role", "alert");
  const needsKey = problem.status === 401;
  const busy = problem.status === 429 || problem.status === 503;
  const title = element("strong");
  title.textContent = needsKey ? "This server needs an API key" : busy ? "The server is busy" : "That did not work";
  const message = element("p");
  message.textContent = problem.message;
  const detail = element("p", "detail");
  const id = problem.message.includes(problem.requestId) ? null : problem.requestId;
  detail.textContent = [problem.status && `status ${problem.status}`, problem.code, problem.param, id].filter(Boolean).join(" · ");
  node.append(title, message);
  if (detail.textContent) node.append(detail);
  if (needsKey) node.append(keyForm(on.useKey));
  else node.append(button("Try again", on.retry, "quiet small"));
  return node;
}

function keyForm(onKey) {
  const box = element("form");
  const field = Object.assign(element("input"), { type: "password", placeholder: "API key", autocomplete: "off" });
  field.setAttribute("aria-label", "API key");
  const save = Object.assign(element("button", "quiet small"), { type: "submit", textContent: "Use this key" });
  box.append(field, save);
  box.addEventListener("submit", (event) => {
    event.preventDefault();
    onKey(field.value.trim());
  });
  return box;
}
