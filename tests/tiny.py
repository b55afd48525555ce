"""Tiny Llamas of odd, non-square sizes around weights that a rule makes, a scripted one, and a byte-level tokenizer.

The models of the goldens are those of `oracle/tiny_models.py`; those here cover what they cannot: sizes that eight
devices divide, the sizes of a real model, and 20,000 positions in one cheap layer.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import reference
import tokenizers
from oracle.tiny_models import TINY_MODELS, random_weights
from tokenizers import decoders, models, pre_tokenizers

from jaxllama import EngineOptions, Llama, LlamaConfig, make_mesh
from jaxllama.model.int8 import quantize_rows
from jaxllama.model.mesh import param_shardings
from jaxllama.model.params import Params, QuantizedWeight, build_params, get_param, param_specs, stored_specs
from jaxllama.model.platforms.describe import describe_platform
from jaxllama.weights.arrays.files import hash_file
from jaxllama.weights.arrays.writer import ParamsWriter
from jaxllama.weights.checkpoint import MANIFEST, Manifest
from jaxllama.weights.forms import fit, unpack

type Weights = Mapping[str, np.ndarray]

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")  # ids 256 to 260
EOS_ID = 258
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

_BASE = TINY_MODELS["tinyllama_like"]
MODELS: dict[str, dict[str, Any]] = TINY_MODELS | {
    # 8 divides heads, ffn and vocabulary, 4 divides the KV heads; 256 bytes and the special tokens fit the vocabulary.
    "divisible": _BASE
    | {
        "vocab_size": 280,
        "hidden_size": 52,
        "intermediate_size": 72,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 6,
        "eos_token_id": EOS_ID,
    },
    # Two layers of SmolLM2's sizes: XLA multiplies small matrices otherwise than large ones.
    "smollm2_like": _BASE
    | {
        "vocab_size": 1031,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
    "far": TINY_MODELS["llama31_like"]
    | {"hidden_size": 44, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1},
}
SEEDS = {name: seed for seed, name in enumerate(MODELS)}

# Few shapes, shared by the tests: each costs seconds to compile. A context has 24 pages, the pool 120.
SMALL = EngineOptions(max_rows=4, max_context=96, page_size=4, num_pages=121, chunk_sizes=(8, 32))


def config_of(name: str, **changes: Any) -> LlamaConfig:
    """The model's config; `changes` are keys of config.json."""
    return LlamaConfig.from_hf(MODELS[name] | changes)


@functools.cache
def weights_of(name: str) -> Weights:
    """Float32 weights by their Hugging Face names."""
    return random_weights(MODELS[name], SEEDS[name])


def make_params(
    config: LlamaConfig,
    weights: Weights,
    mesh: jax.sharding.Mesh,
    dtype: Any = jnp.float32,
    quantize: str | None = None,
) -> Params:
    """The weights on `mesh`, sharded by the rules."""
    arrays: dict[tuple[str | int, ...], Any] = {}
    for spec in param_specs(config):
        array = np.asarray(weights[spec.hf_name][slice(*(spec.hf_rows or (None,)))], dtype)
        parts = stored_specs(spec, quantize)
        # NumPy's give the bits of XLA's, which would compile a dozen programs for each shape. Of NaN the scale tells.
        with np.errstate(invalid="ignore"):
            halves = (array,) if len(parts) == 1 else quantize_rows(array)
        arrays |= {part.path: half for part, half in zip(parts, halves, strict=True)}
    params = build_params(config, lambda part: arrays[part.path], quantize)
    return jax.device_put(params, param_shardings(config, mesh, quantize))


def dequantized(config: LlamaConfig, params: Params) -> Weights:
    """What int8 weights stand for, in float64, by their Hugging Face names."""

    def exact(weight: Any) -> np.ndarray:
        weight = unpack(weight)
        if not isinstance(weight, QuantizedWeight):
            return np.asarray(weight, np.float64)
        return np.asarray(weight.values, np.float64) * np.asarray(weight.scale, np.float64)[:, None]

    return {spec.hf_name: exact(unpack(get_param(params, spec))) for spec in param_specs(config)}


