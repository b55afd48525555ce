// The page: one conversation, one answer at a time. tree.js has the messages, turns.js draws them.

import { ApiProblem, apiKey, listModels, streamChat } from "./api.js";
import * as chats from "./chats.js";
import { element } from "./markdown.js";
import * as settings from "./settings.js";
import { textOf, tokenOf } from "./tokens.js";
import * as tree from "./tree.js";
import { button, drawAssistant, drawToolResult, drawUser, problemOf, updateAssistant } from "./turns.js";

const $ = (id) => document.getElementById(id);
const [thread, scroll, prompt, form, status] = ["thread", "scroll", "prompt", "composer", "status"].map($);
const NARROW = matchMedia("(max-width: 860px)");
const MEDIUM = matchMedia("(max-width: 1180px)");
const MAX_FILE_BYTES = 1_000_000;

let chat = tree.newChat();
let running = null; // the AbortController of the answer in progress
let follows = true; // whether the view stays at the bottom
let files = []; // attached to the message that is being written
let models = [];

// Conversation ---------------------------------------------------------------------------------------------------

function ask(text, attached = []) {
  tree.add(chat, tree.leaf(chat), { role: "user", content: text, ...(attached.length && { files: attached }) });
  follows = true;
  answer();
}

/** Streams an answer to what is active; with `start` (tokens) one that begins with these. */
async function answer(start = []) {
  let fields = settings.requestFields();
  const above = tree.path(chat);
  const messages = [...settings.systemMessages(), ...tree.messagesOf(above)];
  const prefix = start.length ? textOf(start) : "";
  if (prefix) {
    messages.push({ role: "assistant", content: prefix });
    // What continues an answer is text: no call of a tool, no grammar that began before.
    fields = { ...fields, continue_final_message: true, tools: undefined, response_format: undefined };
  }
  const turn = tree.add(chat, tree.leaf(chat), { role: "assistant", content: prefix, reasoning: "", stats: {}, tokens: [...start] });
  running = new AbortController();
  redraw();
  toBottom();
  say("Answering");
  const clock = { sent: performance.now() };
  try {
    for await (const chunk of streamChat({ model: $("model").value, messages, ...fields }, running.signal)) take(turn, chunk, clock);
    say("The answer is complete");
  } catch (error) {
    if (error.name === "AbortError") {
      turn.stats.note = "stopped";
      say("Stopped");
    } else {
      turn.problem = problemOf(error);
      say(`Error: ${turn.problem.message}`);
      if (!(error instanceof ApiProblem)) console.error(error);
    }
  }
  running = null;
  turn.done = true;
  redraw();
  await keep();
}

function take(turn, chunk, clock) {
  const now = performance.now();
  const { delta = {}, finish_reason: reason, logprobs } = chunk.choices[0] ?? {};
  const text = (delta.content ?? "") + (delta.reasoning_content ?? "");
  if (delta.reasoning_content) clock.thinking ??= now;
  if ((delta.content || delta.tool_calls?.length) && clock.thinking) turn.stats.thoughtMs ??= now - clock.thinking;
  turn.content += delta.content ?? "";
  turn.reasoning += delta.reasoning_content ?? "";
  for (const call of delta.tool_calls ?? []) {
    turn.calls ??= [];
    const known = (turn.calls[call.index] ??= { id: call.id, name: "", args: "" });
    known.name += call.function?.name ?? "";
    known.args += call.function?.arguments ?? "";
  }
  turn.tokens.push(...(logprobs?.content ?? []).map(tokenOf));
  if (reason === "length") turn.stats.note = "cut at the token limit";
  const tokens = chunk.usage?.completion_tokens ?? 0;
  if (text && clock.first === undefined) Object.assign(clock, { first: now, firstTokens: tokens });
  if (tokens) {
    turn.stats.tokens = tokens;
    turn.stats.promptTokens = chunk.usage.prompt_tokens;
    turn.stats.accepted = chunk.usage.completion_tokens_details?.accepted_draft_tokens ?? 0;
  }
  if (clock.first !== undefined) {
    turn.stats.firstMs = clock.first - clock.sent;
    // Tokens after the first chunk over the time after it: what decoding alone does.
    if (text && now - clock.first > 50) turn.stats.perSecond = ((tokens - clock.firstTokens) * 1000) / (now - clock.first);
  }
  schedule(turn);
}

/** Whether an answer can be asked for: none is running, and the settings are sound (else it says what is not). */
function isReady() {
  if (running) return false;
  try {
    settings.requestFields();
    return true;
  } catch (error) {
    notify(error.message);
    return false;
  }
}

/** Another answer to the same message, as a branch beside `turn`. */
function retry(turn) {
  if (!isReady()) return;
  chat.active[turn.parent] = undefined;
  follows = true;
  answer();
}

function edit(turn, text) {
  if (!isReady()) return;
  tree.add(chat, turn.parent, { role: "user", content: text, ...(turn.files && { files: turn.files }) });
  follows = true;
  answer();
}

