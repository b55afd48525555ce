"""What a load generator asks: prompts by length, from a file, or with a beginning that all share."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxllama.errors import JaxLlamaError

# Common English words are one token each in nearly every vocabulary, with the space before them.
_TEXT = """
the of and to in is that for it was on with as are be this by at from have not they which one you had were all her
she there would their we him been has when who will no more if out so said what up its about than into them can
only other time new some could these two may first then do any like my now over such our man me even most made
after also did many before must through years where much your way down should because long each just state people
those too mr how little good world make very year still see own work men day get here between both life
"""
_WORDS = tuple(_TEXT.split())


class WorkloadError(JaxLlamaError):
    """A file of prompts cannot be used.

    **What to do:** give a file of UTF-8 with a text or a JSON object on each line, as `jaxllama bench --help` says.
    """


@dataclass(frozen=True)
class Lengths:
    """Numbers of tokens, uniform in `mean` × (1 ± `spread`)."""

    mean: int
    spread: float = 0.0

    def draw(self, rng: random.Random) -> int:
        """At least one."""
        reach = self.mean * self.spread
        return max(1, round(rng.uniform(self.mean - reach, self.mean + reach)))


@dataclass(frozen=True)
class Task:
    """One request: its messages, and the most tokens of its answer."""

    messages: tuple[dict[str, Any], ...]
    max_tokens: int


def random_tasks(prompts: Lengths, outputs: Lengths, num_shared: int, seed: int) -> Iterator[Task]:
    """Prompts of random words, without end; the first `num_shared` words are the same in all.

    A prompt's length is in words, about a token each; the server's own count is what is reported.
    """
    rng = random.Random(seed)
    shared = " ".join(rng.choices(_WORDS, k=num_shared))
    while True:
        # Each begins with a number of its own, so that no prompt is the beginning of another.
        words = [f"{rng.randrange(10**6)}:", *rng.choices(_WORDS, k=prompts.draw(rng))]
        text = " ".join([shared, *words]) if shared else " ".join(words)
        yield Task(({"role": "user", "content": text},), outputs.draw(rng))


def tasks_of_file(path: Path, outputs: Lengths, seed: int) -> Iterator[Task]:
    """The prompts of a file, in turn, without end: a text a line, or JSON objects with `messages` or `prompt`.

    An object may have `max_tokens`.

    Raises: WorkloadError for a file without prompts, or a line that is none.
    """
    rng, entries = random.Random(seed), _read(path)
    while True:
        for messages, max_tokens in entries:
            yield Task(messages, outputs.draw(rng) if max_tokens is None else max_tokens)


def _read(path: Path) -> list[tuple[tuple[dict[str, Any], ...], int | None]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise WorkloadError(f"{path}: cannot be read ({error})") from None
    entries = [_entry(path, number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not entries:
        raise WorkloadError(f"{path}: has no prompts; expected a text or a JSON object on each line")
    return entries


def _entry(path: Path, number: int, line: str) -> tuple[tuple[dict[str, Any], ...], int | None]:
    if not line.lstrip().startswith("{"):
        return ({"role": "user", "content": line},), None
    try:
        value = json.loads(line)
        messages = value["messages"] if "messages" in value else [{"role": "user", "content": str(value["prompt"])}]
        max_tokens = value.get("max_tokens")
        is_count = max_tokens is None or (type(max_tokens) is int and max_tokens > 0)
        if not isinstance(messages, list) or not messages or not is_count:
            raise TypeError
        return tuple(dict(message) for message in messages), max_tokens
    except (ValueError, KeyError, TypeError):
        raise WorkloadError(
            f"{path}, line {number}: expected an object with 'messages' (a list) or 'prompt', and perhaps 'max_tokens'"
        ) from None
