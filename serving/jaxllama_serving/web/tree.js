// A conversation as a tree: an edit or a retry is a branch beside the old one. Plain data, so that it can be kept and exported.

const ROOT = "";

const newId = () => Array.from(crypto.getRandomValues(new Uint8Array(9)), (byte) => byte.toString(36).padStart(2, "0")).join("");

/** `nodes` by id; `children` of each id in their order, and which of them is `active`. "" is above the first message. */
export function newChat() {
  const now = Date.now();
  return { id: newId(), title: "", created: now, changed: now, nodes: {}, children: {}, active: {} };
}

/** Adds a message below `parent` (an id, "" for the first) and makes it the active one. Returns it. */
export function add(chat, parent, fields) {
  const node = { id: newId(), parent, ...fields };
  chat.nodes[node.id] = node;
  (chat.children[parent] ??= []).push(node.id);
  chat.active[parent] = node.id;
  chat.changed = Date.now();
  if (!chat.title && node.role === "user") chat.title = titleOf(node.content || node.files?.[0]?.name || "");
  return node;
}

/** The active messages from the first to the last. */
export function path(chat) {
  const nodes = [];
  for (let id = chat.active[ROOT]; id; id = chat.active[id]) nodes.push(chat.nodes[id]);
  return nodes;
}

/** The id of the last active message, "" if there is none. */
export const leaf = (chat) => path(chat).at(-1)?.id ?? ROOT;

/** The messages that stand beside `node`, itself among them. */
export const siblings = (chat, node) => chat.children[node.parent];

/** Makes the sibling that is `step` further the active one. */
export function move(chat, node, step) {
  const all = siblings(chat, node);
  chat.active[node.parent] = all[(all.indexOf(node.id) + step + all.length) % all.length];
}

/** What the API is sent for `nodes`. */
export function messagesOf(nodes) {
  return nodes.map(({ role, content, files, calls, callId }) => {
    if (role === "tool") return { role, content, tool_call_id: callId };
    if (role === "user") return { role, content: [content, ...(files ?? []).map(quoted)].filter(Boolean).join("\n\n") };
    if (!calls?.length) return { role, content };
    const tool_calls = calls.map(({ id, name, args }) => ({ id, type: "function", function: { name, arguments: args } }));
    return { role, content, tool_calls };
  });
}

/** A file as a message holds it: its name, and its text between fences longer than any in it. */
function quoted({ name, text }) {
  const longest = Math.max(2, ...[...text.matchAll(/`+/g)].map(([run]) => run.length));
  const fence = "`".repeat(longest + 1);
  return `${name}:\n${fence}\n${text.replace(/\n$/, "")}\n${fence}`;
}

function titleOf(text) {
  const line = text.trim().split("\n")[0];
  return line.length > 60 ? `${line.slice(0, 57)}…` : line;
}

/** Checks what a file holds and returns its chats, under new ids. Throws Error in words for the user. */
export function readExport(text) {
  let data;
  try {
    data = JSON.parse(text);
  } catch {
    throw new Error("This file is not JSON.");
  }
  if (data?.format !== "jaxllama-chats" || !Array.isArray(data.chats)) throw new Error("This file holds no chats of this page.");
  return data.chats.map((chat) => {
    const { nodes, children, active } = chat ?? {};
    const isObject = (value) => value !== null && typeof value === "object" && !Array.isArray(value);
    if (![nodes, children, active].every(isObject)) throw new Error("A chat in this file is damaged.");
    for (const [id, node] of Object.entries(nodes)) {
      const known = node?.id === id && (node.parent === ROOT || Object.hasOwn(nodes, node.parent));
      const listed = known && Array.isArray(children[node.parent]) && children[node.parent].includes(id);
      if (!listed || !["user", "assistant", "tool"].includes(node.role) || typeof node.content !== "string") {
        throw new Error("A chat in this file is damaged.");
      }
    }
    const ids = [...Object.values(children).flat(), ...Object.values(active)];
    if (!ids.every((id) => Object.hasOwn(nodes, id)) || hasCircle(nodes)) throw new Error("A chat in this file is damaged.");
    const title = typeof chat.title === "string" ? chat.title.slice(0, 200) : "";
    return { id: newId(), title, created: Number(chat.created) || Date.now(), changed: Number(chat.changed) || Date.now(), nodes, children, active };
  });
}

function hasCircle(nodes) {
  const limit = Object.keys(nodes).length;
  return Object.values(nodes).some((node) => {
    let depth = 0;
    for (let at = node; at && depth <= limit; at = nodes[at.parent]) depth++;
    return depth > limit;
  });
}

export const exportOf = (chats) => JSON.stringify({ format: "jaxllama-chats", version: 1, chats }, null, 1);