function answerCalls(results) {
  if (!isReady()) return;
  for (const result of results) tree.add(chat, tree.leaf(chat), { role: "tool", ...result });
  follows = true;
  answer();
}

function continueFrom(turn, start) {
  if (!isReady()) return;
  chat.active[turn.parent] = undefined;
  answer(start);
}

// Drawing --------------------------------------------------------------------------------------------------------

const views = new Map(); // of the answers on the screen, by their message's id

/** Draws the active branch. The nodes of answers stay, so that what is unfolded stays so. */
function redraw() {
  const nodes = tree.path(chat);
  const shown = new Set(nodes.map(({ id }) => id));
  for (const id of views.keys()) if (!shown.has(id)) views.delete(id);
  const last = nodes.at(-1);
  thread.replaceChildren(...nodes.map((turn) => draw(turn, turn === last)));
  refresh();
  if (follows) toBottom();
}

function draw(turn, isLast) {
  const all = tree.siblings(chat, turn);
  const step = (by) => {
    if (running) return;
    tree.move(chat, turn, by);
    follows = false;
    redraw();
    keep();
  };
  const branch = { index: all.indexOf(turn.id), count: all.length, step };
  if (turn.role === "user") return drawUser(turn, { branch, edit: (text) => edit(turn, text) });
  if (turn.role === "tool") return drawToolResult(turn);
  const on = {
    branch,
    isLast,
    retry: () => retry(turn),
    answerCalls,
    continueFrom: (start) => continueFrom(turn, start),
    useKey: async (key) => {
      setKey(key);
      await connect();
      retry(turn);
    },
  };
  // A finished answer is drawn once more when it is no longer the last, or has got branches.
  const key = JSON.stringify([isLast, branch.index, branch.count, Boolean(turn.done)]);
  let view = views.get(turn.id);
  if (!view || view.key !== key) {
    const before = view;
    view = { ...drawAssistant(), key, showsTokens: false, on };
    views.set(turn.id, view);
    updateAssistant(view, turn, on);
    if (before) view.details.open = before.details.open;
  }
  return view.node;
}

let frame = 0;
function schedule(turn) {
  frame ||= requestAnimationFrame(() => {
    frame = 0;
    const view = views.get(turn.id);
    if (!view || turn.done) return;
    updateAssistant(view, turn, view.on);
    drawContext();
    if (follows) toBottom();
  });
}

function refresh() {
  document.body.classList.toggle("busy", Boolean(running));
  $("welcome").hidden = tree.leaf(chat) !== "";
  $("send").setAttribute("aria-label", running ? "Stop" : "Send");
  $("send").disabled = !running && !prompt.value.trim() && !files.length;
  for (const node of thread.querySelectorAll(".actions button, .calls button")) node.disabled = Boolean(running);
  document.title = chat.title ? `${chat.title} · jaxllama` : "jaxllama chat";
  drawContext();
  drawChats();
}

/** How much of the context the conversation has used, as the server counted it. */
function drawContext() {
  const { promptTokens = 0, tokens = 0 } = tree.path(chat).findLast(({ stats }) => stats?.tokens)?.stats ?? {};
  const used = promptTokens + tokens;
  const room = models.find(({ id }) => id === $("model").value)?.max_model_len;
  $("context").hidden = !used || !room;
  if (!used || !room) return;
  Object.assign($("context-meter"), { max: room, value: used, high: 0.9 * room });
  $("context-text").textContent = `${used.toLocaleString()} of ${room.toLocaleString()} tokens of context`;
}

function say(text) {
  status.textContent = text;
}

let notice = 0;
/** Says something to everybody: on the screen for a while, and aloud. */
function notify(text) {
  say(text);
  $("notice").textContent = text;
  $("notice").hidden = false;
  clearTimeout(notice);
  notice = setTimeout(() => ($("notice").hidden = true), 8000);
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

// Chats ----------------------------------------------------------------------------------------------------------

async function keep() {
  if (!(await chats.keep(chat))) notify("This browser has no room for the chat: export it, or delete others.");
  drawChats();
}

function show(other) {
  running?.abort();
  chat = other;
  views.clear();
  follows = true;
  redraw();
  if (MEDIUM.matches) openPanel("chats", false);
  prompt.focus();
}

function drawChats() {
  chats.drawList($("chat-list"), chat, $("find").value, {
    open: show,
    rename: (other, title) => {
      other.title = title;
      keep().then(refresh);
    },
    remove: async (other) => {
      await chats.remove(other);
      show(tree.newChat());
    },
  });
  $("export-all").disabled = !chats.find().length;
}

$("find").addEventListener("input", drawChats);
$("new-chat").addEventListener("click", () => show(tree.newChat()));
$("export-all").addEventListener("click", () => chats.download(chats.find(), "jaxllama chats"));
$("import").addEventListener("change", async () => {
  const [file] = $("import").files;
  $("import").value = "";
  try {
    const added = await chats.importFile(file);
    if (added.length) show(added[0]);
    notify(added.length === 1 ? "One chat was imported." : `${added.length} chats were imported.`);
  } catch (error) {
    notify(error.message);
  }
});

// Composer -------------------------------------------------------------------------------------------------------

form.addEventListener("submit", (event) => {
  event.preventDefault();
  if (running) return running.abort();
  const text = prompt.value.trim();
  if ((!text && !files.length) || !isReady()) return;
  const attached = files;
  prompt.value = "";
  attach([]);
  grow();
  ask(text, attached);
});
prompt.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  if (!running) form.requestSubmit();
});
prompt.addEventListener("input", () => {
  grow();
  $("send").disabled = !running && !prompt.value.trim() && !files.length;
});

