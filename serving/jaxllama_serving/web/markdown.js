// Markdown to DOM nodes, built one by one: text only ever enters through textContent, so nothing a model writes is HTML.

/** Renders `source` into `target`, keeping the nodes of blocks that did not change since the last call. */
export function render(target, source) {
  const blocks = splitBlocks(source);
  const known = target.blocks ?? [];
  let same = 0;
  while (same < known.length && same < blocks.length && known[same] === blocks[same].key) same++;
  while (target.childNodes.length > same) target.lastChild.remove();
  for (const block of blocks.slice(same)) target.append(BUILD[block.kind](block));
  target.blocks = blocks.map((block) => block.key);
}

const FENCE = /^(\s{0,3})(`{3,}|~{3,})\s*([^`\s]*)[^`]*$/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/;
const HEADING = /^(#{1,6})\s+(.*?)\s*#*$/;
const RULE = /^\s{0,3}([-*_])(\s*\1){2,}\s*$/;
const TABLE_LINE = /^\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$/;

function splitBlocks(source) {
  const lines = source.split("\n");
  const blocks = [];
  let i = 0;
  const take = (kind, rest) => blocks.push({ kind, ...rest, key: JSON.stringify([kind, rest]) });
  while (i < lines.length) {
    const line = lines[i];
    const fence = FENCE.exec(line);
    if (!line.trim()) {
      i++;
    } else if (fence) {
      const body = [];
      const end = new RegExp(`^\\s{0,3}${fence[2][0]}{${fence[2].length},}\\s*$`);
      for (i++; i < lines.length && !end.test(lines[i]); i++) body.push(lines[i]);
      i++;
      take("code", { language: fence[3], text: body.join("\n") });
    } else if (RULE.test(line)) {
      i++;
      take("rule", {});
    } else if (HEADING.test(line)) {
      const [, marks, text] = HEADING.exec(line);
      i++;
      take("heading", { level: marks.length, text });
    } else if (line.includes("|") && i + 1 < lines.length && lines[i + 1].includes("-") && TABLE_LINE.test(lines[i + 1])) {
      const rows = [cells(line)];
      for (i += 2; i < lines.length && lines[i].includes("|"); i++) rows.push(cells(lines[i]));
      take("table", { rows });
    } else if (ITEM.test(line)) {
      const items = [];
      for (; i < lines.length; i++) {
        const item = ITEM.exec(lines[i]);
        if (item) items.push({ indent: item[1].length, ordered: /\d/.test(item[2]), start: parseInt(item[2], 10), text: item[3] });
        else if (/^\s+\S/.test(lines[i])) items.at(-1).text += `\n${lines[i].trim()}`;
        else if (lines[i].trim() || !ITEM.test(lines[i + 1] ?? "")) break;
      }
      take("list", { items });
    } else if (/^\s{0,3}>/.test(line)) {
      const body = [];
      for (; i < lines.length && /^\s{0,3}>/.test(lines[i]); i++) body.push(lines[i].replace(/^\s{0,3}> ?/, ""));
      take("quote", { text: body.join("\n") });
    } else {
      const body = [];
      for (; i < lines.length && lines[i].trim() && (!body.length || !startsBlock(lines[i])); i++) body.push(lines[i]);
      take("paragraph", { text: body.join("\n") });
    }
  }
  return blocks;
}

const startsBlock = (line) => FENCE.test(line) || HEADING.test(line) || ITEM.test(line) || /^\s{0,3}>/.test(line);
const cells = (line) => line.trim().replace(/^\||\|$/g, "").split("|").map((cell) => cell.trim());

const BUILD = {
  paragraph: ({ text }) => withInline(element("p"), text),
  heading: ({ level, text }) => withInline(element(`h${Math.min(level + 2, 5)}`), text),
  rule: () => element("hr"),
  quote: ({ text }) => {
    const node = element("blockquote");
    render(node, text);
    return node;
  },
  code: ({ language, text }) => {
    const node = element("div", "code");
    const header = element("header");
    const label = element("span");
    label.textContent = language || "code";
    const copy = element("button");
    copy.type = "button";
    copy.textContent = "Copy";
    copy.addEventListener("click", () => copyText(text, copy));
    header.append(label, copy);
    const pre = element("pre");
    pre.tabIndex = 0;
    const code = element("code");
    code.textContent = text;
    pre.append(code);
    node.append(header, pre);
    return node;
  },
  table: ({ rows }) => {
    const box = element("div", "table");
    const table = element("table");
    rows.forEach((row, index) => {
      const line = element("tr");
      for (const cell of row) line.append(withInline(element(index ? "td" : "th"), cell));
      table.append(line);
    });
    box.append(table);
    return box;
  },
  list: ({ items }) => {
    const stack = [];
    for (const item of items) {
      while (stack.length > 1 && item.indent < stack.at(-1).indent) stack.pop();
      if (!stack.length || item.indent > stack.at(-1).indent + 1) {
        const list = element(item.ordered ? "ol" : "ul");
        if (item.ordered && item.start !== 1) list.start = item.start;
        stack.at(-1)?.list.lastChild?.append(list);
        stack.push({ indent: item.indent, list });
      }
      stack.at(-1).list.append(withInline(element("li"), item.text));
    }
    return stack[0].list;
  },
};

const INLINE = [
  [/^(`+)(.+?)\1(?!`)/s, (m) => Object.assign(element("code"), { textContent: m[2].replace(/^ (.*) $/s, "$1") })],
  [/^\*\*(?=\S)(.+?\S?)\*\*/s, (m) => withInline(element("strong"), m[1])],
  [/^__(?=\S)(.+?)__(?!\w)/s, (m) => withInline(element("strong"), m[1])],
  [/^~~(?=\S)(.+?)~~/s, (m) => withInline(element("del"), m[1])],
  [/^\*(?=[^\s*])([^*]*[^\s*])\*(?!\*)/s, (m) => withInline(element("em"), m[1])],
  [/^_(?=[^\s_])([^_]*[^\s_])_(?!\w)/s, (m) => withInline(element("em"), m[1])],
  [/^\[([^\]\n]+)\]\((https?:\/\/[^\s()]+(?:\([^\s()]*\)[^\s()]*)*)\)/, (m) => link(m[2], m[1])],
  [/^https?:\/\/[^\s<>()]+[^\s<>().,;:!?'"]/, (m) => link(m[0], m[0])],
  [/^\n/, () => element("br")],
];
const MARKS = new Set("`*_~[h\n");

function withInline(node, text) {
  let plain = "";
  const flush = () => {
    if (plain) node.append(document.createTextNode(plain));
    plain = "";
  };
  for (let i = 0; i < text.length; ) {
    const found = MARKS.has(text[i]) && !(/[h_]/.test(text[i]) && /\w/.test(text[i - 1] ?? "")) && match(text.slice(i));
    if (text[i] === "\\" && /[\\`*_{}[\]()#+\-.!~>|]/.test(text[i + 1] ?? "")) {
      plain += text[i + 1];
      i += 2;
    } else if (found) {
      flush();
      node.append(found.build(found.match));
      i += found.match[0].length;
    } else {
      plain += text[i++];
    }
  }
  flush();
  return node;
}

function match(text) {
  for (const [pattern, build] of INLINE) {
    const found = pattern.exec(text);
    if (found) return { match: found, build };
  }
  return null;
}

function link(url, text) {
  const node = element("a");
  node.href = url;
  node.target = "_blank";
  node.rel = "noopener noreferrer nofollow";
  node.textContent = text;
  return node;
}

/** Makes an element with a class. */
export function element(tag, className = "") {
  const node = document.createElement(tag);
  if (className) node.className = className;
  return node;
}

/** Copies `text` and says so on the button. */
export async function copyText(text, button) {
  const label = button.textContent;
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = "Copied";
  } catch {
    button.textContent = "Not allowed";
  }
  setTimeout(() => (button.textContent = label), 1500);
}
