"""How tensors are spread over safetensors files, and what those have before the bytes.

Source: the README of huggingface/safetensors; huggingface_hub's split_state_dict_into_shards for the names.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

from jaxllama.errors import ConversionError, quote
from jaxllama.weights.exporting.tensors import ExportTensor

INDEX = "model.safetensors.index.json"
MAX_SHARD_BYTES = 5 * 10**9
"""What a file has at most, unless one tensor alone has more."""
WRITER = "jaxllama export"
"""What `__metadata__` of every file says wrote it."""
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_ALIGNMENT_BYTES = 8


@dataclass(frozen=True)
class Shard:
    """One file. The tensors with the widest values come first: all of them then begin at multiples of their width."""

    name: str
    tensors: tuple[ExportTensor, ...]

    def header(self) -> bytes:
        """What is before the tensors' bytes."""
        entries: dict[str, object] = {"__metadata__": {"format": "pt", "writer": WRITER}}
        offset = 0
        for tensor in self.tensors:
            end = offset + tensor.num_bytes
            entries[tensor.name] = {
                "dtype": tensor.dtype,
                "shape": list(tensor.shape),
                "data_offsets": [offset, end],
            }
            offset = end
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _ALIGNMENT_BYTES)
        return len(text).to_bytes(8, "little") + text


def make_shards(tensors: Sequence[ExportTensor], max_shard_bytes: int) -> list[Shard]:
    """The tensors, in order, in as few files as have at most `max_shard_bytes` of them (or one tensor)."""
    groups: list[list[ExportTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if groups[-1] and size + tensor.num_bytes > max_shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.num_bytes
    names = [f"model-{i:05d}-of-{len(groups):05d}.safetensors" for i in range(1, len(groups) + 1)]
    names = ["model.safetensors"] if len(groups) == 1 else names
    return [
        Shard(name, tuple(sorted(group, key=lambda tensor: -tensor.itemsize)))
        for name, group in zip(names, groups, strict=True)
    ]


def index_of(shards: Sequence[Shard]) -> bytes:
    """The text of the index."""
    weight_map = {tensor.name: shard.name for shard in shards for tensor in shard.tensors}
    total = sum(tensor.num_bytes for shard in shards for tensor in shard.tensors)
    return (json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2) + "\n").encode()


def num_bytes_of(size: str | int) -> int:
    """A size in bytes: a number, or a text as `5GB`, `500MB` (powers of ten) or `2GiB` (of two).

    Raises: ConversionError.
    """
    match = re.fullmatch(r"(\d{1,15}) ?([KMG]I?B)?", str(size).strip().upper())
    if match is None or int(match[1]) == 0:
        raise ConversionError(f"a size of {quote(size)} is not understood, expected one as 5GB, 500MB or 2GiB")
    return int(match[1]) * _UNITS[match[2] or ""]