/** For browsers without `field-sizing`: the field grows with its text. */
function grow() {
  if (CSS.supports("field-sizing", "content")) return;
  prompt.style.height = "auto";
  prompt.style.height = `${prompt.scrollHeight + 2}px`;
}

$("attach").addEventListener("change", async () => {
  const chosen = [...$("attach").files];
  $("attach").value = "";
  for (const file of chosen) {
    const text = file.size <= MAX_FILE_BYTES ? await readText(file) : null;
    if (text === null) notify(`${file.name} was not attached: it must be text in UTF-8 of at most a megabyte.`);
    else attach([...files, { name: file.name, text }]);
  }
  prompt.focus();
});

async function readText(file) {
  try {
    const text = new TextDecoder("utf-8", { fatal: true }).decode(await file.arrayBuffer());
    return text.includes("\0") ? null : text;
  } catch {
    return null;
  }
}

function attach(list) {
  files = list;
  $("attached").replaceChildren(
    ...files.map((file) => {
      const item = element("li");
      const remove = button("×", () => attach(files.filter((other) => other !== file)));
      remove.setAttribute("aria-label", `Remove ${file.name}`);
      item.append(file.name, remove);
      return item;
    }),
  );
  $("attached").hidden = !files.length;
  $("send").disabled = !running && !prompt.value.trim() && !files.length;
}

$("ideas").addEventListener("click", (event) => {
  const idea = event.target.closest("button");
  if (idea && isReady()) ask(idea.textContent);
});

// The frame around it --------------------------------------------------------------------------------------------

/** Opens or closes a panel, "chats" or "settings". Where it lies over the conversation, one is open at a time. */
function openPanel(name, open) {
  document.body.classList.toggle(`${name}-closed`, !open);
  $(`toggle-${name}`).setAttribute("aria-expanded", String(open));
  const lies = { chats: MEDIUM.matches, settings: NARROW.matches };
  const other = name === "chats" ? "settings" : "chats";
  if (open && lies[name] && lies[other] && !document.body.classList.contains(`${other}-closed`)) openPanel(other, false);
  $("scrim").hidden = !["chats", "settings"].some((each) => lies[each] && !document.body.classList.contains(`${each}-closed`));
}
for (const name of ["chats", "settings"]) {
  $(`toggle-${name}`).addEventListener("click", () => {
    const open = document.body.classList.contains(`${name}-closed`);
    openPanel(name, open);
    if (open) $(name).querySelector("button, input, textarea").focus();
  });
  $(`close-${name}`).addEventListener("click", () => closePanel(name));
}
function closePanel(name) {
  openPanel(name, false);
  $(`toggle-${name}`).focus();
}
$("scrim").addEventListener("click", closeLying);
function closeLying() {
  if (MEDIUM.matches && !document.body.classList.contains("chats-closed")) closePanel("chats");
  if (NARROW.matches && !document.body.classList.contains("settings-closed")) closePanel("settings");
}
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  if (running) running.abort();
  else closeLying();
});
MEDIUM.addEventListener("change", () => openPanel("chats", !MEDIUM.matches));
NARROW.addEventListener("change", () => openPanel("settings", !NARROW.matches));
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
$("model").addEventListener("change", drawContext);

/** Asks for the model names; shows the key field when the server wants one, and a banner while it is away. */
async function connect() {
  const select = $("model");
  try {
    models = await listModels();
    const chosen = select.value;
    select.replaceChildren(...models.map(({ id }) => new Option(id, id, false, id === chosen)));
    select.disabled = models.length < 2;
    $("key-field").hidden = !apiKey.get();
    $("away").hidden = true;
    drawContext();
  } catch (error) {
    select.replaceChildren(new Option(error.status === 401 ? "API key needed" : "not connected", "default"));
    $("away").hidden = error.status !== 0;
    if (error.status === 401) {
      $("key-field").hidden = false;
      openPanel("settings", true);
      $("api-key").focus();
    } else {
      setTimeout(connect, 3000);
    }
  }
}

settings.setUp();
setKey(apiKey.get());
openPanel("chats", !MEDIUM.matches);
openPanel("settings", !NARROW.matches);
refresh();
connect();
prompt.focus();
chats.open().then((kept) => {
  if (!kept) notify("This browser keeps no chats: they last as long as this tab. Export what you want to keep.");
  drawChats();
});
// Where the browser allows it (https, or this machine) the page opens without its server, too.
navigator.serviceWorker?.register("sw.js").catch(() => {});
