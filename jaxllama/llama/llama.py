"""`Llama`: a loaded model with its tokenizer and engine, for notebooks, the command line and the server."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Generator, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, Self, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int

from jaxllama.decode.params import MAX_TOP_LOGPROBS, SamplingParams
from jaxllama.decode.prompts import Prompt, read_params, read_prompt, read_prompts, token_ids
from jaxllama.decode.scoring import logits_of
from jaxllama.engine.compilation import use_compilation_cache
from jaxllama.engine.engine import Engine
from jaxllama.engine.options import EngineOptions
from jaxllama.engine.scheduling.request import PromptLogprob
from jaxllama.engine.traffic import MemoryTraffic, memory_traffic
from jaxllama.errors import ChatTemplateError, ConfigError, ContextLengthError, RequestError
from jaxllama.hosts.group import Group
from jaxllama.llama.laboratory import Laboratory
from jaxllama.llama.outputs import Completion, CompletionDelta, Output, outputs_of, run_all
from jaxllama.llama.scores import Score, ScoredText, encode_pair, read_pairs
from jaxllama.model import native
from jaxllama.model.config import LlamaConfig
from jaxllama.model.mesh import make_mesh
from jaxllama.model.params import Params, num_params
from jaxllama.system.progress import show_progress
from jaxllama.text.chat import ChatTemplate
from jaxllama.text.constraint import ConstraintMaker
from jaxllama.text.encoding.tokenizer import Tokenizer
from jaxllama.text.reasoning import THINK
from jaxllama.weights.checkpoint import Checkpoint
from jaxllama.weights.exporting.export import export_params
from jaxllama.weights.exporting.rows import answer_rows
from jaxllama.weights.exporting.shards import MAX_SHARD_BYTES
from jaxllama.weights.loading import MAX_IN_FLIGHT_BYTES, load_params
from jaxllama.weights.opening import load_text, open_draft, open_model
from jaxllama.weights.places import PlaceLike
from jaxllama.weights.saving import answer_saves, save_params


def load(
    place: PlaceLike,
    mesh: Mesh | None = None,
    *,
    data: int = 1,
    dtype: Any = None,
    quantize: str | None = None,
    adapters: Sequence[PlaceLike] = (),
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

    `options.draft` is such a place too, of a smaller model with the same vocabulary (see `EngineOptions`), which is
    loaded onto the same mesh with the same `dtype` and `quantize`.

    `adapters` are LoRA adapters of PEFT, at places as the model's, merged into the weights in order while those are
    read: float32, rounded once to what is stored.

    `group` is that of many processes (`jaxllama.hosts.group.join`), each of which calls this alike and reads its own
    shards. Process 0 then uses the model, and the others call `llama.engine.follow()`. `progress` None shows what takes
    longer than two seconds (a bar on a terminal and in a notebook, lines for more than a gigabyte elsewhere).

    Raises: CheckpointError, ConversionError, TokenizerError, ChatTemplateError or ConfigError, saying what is wrong
        with which file; PlaceError saying where it was looked for; StoreError when a store fails; OSError for a
        compilation cache that cannot be made.
    """
    options = options or EngineOptions()
    use_compilation_cache(options.compilation_cache)
    checkpoint = open_model(place, adapters)
    config = checkpoint.config
    if mesh is not None and data != 1:
        raise ConfigError(f"give data={data} or a mesh (make_mesh takes data), not both")
    mesh = make_mesh(config, data=data) if mesh is None else mesh
    if mesh.devices.flat[0].platform == "cpu":
        native.begin_loading()
    dtype = jnp.dtype(checkpoint.dtype if dtype is None else dtype)
    if dtype not in (jnp.bfloat16, jnp.float32):
        raise ConfigError(f"dtype must be bfloat16 or float32, got {dtype}")
    tokenizer, chat_template = load_text(checkpoint)
    smaller = None if options.draft is None else open_draft(options.draft, config, tokenizer, place)
    how: dict[str, Any] = {"max_in_flight_bytes": max_in_flight_bytes, "progress": progress}
    params = load_params(checkpoint, mesh, dtype, quantize, **how)
    draft = None
    if smaller is not None:
        draft = (smaller.config, load_params(smaller, mesh, dtype, quantize, **how))
    return Llama(
        config,
        params,
        mesh,
        tokenizer=tokenizer,
        chat_template=chat_template,
        checkpoint=checkpoint,
        options=options,
        group=group,
        draft=draft,
    )


