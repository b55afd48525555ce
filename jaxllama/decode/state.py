"""The state of the rows that decode together: what it is made of, where it lies, and how a row gets into it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from jaxllama.decode.drafts import FIRST_ACCEPTANCE, SUFFIXES
from jaxllama.decode.params import CONTROLS, MAX_STOP_TOKEN_IDS, SamplingParams
from jaxllama.decode.sampling import ControlArrays, SamplingArrays
from jaxllama.model.cache import HeadLayout, KVPool, kv_pool_axes, kv_pool_shapes
from jaxllama.model.config import LlamaConfig
from jaxllama.model.mesh import in_place, num_page_shards, partition_spec
from jaxllama.text.structured import num_mask_words

MAX_STEPS = 32
NOT_FINITE = -2
"""Stands in `StepOutput.tokens` for a row whose logits were not finite."""


class SteeringArrays(NamedTuple):
    """What is added to the residual stream that layer `layer` puts out, -1 for nothing, as `decode.steering` says."""

    vector: Float[Array, "*rows embed"]
    layer: Int[Array, "*rows"]


class RowState(NamedTuple):
    """What decoding changes of every row, `[rows, …]`; or one row as the host makes it: NumPy, without that dimension.

    `length` counts the tokens of a row whose keys and values are written; `last_token` is the next to go in.
    `remaining` is the budget, `min_remaining` how many more tokens must come before a stop id may.

    What drafts are found in (`drafts`): the token of position p is `history[history_start + p]`, up to `last_token`'s.
    Without speculation `history` has no places. `acceptance` is the share of drafted tokens that were right.
    `draft_length` counts the tokens of which the draft model's cache has keys and values, at most `length`.
    """

    length: Int[Array, "*rows"]
    last_token: Int[Array, "*rows"]
    remaining: Int[Array, "*rows"]
    min_remaining: Int[Array, "*rows"]
    active: Bool[Array, "*rows"]
    generated_counts: Int[Array, "*rows vocab"]
    prompt_mask: Bool[Array, "*rows vocab"]
    history: Int[Array, "*rows history"]
    history_start: Int[Array, "*rows"]
    acceptance: Float[Array, "*rows suffixes"]
    draft_length: Int[Array, "*rows"]
    sampling: SamplingArrays
    steering: SteeringArrays


class DecodeState(NamedTuple):
    """Everything that decoding changes, for a fixed number of rows. Every leaf is always an array of one shape.

    `draft_pool` is the draft model's cache, with as many pages: page tables are for both. None where there is none.
    """

    pool: KVPool
    page_table: Int[Array, "rows max_pages"]
    rows: RowState
    draft_pool: KVPool | None = None


class Place(NamedTuple):
    """Where the tokens of one row are kept: its page table, and the shard (`ShardedAttention`) whose pages those are;
    or of several, as in `Chunk`.

    NumPy's arrays on the host.
    """

    page_table: Int[Any, "*rows max_pages"]
    shard: Int[Any, "*rows"]


class Chunk(NamedTuple):
    """Some tokens of one row: `tokens[:num_tokens]` stand at positions `start …`, the rest is padding.

    The size of the chunk is a multiple of the page size, and so is `start` but where `Platform.starts_anywhere`.
    Or chunks of several rows in one program: they come to what one after another would, so that a later one may be of
    the same row, or of one that holds its pages. Each group of `data` has equally many, of rows of its own shards, one
    group's after another's; those without tokens do nothing.
    """

    tokens: Int[Any, "*rows chunk"]
    start: Int[Any, "*rows"]
    num_tokens: Int[Any, "*rows"]


class StepOutput(NamedTuple):
    """The first `num_steps` of it count. A token is -1 where the row was inactive, `NOT_FINITE` where it failed.

    Of steps with drafts a row's tokens follow one another without gaps, up to its first -1. So many drafts of each row
    were verified, so many accepted, and so many of those found in what the row was expected to resemble.
    `draft_length` is that of `RowState` at the end.
    """

    tokens: Int[Array, "steps rows"]
    num_steps: Int[Array, ""]
    logprobs: Float[Array, "steps rows"]
    top_ids: Int[Array, "steps rows 20"]
    top_logprobs: Float[Array, "steps rows 20"]
    num_drafted: Int[Array, " rows"]
    num_accepted: Int[Array, " rows"]
    num_predicted: Int[Array, " rows"]
    draft_length: Int[Array, " rows"]


@dataclass(frozen=True)
class _Leaf:
    """One array of a `RowState`: its dtype, and the dimensions after the rows (`_dimensions` has their sizes)."""

    dtype: str
    dims: tuple[str, ...] = ()


# Trees of the same form that hold something else than arrays: leaves, shapes, axes, one row's NumPy values.
_row_of: Any = RowState
_sampling_of: Any = SamplingArrays
_controls_of: Any = ControlArrays
_steering_of: Any = SteeringArrays

_ROW: RowState = _row_of(
    length=_Leaf("int32"),
    last_token=_Leaf("int32"),
    remaining=_Leaf("int32"),
    min_remaining=_Leaf("int32"),
    active=_Leaf("bool"),
    generated_counts=_Leaf("int32", ("vocab",)),
    prompt_mask=_Leaf("bool", ("vocab",)),
    history=_Leaf("int32", ("history",)),
    history_start=_Leaf("int32"),
    acceptance=_Leaf("float32", ("suffixes",)),
    draft_length=_Leaf("int32"),
    sampling=_sampling_of(
        controls=_controls_of(*(_Leaf(control.dtype) for control in CONTROLS.values() if control.dtype)),
        seed=_Leaf("uint32", ("seed_words",)),
        stop_ids=_Leaf("int32", ("stop_ids",)),
        logit_bias=_Leaf("float32", ("vocab",)),
        is_biased=_Leaf("bool"),
        num_logprobs=_Leaf("int32"),
        is_masked=_Leaf("bool"),
        token_mask=_Leaf("uint32", ("masks", "mask_words")),
    ),
    steering=_steering_of(vector=_Leaf("float32", ("embed",)), layer=_Leaf("int32")),
)
_SPLIT = ("vocab",)
"""The dimensions that a mesh may split."""


def _dimensions(config: LlamaConfig, history_size: int, num_masks: int = 1) -> dict[str, int]:
    return {
        "vocab": config.vocab_size,
        "embed": config.hidden_size,
        "history": history_size,
        "suffixes": len(FIRST_ACCEPTANCE),
        "seed_words": 2,
        "stop_ids": MAX_STOP_TOKEN_IDS + len(config.eos_token_ids) + 1,
        "masks": num_masks,
        "mask_words": num_mask_words(config.vocab_size),
    }


def state_shapes(
    config: LlamaConfig,
    *,
    num_rows: int,
    num_pages: int,
    page_size: int,
    max_context: int,
    dtype: Any,
    num_shards: int = 1,
    history_size: int = 0,
    num_masks: int = 1,
    layout: HeadLayout | None = None,
    draft: tuple[LlamaConfig, HeadLayout | None] | None = None,
) -> DecodeState:
    """The shapes and dtypes of a `DecodeState` with a pool of `dtype`, whose pages hold heads in `layout`, and one for
    the draft model of that config and layout.

    `num_pages` are those of each shard (see `ShardedAttention`) and count page 0, given to no row. `history_size` is
    the number of tokens in which drafts are looked up for a row; 0 where there is no speculation. For so many of its
    next tokens, `num_masks`, a row can have masks.
    """
    sizes = _dimensions(config, history_size, num_masks)
    shapes: Any = DecodeState(
        pool=kv_pool_shapes(config, num_pages, page_size, dtype, num_shards, layout),
        page_table=jax.ShapeDtypeStruct((num_rows, -(-max_context // page_size)), jnp.int32),  # type: ignore[arg-type]
        rows=jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct((num_rows, *(sizes[dim] for dim in leaf.dims)), leaf.dtype), _ROW
        ),
        draft_pool=None
        if draft is None
        else kv_pool_shapes(draft[0], num_pages, page_size, dtype, num_shards, layout=draft[1]),
    )
    return shapes


def state_shardings(
    config: LlamaConfig, mesh: Mesh, shapes: DecodeState, draft: LlamaConfig | None = None
) -> DecodeState:
    """Rows over `data`, pages over `data` and `rep`, KV heads over `kv`, vocabulary over `kv` and `rep`.

    `draft` is the config of the draft model that there is a pool for. What has no element is everywhere.
    """
    axes = DecodeState(
        pool=kv_pool_axes(shapes.pool.pages.dtype),
        page_table=("rows", None),  # type: ignore[arg-type]
        rows=jax.tree.map(lambda leaf: ("rows", *(dim if dim in _SPLIT else None for dim in leaf.dims)), _ROW),
    )
    shardings: DecodeState = _shardings(axes, config, mesh, num_rows=shapes.page_table.shape[0])
    if draft is not None:
        shardings = shardings._replace(draft_pool=_shardings(axes.pool, draft, mesh))
    everywhere = NamedSharding(mesh, PartitionSpec())
    shardings = jax.tree.map(lambda shape, where: where if shape.size else everywhere, shapes, shardings)
    return shardings


def laid_out(shardings: DecodeState) -> DecodeState:
    """Where a state of these shardings lies: on TPUs each row's `logit_bias` in one piece; None stays None.

    Left to itself, the compiler has columns in one piece where there are 128 rows, and then every dispatch copies the
    array, because the branch that adds it wants rows (bench/LOG.md).
    """
    sampling = shardings.rows.sampling
    where: Any = sampling.logit_bias
    if where is None or next(iter(where.device_set)).platform != "tpu":
        return shardings
    in_rows: Any = Format(Layout((0, 1)), where)
    sampling = sampling._replace(logit_bias=in_rows)
    return shardings._replace(rows=shardings.rows._replace(sampling=sampling))


def _shardings(axes: Any, config: LlamaConfig, mesh: Mesh, num_rows: int | None = None) -> Any:
    return jax.tree.map(
        lambda names: NamedSharding(mesh, partition_spec(names, config, mesh, num_rows=num_rows)),
        axes,
        is_leaf=lambda x: type(x) is tuple,
    )


def make_pool(
    config: LlamaConfig,
    mesh: Mesh,
    *,
    num_pages: int,
    page_size: int,
    dtype: Any,
    layout: HeadLayout | None = None,
) -> KVPool:
    """An empty pool by itself, for `prefill_logits`."""
    shapes = kv_pool_shapes(config, num_pages, page_size, dtype, num_page_shards(mesh), layout)
    shardings = _shardings(kv_pool_axes(dtype), config, mesh)
    pool: KVPool = jax.tree.map(lambda s, where: jnp.zeros(s.shape, s.dtype, device=where), shapes, shardings)
    return pool


def make_state(shapes: DecodeState, shardings: DecodeState) -> DecodeState:
    """An empty state, made on the devices that hold it."""
    where = laid_out(shardings)
    zeros = jax.jit(lambda: jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes), out_shardings=where)
    return zeros()


def row_state(
    config: LlamaConfig,
    params: SamplingParams,
    *,
    prompt: list[int],
    generated: list[int],
    remaining: int,
    seed: int,
    halt_id: int | None = None,
    history_size: int = 0,
    prediction: list[int] | None = None,
    draft_length: int = 0,
) -> RowState:
    """The row that continues `prompt + generated` (`generated` is not empty after a preemption).

    `remaining` is the number of tokens still to come at most. Its last token is the row's next input. `halt_id` makes
    the row inactive as stop ids do. It begins without a mask. `history_size` is that of the state it goes into, which
    holds all tokens of the row; in what is left, drafts are found in `prediction`, what the output may resemble.
    """
    sizes, ids = _dimensions(config, history_size), prompt + generated
    history, start = _history(prompt, ids, remaining, history_size, prediction or [])
    prompt_mask = np.zeros(sizes["vocab"], np.bool_)
    prompt_mask[prompt] = True
    bias = np.zeros(sizes["vocab"], np.float32)
    bias[list(params.logit_bias)] = list(params.logit_bias.values())
    stops = [*params.stop_token_ids, *(() if params.ignore_eos else config.eos_token_ids)]
    stops += [] if halt_id is None else [halt_id]
    row = _row_of(
        length=len(ids) - 1,
        last_token=ids[-1],
        remaining=remaining,
        min_remaining=max(0, params.min_tokens - len(generated)),
        active=True,
        generated_counts=np.bincount(np.asarray(generated, np.int64), minlength=sizes["vocab"]),
        prompt_mask=prompt_mask,
        history=history,
        history_start=start,
        acceptance=np.array(FIRST_ACCEPTANCE),
        draft_length=draft_length,
        sampling=_sampling_of(
            controls=_controls_of(
                *(control.on_device(getattr(params, name)) for name, control in CONTROLS.items() if control.dtype)
            ),
            seed=np.array([seed >> 32, seed & 0xFFFFFFFF]),
            stop_ids=np.pad(np.array(stops, np.int32), (0, sizes["stop_ids"] - len(stops)), constant_values=-1),
            logit_bias=bias,
            is_biased=bias.any(),
            num_logprobs=-1 if params.logprobs is None else params.logprobs,
            is_masked=False,
            # One for all of the state's: `insert` repeats it.
            token_mask=np.full((1, sizes["mask_words"]), 0xFFFFFFFF, np.uint32),
        ),
        steering=_steering_of(
            vector=np.zeros(sizes["embed"]) if params.steering is None else params.steering.vector,
            layer=-1 if params.steering is None else params.steering.layer,
        ),
    )
    new: RowState = jax.tree.map(lambda leaf, value: np.asarray(value, leaf.dtype), _ROW, row)
    return new


def _history(
    prompt: list[int], ids: list[int], remaining: int, size: int, prediction: list[int]
) -> tuple[Int[np.ndarray, " history"], int]:
    """The history of a row of `ids`, and where those begin in it."""
    history, before = np.zeros(size, np.int32), []
    if size and prediction:
        # The prompt's end before it: what follows that, the beginning, is found at once.
        before = [*prompt[-max(SUFFIXES) :], *prediction][: max(0, size - len(ids) - remaining)]
    if size:
        own = [*before, *ids]
        history[: len(own)] = own
    return history, len(before)


def any_row(config: LlamaConfig, history_size: int = 0, remaining: int = 1) -> RowState:
    """A row of no request, for its shapes and dtypes, or to see how long steps take."""
    return row_state(
        config,
        SamplingParams(temperature=0, ignore_eos=True),
        prompt=[0],
        generated=[],
        remaining=remaining,
        seed=0,
        history_size=history_size,
    )


@in_place("state", result=laid_out)
def insert(state: DecodeState, row: Int[Array, ""], new: RowState) -> DecodeState:
    """Puts a row in place. Its pages must be written (`prefill`) before the next `decode_steps`."""
    return state._replace(rows=jax.tree.map(lambda array, value: array.at[row].set(value), state.rows, new))
