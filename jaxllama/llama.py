"""`Llama`: a loaded model with its tokenizer and engine, for notebooks, the command line and the server."""

from __future__ import annotations

import contextlib
import os
import queue
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self, cast, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxllama.decode.params import MAX_TOP_LOGPROBS, SamplingParams
from jaxllama.decode.prompts import Prompt, read_params, read_prompt, read_prompts, token_ids
from jaxllama.decode.scoring import PromptLogprob, logits_of, prompt_logprobs
from jaxllama.engine.compilation import use_compilation_cache
from jaxllama.engine.engine import Engine
from jaxllama.engine.options import EngineOptions
from jaxllama.engine.scheduling.request import EngineRequest, FinishReason, TokenLogprob, TokenOutput
from jaxllama.engine.traffic import MemoryTraffic, memory_traffic
from jaxllama.errors import ChatTemplateError, ConfigError, ContextLengthError, QueueFullError, RequestError
from jaxllama.hosts.group import Group
from jaxllama.model.config import LlamaConfig
from jaxllama.model.mesh import make_mesh
from jaxllama.model.params import Params, num_params
from jaxllama.system.progress import Advance, show_progress
from jaxllama.text.chat import ChatTemplate
from jaxllama.text.constraint import ConstraintMaker, OutputConstraint
from jaxllama.text.encoding.tokenizer import Tokenizer
from jaxllama.text.output import PROMPT_TAIL, GrowingOutput, OutputAssembler
from jaxllama.text.structured import Grammar
from jaxllama.weights.checkpoint import Checkpoint
from jaxllama.weights.exporting.export import export_params
from jaxllama.weights.exporting.shards import MAX_SHARD_BYTES
from jaxllama.weights.loading import MAX_IN_FLIGHT_BYTES, load_params
from jaxllama.weights.opening import load_text, open_model
from jaxllama.weights.places import PlaceLike
from jaxllama.weights.saving import answer_saves, save_params

_QUEUE_RETRY_S = 0.05


