"""compressed-tensors: FP8 and int8 with scales of any shape, and integers of 1 to 8 bits packed into words.

Source: compressed-tensors' compressors/naive_quantized, compressors/pack_quantized and quantization/quant_args.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from jaxtyping import Shaped

from jaxllama.model.int8 import quantize_rows
from jaxllama.weights.sources.patterns import compile_pattern
from jaxllama.weights.sources.quantized.interface import (
    DTYPES,
    Int8Tensor,
    QuantizedTensor,
    Settings,
    check_groups,
    check_part,
    modules,
    read_all,
    take,
    unpack_words,
)
from jaxllama.weights.sources.quantized.scaled import ONE_SCALE, scaled_tensor
from jaxllama.weights.sources.source import SourceTensor

_FORMATS = ("float-quantized", "int-quantized", "naive-quantized", "pack-quantized")
# Of activations: they do not change the weights.
_UNUSED = ("input_scale", "input_zero_point")
_EMBED = "model.embed_tokens.weight"


@dataclass(frozen=True)
class _Scheme:
    """How the matrices of one group are stored. `block` is what a scale covers, (1, -1) a row."""

    targets: tuple[str, ...]
    num_bits: int
    is_float: bool
    is_symmetric: bool
    block: tuple[int, int]
    is_packed: bool

    @property
    def is_w8a16(self) -> bool:
        """Whether it is what `jaxllama export` writes: packed, a scale a row."""
        return (self.num_bits, self.is_symmetric, self.block, self.is_packed) == (8, True, (1, -1), True)


@dataclass(frozen=True, kw_only=True)
class PackedTensor(QuantizedTensor):
    """`(codes - zero_point) * scale` of int32 words along a row; `group_size` columns share a scale.

    With `group_of`, column i belongs to group `group_of[i]` (act-order) and not to `i // group_size`.
    """

    packed: SourceTensor
    scale: SourceTensor
    zero_point: SourceTensor | None
    group_of: SourceTensor | None
    num_bits: int
    group_size: int

    def read_rows(self, start: int, stop: int, *, hashed: bool = True) -> np.ndarray:
        """In the dtype of the scales, rounded once."""
        codes = self._codes(start, stop, hashed).astype(np.float32)
        if self.zero_point is not None:
            codes -= self._of_columns(self._zero_points()[start:stop])
        codes *= self._of_columns(self._scales(start, stop))
        return codes.astype(DTYPES[self.scale.dtype], copy=False)

    def _codes(self, start: int, stop: int, hashed: bool) -> np.ndarray:
        """Int8, around zero."""
        words = self.packed.read_rows(start, stop, hashed=hashed)
        codes = unpack_words(words, self.num_bits, self.shape[1])
        # 128 wraps around to -128, so that the difference is right.
        return codes.view(np.int8) - np.uint8(2 ** (self.num_bits - 1)).view(np.int8)

    def _scales(self, start: int, stop: int) -> np.ndarray:
        """Float32 `[rows, groups]`."""
        scale = self.scale.read_rows(start, stop, hashed=False)
        return scale.reshape(stop - start, -1).astype(np.float32)

    def _zero_points(self) -> np.ndarray:
        """Float32 `[out, groups]`."""
        assert self.zero_point is not None
        stored = read_all(self.zero_point)
        if self.zero_point.dtype == "I8":
            return stored.reshape(self.shape[0], -1).astype(np.float32)
        codes = unpack_words(stored.T, self.num_bits, self.shape[0]).T
        return codes.astype(np.float32) - 2 ** (self.num_bits - 1)

    def _of_columns(self, by_group: Shaped[np.ndarray, "rows groups"]) -> Shaped[np.ndarray, "rows columns"]:
        if self.group_of is not None:
            return by_group[:, read_all(self.group_of)]
        return by_group if by_group.shape[1] == 1 else np.repeat(by_group, self.group_size, axis=1)


@dataclass(frozen=True, kw_only=True)
class PackedRowsTensor(PackedTensor, Int8Tensor):
    """With one scale a row and no zero points: int8 holds the codes of 8 bits and of fewer."""

    def read_int8_rows(self, start: int, stop: int, *, hashed: bool = True) -> tuple[np.ndarray, np.ndarray]:
        """As stored; the scales become float32, which holds all of them."""
        return self._codes(start, stop, hashed), self._scales(start, stop)[:, 0]

    def part(self, start: int, stop: int) -> SourceTensor:
        """Rows `[start, stop)`, which have nothing in common with the others."""
        packed, scale = self.packed.part(start, stop), self.scale.part(start, stop)
        return replace(
            self,
            packed=packed,
            scale=scale,
            offset=packed.offset,
            num_bytes=packed.num_bytes,
            shape=(stop - start, self.shape[1]),
        )


@dataclass(frozen=True, kw_only=True)
class DenseRowsTensor(Int8Tensor):
    """The embedding of a W8A16 model, in float32: rounded to int8 from there, whatever dtype the rest is stored in.

    `jaxllama export` writes that of an int8 checkpoint so, and gets the same int8 values back.
    """

    weight: SourceTensor

    def read_rows(self, start: int, stop: int, *, hashed: bool = True) -> np.ndarray:
        """Float32, as stored."""
        return self.weight.read_rows(start, stop, hashed=hashed)

    def read_int8_rows(self, start: int, stop: int, *, hashed: bool = True) -> tuple[np.ndarray, np.ndarray]:
        """Rounded; a row with NaN or infinity has such a scale."""
        rows = self.read_rows(start, stop, hashed=hashed)
        values, scale = quantize_rows(np.where(np.isfinite(rows), rows, np.float32(0)))
        return values, np.where(np.isfinite(rows).all(axis=1), scale, np.float32(np.nan))


def read_compressed_tensors(settings: Settings, tensors: Mapping[str, SourceTensor]) -> Mapping[str, SourceTensor]:
    """quant_method `compressed-tensors`."""
    schemes, ignored = _schemes(settings)
    left = dict(tensors)
    for part in ("weight_packed", "weight_scale"):
        for module, _ in modules(tensors, part):
            if f"{module}.{part}" not in left:
                continue
            scheme = _scheme_of(module, schemes, ignored, settings)
            matrix = _packed(left, module, scheme) if scheme.is_packed else _scaled(left, module, scheme)
            left[matrix.name] = matrix
            for unused in _UNUSED:
                left.pop(f"{module}.{unused}", None)
    embed = left.get(_EMBED)
    if embed is not None and embed.dtype == "F32" and all(scheme.is_w8a16 for scheme in schemes):
        left[_EMBED] = DenseRowsTensor(**{f.name: getattr(embed, f.name) for f in fields(embed)}, weight=embed)
    return left


def _schemes(settings: Settings) -> tuple[list[_Scheme], list[str]]:
    settings.one_of("quantization_status", ("compressed", "frozen"), "compressed")
    form = settings.one_of("format", (*_FORMATS, "mixed-precision"))
    settings.refuse("kv_cache_scheme", "transform_config", "moe_sparsity_config")
    sparsity = settings.section("sparsity_config")
    if sparsity is not None:
        sparsity.one_of("format", ("dense",), "dense")
    # What was done, and with what; the ratio is for information.
    settings.skip("global_compression_ratio", "version")
    ignored = settings.names("ignore")
    schemes = [_scheme(group, form) for group in settings.sections("config_groups")]
    settings.finish()
    return schemes, ignored


def _scheme(group: Settings, form: str) -> _Scheme:
    form = group.one_of("format", _FORMATS, form)
    group.refuse("output_activations")
    # Activations are not rounded here, which is nearer to the model that was quantised.
    group.skip("input_activations")
    weights = group.section("weights")
    if weights is None:
        raise group.refusal("weights", None, "a group that rounds activations alone")
    is_float = weights.one_of("type", ("int", "float"), "int") == "float"
    num_bits = weights.integer("num_bits", 8)
    is_packed = form == "pack-quantized"
    if num_bits > 8 or num_bits < 1 or (not is_packed and num_bits != 8) or (is_packed and is_float):
        raise weights.refusal("num_bits", num_bits, f"not of type {'float' if is_float else 'int'} in {form}")
    weights.one_of("dynamic", (False,), False)
    # "weight" changes how the scales were found, "group" comes with an index of the columns.
    weights.one_of("actorder", ("weight", "static", "group", "dynamic", False), False)
    weights.skip("observer", "observer_kwargs", "zp_dtype", "scale_dtype")
    scheme = _Scheme(
        targets=tuple(group.names("targets")),
        num_bits=num_bits,
        is_float=is_float,
        is_symmetric=weights.one_of("symmetric", (True, False), True),
        block=_block(weights, is_packed),
        is_packed=is_packed,
    )
    weights.finish()
    group.finish()
    return scheme


def _block(weights: Settings, is_packed: bool) -> tuple[int, int]:
    group_size, structure = weights.get("group_size"), weights.get("block_structure")
    default = "tensor" if group_size is None else "channel" if group_size == -1 else "group"
    strategy = weights.one_of("strategy", ("tensor", "channel", "group", "block"), default)
    if is_packed and strategy in ("tensor", "block"):
        raise weights.refusal("strategy", strategy, "not of packed integers")
    if strategy == "tensor":
        return ONE_SCALE
    if strategy == "channel":
        return (1, -1)
    if strategy == "group":
        return (1, weights.integer("group_size"))
    if isinstance(structure, str):
        structure = [int(size) if size.isdecimal() else 0 for size in structure.split("x")]
    if not isinstance(structure, list) or len(structure) != 2 or not all(type(n) is int and n > 0 for n in structure):
        raise weights.refusal("block_structure", structure, "expected two positive integers")
    return (structure[0], structure[1])


def _scheme_of(module: str, schemes: list[_Scheme], ignored: list[str], settings: Settings) -> _Scheme:
    kind = "Embedding" if module.endswith("embed_tokens") else "Linear"

    def fits(target: Any) -> bool:
        if target.startswith("re:"):
            pattern = compile_pattern(target.removeprefix("re:"), "config.json: quantization_config")
            return pattern.match(module) is not None
        return target in (module, kind)

    if any(map(fits, ignored)):
        raise settings.refusal("ignore", ignored, f"{module} is quantised all the same")
    # The most specific target wins: a name, then a pattern, then a class.
    for is_meant in (
        lambda target: target == module,
        lambda target: target.startswith("re:") and fits(target),
        lambda target: target == kind,
    ):
        for scheme in schemes:
            if any(map(is_meant, scheme.targets)):
                return scheme
    raise settings.refusal("config_groups", [scheme.targets for scheme in schemes], f"none is for {module}")


def _scaled(left: dict[str, SourceTensor], module: str, scheme: _Scheme) -> SourceTensor:
    weight, scale = take(left, module, "weight"), take(left, module, "weight_scale")
    width = weight.shape[-1]
    return scaled_tensor(
        weight,
        scale,
        (1, width) if scheme.block == (1, -1) else scheme.block,
        weight_dtype="F8_E4M3" if scheme.is_float else "I8",
        scale_dtypes=DTYPES,
        rounds_to=DTYPES.get(scale.dtype, np.dtype(np.float32)),
        zero_point=_zero_point(left, module, scheme),
    )


def _zero_point(left: dict[str, SourceTensor], module: str, scheme: _Scheme) -> SourceTensor | None:
    """Older files have zero points of 0 where the scheme is symmetric."""
    found = left.pop(f"{module}.weight_zero_point", None)
    if not scheme.is_symmetric:
        return found if found is not None else take(left, module, "weight_zero_point")
    return None if found is None or not read_all(found).view(np.uint8).any() else found


def _packed(left: dict[str, SourceTensor], module: str, scheme: _Scheme) -> SourceTensor:
    packed, scale = take(left, module, "weight_packed"), take(left, module, "weight_scale")
    shape = read_all(check_part(take(left, module, "weight_shape"), [(2,)], ["I64", "I32"]))
    out, width = int(shape[0]), int(shape[1])
    size = width if scheme.block[1] == -1 else scheme.block[1]
    num_groups = -(-width // size)
    check_part(packed, [(out, -(-width * scheme.num_bits // 32))], ["I32"])
    check_part(scale, [(out, num_groups), *([(out,)] if num_groups == 1 else [])], DTYPES)
    zero_point = _zero_point(left, module, scheme)
    if zero_point is not None:
        dtype = zero_point.dtype
        words = -(-out * scheme.num_bits // 32)
        check_part(zero_point, [(out, num_groups) if dtype == "I8" else (words, num_groups)], ["I8", "I32"])
    group_of = left.pop(f"{module}.weight_g_idx", None)
    if group_of is not None:
        group_of = _act_order(group_of, width, num_groups)
    has_rows = num_groups == 1 and zero_point is None
    return (PackedRowsTensor if has_rows else PackedTensor)(
        name=f"{module}.weight",
        file=packed.file,
        offset=packed.offset,
        num_bytes=packed.num_bytes,
        shape=(out, width),
        dtype=f"int{scheme.num_bits}",
        packed=packed,
        scale=scale,
        zero_point=zero_point,
        group_of=group_of,
        num_bits=scheme.num_bits,
        group_size=size,
    )


def _act_order(group_of: SourceTensor, width: int, num_groups: int) -> SourceTensor | None:
    """None where it says nothing (-1 everywhere)."""
    if (read_all(group_of) == -1).all():
        return None
    check_groups(group_of, width, num_groups)
    return group_of
