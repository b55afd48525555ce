"""How likely given texts are: prompts and continuations as token ids, and their scores as they come."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jaxllama.decode.prompts import Prompt, read_prompts
from jaxllama.engine.engine import Engine
from jaxllama.engine.scheduling.request import EngineRequest, PromptLogprob, TokenOutput
from jaxllama.errors import RequestError
from jaxllama.llama.outputs import OnOutput
from jaxllama.text.encoding.tokenizer import Tokenizer


@dataclass(frozen=True)
class Score:
    """How likely a continuation is after its prompt.

    `logprob` is the natural logarithm of its probability, the sum of its tokens' own. `is_greedy`: each of its tokens
    is the likeliest at its place, so that greedy decoding would say just this. `tokens` are one each, if asked for.
    """

    logprob: float
    is_greedy: bool
    num_tokens: int
    tokens: tuple[PromptLogprob, ...] | None = None


class ScoredText:
    """One sequence whose tokens from `first` on are scored."""

    def __init__(
        self,
        engine: Engine,
        ids: list[int],
        first: int,
        *,
        num_top: int = 0,
        priority: int = 0,
        cache_scope: str | bytes = b"",
    ) -> None:
        self.ids = ids
        self.found: list[PromptLogprob] = []
        self._engine = engine
        self._first = first
        self._options: dict[str, Any] = {"num_top": num_top, "priority": priority, "cache_scope": cache_scope}
        self._request: EngineRequest | None = None

    def start(self, on_output: OnOutput) -> None:
        """Submits it."""
        self._request = self._engine.submit_scoring(self.ids, on_output, first=self._first, **self._options)

    def add(self, output: TokenOutput) -> tuple[PromptLogprob, ...]:
        """Takes in and returns what the engine found. Raises: the engine's error, if that is how it ended."""
        if output.error is not None:
            raise output.error
        if output.finish_reason == "cancelled":
            raise RequestError("the scoring was cancelled")
        self.found += output.scores
        return output.scores

    def cancel(self) -> None:
        """Ends it if it still runs."""
        if self._request is not None:
            self._request.cancel()

    def score(self, *, per_token: bool) -> Score:
        """The whole, once finished."""
        tokens = tuple(self.found)
        return Score(
            logprob=sum(token.logprob for token in tokens),
            is_greedy=all(token.is_greedy for token in tokens),
            num_tokens=len(tokens),
            tokens=tokens if per_token else None,
        )


def read_pairs(prompts: Any, continuations: Any) -> tuple[list[tuple[Prompt, Prompt]], bool]:
    """Each prompt with its continuation, and whether it is one pair and not a list of them.

    One prompt goes with each of a list of continuations.

    Raises: RequestError saying what was expected.
    """
    before, is_one_prompt = read_prompts(prompts)
    after, is_one = read_prompts(continuations)
    if is_one_prompt and not is_one:
        before = before * len(after)
    if len(before) != len(after):
        raise RequestError(
            f"continuations must be one for each prompt: {len(before)} prompts and {len(after)} continuations",
            "continuations",
        )
    return list(zip(before, after, strict=True)), is_one_prompt and is_one


def encode_pair(tokenizer: Tokenizer | None, prompt: Prompt, continuation: Prompt) -> tuple[list[int], int]:
    """The ids of both, and how many are the prompt's.

    Two texts are encoded as one, as their join would be read: the prompt's ids are as many as it has by itself, and
    spaces at its end belong to the continuation, because tokens begin with theirs.

    Raises: RequestError for a text without tokenizer, and where either has no token.
    """
    if (isinstance(prompt, str) or isinstance(continuation, str)) and tokenizer is None:
        raise RequestError("this checkpoint has no tokenizer: give prompts and continuations as token ids", "prompts")
    if isinstance(prompt, str) and isinstance(continuation, str):
        assert tokenizer is not None
        text = prompt.rstrip()
        whole = tokenizer.encode(prompt + continuation)
        num_prompt = min(len(tokenizer.encode(text)), len(whole) - 1) if text else len(tokenizer.encode(""))
        ids = whole
    else:
        first, rest = (
            tokenizer.encode(part, add_bos=bos) if tokenizer is not None and isinstance(part, str) else list(part)
            for part, bos in ((prompt, None), (continuation, False))
        )
        ids, num_prompt = [*first, *rest], len(first)
    if num_prompt < 1:
        raise RequestError(
            "a prompt has no tokens, and without one before it a token has no probability. Give at least a BOS token",
            "prompts",
        )
    if len(ids) <= num_prompt:
        raise RequestError("a continuation has no tokens", "continuations")
    return ids, num_prompt
