"""How large the engine makes what it holds: rows, pages, page tables. The planner works with the same numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax

from jaxllama.decode.draft_model import DraftModel
from jaxllama.decode.state import DecodeState, state_shapes
from jaxllama.engine.options import EngineOptions
from jaxllama.engine.scheduling.sharing import ChunkPlaces
from jaxllama.engine.scheduling.speculation import MAX_PREDICTION_TOKENS, Speculation, SpeculationMode
from jaxllama.errors import ConfigError
from jaxllama.model.cache import HeadLayout
from jaxllama.model.config import LlamaConfig
from jaxllama.model.params import Params, num_params
from jaxllama.model.platforms.platform import Platform

TOKENS_PER_ROW = 2048
"""For so many tokens of each row there are pages, unless the options say how many pages."""


@dataclass(frozen=True)
class EngineSizes:
    """`rows_per_shard` rows and `num_pages` pages (page 0 is nobody's) on each of `num_shards`.

    A page table is wider than a context, because a prompt's last chunk may reach past it. `history_size` is the number
    of tokens in which drafts are looked up for a row, and for `num_masks` of its next tokens it can have masks.
    """

    max_context: int
    page_size: int
    chunk_sizes: tuple[int, ...]
    num_shards: int
    rows_per_shard: int
    num_pages: int
    history_size: int = 0
    num_masks: int = 1

    @property
    def num_rows(self) -> int:
        """Rows in all."""
        return self.rows_per_shard * self.num_shards

    @property
    def table_width(self) -> int:
        """Pages of a row's page table."""
        return _num_pages(self.max_context, self.page_size) + max(self.chunk_sizes) // self.page_size

    def state_shapes(
        self, config: LlamaConfig, kv_dtype: Any, layout: HeadLayout | None = None, draft: DraftModel | None = None
    ) -> DecodeState:
        """The arrays of the decode state, with heads in `layout` (`Platform.head_layout`), and a cache for `draft`."""
        return state_shapes(
            config,
            num_rows=self.num_rows,
            num_pages=self.num_pages,
            page_size=self.page_size,
            max_context=self.table_width * self.page_size,
            dtype=kv_dtype,
            num_shards=self.num_shards,
            history_size=self.history_size,
            num_masks=self.num_masks,
            layout=layout,
            draft=None if draft is None else (draft.config, draft.platform.head_layout),
        )


def size_engine(
    *,
    max_rows: int,
    max_context: int,
    page_size: int,
    chunk_sizes: tuple[int, ...],
    num_shards: int,
    num_pages: int | None = None,
    tokens_per_row: int = TOKENS_PER_ROW,
    min_rows: int = 2,
    speculation: SpeculationMode = "off",
    max_drafts: int = 0,
) -> EngineSizes:
    """The sizes for `max_rows` rows; every shard has equally many, one alone at least `min_rows` (see `Platform`).

    Chunks of a size that no context fills are left out. `num_pages` None holds `tokens_per_row` tokens of each row, and
    at least one context. With `speculation` rows have room for their tokens, with "auto" for a prediction too, and for
    the masks of a token and `max_drafts` more.

    Raises: ConfigError for chunks that are not whole pages, or pages that hold no context.
    """
    if not chunk_sizes or any(size < 1 or size % page_size for size in chunk_sizes):
        raise ConfigError(f"chunk_sizes must be multiples of page_size ({page_size}), got {chunk_sizes}")
    longest = min((size for size in chunk_sizes if size >= max_context), default=max(chunk_sizes))
    chunk_sizes = tuple(size for size in chunk_sizes if size <= longest)
    rows_per_shard = max(min_rows, max_rows) if num_shards == 1 else -(-max_rows // num_shards)
    context_pages = _num_pages(max_context, page_size)
    if num_pages is None:
        num_pages = 1 + max(context_pages, rows_per_shard * min(context_pages, _num_pages(tokens_per_row, page_size)))
    if num_pages <= context_pages:
        raise ConfigError(
            f"num_pages ({num_pages}) cannot hold one context of {max_context} tokens, which needs "
            f"{context_pages + 1} pages of {page_size}. Lower max_context or raise num_pages"
        )
    predicted = min(max_context, MAX_PREDICTION_TOKENS)
    history_size = {"off": 0, "auto": max_context + predicted}.get(speculation, max_context)
    num_masks = 1 + max_drafts if history_size else 1
    pages = (max_context, page_size, chunk_sizes, num_shards, rows_per_shard, num_pages)
    return EngineSizes(*pages, history_size, num_masks)


def chunk_places(platform: Platform, sizes: EngineSizes, params: Params) -> ChunkPlaces:
    """How many chunks a call of prefill has, by their size."""
    layers = jax.tree.leaves(params["layers"])
    weight_bytes = sum(array.nbytes for array in layers) / sum(array.size for array in layers)
    in_group = {size: platform.chunks_in_group(size, weight_bytes) for size in sizes.chunk_sizes}
    return ChunkPlaces(in_group, platform.num_groups)


def most_drafts(options: EngineOptions, platform: Platform, *, has_draft: bool) -> int:
    """Drafts of a row that a step verifies at most, wherever they are from."""
    if options.speculation == "draft":
        return options.draft_tokens
    return max(platform.max_drafts, options.draft_tokens if has_draft else 0)


def plan_speculation(
    config: LlamaConfig,
    sizes: EngineSizes,
    options: EngineOptions,
    platform: Platform,
    row_buckets: Sequence[int],
    draft: DraftModel | None,
) -> Speculation:
    """What the engine's programs verify, for `row_buckets` rows.

    Raises: ConfigError where the options and the draft model do not go together.
    """
    if (options.speculation == "draft") > (draft is not None):
        raise ConfigError("speculation 'draft' needs a draft model: give its place as `draft` (--draft)")
    most = most_drafts(options, platform, has_draft=draft is not None)
    if draft is not None:
        draft.platform.kernel.validate(
            page_size=sizes.page_size, num_rows=sizes.rows_per_shard, table_width=sizes.table_width
        )
    return Speculation(
        history_size=sizes.history_size,
        num_drafts={rows: platform.num_drafts(rows, most) if sizes.history_size else 0 for rows in row_buckets},
        looks_up=options.speculation != "draft",
        max_by_model=0 if draft is None else options.draft_tokens,
        model_share=1.0 if draft is None else num_params(draft.config) / num_params(config),
    )


def _num_pages(num_tokens: int, page_size: int) -> int:
    return -(-num_tokens // page_size)