@dataclass(frozen=True)
class Completion:
    """A finished output.

    `token_ids` include the stop token, `text` does not. `logprobs`, if asked for, are one a token.
    `reasoning` is what a reasoning model thinks before its answer (`chat` alone separates it). `stop_reason` is the
    string of `stop` or the id of `stop_token_ids` that ended it, None at the model's own end; `seed` repeats it.
    `num_accepted` of the tokens came without a step of their own (speculation).
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None
    finish_reason: FinishReason
    prompt_token_ids: tuple[int, ...]
    reasoning: str = ""
    stop_reason: str | int | None = None
    seed: int = 0
    num_accepted: int = 0


@dataclass(frozen=True)
class CompletionDelta:
    """The next piece of an output: all `text` joined is `Completion.text`. The last has a `finish_reason`."""

    text: str
    reasoning: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    finish_reason: FinishReason | None


def load(
    place: PlaceLike,
    mesh: Mesh | None = None,
    *,
    data: int = 1,
    dtype: Any = None,
    quantize: str | None = None,
    options: EngineOptions | None = None,
    group: Group | None = None,
    max_in_flight_bytes: int = MAX_IN_FLIGHT_BYTES,
    progress: bool | None = None,
) -> Llama:
    """Loads a model onto `mesh`, as `dtype` (None: as stored).

    `place` is a checkpoint, a Hugging Face folder or a GGUF file: a path, on the hub (`org/name`, `org/name@revision`,
    `org/name:file.gguf`) or in a bucket (`gs://…`, `s3://…`). What is not converted has the bits that `convert` would
    write. Between a store and the devices the host holds at most `max_in_flight_bytes`. `mesh` None is all devices:
    `data` groups of them, each with the whole model and its share of the rows. `quantize` "int8" rounds the matrices,
    which those of an int8 checkpoint are anyway. Norms and all computation have `dtype`.

    `group` is that of many processes (`jaxllama.hosts.group.join`), each of which calls this alike and reads its own
    shards. Process 0 then uses the model, and the others call `llama.engine.follow()`. `progress` None shows what takes
    longer than two seconds (a bar on a terminal and in a notebook, lines for more than a gigabyte elsewhere).

    Raises: CheckpointError, ConversionError, TokenizerError, ChatTemplateError or ConfigError, saying what is wrong
        with which file; PlaceError saying where it was looked for; StoreError when a store fails; OSError for a
        compilation cache that cannot be made.
    """
    options = options or EngineOptions()
    use_compilation_cache(options.compilation_cache)
    checkpoint = open_model(place)
    config = checkpoint.config
    if mesh is not None and data != 1:
        raise ConfigError(f"give data={data} or a mesh (make_mesh takes data), not both")
    mesh = make_mesh(config, data=data) if mesh is None else mesh
    dtype = jnp.dtype(checkpoint.dtype if dtype is None else dtype)
    if dtype not in (jnp.bfloat16, jnp.float32):
        raise ConfigError(f"dtype must be bfloat16 or float32, got {dtype}")
    tokenizer, chat_template = load_text(checkpoint)
    how: dict[str, Any] = {"max_in_flight_bytes": max_in_flight_bytes, "progress": progress}
    params = load_params(checkpoint, mesh, dtype, quantize, **how)
    return Llama(
        config,
        params,
        mesh,
        tokenizer=tokenizer,
        chat_template=chat_template,
        checkpoint=checkpoint,
        options=options,
        group=group,
    )


class Llama:
    """A model that generates. Threads may share it; its engine runs their requests together.

    `tokenizer` and `chat_template` are None where the checkpoint has none: prompts must then be token ids.
    """

    def __init__(
        self,
        config: LlamaConfig,
        params: Params,
        mesh: Mesh,
        *,
        tokenizer: Tokenizer | None = None,
        chat_template: ChatTemplate | None = None,
        checkpoint: Checkpoint | None = None,
        options: EngineOptions | None = None,
        group: Group | None = None,
    ) -> None:
        self.config = config
        self.params = params
        self.mesh = mesh
        self.tokenizer = tokenizer
        self.chat_template = chat_template
        self.checkpoint = checkpoint
        self.engine = Engine(config, params, mesh, options or EngineOptions(), group)
        if group is not None and not group.is_leader:
            answer_saves(config, params, group)

    @property
    def max_context(self) -> int:
        """The most tokens that a prompt and its output may have together."""
        return self.engine.max_context

    @cached_property
    def constraints(self) -> ConstraintMaker:
        """Makes what holds outputs to grammars and thinking budgets.

        Raises: RequestError if the checkpoint has no tokenizer.
        """
        if self.tokenizer is None:
            raise RequestError("this checkpoint has no tokenizer, which structured output and thinking budgets need")
        return ConstraintMaker(self.tokenizer, self.config.vocab_size, self.config.eos_token_ids)

    @property
    def num_params(self) -> int:
        """The number of weights (a tied head counts once)."""
        return num_params(self.config)

    def memory_traffic(self) -> MemoryTraffic:
        """What decoding must read from memory, to compare with what it takes (`Engine.on_steps`)."""
        return memory_traffic(self.config, self.params, self.mesh, self.engine.kv_dtype)

    def save(self, path: str | os.PathLike[str]) -> Checkpoint:
        """Writes the weights as they are now, int8 included, as a checkpoint that `load` and the server read.

        Tokenizer, config and chat template are the loaded checkpoint's. Nothing is at `path` before all is complete,
        and what is there stays: an empty folder at most may be there. Requests run meanwhile. Of many processes, 0
        calls this, and each writes its own shards: `path` is in a folder that all share.

        Raises: CheckpointError saying what is in the way, or which process cannot write what.
        """
        return save_params(self.checkpoint, self.params, path, self.engine.group)

    def export(
        self,
        place: str | os.PathLike[str],
        *,
        dtype: str | None = None,
        max_shard_size: str | int = MAX_SHARD_BYTES,
        force: bool = False,
    ) -> str:
        """Writes the weights as they are now as a Hugging Face folder, and returns where: see `jaxllama export`.

        `dtype` None keeps them as they are, int8 as compressed-tensors' W8A16. The host holds one tensor at a time.
        Nothing is at `place` before all is complete; `force` replaces an earlier export. Requests run meanwhile.

        Raises: ConversionError for `place` and a value that `dtype` cannot hold; CheckpointError for a model of no
            checkpoint, or one that is spread over several processes; StoreError when writing fails.
        """
        written = export_params(
            self.checkpoint, self.params, place, dtype=dtype, max_shard_size=max_shard_size, force=force
        )
        return written.where

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Cancels what runs and ends the engine's thread."""
        self.engine.close()

    @overload
    def generate(self, prompts: str, params: SamplingParams | None = None) -> Completion: ...  # type: ignore[overload-overlap]
    @overload
    def generate(self, prompts: Sequence[int], params: SamplingParams | None = None) -> Completion: ...
    @overload
    def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool | None = None,
    ) -> list[Completion]: ...
    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool | None = None,
    ) -> Completion | list[Completion]:
        """Completes one prompt (text or token ids), or any number, which share the rows; waits where the queue is full.

        `params` are those of all prompts, or one for each. A text is encoded as the tokenizer does by itself (BOS
        included, if it adds one). `progress` shows how many are done on stderr: a bar on a terminal and in a notebook,
        lines elsewhere. None shows it for several prompts, on a terminal or in a notebook only.

        Raises: RequestError for a prompt or parameters that cannot run; NonFiniteLogitsError.
        """
        given, is_one = read_prompts(prompts)
        each = read_params(params, len(given))
        ids = [self._encode(prompt) for prompt in given]
        outputs = [_Output(self, prompt, one) for prompt, one in zip(ids, each, strict=True)]
        # One prompt is not worth a bar that nobody asked for.
        show = False if progress is None and len(outputs) == 1 else progress
        with show_progress("generate", len(outputs), show=show) as advance:
            completions = self._run(outputs, advance)
        return completions[0] if is_one else completions

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[CompletionDelta]:
        """Completes one prompt piece by piece. Leaving the loop early cancels the request.

        Raises: as `generate`.
        """
        (one,) = read_params(params, 1)
        return self._stream(_Output(self, self._encode(read_prompt(prompt)), one))

    def chat(self, messages: Sequence[Mapping[str, Any]], params: SamplingParams | None = None) -> Completion:
        """Answers messages (`{"role": …, "content": …}`) through the model's chat template.

        Raises: ChatTemplateError if there is no template or it refuses the messages; else as `generate`.
        """
        (one,) = read_params(params, 1)
        if self.chat_template is None or self.tokenizer is None:
            raise ChatTemplateError("this checkpoint has no chat template; use generate with a prompt of your own")
        rendered = self.chat_template.render(messages)
        output = _Output(
            self,
            self.tokenizer.encode_rendered(rendered),
            one,
            is_chat=True,
            starts_in_reasoning=rendered.starts_in_reasoning,
        )
        for _ in self._stream(output):
            pass
        return output.completion()

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """Scores of every next token after each of `ids`: float32 `[len(ids), vocab_size]`.

        Not over many processes. Raises: RequestError there and for ids outside the vocabulary, ContextLengthError for
        more than the context.
        """
        tokens = self._checked_ids(ids)
        return np.concatenate([np.asarray(chunk) for chunk in self._score(tokens)])[: len(tokens)]

    def prompt_logprobs(self, ids: Sequence[int], num_top: int = 0) -> Iterator[PromptLogprob]:
        """The log-probability of every token but the first, with the `num_top` (at most 20) likeliest at its place.

        The work is done as the iterator is read, in an own small cache beside the engine's. Not over many processes.

        Raises: as `logits`; RequestError for `num_top`.
        """
        if not 0 <= num_top <= MAX_TOP_LOGPROBS:
            raise RequestError(f"num_top must be from 0 to {MAX_TOP_LOGPROBS}, got {num_top}", "num_top")
        tokens = self._checked_ids(ids)
        return prompt_logprobs(self._score(tokens), tokens, num_top)

    def _checked_ids(self, ids: Sequence[int]) -> np.ndarray:
        if self.engine.group is not None:
            raise RequestError("logits are of one process; this model is spread over several")
        tokens = token_ids(ids, "ids")
        vocab, context = self.config.vocab_size, self.config.max_position_embeddings
        if not tokens or min(tokens) < 0 or max(tokens) >= vocab:
            raise RequestError(f"ids must be a non-empty list of token ids from 0 to {vocab - 1}", "ids")
        if len(tokens) > context:
            raise ContextLengthError(f"{len(tokens)} ids exceed the context of {context}", "ids")
        return np.asarray(tokens, np.int32)

    def _score(self, tokens: np.ndarray) -> Iterator[jax.Array]:
        engine = self.engine
        return logits_of(
            self.config,
            self.params,
            self.mesh,
            tokens,
            page_size=engine.page_size,
            kv_dtype=engine.kv_dtype,
            platform=engine.platform,
        )

    def _encode(self, prompt: str | list[int]) -> list[int]:
        if not isinstance(prompt, str):
            return prompt
        if self.tokenizer is None:
            raise RequestError("this checkpoint has no tokenizer: give the prompt as token ids", "prompt")
        return self.tokenizer.encode(prompt)

    def _run(self, outputs: list[_Output], advance: Advance) -> list[Completion]:
        """Keeps twice as many in the engine as it has rows: enough to fill every row that becomes free."""
        inbox: queue.SimpleQueue[tuple[_Output, TokenOutput]] = queue.SimpleQueue()
        not_started, num_running = deque(outputs), 0
        most = 2 * self.engine.options.max_rows
        try:
            while not_started or num_running:
                with contextlib.suppress(QueueFullError):
                    while not_started and num_running < most:
                        not_started[0].start(inbox)
                        not_started.popleft()
                        num_running += 1
                has_ended = False
                while num_running and not has_ended:
                    output, tokens = inbox.get()
                    output.add(tokens)
                    has_ended = tokens.finish_reason is not None
                    advance(items=has_ended, tokens=len(tokens.token_ids))
                num_running -= has_ended
                if not num_running and not_started:
                    # Others may have filled the queue; then no output of ours tells when there is room again.
                    time.sleep(_QUEUE_RETRY_S)
        finally:
            for output in outputs:
                output.cancel()
        return [output.completion() for output in outputs]

    def _stream(self, output: _Output) -> Iterator[CompletionDelta]:
        inbox: queue.SimpleQueue[tuple[_Output, TokenOutput]] = queue.SimpleQueue()
        output.start(inbox)
        try:
            while not output.is_finished:
                _, tokens = inbox.get()
                delta = output.add(tokens)
                if delta.token_ids or delta.text or delta.reasoning or delta.finish_reason:
                    yield delta
        finally:
            output.cancel()


