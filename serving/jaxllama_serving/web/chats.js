// The chats of this browser: kept in IndexedDB, and the list of them beside the conversation.

import { element } from "./markdown.js";
import { exportOf, readExport } from "./tree.js";

const NAME = "jaxllama";
const STORE = "chats";

let database = null; // null: this browser keeps nothing (a private window, say)
const all = new Map();

/** Reads what is kept. Works without storage: chats then last as long as the tab. */
export async function open() {
  try {
    database = await new Promise((resolve, reject) => {
      const request = indexedDB.open(NAME, 1);
      request.onupgradeneeded = () => request.result.createObjectStore(STORE, { keyPath: "id" });
      request.onsuccess = () => resolve(request.result);
      request.onerror = () => reject(request.error);
    });
    for (const chat of await run("readonly", (store) => store.getAll())) all.set(chat.id, chat);
  } catch {
    database = null;
  }
  return database !== null;
}

function run(mode, action) {
  return new Promise((resolve, reject) => {
    const request = action(database.transaction(STORE, mode).objectStore(STORE));
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

/** Keeps a chat that has messages. Resolves to false if it could not be written (storage is full, say). */
export async function keep(chat) {
  if (!Object.keys(chat.nodes).length) return true;
  all.set(chat.id, chat);
  if (!database) return true;
  try {
    await run("readwrite", (store) => store.put(chat));
    return true;
  } catch {
    return false;
  }
}

export async function remove(chat) {
  all.delete(chat.id);
  if (database) await run("readwrite", (store) => store.delete(chat.id)).catch(() => {});
}

/** Those whose title or messages hold `words`, the newest first. */
export function find(words = "") {
  const wanted = words.trim().toLowerCase();
  const holds = (chat) =>
    !wanted || [chat.title, ...Object.values(chat.nodes).map(({ content }) => content)].some((text) => text.toLowerCase().includes(wanted));
  return [...all.values()].filter(holds).sort((a, b) => b.changed - a.changed);
}

/** Gives the browser a file to save. */
export function download(chats, name) {
  const link = element("a");
  link.href = URL.createObjectURL(new Blob([exportOf(chats)], { type: "application/json" }));
  link.download = `${name.replace(/[^\p{L}\p{N} _-]+/gu, "").trim().slice(0, 60) || "chat"}.json`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

/** Adds the chats of a file. Throws Error in words for the user. */
export async function importFile(file) {
  const chats = readExport(await file.text());
  for (const chat of chats) await keep(chat);
  return chats;
}

/** Draws the list into `target`. `on` has `open(chat)`, `rename(chat, title)` and `remove(chat)`. */
export function drawList(target, current, words, on) {
  const found = find(words);
  target.replaceChildren(...found.map((chat) => drawChat(chat, chat.id === current.id, on)));
  if (!found.length) {
    const empty = element("li", "help");
    empty.textContent = words ? "No chat has these words." : "Chats are kept in this browser.";
    target.append(empty);
  }
}

function drawChat(chat, isCurrent, on) {
  const item = element("li", isCurrent ? "chat current" : "chat");
  const open = Object.assign(element("button", "open"), { type: "button", textContent: chat.title || "Untitled" });
  open.title = new Date(chat.changed).toLocaleString();
  if (isCurrent) open.setAttribute("aria-current", "true");
  open.addEventListener("click", () => on.open(chat));
  item.append(open);
  if (!isCurrent) return item;
  const actions = element("div", "actions");
  const action = (label, onClick) => {
    const node = Object.assign(element("button"), { type: "button", textContent: label });
    node.setAttribute("aria-label", `${label} this chat`);
    node.addEventListener("click", onClick);
    actions.append(node);
  };
  action("Rename", () => rename(item, open, chat, on));
  action("Export", () => download([chat], chat.title));
  action("Delete", () => confirm(`Delete “${chat.title || "Untitled"}”? It is in this browser only.`) && on.remove(chat));
  item.append(actions);
  return item;
}

function rename(item, open, chat, on) {
  const field = Object.assign(element("input"), { value: chat.title, maxLength: 200 });
  field.setAttribute("aria-label", "Title of this chat");
  let ended = false;
  const end = (title) => {
    if (ended) return;
    ended = true;
    on.rename(chat, title);
  };
  field.addEventListener("keydown", (event) => {
    if (event.key === "Enter") end(field.value.trim() || chat.title);
    if (event.key === "Escape") {
      event.stopPropagation();
      end(chat.title);
    }
  });
  field.addEventListener("blur", () => end(field.value.trim() || chat.title));
  open.replaceWith(field);
  field.select();
}
