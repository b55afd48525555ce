"""AWQ in AutoAWQ's "gemm" packing: integers of 4 bits, packed along the outputs in an order of their own.

Source: AutoAWQ's modules/linear/gemm.py and utils/packing_utils.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int32, UInt8

from jaxllama.weights.sources.quantized.gptq import drop_zero_bias
from jaxllama.weights.sources.quantized.interface import (
    DTYPES,
    QuantizedTensor,
    RecentReads,
    Settings,
    check_part,
    modules,
    read_all,
    take,
    unpack_words,
)
from jaxllama.weights.sources.source import SourceTensor

# The output that each four bits of a word belong to, the lowest first.
_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_PER_WORD = 8
_OF_THE_QUANTISER = (
    "backend", "do_fuse", "exllama_config", "fuse_max_seq_len", "modules_to_fuse", "modules_to_not_convert",
    "dataset", "desc_act", "lm_head", "meta", "model_seqlen", "sym", "damp_percent", "true_sequential", "tokenizer",
    "act_group_aware", "batch_size", "block_name_to_quantize", "cache_block_outputs", "max_input_length",
    "pad_token_id", "module_name_preceding_first_block", "modules_in_block_to_quantize",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class AwqTensor(QuantizedTensor):
    """`(codes - zero_point) * scale`, stored as `[in, out]`: words hold eight outputs of one input."""

    words: SourceTensor
    zeros: SourceTensor
    scales: SourceTensor
    group_size: int
    recent: RecentReads

    def read_rows(self, start: int, stop: int, *, hashed: bool = True) -> np.ndarray:
        """In the dtype of the scales, rounded once."""
        # In the order of the file only where the first slice is the first read.
        in_order = hashed and start == 0
        words = self.recent.get(self.name, lambda: self.words.read_rows(0, self.words.shape[0], hashed=in_order))
        codes = _unpack(words, start, stop).T.astype(np.float32)
        zeros = _unpack(read_all(self.zeros), start, stop).T.astype(np.float32)
        scales = read_all(self.scales)[:, start:stop].T.astype(np.float32)
        codes -= np.repeat(zeros, self.group_size, axis=1)
        codes *= np.repeat(scales, self.group_size, axis=1)
        return codes.astype(DTYPES[self.scales.dtype], copy=False)


def read_awq(settings: Settings, tensors: Mapping[str, SourceTensor]) -> Mapping[str, SourceTensor]:
    """quant_method `awq`."""
    settings.one_of("bits", (4,), 4)
    settings.one_of("version", ("gemm",), settings.get("format", "gemm"))
    settings.one_of("zero_point", (True,), True)
    group_size = settings.integer("group_size", 128)
    settings.skip("format", *_OF_THE_QUANTISER)
    settings.finish()
    left, recent = dict(tensors), RecentReads()
    for module, words in modules(tensors, "qweight"):
        del left[words.name]
        zeros, scales = take(left, module, "qzeros"), take(left, module, "scales")
        check_part(words, [words.shape if len(words.shape) == 2 else (0, 0)], ["I32"])
        width, out = words.shape[0], words.shape[1] * _PER_WORD
        size = width if group_size == -1 else group_size
        # AutoAWQ itself takes whole groups only.
        num_groups = width // size
        check_part(scales, [(num_groups, out)] if not width % size else [], DTYPES)
        check_part(zeros, [(num_groups, out // _PER_WORD)], ["I32"])
        left[f"{module}.weight"] = AwqTensor(
            name=f"{module}.weight",
            file=words.file,
            offset=words.offset,
            num_bytes=words.num_bytes,
            shape=(out, width),
            dtype="AWQ int4",
            words=words,
            zeros=zeros,
            scales=scales,
            group_size=size,
            recent=recent,
        )
        drop_zero_bias(left, module)
    return left


def _unpack(words: Int32[np.ndarray, "rows words"], start: int, stop: int) -> UInt8[np.ndarray, "rows columns"]:
    """The columns `[start, stop)` of int32 `[rows, out / 8]`, as uint8."""
    first, last = start // _PER_WORD, -(-stop // _PER_WORD)
    codes = unpack_words(words[:, first:last], 4, (last - first) * _PER_WORD)
    codes = codes.reshape(len(words), -1, _PER_WORD)[..., np.argsort(_ORDER)]
    return codes.reshape(len(words), -1)[:, start - first * _PER_WORD : stop - first * _PER_WORD]
