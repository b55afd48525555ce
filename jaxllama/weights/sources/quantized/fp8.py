"""FP8: transformers' `fp8` (a scale a block, or one), vLLM's `fp8` (one) and `fbgemm_fp8` (a scale a row).

Source: transformers' integrations/finegrained_fp8.py and fbgemm_fp8.py.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from jaxllama.weights.sources.quantized.interface import Settings, modules, take
from jaxllama.weights.sources.quantized.scaled import ONE_SCALE, scaled_tensor
from jaxllama.weights.sources.source import SourceTensor

_SCALES = ("weight_scale_inv", "weight_scale")
# Of activations, whose rounding is left out here; they do not change the weights.
_UNUSED = ("activation_scale", "input_scale", "input_scale_ub")


def read_fp8(settings: Settings, tensors: Mapping[str, SourceTensor]) -> Mapping[str, SourceTensor]:
    """quant_method `fp8`."""
    settings.one_of("fmt", ("e4m3",), "e4m3")
    settings.one_of("activation_scheme", ("dynamic", "static"), "dynamic")
    settings.one_of("scale_fmt", ("float", "ue8m0"), "float")
    settings.refuse("kv_cache_scheme")
    # Which matrices are FP8 shows in the file itself.
    settings.skip("modules_to_not_convert", "ignored_layers", "modules_to_convert", "dequantize", "expert_dtype")
    block = settings.get("weight_block_size")
    if block is not None and not (
        isinstance(block, list) and len(block) == 2 and all(type(size) is int and size > 0 for size in block)
    ):
        raise settings.refusal("weight_block_size", block, "expected two positive integers")
    settings.finish()
    scale_dtypes = ("F32", "BF16", "F16", "F8_E8M0", "U8")
    return _group(tensors, None if block is None else (block[0], block[1]), scale_dtypes)


def read_fbgemm(settings: Settings, tensors: Mapping[str, SourceTensor]) -> Mapping[str, SourceTensor]:
    """quant_method `fbgemm_fp8`."""
    settings.skip("modules_to_not_convert", "activation_scale_ub")
    settings.finish()
    return _group(tensors, "row", ("F32", "BF16", "F16"))


def _group(
    tensors: Mapping[str, SourceTensor], block: tuple[int, int] | str | None, scale_dtypes: tuple[str, ...]
) -> Mapping[str, SourceTensor]:
    left = dict(tensors)
    for part in _SCALES:
        for module, scale in modules(tensors, part):
            weight = take(left, module, "weight")
            del left[scale.name]
            left[weight.name] = scaled_tensor(
                weight,
                scale,
                ONE_SCALE if block is None else (1, weight.shape[-1]) if isinstance(block, str) else block,
                weight_dtype="F8_E4M3",
                scale_dtypes=scale_dtypes,
                # The product of two float32 is rounded to the model's dtype, whichever that is.
                rounds_to=np.dtype(np.float32),
            )
            for unused in _UNUSED:
                left.pop(f"{module}.{unused}", None)
    return left
