"""Every exception that jaxllama raises on purpose.

JaxLlamaError
├── ConfigError (ValueError)         config.json is unsupported or contradicts itself
├── CheckpointError                  a checkpoint is missing, incomplete, damaged or of another model
├── ConversionError                  a source checkpoint cannot be converted
├── PlaceError                       there is nothing at a place, or it may not be read or written
│   └── StoreError                   a store, a disk or a connection to them fails, or a file changes while it is read
├── TokenizerError                   tokenizer files are missing, damaged or do not fit the model
├── ChatTemplateError (ValueError)   a chat template is missing, refuses the messages or exceeds its bounds
├── PlanError (ValueError)           a plan was asked for an unknown topology or for values that contradict each other
├── RequestError (ValueError)        a prompt or a sampling parameter is out of range; `param` names it
│   ├── ContextLengthError           the prompt does not fit the context
│   └── GrammarError                 a grammar or schema is malformed, not supported or too large
├── EngineError                      the engine cannot run the request
│   ├── QueueFullError               too many requests or tokens wait
│   ├── EngineStoppedError           the engine drains, has stopped or has failed
│   ├── NonFiniteLogitsError         the model produced NaN or infinity for this request
│   └── LockstepError                a many-host engine cannot go on; the message names the process at fault
└── MissingExtraError (ImportError)  an optional dependency is not installed

What a message quotes may come from a stranger's file: `quote`, `one_line` and `listed` keep it short.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection

_MAX_QUOTED_CHARS = 80
_MAX_LINE_CHARS = 300
_MAX_LISTED = 40


class JaxLlamaError(Exception):
    """Base of all of them."""


class ConfigError(JaxLlamaError, ValueError):
    """config.json is unsupported or contradicts itself."""


class CheckpointError(JaxLlamaError):
    """A checkpoint is missing, incomplete, damaged or of another model."""


class ConversionError(JaxLlamaError):
    """A source checkpoint cannot be converted."""


class PlaceError(JaxLlamaError):
    """There is nothing at a place (a folder, a hub id, a bucket), or it may not be read or written."""


class StoreError(PlaceError):
    """A store, a disk or a connection to them fails, or a file changes while it is read."""


class TokenizerError(JaxLlamaError):
    """Tokenizer files are missing, damaged or do not fit the model."""


class ChatTemplateError(JaxLlamaError, ValueError):
    """A chat template is missing, refuses the messages or exceeds its bounds.

    `param` is the path of what is malformed (`"messages[2].content"`), if it is one message.
    """

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class PlanError(JaxLlamaError, ValueError):
    """A plan was asked for an unknown topology or for values that contradict each other."""


class RequestError(JaxLlamaError, ValueError):
    """A prompt or a sampling parameter is out of range.

    `param` is the name of the field (`"top_p"`), for callers that report it separately from the message.
    """

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class ContextLengthError(RequestError):
    """The prompt does not fit the context."""


class GrammarError(RequestError):
    """A grammar or schema is malformed, not supported or too large."""


class EngineError(JaxLlamaError):
    """The engine cannot run the request."""


class QueueFullError(EngineError):
    """Too many requests or tokens wait."""


class EngineStoppedError(EngineError):
    """The engine drains, has stopped or has failed."""


class NonFiniteLogitsError(EngineError):
    """The model produced NaN or infinity for this request."""


class LockstepError(EngineError):
    """A many-host engine cannot go on; the message names the process at fault."""


class MissingExtraError(JaxLlamaError, ImportError):
    """An optional dependency is not installed."""

    def __init__(self, extra: str, package: str) -> None:
        super().__init__(f"{package} is not installed. Install it with: pip install 'jaxllama[{extra}]'")
        self.extra = extra


def quote(value: object, max_chars: int = _MAX_QUOTED_CHARS) -> str:
    """`value` as a message quotes it: its repr, with the middle left out beyond `max_chars`."""
    if isinstance(value, str):
        # Cut before, not behind: every character may take ten in the repr.
        return repr(_cut(value, max_chars))
    return _cut(repr(value), max_chars)


def one_line(text: object, max_chars: int = _MAX_LINE_CHARS) -> str:
    """A text, or an error's (its type where it says nothing), as one printable line of at most `max_chars`."""
    printable = "".join(char if char.isprintable() else " " for char in str(text))
    line = _cut(" ".join(printable.split()), max_chars)
    return line or (type(text).__name__ if isinstance(text, BaseException) else line)


def listed(problems: Collection[str]) -> str:
    """The problems in one line, the first 40 of them."""
    more = f"; and {len(problems) - _MAX_LISTED:,} more" if len(problems) > _MAX_LISTED else ""
    return "; ".join(itertools.islice(problems, _MAX_LISTED)) + more


def _cut(text: str, max_chars: int) -> str:
    if len(text) <= max_chars:
        return text
    head = 2 * max_chars // 3
    return f"{text[:head]}…{text[head - max_chars + 1 :]}"
