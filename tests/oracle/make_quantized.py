"""Quantised matrices as the libraries of their formats write them, and what those libraries dequantise them to.

    PYTHONPATH=$GPTQMODEL:$AUTOAWQ python tests/oracle/make_quantized.py --out tests/golden/quantised --old-ct FOLDER

Runs in an environment of its own (Python 3.11, torch CPU; versions in cases.json). GPTQModel wants a newer torch and
AutoAWQ is no longer kept: their published sources are unpacked and imported from there (GPTQModel also wants pillow,
datasets, logbar, device-smi, pypcre, tokenicer, threadpoolctl, defuser and torchao). `--old-ct` is an unpacked
compressed-tensors 0.10.2, the last with act-order.

Every case is one file with the parts of two matrices of the model in tests/unit/weights/sources/quantized_test.py, and
an entry of cases.json: quantization_config and, for each matrix, the sha256 of its values as little-endian float32, and
the first four.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import importlib.metadata
import json
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

# 96 columns are no multiple of the blocks of 64 that bitsandbytes makes, so that they run on into the next row.
SHAPES = {"model.layers.0.self_attn.k_proj": (32, 96), "model.layers.0.self_attn.o_proj": (96, 64)}
LEFT_DENSE = [r"re:.*(q|v|gate|up|down)_proj$", "lm_head"]

Parts = dict[str, torch.Tensor]
Case = Callable[[torch.Tensor], tuple[Parts, torch.Tensor]]
"""From a weight to the tensors of its module, by their last names, and the dequantised weight."""


def weights() -> dict[str, torch.Tensor]:
    """Float32, with rows of different sizes and a few outliers."""
    made = {}
    for seed, (module, shape) in enumerate(SHAPES.items()):
        rng = np.random.default_rng([seed, 13])
        values = rng.standard_normal(shape) * rng.uniform(0.02, 0.2, (shape[0], 1))
        values[rng.random(shape) < 0.01] *= 8
        made[module] = torch.from_numpy(values.astype(np.float32))
    return made


def fp8(block: tuple[int, int] | None, *, ue8m0: bool = False, static: bool = False) -> Case:
    """transformers' own dequantiser; the scales are those of its quantiser: 448 over the largest, inverted."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    def make(weight: torch.Tensor) -> tuple[Parts, torch.Tensor]:
        rows, columns = block or weight.shape
        tiles = weight.reshape(weight.shape[0] // rows, rows, weight.shape[1] // columns, columns)
        scale = tiles.abs().amax(dim=(1, 3)) / 448
        if ue8m0:
            scale = torch.exp2(torch.ceil(torch.log2(scale)))
        stored = (tiles / scale[:, None, :, None]).reshape(weight.shape).to(torch.float8_e4m3fn)
        scale = scale.reshape(()) if block is None else scale.to(torch.float8_e8m0fnu) if ue8m0 else scale
        parts = {"weight": stored, "weight_scale_inv": scale}
        if static:
            parts["activation_scale"] = torch.tensor(0.25)
        values = Fp8Dequantize(None)._dequantize_one(stored, scale, output_dtype=torch.float32)
        return parts, values

    return make


def fbgemm(weight: torch.Tensor) -> tuple[Parts, torch.Tensor]:
    """FBGEMM has no dequantiser: its products are scaled by the rows' scales, which is written down here."""
    scale = weight.abs().amax(dim=1, keepdim=True) / 448
    stored = (weight / scale).to(torch.float8_e4m3fn)
    return {
        "weight": stored, "weight_scale": scale, "input_scale_ub": torch.tensor([1200.0])
    }, stored.to(torch.float32) * scale  # fmt: skip


def compressed(args: dict[str, Any], form: str, scale_dtype: torch.dtype, extra: Parts | None = None) -> Case:
    """compressed-tensors' own compressor of the format, and its decompressor."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**args))

    def make(weight: torch.Tensor) -> tuple[Parts, torch.Tensor]:
        weight = weight.to(scale_dtype)
        out, width = weight.shape
        strategy = scheme.weights.strategy
        if strategy == "tensor":
            grouped, axes = weight.reshape(1, -1), 1
        elif strategy == "channel":
            grouped, axes = weight, 1
        elif strategy == "group":
            grouped, axes = weight.reshape(out, -1, args["group_size"]), 2
        else:
            rows, columns = args["block_structure"]
            padded = torch.nn.functional.pad(weight, (0, -width % columns, 0, -out % rows))
            tiles = padded.reshape(-(-out // rows), rows, -(-width // columns), columns)
            grouped, axes = tiles.transpose(1, 2).flatten(2), 2
        scale, zero = calculate_qparams(grouped.amin(axes), grouped.amax(axes), scheme.weights)
        if strategy == "channel":
            scale, zero = scale[:, None], zero[:, None]
        state = {"weight": weight, "weight_scale": scale.to(scale_dtype), "weight_zero_point": zero}
        compressor = BaseCompressor.get_value_from_registry(form)
        parts = compressor.compress(state, scheme)
        values = compressor.decompress(parts, scheme)["weight"]
        return parts | (extra or {}), values

    return make


def act_order(weight: torch.Tensor) -> tuple[Parts, torch.Tensor]:
    """compressed-tensors 0.10.2, in a process of its own because this one has a newer one."""
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/weight.safetensors"
        save_file({"weight": weight.to(torch.bfloat16)}, path)
        subprocess.run([sys.executable, __file__, "--act-order", path, *sys.argv[1:]], check=True)
        made = load_file(path)
    return {name: value for name, value in made.items() if name != "values"}, made["values"]


def act_order_alone(path: str, folder: str) -> None:
    """What `act_order` starts."""
    sys.path.insert(0, folder)
    from compressed_tensors.compressors.quantized_compressors.pack_quantized import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    weight = load_file(path)["weight"]
    args = QuantizationArgs(num_bits=4, strategy="group", group_size=32, symmetric=True, actorder="group")
    order = torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(3))
    group_of = torch.empty(weight.shape[1], dtype=torch.int32)
    group_of[order] = torch.arange(weight.shape[1], dtype=torch.int32) // 32
    grouped = weight[:, order].reshape(weight.shape[0], -1, 32)
    scale, zero = calculate_qparams(grouped.amin(2), grouped.amax(2), args)
    scale = scale.to(torch.bfloat16)
    codes = quantize(weight, scale, zero, args, g_idx=group_of, dtype=torch.int8)
    from compressed_tensors.compressors.quantized_compressors.pack_quantized import pack_to_int32

    parts = {
        "weight_packed": pack_to_int32(codes, 4), "weight_scale": scale,
        "weight_shape": torch.tensor(weight.shape), "weight_g_idx": group_of,
    }  # fmt: skip
    compressor = PackedQuantizationCompressor.__new__(PackedQuantizationCompressor)
    values = compressor.decompress_weight(parts, args)
    save_file({**parts, "values": values.contiguous()}, path)


def gptq(bits: int, group_size: int, *, desc_act: bool = False, sym: bool = True, v2: bool = False) -> Case:
    """GPTQModel's packing and dequantiser. v1 is what its writer makes of v2: zero points less one."""
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module

    def make(weight: torch.Tensor) -> tuple[Parts, torch.Tensor]:
        out, width = weight.shape
        size = width if group_size == -1 else group_size
        order = torch.randperm(width, generator=torch.Generator().manual_seed(5)) if desc_act else torch.arange(width)
        group_of = torch.empty(width, dtype=torch.int32)
        group_of[order] = torch.arange(width, dtype=torch.int32) // size
        grouped = weight[:, order].reshape(out, -1, size)
        most = 2**bits - 1
        if sym:
            scale = 2 * grouped.abs().amax(2) / most
            zero = torch.full_like(scale, 2 ** (bits - 1))
        else:
            low, high = grouped.amin(2).clamp(max=0), grouped.amax(2).clamp(min=0)
            scale = (high - low) / most
            # At least 1: v1 cannot tell 0 from 2^bits.
            zero = torch.round(-low / scale).clamp(1, most)
        scale = scale.to(torch.float16).to(torch.float32)
        linear = torch.nn.Linear(width, out, bias=False)
        wide_scale, wide_zero = scale[:, group_of.long()], zero[:, group_of.long()]
        codes = torch.clamp(torch.round(weight / wide_scale) + wide_zero, 0, most)
        linear.weight.data = (codes - wide_zero) * wide_scale
        layer = TorchLinear(bits=bits, group_size=size, sym=sym, desc_act=desc_act, in_features=width, out_features=out)
        layer.pack_original(linear, scale, zero, group_of)
        layer.post_init()
        values = layer.dequantize_weight().T.contiguous()
        if not v2:
            settings = types.SimpleNamespace(bits=bits, pack_dtype=torch.int32, runtime_bits=bits)
            convert_gptq_v2_to_v1_format_module(layer, settings)
        names = ("qweight", "qzeros", "scales", "g_idx")
        return {name: getattr(layer, name).detach().clone().contiguous() for name in names}, values

    return make


def awq(group_size: int) -> Case:
    """AutoAWQ's packing and its dequantiser in torch, imported without the package around them."""
    folder = next(path for path in map(Path, sys.path) if (path / "awq" / "utils" / "packing_utils.py").exists())
    for name in ("awq", "awq.modules", "awq.modules.linear", "awq.utils"):
        module = sys.modules.setdefault(name, types.ModuleType(name))
        module.__path__ = [str(folder / name.replace(".", "/"))]
    gemm = importlib.import_module("awq.modules.linear.gemm").WQLinear_GEMM
    dequantize = importlib.import_module("awq.utils.packing_utils").dequantize_gemm

    def make(weight: torch.Tensor) -> tuple[Parts, torch.Tensor]:
        out, width = weight.shape
        size = width if group_size == -1 else group_size
        grouped = weight.reshape(out, -1, size)
        low, high = grouped.amin(2), grouped.amax(2)
        scale = ((high - low).clamp(min=1e-5) / 15).to(torch.float16).to(torch.float32)
        zero = (-torch.round(low / scale)).clamp(0, 15)
        linear = torch.nn.Linear(width, out, bias=False)
        codes = torch.clamp(torch.round(grouped / scale[..., None]) + zero[..., None], 0, 15) - zero[..., None]
        linear.weight.data = (codes * scale[..., None]).reshape(out, width)
        layer = gemm.from_linear(linear, 4, size, scales=scale.T.contiguous(), zeros=zero.T.contiguous())
        values = dequantize(layer.qweight, layer.qzeros, layer.scales, 4, size).T.contiguous()
        return {name: getattr(layer, name) for name in ("qweight", "qzeros", "scales")}, values

    return make


def bnb_int8(weight: torch.Tensor) -> tuple[Parts, torch.Tensor]:
    """bitsandbytes' own quantiser and dequantiser."""
    from bitsandbytes import functional

    stored, largest, _ = functional.int8_vectorwise_quant(weight.to(torch.float16))
    parts = {"weight": stored, "SCB": largest, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    return parts, functional.int8_vectorwise_dequant(stored, largest)


def bnb_4bit(kind: str, dtype: torch.dtype, *, nested: bool, storage: torch.dtype = torch.uint8) -> Case:
    """bitsandbytes' own quantiser, the tensors it saves, and its dequantiser."""
    from bitsandbytes import functional

    def make(weight: torch.Tensor) -> tuple[Parts, torch.Tensor]:
        stored, state = functional.quantize_4bit(
            weight.to(dtype), quant_type=kind, compress_statistics=nested, quant_storage=storage
        )
        parts = {"weight": stored} | {f"weight.{name}": value for name, value in state.as_dict(packed=True).items()}
        return parts, functional.dequantize_4bit(stored, state)

    return make


def cases() -> dict[str, tuple[dict[str, Any], Case]]:
    """Every case: quantization_config and how it is made."""
    bf16, f16 = torch.bfloat16, torch.float16
    dynamic = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True, "symmetric": True}
    static = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}

    def of(args: dict[str, Any], form: str, dtype: torch.dtype, activations: Any = None, extra: Any = None) -> Any:
        group = {"targets": ["Linear"], "weights": args, "input_activations": activations, "output_activations": None}
        config = {
            "quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group},
            "ignore": LEFT_DENSE, "kv_cache_scheme": None, "quantization_status": "compressed",
            "global_compression_ratio": None,
        }  # fmt: skip
        return config, compressed(args, form, dtype, extra)

    def wna16(bits: int, **more: Any) -> dict[str, Any]:
        return {"num_bits": bits, "type": "int", "symmetric": True} | more

    group32 = {"strategy": "group", "group_size": 32}
    f8 = {"num_bits": 8, "type": "float", "symmetric": True}
    fine = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3"}
    ordered = of(wna16(4, **group32), "pack-quantized", bf16)[0]
    ordered["config_groups"]["group_0"]["weights"] = wna16(4, **group32, actorder="group")
    int8_dynamic = dynamic | {"type": "int"}
    gptq_config = {"quant_method": "gptq", "lm_head": False, "damp_percent": 0.01, "true_sequential": True}
    awq_config = {"quant_method": "awq", "bits": 4, "version": "gemm", "zero_point": True}
    bnb = {"quant_method": "bitsandbytes", "bnb_4bit_compute_dtype": "bfloat16", "llm_int8_threshold": 6.0}
    nf4 = bnb | {"load_in_4bit": True, "_load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    return {
        "fp8_block": (fine | {"weight_block_size": [32, 32]}, fp8((32, 32))),
        "fp8_block_ue8m0": (fine | {"weight_block_size": [16, 32], "scale_fmt": "ue8m0"}, fp8((16, 32), ue8m0=True)),
        "fp8_tensor_static": (
            fine | {"weight_block_size": None, "activation_scheme": "static"}, fp8(None, static=True)
        ),
        "fbgemm_fp8": ({"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0,
                        "modules_to_not_convert": ["lm_head"]}, fbgemm),
        "ct_fp8_static": of(f8 | {"strategy": "tensor"}, "float-quantized", bf16, static,
                            {"input_scale": torch.tensor([0.5], dtype=bf16)}),
        "ct_fp8_dynamic": of(f8 | {"strategy": "channel"}, "float-quantized", bf16, dynamic),
        "ct_fp8_block": of(f8 | {"strategy": "block", "block_structure": [40, 56]}, "float-quantized", bf16, dynamic),
        "ct_w8a8": of(wna16(8, strategy="channel"), "int-quantized", bf16, int8_dynamic),
        "ct_w8a8_asym_group": of(wna16(8, **group32) | {"symmetric": False}, "int-quantized", f16, int8_dynamic),
        "ct_w8a16": of(wna16(8, strategy="channel"), "pack-quantized", bf16),
        "ct_w4a16_channel": of(wna16(4, strategy="channel"), "pack-quantized", f16),
        "ct_w4a16": of(wna16(4, **group32), "pack-quantized", bf16),
        "ct_w4a16_asym": of(wna16(4, **group32) | {"symmetric": False}, "pack-quantized", bf16),
        "ct_w3a16_asym": of(wna16(3, **group32) | {"symmetric": False}, "pack-quantized", f16),
        "ct_w4a16_actorder": (ordered, act_order),
        "gptq_4bit": (gptq_config | {"bits": 4, "group_size": 32, "desc_act": False, "sym": True}, gptq(4, 32)),
        "gptq_4bit_desc_act": (
            gptq_config | {"bits": 4, "group_size": 32, "desc_act": True, "sym": False, "checkpoint_format": "gptq"},
            gptq(4, 32, desc_act=True, sym=False),
        ),
        "gptq_8bit_v2": (
            gptq_config | {"bits": 8, "group_size": -1, "desc_act": False, "sym": False,
                           "checkpoint_format": "gptq_v2"}, gptq(8, -1, sym=False, v2=True),
        ),
        "gptq_3bit": (gptq_config | {"bits": 3, "group_size": 32, "desc_act": False, "sym": False},
                      gptq(3, 32, sym=False)),
        "gptq_2bit": (gptq_config | {"bits": 2, "group_size": 32, "desc_act": False, "sym": True}, gptq(2, 32)),
        "awq": (awq_config | {"group_size": 32}, awq(32)),
        "awq_channel": (awq_config | {"group_size": -1, "version": "GEMM"}, awq(-1)),
        "bnb_int8": (bnb | {"load_in_8bit": True, "_load_in_8bit": True}, bnb_int8),
        "bnb_nf4": (nf4, bnb_4bit("nf4", bf16, nested=False)),
        "bnb_nf4_double": (nf4 | {"bnb_4bit_use_double_quant": True}, bnb_4bit("nf4", bf16, nested=True)),
        "bnb_nf4_double_bf16_storage": (
            nf4 | {"bnb_4bit_use_double_quant": True, "bnb_4bit_quant_storage": "bfloat16"},
            bnb_4bit("nf4", f16, nested=True, storage=bf16),
        ),
        "bnb_fp4": (nf4 | {"bnb_4bit_quant_type": "fp4"}, bnb_4bit("fp4", torch.float32, nested=False)),
    }  # fmt: skip


