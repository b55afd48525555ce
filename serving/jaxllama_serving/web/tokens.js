// An answer token by token: its probability as colour, what else could have stood there, and a way to go on from it.

import { element } from "./markdown.js";

// From the first that the probability reaches; the last is everything below.
const LEVELS = [
  [0.9, "sure"],
  [0.5, "likely"],
  [0.2, "open"],
  [0.05, "unlikely"],
  [0, "rare"],
];

/** What an answer keeps of a token that the API describes. */
export const tokenOf = ({ token, bytes, logprob, top_logprobs: top }) => ({
  bytes: bytes ?? [...new TextEncoder().encode(token)],
  logprob,
  top: (top ?? []).map((other) => ({ bytes: other.bytes ?? [...new TextEncoder().encode(other.token)], logprob: other.logprob })),
});

/** The text of tokens, or null if they end within a character. */
export function textOf(tokens) {
  try {
    return new TextDecoder("utf-8", { fatal: true }).decode(Uint8Array.from(tokens.flatMap(({ bytes }) => bytes)));
  } catch {
    return null;
  }
}

const shown = (token) => (textOf([token]) ?? token.bytes.map((byte) => `\\x${byte.toString(16).padStart(2, "0")}`).join("")).replaceAll("\n", "⏎\n");
const named = (token) => `“${shown(token).replaceAll("\n", "")}”`;
const percent = ({ logprob }) => `${(Math.exp(logprob) * 100).toFixed(1)} %`;

/** Draws the tokens into `target`. `onContinue(tokens)` is called with those that a new branch begins with. */
export function drawTokens(target, tokens, onContinue) {
  const line = element("div", "tokens");
  line.setAttribute("role", "group");
  line.setAttribute("aria-label", "Tokens. Left and right move, Enter shows the alternatives.");
  const card = element("div", "alternatives");
  card.setAttribute("aria-live", "polite");
  const hint = element("p", "help");
  hint.textContent = "The warmer, the less likely. Choose a token to see what else could have stood there.";
  card.append(hint);
  const buttons = tokens.map((token, index) => {
    const level = LEVELS.find(([least]) => Math.exp(token.logprob) >= least)[1];
    const node = Object.assign(element("button", `token ${level}`), { type: "button", textContent: shown(token), tabIndex: index ? -1 : 0 });
    node.title = [token, ...token.top.filter((other) => other.bytes.join() !== token.bytes.join())].map((other) => `${named(other)} ${percent(other)}`).join("\n");
    node.addEventListener("click", () => {
      for (const other of buttons) other.removeAttribute("aria-pressed");
      node.setAttribute("aria-pressed", "true");
      focusOn(index);
      drawAlternatives(card, tokens, index, onContinue);
    });
    return node;
  });
  const focusOn = (index) => {
    buttons.forEach((node, i) => (node.tabIndex = i === index ? 0 : -1));
    buttons[index].focus();
  };
  line.addEventListener("keydown", (event) => {
    const at = buttons.indexOf(document.activeElement);
    const next = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: buttons.length - 1 }[event.key];
    if (at < 0 || next === undefined || !buttons[next]) return;
    event.preventDefault();
    focusOn(next);
  });
  line.append(...buttons);
  target.replaceChildren(line, card);
}

function drawAlternatives(card, tokens, index, onContinue) {
  const token = tokens[index];
  const title = element("p");
  title.textContent = `Token ${index + 1} of ${tokens.length}: ${named(token)}, ${percent(token)}`;
  const list = element("ul");
  for (const other of token.top) {
    const item = element("li");
    const node = Object.assign(element("button", "quiet small"), { type: "button", textContent: `${named(other)} ${percent(other)}` });
    const start = [...tokens.slice(0, index), { ...other, top: token.top }];
    node.setAttribute("aria-label", `Continue with ${named(other)}, ${percent(other)}`);
    // Half a character cannot be sent as text.
    node.disabled = textOf(start) === null;
    node.addEventListener("click", () => onContinue(start));
    item.append(node);
    list.append(item);
  }
  const hint = element("p", "help");
  hint.textContent = token.top.length ? "Choose one to continue the answer from it, as a branch of its own." : "No alternatives came with this token.";
  card.replaceChildren(title, list, hint);
}