class _Output:
    """One output: its request, what constrains it, and how it grows."""

    def __init__(
        self,
        llama: Llama,
        prompt: list[int],
        params: SamplingParams,
        *,
        is_chat: bool = False,
        starts_in_reasoning: bool | None = None,
    ) -> None:
        self._llama = llama
        self._prompt = prompt
        self._params = params
        self._request: EngineRequest | None = None
        assembler = None
        if llama.tokenizer is not None:
            assembler = OutputAssembler(
                llama.tokenizer,
                stop=params.stop,
                include_stop=params.include_stop_str_in_output,
                starts_in_reasoning=starts_in_reasoning,
                prompt_tail=() if is_chat else prompt[-PROMPT_TAIL:],
            )
        elif params.stop:
            raise RequestError("this checkpoint has no tokenizer: stop strings cannot be found", "stop")
        self._starts_in_reasoning = starts_in_reasoning
        self._grammar = self._compile()
        self._grown = GrowingOutput(assembler, has_stops=bool(params.stop), stop_token_ids=params.stop_token_ids)

    @property
    def is_finished(self) -> bool:
        """Whether nothing more will come."""
        return self._grown.finish_reason is not None

    def start(self, inbox: queue.SimpleQueue[tuple[_Output, TokenOutput]]) -> None:
        """Submits the request, whose outputs then arrive in `inbox`."""
        self._request = self._llama.engine.submit(
            self._prompt, self._params, lambda tokens: inbox.put((self, tokens)), constraint=self._make_constraint()
        )

    def _compile(self) -> Grammar | None:
        params, starts = self._params, self._starts_in_reasoning
        if params.thinking_budget is not None and starts is None:
            raise RequestError(
                "thinking_budget bounds the reasoning in `chat` with a model that reasons; here there is none to bound",
                "thinking_budget",
            )
        if params.structured is None:
            return None
        return self._llama.constraints.compile(params.structured.source(), params.structured.kind, starts)

    def _make_constraint(self) -> OutputConstraint | None:
        params = self._params
        if self._grammar is None and params.thinking_budget is None:
            return None
        return self._llama.constraints.make(
            self._grammar,
            starts_in_reasoning=self._starts_in_reasoning,
            thinking_budget=params.thinking_budget,
            min_tokens=params.min_tokens,
        )

    def cancel(self) -> None:
        """Ends the request if it still runs."""
        if self._request is not None:
            self._request.cancel()

    def add(self, output: TokenOutput) -> CompletionDelta:
        """Takes in what the engine produced. Tokens after a stop string are dropped.

        Raises: the engine's error, if that is how the request ended.
        """
        if output.error is not None:
            raise output.error
        grown = self._grown
        if self.is_finished:
            return CompletionDelta("", "", (), (), None)
        num_ids, num_logprobs = len(grown.token_ids), len(grown.logprobs)
        delta = grown.add(output.token_ids, output.logprobs, output.finish_reason, output.stop_token_id)
        if delta.matched_stop is not None:
            self.cancel()
        ids, logprobs = tuple(grown.token_ids[num_ids:]), tuple(grown.logprobs[num_logprobs:])
        return CompletionDelta(delta.content, delta.reasoning, ids, logprobs, self._finish_reason)

    @property
    def _finish_reason(self) -> FinishReason | None:
        # The engine's own, or "stop".
        return cast("FinishReason | None", self._grown.finish_reason)

    def completion(self) -> Completion:
        """The whole output, once finished."""
        assert self._finish_reason is not None
        assert self._request is not None
        grown = self._grown
        return Completion(
            text="".join(grown.content),
            token_ids=tuple(grown.token_ids),
            logprobs=tuple(grown.logprobs) if self._params.logprobs is not None else None,
            finish_reason=self._finish_reason,
            prompt_token_ids=tuple(self._prompt),
            reasoning="".join(grown.reasoning),
            stop_reason=grown.stop_reason,
            seed=self._request.seed,
            num_accepted=self._request.num_accepted,
        )
