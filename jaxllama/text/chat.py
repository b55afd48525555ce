"""Chat templates: from messages to the text a model was trained on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from jaxllama.errors import ChatTemplateError, one_line
from jaxllama.text.encoding.backend import named_token, tokenizer_config
from jaxllama.text.encoding.specials import RenderedChat, Spellings, StandIns
from jaxllama.text.encoding.tokenizer import special_spellings
from jaxllama.text.messages import for_template, normalized
from jaxllama.text.reasoning import THINK, choose_tags
from jaxllama.text.sandbox import TemplateBoundError, TemplateEnvironment
from jaxllama.text.tools import Tool, ToolFormat, choose_format

__all__ = ["ChatTemplate", "RenderedChat", "has_chat_template", "load_chat_template"]

_MAX_TEMPLATE_CHARS = 1_000_000
_OWN_VARIABLES = ("messages", "tools", "documents", "add_generation_prompt")
_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


class ChatTemplate:
    """A model's chat template, and what it needs to know of the tokenizer.

    `spellings` are the special tokens' (`Tokenizer.special_tokens`), `named_tokens` the variables such as `bos_token`.
    `tool_use` is the source of a second template, for chats with tools.
    """

    def __init__(
        self,
        source: str,
        *,
        spellings: Iterable[str],
        named_tokens: Mapping[str, str] | None = None,
        tool_use: str | None = None,
        timeout_s: float = 5.0,
        max_chars: int = 8_000_000,
    ) -> None:
        """Raises: ChatTemplateError if the template does not compile."""
        if len(source) > _MAX_TEMPLATE_CHARS:
            raise ChatTemplateError(f"The chat template has {len(source)} characters, more than {_MAX_TEMPLATE_CHARS}.")
        self.source = source
        self._spellings = Spellings(spellings)
        self._named_tokens = dict(named_tokens or {})
        self._environment = TemplateEnvironment(timeout_s=timeout_s, max_chars=max_chars)
        try:
            self._template = self._environment.from_string(source)
        except Exception as error:
            raise ChatTemplateError(f"The chat template does not compile: {_message(error)}") from None
        self.variables = self._environment.variables_of(source)
        """The names that the template asks for, of what `render` may give it: `tools`, `enable_thinking` and others."""
        self.own_variables = frozenset(
            {*_OWN_VARIABLES, *_NAMED_TOKENS, *self._named_tokens, *self._environment.globals}
        )
        """The names that are not for callers to set: `render` gives them itself, or Jinja's environment has them."""
        tags = choose_tags(source, self._spellings.all)
        self.has_reasoning = tags is not None
        """Whether replies may hold reasoning: the template or the tokenizer knows tags for it."""
        self.reasoning_tags = tags or THINK
        """What is around it; `<think>`, which messages may hold too, for a model that does not reason."""
        self.tool_format = choose_format(source)
        """How the model writes calls."""
        self._names = self._environment.names_in(source)
        self._tool_use = None
        if tool_use is not None:
            bounds: dict[str, Any] = {"timeout_s": timeout_s, "max_chars": max_chars}
            self._tool_use = ChatTemplate(tool_use, spellings=spellings, named_tokens=named_tokens, **bounds)

    def variant(self, *, with_tools: bool) -> ChatTemplate:
        """The template for chats with tools, or for those without; most models have one for both."""
        return self._tool_use if with_tools and self._tool_use is not None else self

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Tool] = (),
        tool_format: ToolFormat | None = None,
        add_generation_prompt: bool = True,
        continue_last: bool = False,
        close_reasoning: bool = False,
        variables: Mapping[str, Any] = MappingProxyType({}),
    ) -> RenderedChat:
        """The prompt for `messages`.

        Messages are normalised first (`messages.normalized`). A template that knows `tools` shows them; for another
        they, calls and results are written out in `tool_format` (None: the template's own). Earlier reasoning goes to
        templates that ask for it. Special tokens that message texts spell stay ordinary text. `variables` are further
        ones that the template may ask for.

        With `continue_last` the last message, the assistant's, is not rendered but begun: the prompt ends with its
        content, or with its `reasoning_content` where it has no content. `close_reasoning` ends the reasoning before it
        begins; it does nothing for a model that does not reason.

        Raises: ChatTemplateError if the messages are malformed, or the template refuses them or exceeds its bounds.
        """
        if tools and self._tool_use is not None:
            options: dict[str, Any] = {"continue_last": continue_last, "close_reasoning": close_reasoning}
            options |= {"tools": tools, "tool_format": tool_format, "variables": variables}
            return self._tool_use.render(messages, add_generation_prompt=add_generation_prompt, **options)
        tags, keeps_last = self.reasoning_tags, continue_last and not self.has_reasoning
        plain = normalized(messages, keep_last=keeps_last, tags=tags)
        reasoning, content = "", ""
        if continue_last:
            reasoning, content = self._begun(messages, plain)
            plain = [message for message in plain if message is not plain[-1]]
        plain = for_template(plain, tools, tool_format or self.tool_format, self._names, self.variables)
        definitions = [tool.definition for tool in tools] or None
        try:
            texts = [self.source, reasoning, content, *_texts(self._named_tokens), *_texts(plain), *_texts(variables)]
            stand_ins = StandIns(self._spellings, [*texts, *_texts(definitions)])
            given = {
                **self._named_tokens,
                "tools": _protect_value(definitions, stand_ins),
                "documents": None,
                **{name: _protect_value(value, stand_ins) for name, value in variables.items()},
                "messages": [_protect(message, stand_ins) for message in plain],
                "add_generation_prompt": add_generation_prompt or continue_last,
            }
            protected = self._run(given)
        except Exception as error:
            raise ChatTemplateError(f"The chat template refuses these messages: {_message(error)}") from None
        is_open = protected.rstrip().endswith(tags.open) if self.has_reasoning else None
        if continue_last and (reasoning or content):
            protected, is_open = self._begin(protected, is_open, reasoning, content, stand_ins)
        elif close_reasoning and is_open is not None:
            protected += tags.closing if is_open else f"{tags.open}{tags.newline}{tags.closing}"
            is_open = False
        return RenderedChat(
            text=stand_ins.restore(protected),
            protected_text=protected,
            protected_spellings=self._spellings.all,
            stand_ins=stand_ins,
            starts_in_reasoning=is_open,
            continued=content or reasoning,
        )

    def _run(self, given: dict[str, Any]) -> str:
        """The rendered text. Raises: whatever the template does."""
        try:
            return self._environment.render_bounded(self._template, given)
        except TemplateBoundError:
            raise
        except Exception:
            # Of a message that only calls tools, some templates (R1's) ask whether its content is None, and others
            # (Qwen3's, Ministral's) take it for text.
            if all(message["content"] is not None for message in given["messages"]):
                raise
            messages = [{**message, "content": message["content"] or ""} for message in given["messages"]]
            return self._environment.render_bounded(self._template, {**given, "messages": messages})

    def _begun(self, messages: Sequence[Mapping[str, Any]], plain: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
        """Reasoning and content of the message to continue."""
        where, last = f"messages[{len(messages) - 1}]", plain[-1]
        if len(plain) < 2 or messages[-1].get("role") != "assistant" or last.get("tool_calls"):
            raise ChatTemplateError(
                f"{where} cannot be continued: the last message must be the assistant's, after another, without calls."
            )
        reasoning = last.get("reasoning_content", "")
        if reasoning and not self.has_reasoning:
            raise ChatTemplateError(
                f"{where}.reasoning_content cannot be continued: this model does not reason.",
                f"{where}.reasoning_content",
            )
        return reasoning, last["content"]

    def _begin(
        self, protected: str, is_open: bool | None, reasoning: str, content: str, stand_ins: StandIns
    ) -> tuple[str, bool | None]:
        """The prompt with the begun message, and what `starts_in_reasoning` is then.

        Every tag is our own, outside what users wrote.
        """
        tags = self.reasoning_tags
        if reasoning:
            protected += ("" if is_open else tags.open + tags.newline) + stand_ins.protect(reasoning)
            if not content:
                return protected, True
            protected += tags.closing
        elif is_open:
            protected += tags.closing
        # A begun answer has left its reasoning behind, and may speak of the tags.
        return protected + stand_ins.protect(content), None


def has_chat_template(folder: Path) -> bool:
    """Whether the files in `folder` hold a template, be it damaged.

    Raises: TokenizerError if tokenizer_config.json is damaged.
    """
    return (folder / "chat_template.jinja").exists() or bool(tokenizer_config(folder).get("chat_template"))


def load_chat_template(folder: Path) -> ChatTemplate:
    """The template of chat_template.jinja, or else of tokenizer_config.json.

    Of several there, the one named "default", and for chats with tools the one named "tool_use".

    Raises: ChatTemplateError if there is none, or it is damaged. TokenizerError if the tokenizer's files are.
    """
    folder = Path(folder)
    config = tokenizer_config(folder)
    source, tool_use = _find_sources(folder, config)
    named = {name: token for name in _NAMED_TOKENS if (token := named_token(config, name)) is not None}
    try:
        return ChatTemplate(source, spellings=special_spellings(folder), named_tokens=named, tool_use=tool_use)
    except ChatTemplateError as error:
        raise ChatTemplateError(f"{folder}: {error}") from None


def _find_sources(folder: Path, config: Mapping[str, Any]) -> tuple[str, str | None]:
    path = folder / "chat_template.jinja"
    if path.exists():
        try:
            return path.read_text(encoding="utf-8"), None
        except (OSError, UnicodeDecodeError) as error:
            raise ChatTemplateError(f"{path}: cannot be read: {error}") from None
    source: Any = config.get("chat_template")
    tool_use: Any = None
    if isinstance(source, list):
        source = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, dict)}
    if isinstance(source, dict):
        source, tool_use = source.get("default"), source.get("tool_use")
    if not isinstance(source, str):
        raise ChatTemplateError(f"{folder}: no chat_template.jinja, and no chat_template in tokenizer_config.json.")
    return source, tool_use if isinstance(tool_use, str) else None


def _protect(message: Mapping[str, Any], stand_ins: StandIns) -> dict[str, Any]:
    # The role is one of ours, and templates build special tokens from it: `'<|' + role + '|>'`.
    return {key: value if key == "role" else _protect_value(value, stand_ins) for key, value in message.items()}


def _protect_value(value: Any, stand_ins: StandIns) -> Any:
    if isinstance(value, str):
        return stand_ins.protect(value)
    if isinstance(value, Mapping):
        return {_protect_value(key, stand_ins): _protect_value(inner, stand_ins) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_protect_value(inner, stand_ins) for inner in value]
    return value


def _texts(value: Any) -> Iterator[str]:
    """Every text in a nested value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _texts(key)
            yield from _texts(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _texts(inner)


def _message(error: BaseException) -> str:
    """One line about an error of Jinja's, with the line of the template where it is known."""
    line = getattr(error, "lineno", None)
    return one_line(error, 500) + (f" (line {line})" if line else "")
