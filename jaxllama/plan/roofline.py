"""The analytic model: the least time that memory and arithmetic allow, and a guess at temporaries."""

from __future__ import annotations

from functools import lru_cache

from jaxllama.model.config import LlamaConfig
from jaxllama.model.params import param_specs
from jaxllama.plan.measure import KernelWork
from jaxllama.plan.setup import PARTS, Setup, kv_bytes_per_token, weight_bytes

EFFICIENCY = 0.75
"""Of the roofline, where nothing was compiled. The compiled 70B reached 0.59 (v5p-4) to 0.89 (v6e-8), docs/tpu.md."""

_KERNEL_FLOPS_EFFICIENCY = 0.5
_TEMPORARY_BYTES = 128 * 2**20


def decode_seconds(setup: Setup, tokens: int = 1) -> float:
    """One step of all rows, of so many tokens of each: weights and KV read once, or the arithmetic, whichever is
    longer."""
    chip, config, queries = setup.topology.generation, setup.config, setup.rows_per_replica * tokens
    kv = setup.rows_per_shard * setup.context * kv_bytes_per_token(setup)
    flops = 2 * _product_params(setup) * queries / setup.tp + _attention_flops(setup, queries * setup.context)
    # The embedding is a look-up of a few rows, unless it is the head too.
    read = weight_bytes(setup, PARTS if config.tie_word_embeddings else ("layers", "norm", "lm_head"))
    return max((read + kv) / chip.hbm_bytes_per_s, flops / chip.flops_per_s)


def chunk_seconds(setup: Setup) -> float:
    """A call of chunks in the middle of prompts, as many of each group as there are places."""
    chip = setup.topology.generation
    flops = 2 * _product_params(setup, head=False) * setup.chunks_in_group * setup.chunk_tokens / setup.tp
    flops += _chunk_attention_flops(setup)
    kv = setup.chunks_in_group * mean_prefill_context(setup) * kv_bytes_per_token(setup)
    return max((weight_bytes(setup, ("layers",)) + kv) / chip.hbm_bytes_per_s, flops / chip.flops_per_s)


def num_chunks(setup: Setup) -> int:
    """Of one prompt."""
    return -(-setup.prompt_tokens // setup.chunk_tokens)


def num_calls(setup: Setup) -> int:
    """Of prefill for one prompt, whose chunks share them too."""
    return -(-num_chunks(setup) // setup.chunks_in_group)


def mean_prefill_context(setup: Setup) -> float:
    """How many keys a query of the prompt sees on average."""
    return num_chunks(setup) * setup.chunk_tokens / 2


def decode_kernels(setup: Setup) -> KernelWork:
    """What attention kernels do in one decode step: the one place where a Pallas kernel's KV bytes are counted."""
    return KernelWork(setup.rows_per_shard * setup.context * kv_bytes_per_token(setup, as_kept=True))


def prefill_kernels(setup: Setup) -> KernelWork:
    """The same for a call of chunks in the middle of prompts, whose arithmetic counts too."""
    keys = setup.chunks_in_group * mean_prefill_context(setup)
    peak = setup.topology.generation.flops_per_s * _KERNEL_FLOPS_EFFICIENCY
    return KernelWork(keys * kv_bytes_per_token(setup, as_kept=True), _chunk_attention_flops(setup) / peak)


def temporary_bytes(setup: Setup) -> int:
    """A guess at what programs need besides: activations of the larger of a step and a chunk, and the logits."""
    config = setup.config
    width = 2 * config.hidden_size + 3 * config.intermediate_size // setup.tp
    step = setup.rows_per_replica * (width + 4 * config.vocab_size // setup.tp)
    return _TEMPORARY_BYTES + 4 * max(step, setup.chunks_in_group * setup.chunk_tokens * width)


def _product_params(setup: Setup, *, head: bool = True) -> int:
    """Elements of the matrices that every token is multiplied with."""
    config = setup.config
    return _layer_params(config) + head * config.vocab_size * config.hidden_size


@lru_cache
def _layer_params(config: LlamaConfig) -> int:
    return sum(spec.size for spec in param_specs(config) if spec.path[0] == "layers" and len(spec.shape) == 2)


def _chunk_attention_flops(setup: Setup) -> float:
    """Of a group's chunks of a call, on a device of the shard that has all their pages: the others wait."""
    pairs = setup.chunks_in_group * setup.chunk_tokens * mean_prefill_context(setup)
    return int(setup.mesh.shape["rep"]) * _attention_flops(setup, pairs)


def _attention_flops(setup: Setup, pairs: float) -> float:
    """Of `pairs` of a query position and a key, all layers, on one device."""
    config = setup.config
    return 4 * pairs * config.num_heads * config.head_dim * config.num_layers / setup.tp
