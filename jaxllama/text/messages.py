"""Messages of a chat as templates want them, whoever wrote them and however: the one place that normalises them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jaxllama.errors import ChatTemplateError, quote
from jaxllama.text.reasoning import THINK, ReasoningTags, split_reasoning
from jaxllama.text.tools import Tool, ToolFormat, as_templates_expect, in_system_message, write_out

REASONING_NAMES = ("reasoning_content", "reasoning", "thinking")
"""What messages, and the templates that ask for it, call an earlier answer's reasoning."""
_ROLES = ("system", "developer", "user", "assistant", "tool")


def normalized(
    messages: Sequence[Mapping[str, Any]], *, keep_last: bool = False, tags: ReasoningTags = THINK
) -> list[dict[str, Any]]:
    """Checked copies of `messages`: content is one text, developers are systems, and the system message comes first.

    Several system messages become one, in their order, with a blank line between.

    An assistant's reasoning is in `reasoning_content` alone, whatever name it had, or where it was: between `tags`
    at the start of the content is split off. With `keep_last` the last message's content stays as it is. Content is
    None only where the assistant calls tools.

    Raises: ChatTemplateError, whose param is the path of what is malformed.
    """
    if not messages:
        raise ChatTemplateError("messages is empty: at least one is needed.", "messages")
    plain = [
        _plain(message, f"messages[{i}]", tags if not keep_last or i < len(messages) - 1 else None)
        for i, message in enumerate(messages)
    ]
    system = [message for message in plain if message["role"] == "system"]
    return _joined(system) + [message for message in plain if message["role"] != "system"]


def _joined(system: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One message instead of several, as templates want it; a name that only some of them have is dropped."""
    if len(system) < 2:
        return system
    joined = {"role": "system", "content": "\n\n".join(message["content"] for message in system)}
    names = {message.get("name") for message in system} - {None}
    is_shared = len(names) == 1 and all("name" in message for message in system)
    return [{**joined, "name": names.pop()} if is_shared else joined]


def _plain(message: Mapping[str, Any], where: str, tags: ReasoningTags | None) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise ChatTemplateError(f"{where} must be an object, got {type(message).__name__}.", where)
    role = message.get("role")
    if role not in _ROLES:
        raise ChatTemplateError(f"{where}.role must be one of {', '.join(_ROLES)}; got {quote(role)}.", f"{where}.role")
    content = _text(message, f"{where}.content")
    reasoning = next((text for name in REASONING_NAMES if (text := message.get(name))), "")
    if role == "assistant" and content and tags is not None:
        inside, content = split_reasoning(content, tags)
        reasoning = reasoning or inside
    others = {key: value for key, value in message.items() if key not in ("role", "content", *REASONING_NAMES)}
    plain = {"role": "system" if role == "developer" else role, "content": content, **others}
    return {**plain, "reasoning_content": reasoning} if reasoning and role == "assistant" else plain


def _text(message: Mapping[str, Any], where: str) -> str | None:
    content = message.get("content")
    if isinstance(content, list | tuple):
        for part in content:
            if not (isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)):
                raise ChatTemplateError(f'{where}: every part must be {{"type": "text", "text": …}}.', where)
        content = "".join(part["text"] for part in content)
    may_be_none = message.get("role") == "assistant" and bool(message.get("tool_calls"))
    if (content is None and not may_be_none) or (content is not None and not isinstance(content, str)):
        raise ChatTemplateError(f"{where} must be a text or a list of text parts.", where)
    return content


def for_template(
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Tool],
    tool_format: ToolFormat,
    names: frozenset[str],
    variables: frozenset[str],
) -> list[dict[str, Any]]:
    """Normalised messages for a template that asks for `variables` and in messages for `names` (`names_in`).

    One that knows tools gets the arguments of calls as objects; for another, tools, calls and results are written out
    as text. Reasoning goes to a template under the name that it asks for, and to no other.
    """
    in_message = "tools" in names and tool_format.tools_in_message
    if "tools" in variables or in_message:
        found = as_templates_expect(messages, tool_format, knows_calls="tool_calls" in names)
        if tools and "tools" not in variables:
            found = in_system_message(found, tools)
    elif tools or any(message["role"] == "tool" or message.get("tool_calls") for message in messages):
        found = write_out(messages, tools, tool_format)
    else:
        found = [dict(message) for message in messages]
    for message in found:
        if reasoning := message.pop("reasoning_content", ""):
            message |= {name: reasoning for name in REASONING_NAMES if name in names}
    return found
