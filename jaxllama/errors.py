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

A class's docstring is its page in the documentation, and what `jaxllama explain NAME` prints (`system/explain.py`).
"""

from __future__ import annotations

import itertools
from collections.abc import Collection

_MAX_QUOTED_CHARS = 80
_MAX_LINE_CHARS = 300
_MAX_LISTED = 40


class JaxLlamaError(Exception):
    """Base of all of them: `except JaxLlamaError` catches whatever is raised on purpose, and no fault of the code."""


class ConfigError(JaxLlamaError, ValueError):
    """config.json is unsupported or contradicts itself.

    The message names the key, what it says and what is supported. A key that would change the computation and is not
    understood is refused, because the model would answer, and wrongly.

    **Usually** the model is of an architecture that is not supported (the table is in the guide on models), uses a
    rope type or an activation that is not, or config.json was edited by hand. It is raised too for `data=` or a mesh
    that does not suit the model.

    **What to do:** check that config.json is the model's own, as published. If the architecture is in the table, take
    a newer jaxllama. Otherwise there is nothing to set: open an issue with the config.json.
    """


class CheckpointError(JaxLlamaError):
    """A checkpoint is missing, incomplete, damaged or of another model.

    The message names the folder and the file. A checkpoint is whole when it has its `manifest.json`, which is written
    last.

    **Usually** the path is not the checkpoint's (its parent, or the folder that Hugging Face's files are in), a
    copy was interrupted, or a disk has damaged a file.

    **What to do:** where `manifest.json` is missing, start the same `jaxllama convert` again: it resumes. Where a hash
    or a size differs, copy the file again from where it is whole, or convert again with `--force --verify`.
    `Checkpoint.open(path).verify()` reads everything and names what differs.
    """


class ConversionError(JaxLlamaError):
    """A source checkpoint cannot be converted.

    Nothing has been written: every header is checked first, and the message lists all that is wrong at once, each with
    its file, tensor, what was expected and what was found.

    **Usually** a shard is missing or was not downloaded whole (its size says so), the config.json is of another model,
    a quantisation is of a kind that is not read, or tensors hold NaN or values beyond the dtype.

    **What to do:** download the named files again. Of a quantisation that is refused take another file of the same
    model: bfloat16 safetensors are always read. The guide on models lists what is.
    """


class PlaceError(JaxLlamaError):
    """There is nothing at a place (a folder, a hub id, a bucket), or it may not be read or written.

    A place is a path, `org/name[@revision][:file.gguf]` on the Hugging Face hub, `gs://…` or `s3://…`. A path of this
    machine wins over a hub id; the message says where it was looked for.

    **Usually** there is a typing error, the command runs in another folder than thought, a gated model was not accepted
    on the hub, or the credentials in the environment are not those of the bucket.

    **What to do:** give the whole path. For the hub set `HF_TOKEN` and accept the model's licence on its page; with
    `HF_HUB_OFFLINE` only what is in the cache is found. For buckets check the environment with the store's own tool.
    """


class StoreError(PlaceError):
    """A store, a disk or a connection to them fails, or a file changes while it is read.

    Not the input's fault: the same command may succeed later (exit code 1). What can be tried again has been, for
    minutes.

    **Usually** the network or the store is away, a disk fails, or somebody uploads to the place that is being read:
    length and ETag are pinned at the first answer, so that a file is never put together from two versions.

    **What to do:** start the command again. Conversion and batches go on where they were. If a file changed, wait until
    whoever writes it is done.
    """


class TokenizerError(JaxLlamaError):
    """Tokenizer files are missing, damaged or do not fit the model.

    They are tried in a process of their own, with a bound on time and memory, before they are used.

    **Usually** `tokenizer.json` or `tokenizer.model` was not downloaded with the weights, or is of another model:
    it has ids beyond the vocabulary.

    **What to do:** put the model's own tokenizer files beside its weights. Without any, prompts of token ids still work
    in Python.
    """


class ChatTemplateError(JaxLlamaError, ValueError):
    """A chat template is missing, refuses the messages or exceeds its bounds.

    A template is the model's own program that turns messages into a prompt. It runs in a sandbox with a deadline.

    **Usually** a base model, which has none, was asked to chat, or the template wants messages in another order
    (user and assistant in turn, the system message first).

    **What to do:** use `jaxllama generate` for a base model, or an `-Instruct` version of it. Otherwise put
    the messages in the order that the message asks for.

    `param` is the path of what is malformed (`"messages[2].content"`), if it is one message.
    """

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class PlanError(JaxLlamaError, ValueError):
    """A plan was asked for an unknown topology or for values that contradict each other.

    **Usually** a topology is written as a machine type. It is a generation and the shape of its chips: `v6e:2x4`,
    `v5p:2x2x1`.

    **What to do:** take a topology from the message's list, or `--search`, which tries all of them.
    """


class RequestError(JaxLlamaError, ValueError):
    """A prompt or a sampling parameter is out of range.

    Over HTTP a 400 whose `param` is the path of the field. The message says what was wanted and what was given.

    **What to do:** change that field. Its range is in the reference of the HTTP API, and in `/openapi.json`.

    `param` is the name of the field (`"top_p"`), for callers that report it separately from the message.
    """

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class ContextLengthError(RequestError):
    """The prompt does not fit the context.

    The message has both numbers, in tokens. A prompt must be shorter than the context, so that one token can
    follow; with `--strict-length` prompt and `max_tokens` together must fit.

    **What to do:** shorten the prompt or the history (`/tokenize` counts tokens). The context is the smaller of the
    model's and `--max-context`, which a server may have set to save memory.
    """


class GrammarError(RequestError):
    """A grammar or schema is malformed, not supported or too large.

    A schema is enforced whole or refused: what could not be held at every token is named (`uniqueItems`, a remote
    `$ref`, look-around in a regex). What would take too long or too much memory to compile is refused too.

    **What to do:** leave out the keyword and check that part of the answer yourself. Give strings and arrays a
    `maxLength` and `maxItems`, and split very large schemas.
    """


class EngineError(JaxLlamaError):
    """The engine cannot run the request.

    Not the request's fault. The classes below say which of the reasons it is; this one alone means that the engine has
    failed, with the cause in its message and in the log.

    **What to do:** read the first error in the log. Out of memory: fewer `--max-rows`, a smaller `--num-pages`.
    Anything else is worth an issue, with `jaxllama doctor`.
    """


class QueueFullError(EngineError):
    """Too many requests or tokens wait.

    Over HTTP a 429 with `Retry-After`. The bounds are `--max-queue` requests and `--max-pending-tokens` prompt tokens.

    **What to do:** send it again after that time. If it happens often, more `--max-rows` (while memory lasts) or
    another replica; a longer queue only makes everybody wait longer.
    """


class EngineStoppedError(EngineError):
    """The engine drains, has stopped or has failed.

    Over HTTP a 503. While it drains, requests that run are finished and new ones are refused.

    **What to do:** send it to another replica, or again when `/ready` says so. In Python, `llama.close()` was called
    before. If the engine failed, its first error is in the log.
    """


class NonFiniteLogitsError(EngineError):
    """The model produced NaN or infinity for this request.

    Only this request ends; its part of the cache is never used again.

    **Usually** the weights hold NaN (a checkpoint that was converted elsewhere, or a damaged one), or a model that
    needs float32 runs in bfloat16.

    **What to do:** `jaxllama convert … --verify` reports tensors that are not finite. Try `--dtype float32`. If one
    prompt does it with sound weights, open an issue with the prompt's tokens.
    """


class LockstepError(EngineError):
    """A many-host engine cannot go on; the message names the process at fault.

    **Usually** a process was killed (out of memory, a preempted machine), never started, has other flags, another
    version or another checkpoint than process 0, or the network between hosts is cut.

    **What to do:** read the log of the process that is named. All processes end by themselves; start them again
    together. Hosts that start far apart need a longer `--join-timeout`.
    """


class MissingExtraError(JaxLlamaError, ImportError):
    """An optional dependency is not installed.

    What is not needed by everybody is in extras: `serve`, `convert`, `hub`, `gcs`, `s3`, `tpu`, `gpu`, `plot`.

    **What to do:** run the `pip install` of the message, in the environment whose `jaxllama` it was.
    """

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
