"""GPTQ: integers of 2, 3, 4 or 8 bits, packed along the inputs, with scales and zero points by group.

Source: AutoGPTQ's nn_modules/qlinear/qlinear_cuda_old.py and GPTQModel's nn_modules/qlinear/__init__.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from jaxllama.weights.sources.quantized.interface import (
    DTYPES,
    QuantizedTensor,
    RecentReads,
    Settings,
    check_groups,
    check_part,
    modules,
    read_all,
    take,
    unpack_words,
)
from jaxllama.weights.sources.source import SourceTensor

# How the scales were found, what they were found with, and which kernels were meant to run them.
_OF_THE_QUANTISER = (
    "act_group_aware", "backend", "batch_size", "block_name_to_quantize", "cache_block_outputs", "damp_auto_increment",
    "damp_percent", "dataset", "desc_act", "disable_exllama", "exllama_config", "inside_layer_modules", "lm_head",
    "max_input_length", "meta", "model_file_base_name", "model_name_or_path", "model_seqlen",
    "modules_in_block_to_quantize", "module_name_preceding_first_block", "mse", "offload_to_disk", "pad_token_id",
    "quantizer", "static_groups", "sym", "tokenizer", "true_sequential", "use_cuda_fp16", "use_exllama", "version",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class GptqTensor(QuantizedTensor):
    """`(codes - zero_point) * scale`, stored as `[in, out]`: words hold consecutive inputs of one output.

    `zero_offset` is 1 where zero points are stored less one ("gptq"), and 0 where they are stored as they are.
    """

    words: SourceTensor
    zeros: SourceTensor
    scales: SourceTensor
    group_of: SourceTensor | None
    num_bits: int
    group_size: int
    zero_offset: int
    recent: RecentReads

    def read_rows(self, start: int, stop: int, *, hashed: bool = True) -> np.ndarray:
        """In the dtype of the scales, rounded once."""
        width = self.shape[1]
        # In the order of the file only where the first slice is the first read.
        in_order = hashed and start == 0
        words = self.recent.get(self.name, lambda: self.words.read_rows(0, self.words.shape[0], hashed=in_order))
        codes = unpack_words(words[:, start:stop].T, self.num_bits, width)
        packed_zeros = read_all(self.zeros)
        zeros = unpack_words(packed_zeros, self.num_bits, self.shape[0])[:, start:stop].astype(np.int16)
        zeros = (zeros + self.zero_offset) & (2**self.num_bits - 1)
        scales = read_all(self.scales)[:, start:stop].astype(np.float32)
        groups = np.arange(width) // self.group_size if self.group_of is None else read_all(self.group_of)
        values = codes.astype(np.float32)
        values -= zeros.T.astype(np.float32)[:, groups]
        values *= scales.T[:, groups]
        return values.astype(DTYPES[self.scales.dtype], copy=False)


def read_gptq(settings: Settings, tensors: Mapping[str, SourceTensor]) -> Mapping[str, SourceTensor]:
    """quant_method `gptq`."""
    num_bits = settings.one_of("bits", (2, 3, 4, 8))
    group_size = settings.integer("group_size", -1)
    form = settings.one_of("checkpoint_format", ("gptq", "gptq_v2"), settings.get("format", "gptq"))
    settings.skip("format", *_OF_THE_QUANTISER)
    settings.one_of("pack_dtype", ("int32",), "int32")
    settings.refuse("is_marlin_format", "rotation", "adapter")
    dynamic = settings.get("dynamic", {})
    # "-:PATTERN" leaves modules as they are, which shows in the file.
    if not isinstance(dynamic, Mapping) or not all(str(pattern).startswith("-:") for pattern in dynamic):
        raise settings.refusal("dynamic", dynamic, "modules with settings of their own")
    settings.finish()
    left, recent = dict(tensors), RecentReads()
    for module, words in modules(tensors, "qweight"):
        matrix = _gptq_tensor(left, module, words, num_bits, group_size, int(form == "gptq"), recent)
        left[matrix.name] = matrix
        drop_zero_bias(left, module)
    return left


def _gptq_tensor(
    left: dict[str, SourceTensor],
    module: str,
    words: SourceTensor,
    num_bits: int,
    group_size: int,
    zero_offset: int,
    recent: RecentReads,
) -> GptqTensor:
    del left[words.name]
    zeros, scales = take(left, module, "qzeros"), take(left, module, "scales")
    group_of = left.pop(f"{module}.g_idx", None)
    is_whole = len(words.shape) == 2 and not 32 * words.shape[0] % num_bits
    check_part(words, [words.shape if is_whole else (0, 0)], ["I32"])
    width, out = words.shape[0] * 32 // num_bits, words.shape[1]
    size = width if group_size == -1 else group_size
    num_groups = -(-width // size)
    check_part(scales, [(num_groups, out)], DTYPES)
    check_part(zeros, [(num_groups, -(-out * num_bits // 32))], ["I32"])
    if group_of is not None:
        check_groups(group_of, width, num_groups)
    return GptqTensor(
        name=f"{module}.weight",
        file=words.file,
        offset=words.offset,
        num_bytes=words.num_bytes,
        shape=(out, width),
        dtype=f"GPTQ int{num_bits}",
        words=words,
        zeros=zeros,
        scales=scales,
        group_of=group_of,
        num_bits=num_bits,
        group_size=size,
        zero_offset=zero_offset,
        recent=recent,
    )


def drop_zero_bias(left: dict[str, SourceTensor], module: str) -> None:
    """Removes a bias of zeros, which AutoGPTQ writes for every matrix, unless the model has biases."""
    bias = left.get(f"{module}.bias")
    if bias is not None and bias.is_readable and not read_all(bias).astype(np.float32).any():
        del left[bias.name]
