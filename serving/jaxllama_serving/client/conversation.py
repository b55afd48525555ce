"""A conversation and its settings: what `jaxllama chat` keeps, sends, saves and loads."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxllama.errors import JaxLlamaError

_RESERVED = ("model", "messages", "stream", "stream_options", "n")


class ChatError(JaxLlamaError):
    """A command of the chat cannot be carried out.

    **What to do:** `/help` lists the commands and what they take.
    """


@dataclass
class Conversation:
    """Messages after the system prompt, in turns, and the fields sent beside them.

    `reasoning` is that of the last answer; it is not sent again, but saved.
    """

    model: str
    system: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    messages: list[dict[str, Any]] = field(default_factory=list)

    def body(self) -> dict[str, Any]:
        """The request that asks for the next answer."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        turns = [{"role": message["role"], "content": message["content"]} for message in self.messages]
        usage = {"stream_options": {"include_usage": True}}
        return {"model": self.model, "messages": system + turns, **usage, **self.settings}

    def ask(self, text: str) -> None:
        """Adds a message of the user."""
        self.messages.append({"role": "user", "content": text})

    def answer(self, content: str, reasoning: str) -> None:
        """Adds the model's answer."""
        self.messages.append(_with_reasoning({"role": "assistant", "content": content}, reasoning))

    @property
    def reasoning(self) -> str:
        """The last answer's."""
        answers = [message for message in self.messages if message["role"] == "assistant"]
        return str(answers[-1].get("reasoning", "")) if answers else ""

    def drop_answer(self) -> None:
        """Takes back the last answer, so that its question can be asked again. Raises: ChatError without one."""
        if not self.messages:
            raise ChatError("nothing was asked yet")
        if self.messages[-1]["role"] == "assistant":
            self.messages.pop()

    def undo(self) -> None:
        """Takes back the last question and its answer. Raises: ChatError without one."""
        self.drop_answer()
        self.messages.pop()

    def set(self, name: str, value: str) -> None:
        """Sets a field of the request: JSON, or else a text; nothing takes it out again.

        Raises: ChatError for a field that the chat sets itself.
        """
        if name in _RESERVED:
            raise ChatError(f"{name} cannot be set: the chat sends it itself")
        if not value:
            self.settings.pop(name, None)
            return
        try:
            self.settings[name] = json.loads(value)
        except ValueError:
            self.settings[name] = value

    def save(self, path: Path) -> None:
        """Writes the conversation: as Markdown to a file named .md, else as JSON that `load` reads.

        Raises: ChatError.
        """
        if path.suffix == ".md":
            parts = [f"**system**\n\n{self.system}"] if self.system else []
            parts += [f"**{message['role']}**\n\n{message['content']}" for message in self.messages]
            text = "\n\n---\n\n".join(parts) + "\n"
        else:
            value = {"model": self.model, "system": self.system, "settings": self.settings, "messages": self.messages}
            text = json.dumps(value, ensure_ascii=False, indent=1) + "\n"
        try:
            path.expanduser().write_text(text, encoding="utf-8")
        except OSError as error:
            raise ChatError(f"{path}: cannot be written ({error.strerror})") from None

    def load(self, path: Path) -> None:
        """Takes system prompt, settings and messages from a file that `save` wrote. Raises: ChatError."""
        try:
            value = json.loads(path.expanduser().read_text(encoding="utf-8"))
            messages = [_message(message) for message in value["messages"]]
            system, settings = str(value.get("system", "")), dict(value.get("settings", {}))
        except OSError as error:
            raise ChatError(f"{path}: cannot be read ({error.strerror})") from None
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ChatError(f"{path}: is no conversation that /save wrote as JSON") from None
        self.system, self.settings, self.messages = system, settings, messages


def _message(value: Any) -> dict[str, Any]:
    role, content = value["role"], value["content"]
    if role not in ("user", "assistant") or not isinstance(content, str):
        raise TypeError
    return _with_reasoning({"role": role, "content": content}, str(value.get("reasoning", "")))


def _with_reasoning(message: dict[str, Any], reasoning: str) -> dict[str, Any]:
    return {**message, "reasoning": reasoning} if reasoning else message
