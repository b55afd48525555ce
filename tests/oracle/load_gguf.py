"""Loads a Llama GGUF file into transformers, by a path that shares no code with jaxllama's converter.

Runs in the oracle's environment (torch, transformers, gguf, tokenizers). transformers has a GGUF loader of its own; it
is not used, so that a mistake there cannot become our golden value.
"""

from __future__ import annotations

from typing import Any

import gguf
import numpy as np
import torch
from gguf.quants import dequantize
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

CONTROL_TOKEN = 3  # llama.cpp's LLAMA_TOKEN_TYPE_CONTROL

_LAYER_NAMES = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}
_TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


def metadata(reader: gguf.GGUFReader, key: str) -> Any:
    """The value of a metadata key, None where it is absent."""
    field = reader.fields.get(key)
    return None if field is None else field.contents()


def hf_name(name: str) -> str:
    """`blk.3.attn_q.weight` → `model.layers.3.self_attn.q_proj.weight`.

    Raises: KeyError for any tensor it does not know.
    """
    if name in _TOP_NAMES:
        return _TOP_NAMES[name]
    block, layer, rest = name.split(".", 2)
    if block != "blk":
        raise KeyError(name)
    return f"model.layers.{int(layer)}.{_LAYER_NAMES[rest]}"


def unpermute(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows of one head from interleaved rotary pairs (0, D/2, 1, D/2 + 1, …) back to halves (0, 1, …, D/2, …)."""
    out, width = weight.shape
    pairs = weight.reshape(num_heads, out // num_heads // 2, 2, width)
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(out, width)


def load_weights(reader: gguf.GGUFReader) -> dict[str, np.ndarray]:
    """Every tensor in float32 under its Hugging Face name; `[out, in]` as there."""
    heads = {
        "attn_q.weight": metadata(reader, "llama.attention.head_count"),
        "attn_k.weight": metadata(reader, "llama.attention.head_count_kv"),
    }
    weights = {}
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        values = values.reshape(tuple(int(n) for n in reversed(tensor.shape)))
        num_heads = heads.get(tensor.name.split(".", 2)[-1])
        weights[hf_name(tensor.name)] = values if num_heads is None else unpermute(values, num_heads)
    return weights


def load_config(reader: gguf.GGUFReader, *, tied: bool) -> LlamaConfig:
    """The config that the metadata describes. GGUF holds eps as a float32, so it is rounded back to seven digits."""
    heads = metadata(reader, "llama.attention.head_count")
    return LlamaConfig(
        vocab_size=len(metadata(reader, "tokenizer.ggml.tokens")),
        hidden_size=metadata(reader, "llama.embedding_length"),
        intermediate_size=metadata(reader, "llama.feed_forward_length"),
        num_hidden_layers=metadata(reader, "llama.block_count"),
        num_attention_heads=heads,
        num_key_value_heads=metadata(reader, "llama.attention.head_count_kv"),
        max_position_embeddings=metadata(reader, "llama.context_length"),
        rms_norm_eps=float(f"{metadata(reader, 'llama.attention.layer_norm_rms_epsilon'):.7g}"),
        rope_parameters={"rope_type": "default", "rope_theta": float(metadata(reader, "llama.rope.freq_base"))},
        tie_word_embeddings=tied,
        bos_token_id=metadata(reader, "tokenizer.ggml.bos_token_id"),
        eos_token_id=metadata(reader, "tokenizer.ggml.eos_token_id"),
        pad_token_id=metadata(reader, "tokenizer.ggml.padding_token_id"),
    )


def build_llama(
    config: LlamaConfig, weights: dict[str, np.ndarray], dtype: torch.dtype = torch.float32
) -> LlamaForCausalLM:
    """The transformers model with exactly these weights. Raises where a tensor is missing, unexpected or misshapen."""
    config._attn_implementation = "sdpa"
    model = LlamaForCausalLM(config).to(torch.float32)
    state = {name: torch.from_numpy(np.array(values)) for name, values in weights.items()}
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, strict=True)
    model.tie_weights()
    return model.to(dtype).eval()


def load_llama(path: str, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """The GGUF's model, dequantised to float32 and then cast to `dtype`."""
    reader = gguf.GGUFReader(path)
    weights = load_weights(reader)
    return build_llama(load_config(reader, tied="lm_head.weight" not in weights), weights, dtype)


def load_tokenizer(path: str, *, with_specials: bool) -> Tokenizer:
    """The raw byte-level BPE of the SmolLM family, independent of transformers' tokenizer classes.

    `with_specials` makes control tokens spelt in the text into their ids, as for a rendered chat; without it they are
    ordinary text, as for what a user writes.
    """
    reader = gguf.GGUFReader(path)
    if metadata(reader, "tokenizer.ggml.pre") != "smollm":
        raise ValueError(f"{path}: only the smollm pre-tokenizer is known here")
    tokens, types = metadata(reader, "tokenizer.ggml.tokens"), metadata(reader, "tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ", 1)) for merge in metadata(reader, "tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    if with_specials:
        control = [token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL_TOKEN]
        tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    return tokenizer
