"""A model of lm-eval (the Language Model Evaluation Harness) in process: `score` and `generate`, without a server.

    jaxllama eval --model_args place=PLACE,dtype=float32 --tasks hellaswag

Source: lm_eval.api.model.LM of lm-eval 0.4.13, whose HFLM this follows in what it encodes and truncates.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jaxllama.decode.params import SamplingParams
from jaxllama.engine.options import EngineOptions
from jaxllama.errors import MissingExtraError, RequestError
from jaxllama.llama.llama import Llama, load
from jaxllama.text.encoding.specials import RenderedChat

NAME = "jaxllama"
_MAX_GENERATED = 256


class EvaluationModel:
    """What lm-eval asks of a model. `register` makes it one of lm-eval's own.

    `place`, `dtype`, `quantize`, `data` and `kv_dtype` are as for `load` and `EngineOptions`; `batch_size` is how many
    rows run together. `max_length` None is the model's context. `pretrained` is another name of `place`. What else
    lm-eval passes (`device`, `max_batch_size`) decides nothing here.

    Raises: as `load`; RequestError without a place, and for a checkpoint without tokenizer.
    """

    def __init__(
        self,
        place: Any = None,
        *,
        pretrained: Any = None,
        llama: Llama | None = None,
        dtype: Any = None,
        quantize: str | None = None,
        data: int = 1,
        kv_dtype: str | None = None,
        batch_size: int | str = 16,
        max_length: int | None = None,
        max_batch_size: Any = None,
        device: Any = None,
    ) -> None:
        super().__init__()
        place = pretrained if place is None else place
        if llama is None:
            if place is None:
                raise RequestError("give the model's place: --model_args place=PLACE", "place")
            rows = int(batch_size) if str(batch_size).isdecimal() else 16
            options = EngineOptions(max_rows=rows, max_context=max_length, kv_dtype=kv_dtype)
            llama = load(place, data=int(data), dtype=dtype, quantize=quantize, options=options)
        if llama.tokenizer is None:
            raise RequestError("this checkpoint has no tokenizer, and evaluations are of texts", "place")
        self.llama = llama
        self.max_length = llama.max_context
        self._encode = llama.tokenizer.encode
        self._rendered: dict[str, RenderedChat] = {}

    @property
    def eot_token_id(self) -> int | None:
        """The end-of-sequence token."""
        assert self.llama.tokenizer is not None
        return self.llama.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What a text without context is scored after: the BOS token, or else the end-of-sequence token."""
        assert self.llama.tokenizer is not None
        bos = self.llama.tokenizer.bos_token_id
        prefix = self.eot_token_id if bos is None else bos
        if prefix is None:
            raise RequestError("this tokenizer has neither BOS nor EOS token to score a text after", "place")
        return prefix

    @property
    def tokenizer_name(self) -> str:
        """What lm-eval keeps apart in its cache."""
        return str(self.llama.checkpoint and self.llama.checkpoint.path)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The source of the model's template, if it is to be used."""
        template = self.llama.chat_template
        return template.source if chat_template and template is not None else None

    def apply_chat_template(self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
        """The prompt of a chat, whose template's special tokens are known again in the requests that follow."""
        if self.llama.chat_template is None:
            raise RequestError("this checkpoint has no chat template", "apply_chat_template")
        continues = not add_generation_prompt and chat_history[-1]["role"] == "assistant"
        rendered = self.llama.chat_template.render(
            chat_history, add_generation_prompt=add_generation_prompt, continue_last=continues
        )
        self._rendered[rendered.text] = rendered
        return rendered.text

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Of each `(context, continuation)`: the continuation's log-probability, and whether it is greedy's choice."""
        pairs = [self._pair(*request.args) for request in requests]
        scores = self._score(pairs, show=not disable_tqdm)
        for request, score in zip(requests, scores, strict=True):
            self._remember("loglikelihood", request.args, score)
        return scores

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Of each `(text,)` its log-probability; each token is predicted once, after as much as the context holds."""
        windows = [list(self._windows(self._encode(text))) for (text,) in (request.args for request in requests)]
        found = iter(self._score([window for each in windows for window in each], show=not disable_tqdm))
        totals = [sum(next(found)[0] for _ in each) for each in windows]
        for request, total in zip(requests, totals, strict=True):
            self._remember("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """What each `(context, options)` generates, up to one of its `until`; greedily, unless it asks to sample."""
        prompts, params = [], []
        for context, given in (request.args for request in requests):
            one = self._params(given)
            assert one.max_tokens is not None
            prompts.append(self._ids(context)[-max(1, self.max_length - one.max_tokens) :])
            params.append(one)
        done = self.llama.generate(prompts, params, progress=False if disable_tqdm else None)
        texts = [completion.text for completion in done]
        for request, text in zip(requests, texts, strict=True):
            self._remember("generate_until", request.args, text)
        return texts

    def _params(self, given: Mapping[str, Any]) -> SamplingParams:
        until = given.get("until") or []
        stops = [until] if isinstance(until, str) else list(until)
        assert self.llama.tokenizer is not None
        names = ("temperature", "top_p", "top_k", "min_p")
        sampled = {name: given[name] for name in names if given.get(name) is not None}
        if not given.get("do_sample", sampled.get("temperature", 0) > 0):
            sampled = {"temperature": 0.0}
        return SamplingParams(
            max_tokens=int(given.get("max_gen_toks", given.get("max_tokens", _MAX_GENERATED))),
            # A special token ends the reply by itself, and is no text that could match.
            stop=tuple(text for text in stops if text and text not in self.llama.tokenizer.special_tokens),
            **sampled,
        )

    def _ids(self, context: str) -> list[int]:
        assert self.llama.tokenizer is not None
        rendered = self._rendered.get(context)
        ids = self._encode(context) if rendered is None else self.llama.tokenizer.encode_rendered(rendered)
        return ids or [self.prefix_token_id]

    def _pair(self, context: str, continuation: str) -> tuple[list[int], int]:
        """The ids of both, and how many are the context's: where it ends in spaces they belong to what follows."""
        if context in self._rendered or not context:
            before = self._ids(context) if context else [self.prefix_token_id]
            after = self._encode(continuation, add_bos=False)
            # The text may begin with the token that stands for nothing before it.
            before = before if context or after[0] != before[0] else []
            num_context = max(1, len(before))
            return [*before, *after], num_context
        num_context = len(self._encode(context.rstrip()))
        return self._encode(context + continuation), max(1, num_context)

    def _windows(self, tokens: list[int]) -> Iterator[tuple[list[int], int]]:
        first = min(self.max_length, len(tokens))
        yield [self.prefix_token_id, *tokens[:first]], 1
        while first < len(tokens):
            end = min(len(tokens), first + self.max_length)
            yield tokens[end - self.max_length - 1 : end], self.max_length + 1 - (end - first)
            first = end

    def _score(self, pairs: Sequence[tuple[list[int], int]], *, show: bool) -> list[tuple[float, bool]]:
        """Of the sequences that are too long only the end counts, as in lm-eval's own models."""
        contexts, continuations = [], []
        for ids, num_context in pairs:
            cut = min(max(0, len(ids) - self.max_length - 1), num_context - 1)
            contexts.append(ids[cut:num_context])
            continuations.append(ids[num_context:])
        scores = self.llama.score(contexts, continuations, progress=None if show else False)
        assert isinstance(scores, list)
        return [(score.logprob, score.is_greedy) for score in scores]

    def _remember(self, kind: str, key: Any, value: Any) -> None:
        hook = getattr(self, "cache_hook", None)
        if hook is not None:
            hook.add_partial(kind, key, value)


def register() -> type[EvaluationModel]:
    """Makes `--model jaxllama` known to lm-eval, in this process, and returns the class.

    Raises: MissingExtraError without lm-eval.
    """
    try:
        registry = importlib.import_module("lm_eval.api.registry")
        base = importlib.import_module("lm_eval.api.model").LM
    except ModuleNotFoundError as error:
        raise MissingExtraError("eval", error.name or "lm_eval") from None
    # Abstract methods are those of `LM`; this class comes first and has them all.
    names = {"__doc__": EvaluationModel.__doc__, "__module__": __name__}
    model: type[EvaluationModel] = type("JaxLlamaLM", (EvaluationModel, base), names)
    registry.register_model(NAME)(model)
    return model


def evaluate(arguments: list[str]) -> int:
    """lm-eval's own command with `arguments`, where the model is this one unless they name another.

    Returns its exit code. Raises: MissingExtraError without lm-eval.
    """
    register()
    if not any(argument == "--model" or argument.startswith("--model=") for argument in arguments):
        arguments = ["--model", NAME, *arguments]
    sys.argv = ["jaxllama eval", "run", *arguments]  # which is where lm-eval reads them
    importlib.import_module("lm_eval.__main__").cli_evaluate()
    return 0