def main() -> None:
    """Writes every case."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path)
    parser.add_argument("--old-ct")
    parser.add_argument("--act-order")
    args = parser.parse_args()
    if args.act_order:
        act_order_alone(args.act_order, args.old_ct)
        return
    args.out.mkdir(parents=True, exist_ok=True)
    entries = {}
    for name, (config, make) in cases().items():
        tensors, values = {}, {}
        for module, weight in weights().items():
            with torch.no_grad():
                parts, result = make(weight)
            assert result.shape == weight.shape, (name, result.shape)
            tensors |= {f"{module}.{part}": value.clone().contiguous() for part, value in parts.items()}
            result = result.to(torch.float32).numpy().astype("<f4")
            error = float(np.abs(result - weight.numpy()).max() / weight.abs().max())
            digest = hashlib.sha256(result.tobytes()).hexdigest()
            values[f"{module}.weight"] = {"sha256": digest, "first": result.reshape(-1)[:4].tolist()}
            print(f"{name:28} {module[-6:]} largest error {error:.3f}")
        save_file(tensors, args.out / f"{name}.safetensors")
        entries[name] = {"quantization_config": config, "values": values}
    packages = ("torch", "transformers", "compressed-tensors", "bitsandbytes", "numpy", "safetensors")
    origin = {name: importlib.metadata.version(name) for name in packages}
    origin |= {"gptqmodel": "7.7.0 (its sdist)", "autoawq": "0.2.9 (its sdist)"}
    origin |= {"compressed-tensors of act-order": "0.10.2"}
    (args.out / "cases.json").write_text(json.dumps({"origin": origin, "cases": entries}, indent=1) + "\n")


if __name__ == "__main__":
    main()