def make_llama(
    name: str = "divisible",
    *,
    tp: int = 1,
    data: int = 1,
    dtype: Any = jnp.float32,
    quantize: str | None = None,
    options: EngineOptions = SMALL,
    weights: Weights | None = None,
    tokenizer_folder: Path | None = None,
    draft: str | None = None,
    draft_weights: Weights | None = None,
    **changes: Any,
) -> Llama:
    """A tiny `Llama` on the first `data` × `tp` fake devices, drafted for by the model `draft`. Close it, or use it in
    a `with`."""
    from jaxllama.text.chat import load_chat_template
    from jaxllama.text.encoding.tokenizer import load_tokenizer

    config = config_of(name, **changes)
    mesh = make_mesh(config, tp=tp, data=data)
    params = make_params(config, weights_of(name) if weights is None else weights, mesh, dtype, quantize)
    folder = tokenizer_folder
    drafted = None
    if draft is not None:
        hf = MODELS[draft] | {"vocab_size": config.vocab_size}
        own = LlamaConfig.from_hf(hf)
        small = random_weights(hf, SEEDS[draft]) if draft_weights is None else draft_weights
        drafted = (own, fit(make_params(own, small, mesh, dtype, quantize), describe_platform(own, mesh, dtype=dtype)))
    return Llama(
        config,
        fit(params, describe_platform(config, mesh, dtype=dtype)),
        mesh,
        tokenizer=None if folder is None else load_tokenizer(folder, config.vocab_size),
        chat_template=None if folder is None else load_chat_template(folder),
        options=options,
        draft=drafted,
    )


def prompt_of(name: str, length: int, seed: int = 0) -> list[int]:
    """Random token ids."""
    return np.random.default_rng([7, seed]).integers(0, MODELS[name]["vocab_size"], length).tolist()


def reference_logits(name: str, ids: Sequence[int], weights: Weights | None = None) -> np.ndarray:
    """Float64 logits `[len(ids), V]`."""
    return reference.llama_logits(weights_of(name) if weights is None else weights, config_of(name), ids)


def assert_greedy(name: str, prompt: Sequence[int], generated: Sequence[int], margin: float = 1e-4) -> None:
    """Every generated token is the reference's likeliest, given those before it; within `margin` two are as likely."""
    logits = reference_logits(name, [*prompt, *generated])[len(prompt) - 1 : -1]
    chosen = np.take_along_axis(logits, np.asarray(generated)[:, None], axis=1)[:, 0]
    worst = float((logits.max(axis=1) - chosen).max())
    assert worst <= margin, f"{name}, {len(prompt)} tokens: a token {worst:.2e} below the reference's best"


def scripted_weights(name: str, chain: Mapping[int, int]) -> Weights:
    """Weights of a model that says `chain[t]` after token t, whatever came before.

    Attention and MLP add nothing, and the head's row of `chain[t]` is the embedding of t.
    """
    hf = MODELS[name]
    assert not hf["tie_word_embeddings"]
    weights = dict(weights_of(name))
    for key, value in weights.items():
        if "o_proj" in key or "down_proj" in key or key == "lm_head.weight":
            weights[key] = np.zeros_like(value)
        elif key.endswith("norm.weight"):
            weights[key] = np.ones_like(value)
    head = weights["lm_head.weight"]
    for token_id, following in chain.items():
        head[following] += weights["model.embed_tokens.weight"][token_id]
    return weights


def write_tokenizer(folder: Path) -> Path:
    """A tokenizer with one token a byte and `SPECIAL_TOKENS` after them, and a ChatML template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {"bos_token": SPECIAL_TOKENS[0], "eos_token": SPECIAL_TOKENS[2]}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return folder


def write_checkpoint(folder: Path, name: str, weights: Weights | None = None, **changes: Any) -> Path:
    """A whole checkpoint with the byte-level tokenizer, as `jaxllama convert` would leave it."""
    config = config_of(name, **changes)
    weights = weights_of(name) if weights is None else weights
    write_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps(MODELS[name] | changes))
    (folder / "generation_config.json").write_text("{}")
    writer = ParamsWriter(folder, config, "float32")
    params = build_params(config, lambda spec: np.asarray(weights[spec.hf_name], np.float32))
    for spec in param_specs(config):
        writer.write(spec, get_param(params, spec))
    writer.commit()
    files = {p.relative_to(folder).as_posix(): hash_file(p) for p in sorted(folder.rglob("*")) if p.is_file()}
    (folder / MANIFEST).write_text(Manifest("float32", {"kind": "test"}, files, {}).to_json())
    return folder
