"""The one table of the model's tensors: the model, converter, loader, sharding and planner all read it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from jaxllama.model.config import LlamaConfig

QUANTIZATIONS = ("int8",)

type Params = dict[str, Any]
"""`{"embed_tokens", "layers": [{"q_proj", …}, …], "norm", "lm_head"?}`: plain dicts and lists, so that `jax.jit`
flattens them in C++. One leaf per tensor and layer, in the layout of Hugging Face (`[out, in]`). A matrix may be a
`QuantizedWeight` instead; then every matrix is. On TPUs large feed-forward matrices are in parts
(`weights.parts`), on CPUs matrices may be packed (`native.packing`)."""


class QuantizedWeight(NamedTuple):
    """A matrix whose row o is `values[o] * scale[o]`: int8 `[out, in]` and float32 `[out]`."""

    values: Any
    scale: Any


@dataclass(frozen=True)
class ParamSpec:
    """One tensor.

    `path` leads to it in the `Params` tree, `axes` are the logical names of its dimensions (see `mesh.py`), `hf_name`
    is its name in a Hugging Face checkpoint. Values and layout are the same in both: nothing is folded or permuted.
    `hf_rows` are its rows, start and end, in a tensor that holds several; None: it is the whole tensor.
    `dtype` None is the model's own; the parts of a quantised matrix have theirs (`stored_specs`).
    """

    path: tuple[str | int, ...]
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    hf_name: str
    dtype: str | None = None
    hf_rows: tuple[int, int] | None = None

    @property
    def hf_key(self) -> tuple[str, tuple[int, int] | None]:
        """Where it is in a Hugging Face checkpoint; the parts of a quantised matrix are in one place."""
        return self.hf_name, self.hf_rows

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def name(self) -> str:
        """The path joined by dots, e.g. `layers.3.q_proj`."""
        return ".".join(map(str, self.path))


def param_specs(config: LlamaConfig) -> tuple[ParamSpec, ...]:
    """Every tensor of the model, once, in the order of the forward pass."""
    c = config
    embed = ParamSpec(("embed_tokens",), (c.vocab_size, c.hidden_size), ("vocab", "embed"), "model.embed_tokens.weight")
    layers = [spec for layer in range(c.num_layers) for spec in _layer_specs(c, layer)]
    norm = ParamSpec(("norm",), (c.hidden_size,), ("embed",), "model.norm.weight")
    head = ParamSpec(("lm_head",), (c.vocab_size, c.hidden_size), ("vocab", "embed"), "lm_head.weight")
    return (embed, *layers, norm) if c.tie_word_embeddings else (embed, *layers, norm, head)


def _layer_specs(c: LlamaConfig, layer: int) -> Iterator[ParamSpec]:
    def spec(name: str, module: str, shape: tuple[int, ...], axes: tuple[str, ...], kind: str = "weight") -> ParamSpec:
        return ParamSpec(("layers", layer, name), shape, axes, f"model.layers.{layer}.{module}.{kind}")

    heads, kv_heads, ffn = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim, c.intermediate_size
    norms = ("input_layernorm", "post_attention_layernorm")
    if c.norms_outputs:
        norms = ("post_attention_layernorm", "post_feedforward_layernorm")
    for norm in norms:
        yield spec(norm, norm, (c.hidden_size,), ("embed",))
    if c.qk_norm is not None:
        by_head = c.qk_norm == "head"
        for name, width, axis in (("q_norm", heads, "heads"), ("k_norm", kv_heads, "kv_heads")):
            size, named = (c.head_dim, "head_dim") if by_head else (width, axis)
            yield spec(name, f"self_attn.{name}", (size,), (named,))
    projections = (
        ("q_proj", "self_attn", (heads, c.hidden_size), ("heads", "embed"), c.attention_bias),
        ("k_proj", "self_attn", (kv_heads, c.hidden_size), ("kv_heads", "embed"), c.attention_bias),
        ("v_proj", "self_attn", (kv_heads, c.hidden_size), ("kv_heads", "embed"), c.attention_bias),
        ("o_proj", "self_attn", (c.hidden_size, heads), ("embed", "heads"), c.o_proj_bias),
        ("gate_proj", "mlp", (ffn, c.hidden_size), ("ffn", "embed"), c.mlp_bias),
        ("up_proj", "mlp", (ffn, c.hidden_size), ("ffn", "embed"), c.mlp_bias),
        ("down_proj", "mlp", (c.hidden_size, ffn), ("embed", "ffn"), c.mlp_bias),
    )
    fused = _fused_rows(heads, kv_heads, ffn) if c.is_fused else {}
    for name, block, shape, axes, has_bias in projections:
        tensor, rows = fused.get(name, (name, None))
        yield replace(spec(name, f"{block}.{tensor}", shape, axes), hf_rows=rows)
        if has_bias:
            yield replace(spec(f"{name}_bias", f"{block}.{tensor}", shape[:1], axes[:1], "bias"), hf_rows=rows)


def _fused_rows(heads: int, kv_heads: int, ffn: int) -> dict[str, tuple[str, tuple[int, int]]]:
    """The tensor and its rows that hold each projection, where several are stored as one."""
    return {
        "q_proj": ("qkv_proj", (0, heads)),
        "k_proj": ("qkv_proj", (heads, heads + kv_heads)),
        "v_proj": ("qkv_proj", (heads + kv_heads, heads + 2 * kv_heads)),
        "gate_proj": ("gate_up_proj", (0, ffn)),
        "up_proj": ("gate_up_proj", (ffn, 2 * ffn)),
    }


def num_params(config: LlamaConfig) -> int:
    """The number of stored weights (a tied head counts once)."""
    return sum(spec.size for spec in param_specs(config))


def stored_specs(spec: ParamSpec, quantize: str | None) -> tuple[ParamSpec, ...]:
    """The arrays that a tensor consists of: itself, or a quantised matrix's values and scale."""
    if quantize is None or len(spec.shape) != 2:
        return (spec,)
    values = replace(spec, path=(*spec.path, "values"), dtype="int8")
    # Every device keeps the scales of all embeddings: taking a token's from another would cost an exchange a step.
    axes = ("embed_scale",) if spec.path == ("embed_tokens",) else spec.axes[:1]
    scale = replace(spec, path=(*spec.path, "scale"), shape=spec.shape[:1], axes=axes, dtype="float32")
    return values, scale


def build_params(config: LlamaConfig, leaf: Callable[[ParamSpec], Any], quantize: str | None = None) -> Params:
    """The `Params` tree with `leaf(spec)` for every array; with `quantize`, matrices are `QuantizedWeight`s of two."""
    params: Params = {"layers": [{} for _ in range(config.num_layers)]}
    for spec in param_specs(config):
        node: Any = params
        for key in spec.path[:-1]:
            node = node[key]
        parts = [leaf(part) for part in stored_specs(spec, quantize)]
        node[spec.path[-1]] = parts[0] if len(parts) == 1 else QuantizedWeight(*parts)
    return params


def get_param(params: Mapping[str, Any], spec: ParamSpec) -> Any:
    """The leaf that `spec` describes. Of an int8 matrix in any form a spec may describe the `values` or the `scale`."""
    node: Any = params
    for key in spec.path:
        node = getattr(node, str(key)) if key in QuantizedWeight._fields else node[key]
    return node