class Llama(Laboratory):
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
        draft: tuple[LlamaConfig, Params] | None = None,
    ) -> None:
        options = options or EngineOptions()
        self.config = config = config.for_context(options.max_context)
        if draft is not None:
            draft = (draft[0].for_context(options.max_context), draft[1])
        self.params = params
        self.mesh = mesh
        self.tokenizer = tokenizer
        self.chat_template = chat_template
        self.checkpoint = checkpoint
        self.engine = Engine(config, params, mesh, options, group, draft)
        if group is not None and not group.is_leader:
            answer_saves(config, params, group)
            answer_rows(config, params, group)

    def __repr__(self) -> str:
        """What a notebook shows: where the model is from, its size, and where it is spread."""
        name = f"{self.checkpoint.path}: " if self.checkpoint else ""
        axes = ", ".join(f"{axis} {size}" for axis, size in self.mesh.shape.items())
        return f"Llama({name}{self.num_params:,} parameters on {self.mesh.devices.flat[0].platform}, mesh {axes})"

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
        tags = THINK if self.chat_template is None else self.chat_template.reasoning_tags
        return ConstraintMaker(self.tokenizer, self.config.vocab_size, self.config.eos_token_ids, tags)

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
        Nothing is at `place` before all is complete; `force` replaces an earlier export. Requests run meanwhile. Of
        many processes, 0 calls this and writes everything; the others send it what their devices hold.

        Raises: ConversionError for `place` and a value that `dtype` cannot hold; CheckpointError for a model of no
            checkpoint; StoreError when writing fails.
        """
        options: dict[str, Any] = {"dtype": dtype, "max_shard_size": max_shard_size, "force": force}
        written = export_params(self.checkpoint, self.params, place, self.engine.group, **options)
        return written.where

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Cancels what runs and ends the engine's thread."""
        self.engine.close()

    @overload
    def generate(  # type: ignore[overload-overlap]
        self, prompts: str, params: SamplingParams | None = None, *, prediction: Prompt | None = None
    ) -> Completion: ...
    @overload
    def generate(
        self, prompts: Sequence[int], params: SamplingParams | None = None, *, prediction: Prompt | None = None
    ) -> Completion: ...
    @overload
    def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        prediction: Prompt | None = None,
        progress: bool | None = None,
    ) -> list[Completion]: ...
    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        prediction: Prompt | None = None,
        progress: bool | None = None,
    ) -> Completion | list[Completion]:
        """Completes one prompt (text or token ids), or any number, which share the rows; waits where the queue is full.

        `params` are those of all prompts, or one for each. A text is encoded as the tokenizer does by itself (BOS
        included, if it adds one). `prediction` is what all may resemble, as OpenAI's: with speculation "auto" one
        that does is sooner, and nothing else changes. `progress` shows how many are done on stderr: a bar on a terminal
        and in a notebook, lines elsewhere. None shows it for several prompts, on a terminal or in a notebook only.

        Raises: RequestError for a prompt or parameters that cannot run; NonFiniteLogitsError.
        """
        given, is_one = read_prompts(prompts)
        each = read_params(params, len(given))
        ids = [self._encode(prompt) for prompt in given]
        predicted = self._encode_prediction(prediction)
        outputs = [Output(self, prompt, one, prediction=predicted) for prompt, one in zip(ids, each, strict=True)]
        # One prompt is not worth a bar that nobody asked for.
        show = False if progress is None and len(outputs) == 1 else progress
        with show_progress("generate", len(outputs), show=show) as advance:
            run_all(self.engine, outputs, advance)
        completions = [output.completion() for output in outputs]
        return completions[0] if is_one else completions

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, *, prediction: Prompt | None = None
    ) -> Iterator[CompletionDelta]:
        """Completes one prompt piece by piece. Leaving the loop early cancels the request. `prediction` as for
        `generate`.

        Raises: as `generate`.
        """
        (one,) = read_params(params, 1)
        ids = self._encode(read_prompt(prompt))
        return _deltas(Output(self, ids, one, prediction=self._encode_prediction(prediction)))

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        params: SamplingParams | None = None,
        *,
        prediction: Prompt | None = None,
    ) -> Completion:
        """Answers messages (`{"role": …, "content": …}`) through the model's chat template. `prediction` as for
        `generate`.

        Raises: ChatTemplateError if there is no template or it refuses the messages; else as `generate`.
        """
        (one,) = read_params(params, 1)
        if self.chat_template is None or self.tokenizer is None:
            raise ChatTemplateError("this checkpoint has no chat template; use generate with a prompt of your own")
        rendered = self.chat_template.render(messages)
        output = Output(
            self,
            self.tokenizer.encode_rendered(rendered),
            one,
            is_chat=True,
            starts_in_reasoning=rendered.starts_in_reasoning,
            reasoning_tags=self.chat_template.reasoning_tags,
            prediction=self._encode_prediction(prediction),
        )
        for _ in _deltas(output):
            pass
        return output.completion()

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """Scores of every next token after each of `ids`: float32 `[len(ids), vocab_size]`.

        Not over many processes. Raises: RequestError there and for ids outside the vocabulary, ContextLengthError for
        more than the context.
        """
        if self.engine.group is not None:
            raise RequestError("logits are of one process; this model is spread over several")
        tokens = self._checked_ids(ids, self.config.max_position_embeddings)
        return np.concatenate([np.asarray(chunk) for chunk in self._logits(tokens)])[: len(tokens)]

    def prompt_logprobs(
        self, ids: Sequence[int], num_top: int = 0, *, priority: int = 0, cache_scope: str | bytes = b""
    ) -> Generator[PromptLogprob]:
        """The log-probability of every token but the first, with the `num_top` (at most 20) likeliest at its place.

        The engine finds them chunk by chunk, beside other requests, once the iterator is read; closing it cancels the
        rest. `priority` and `cache_scope` are as for `Engine.submit`.

        Raises: RequestError for ids outside the vocabulary and for `num_top`, ContextLengthError for more than the
            context; NonFiniteLogitsError.
        """
        if not 0 <= num_top <= MAX_TOP_LOGPROBS:
            raise RequestError(f"num_top must be from 0 to {MAX_TOP_LOGPROBS}, got {num_top}", "num_top")
        tokens = self._checked_ids(ids, self.max_context + 1).tolist()
        text = ScoredText(self.engine, tokens, 1, num_top=num_top, priority=priority, cache_scope=cache_scope)
        return _entries(text)

    @overload
    def score(self, prompts: str, continuations: str, *, per_token: bool = False) -> Score: ...
    @overload
    def score(
        self,
        prompts: Prompt | Sequence[Prompt],
        continuations: Prompt | Sequence[Prompt],
        *,
        per_token: bool = False,
        progress: bool | None = None,
    ) -> Score | list[Score]: ...
    def score(
        self,
        prompts: Prompt | Sequence[Prompt],
        continuations: Prompt | Sequence[Prompt],
        *,
        per_token: bool = False,
        progress: bool | None = None,
    ) -> Score | list[Score]:
        """How likely each continuation is after its prompt, or all of several after one prompt.

        Both are texts or token ids; a text prompt and its continuation are encoded together. What several begin with
        is computed once. `per_token` adds each token's log-probability and rank. `progress` is as for `generate`.
        Nothing is sampled, so the values do not depend on what else runs.

        Raises: RequestError for what cannot be scored, ContextLengthError for a pair of more than the context;
            NonFiniteLogitsError.
        """
        pairs, is_one = read_pairs(prompts, continuations)
        encoded = [encode_pair(self.tokenizer, *pair) for pair in pairs]
        texts = [
            ScoredText(self.engine, self._checked_ids(ids, self.max_context + 1).tolist(), n) for ids, n in encoded
        ]
        show = False if progress is None and len(texts) == 1 else progress
        # Neighbours share most of what they begin with, while it is in the cache.
        ordered = sorted(texts, key=lambda text: text.ids)
        with show_progress("score", len(texts), show=show) as advance:
            run_all(self.engine, ordered, advance)
        scores = [text.score(per_token=per_token) for text in texts]
        return scores[0] if is_one else scores

    def _checked_ids(self, ids: Sequence[int], context: int) -> np.ndarray:
        tokens = token_ids(ids, "ids")
        vocab = self.config.vocab_size
        if not tokens or min(tokens) < 0 or max(tokens) >= vocab:
            raise RequestError(f"ids must be a non-empty list of token ids from 0 to {vocab - 1}", "ids")
        if len(tokens) > context:
            raise ContextLengthError(f"{len(tokens)} ids are more than the {context} that the context allows", "ids")
        return np.asarray(tokens, np.int32)

    def _logits(self, tokens: Int[np.ndarray, " tokens"]) -> Iterator[jax.Array]:
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

    def _encode_prediction(self, prediction: Prompt | None) -> list[int]:
        if prediction is None:
            return []
        given = read_prompt(prediction, "prediction")
        if isinstance(given, str) and self.tokenizer is not None:
            return self.tokenizer.encode(given, add_bos=False)
        return self._encode(given)

    def _encode(self, prompt: str | list[int]) -> list[int]:
        if not isinstance(prompt, str):
            return prompt
        if self.tokenizer is None:
            raise RequestError("this checkpoint has no tokenizer: give the prompt as token ids", "prompt")
        return self.tokenizer.encode(prompt)


def _deltas(output: Output) -> Iterator[CompletionDelta]:
    with contextlib.closing(outputs_of(output)) as outputs:
        for tokens in outputs:
            delta = output.add(tokens)
            if delta.token_ids or delta.text or delta.reasoning or delta.finish_reason:
                yield delta
            if output.is_finished:
                return


def _entries(text: ScoredText) -> Generator[PromptLogprob]:
    if len(text.ids) == 1:
        return
    with contextlib.closing(outputs_of(text)) as outputs:
        for output in outputs:
            yield from text.add(output)
