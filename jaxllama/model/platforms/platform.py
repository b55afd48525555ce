"""What a model and the engine are told about the devices they run on."""

from __future__ import annotations

from dataclasses import dataclass

from jax.sharding import Mesh

from jaxllama.model.attention import Attention, ReferenceAttention, ShardedAttention
from jaxllama.model.cache import HeadLayout
from jaxllama.model.config import LlamaConfig
from jaxllama.model.linear import SplitTokens
from jaxllama.model.mesh import RULES, splitting

_TILE_TOKENS = 16
"""Of bfloat16, in the second-last dimension of a TPU's tile."""

type CompilerOptions = tuple[tuple[str, str | bool | int], ...]


@dataclass(frozen=True)
class Case:
    """What a description depends on: the model, its devices, and the dtypes of what enters a product and of the cache.

    The dtypes are names such as "bfloat16". `quantize` is "int8" where matrices are kept so, else None.
    """

    config: LlamaConfig
    mesh: Mesh
    dtype: str
    kv_dtype: str
    quantize: str | None = None

    def reference(self) -> ShardedAttention:
        """Attention in plain JAX, on these devices."""
        return ShardedAttention(ReferenceAttention(), self.mesh if self.mesh.size > 1 else None)


@dataclass(frozen=True)
class Platform:
    """How one model runs on its devices. Hashable: it is static under `jax.jit`. The defaults suit plain JAX.

    The programs:
    `attention` is the kernel, on the mesh. `keeps_float32`: between matrix products values are float32, else they are
    rounded to the weights' dtype. `layers_per_loop`: layers run in groups of so many, each in a loop of one round,
    because a compiler may plan its copies well for a few layers and badly for 80; None: all in one piece.
    `has_layer_kernel`: a layer is one call of `native.run_layer`. `splits_tokens`: between products, each device of a
    mesh has its own tokens of a chunk, where chunk and model divide; else every device has all tokens.
    `compiler_options` are XLA's, for every program that runs the layers, `step_options` more of them for decode steps.
    `head_layout` is how the kernel wants the cache's pages to hold KV heads; None: each by itself. `kernel_fault` is
    what a kernel does wrong on these devices, in whose place the reference runs (`self_check`).

    The weights:
    `packs_weights`: matrices are reordered for `native.multiply`. `max_part_bytes`: feed-forward matrices are
    kept in parts of at most so many bytes on a device; None: whole.

    The engine:
    `page_size` and `chunk_sizes`, in tokens, are what the kernel works best with. Chunks share a program of prefill in
    which each group of `data` has one, or more that are `shared_tokens` together: so many cost hardly more than one,
    because products wait for the weights, in bfloat16. A chunk alone runs that program too, with places that are free:
    its bits must not depend on who else waits. `needs_clean_pages`: pages that may
    hold a failed row's NaN are cleared before another row is given them, because the kernel reads past a row's end.
    `has_row_buckets`: decode programs are made for fewer rows too, which presumes that a row's bits are the same in
    each. `min_rows` of a decode program: XLA multiplies one row by another path, with other bits, than two, and a row
    must not notice its batch. `programs_agree`: all programs write the same bits for a token, `prefill` of any size
    from any page and `decode_steps` alike. `max_drafts`: a step verifies so many drafts a row, and
    in all `max_verified_tokens` tokens: with more its products no longer wait for the memory.
    """

    name: str
    attention: ShardedAttention
    keeps_float32: bool = True
    layers_per_loop: int | None = None
    has_layer_kernel: bool = False
    splits_tokens: bool = False
    compiler_options: CompilerOptions = ()
    step_options: CompilerOptions = ()
    head_layout: HeadLayout | None = None
    kernel_fault: str | None = None
    packs_weights: bool = False
    max_part_bytes: int | None = None
    page_size: int = 16
    chunk_sizes: tuple[int, ...] = (32, 128, 512)
    shared_tokens: int = 0
    needs_clean_pages: bool = False
    has_row_buckets: bool = False
    min_rows: int = 2
    programs_agree: bool = False
    max_drafts: int = 4
    max_verified_tokens: int = 256

    def split_tokens(self, config: LlamaConfig, rows: int, tokens: int) -> SplitTokens | None:
        """How the tokens of chunks are split between products; None: every device has all of them."""
        mesh = self.attention.mesh
        if not self.splits_tokens or mesh is None:
            return None
        own_rows = splitting(RULES["rows"] if self.attention.splits_rows(rows) else (), mesh)
        split = SplitTokens(mesh, splitting(RULES["ffn"], mesh), own_rows)
        divides = all(size % split.num_parts == 0 for size in (config.num_heads, config.intermediate_size))
        whole_tiles = tokens % (_TILE_TOKENS * split.num_parts) == 0
        return split if split.num_parts > 1 and divides and whole_tiles else None

    @property
    def kernel(self) -> Attention:
        """Attention on one device."""
        return self.attention.kernel

    @property
    def starts_anywhere(self) -> bool:
        """Whether a chunk may start in the middle of a page: a layer's kernel writes token by token."""
        return self.has_layer_kernel

    @property
    def num_shards(self) -> int:
        """Into how many parts rows and pages are split."""
        return self.attention.num_shards

    @property
    def num_groups(self) -> int:
        """Into how many parts the rows of products are split: `data`."""
        mesh = self.attention.mesh
        return 1 if mesh is None else int(mesh.shape["data"])

    def chunks_in_group(self, size: int, weight_bytes: float = 2.0) -> int:
        """How many chunks of `size` tokens each group has in a program of prefill, with so many bytes a weight."""
        return max(1, int(self.shared_tokens * weight_bytes / 2) // size)

    @property
    def most_chunks_in_group(self) -> int:
        """The most that `chunks_in_group` gives, for the smallest chunks and weights in bfloat16."""
        return self.chunks_in_group(min(self.chunk_sizes))

    def num_drafts(self, num_rows: int, most: int | None = None) -> int:
        """Drafts a row for a decode program of `num_rows`, at most `most` (None: `max_drafts`); 0 where verifying would
        not pay."""
        most = self.max_drafts if most is None else most
        if not self.programs_agree:  # All rows run that program, whatever they have.
            num_drafts = min(most, self.max_verified_tokens // num_rows - 1)
            return num_drafts if num_drafts >= min(most, 2) else 0
        # A layer's kernel takes the time of the tokens that there are, however many rows there could be.
        return most if self.has_layer_kernel or num_rows <= self.max_verified_tokens else 0

    def row_buckets(self, num_rows: int) -> tuple[int, ...]:
        """Numbers of rows to make decode programs for, ascending: few rows should not pay for many.

        Kernels leave out rows that are not active, so there one number between would save little.
        """
        sizes = {self.min_rows, num_rows}
        if not self.has_layer_kernel:
            sizes.add(max(self.min_rows, num_rows // 4))
        return tuple(sorted(sizes)) if self.has_row_buckets else (num_rows,)
