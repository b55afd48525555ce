"""llama.cpp as a contender (turns.py): BF16, F32 or Q8_0 weights on a CPU, through llama-cpp-python's C interface.

    python bench/peers/llamacpp_bench.py --gguf FILE --dtype bfloat16 --rows 16 --threads 2

Needs llama-cpp-python built on this machine for its own instruction set (CMAKE_ARGS="-DGGML_NATIVE=ON"); a prebuilt
wheel stops at AVX2 and is no fair opponent. The model is dequantised exactly and rounded to `--dtype`, in a temporary
file. Greedy, rows as sequences of one batch, each logit row's argmax by NumPy.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.metadata
import tempfile
import time
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
from gguf.quants import dequantize, quantize
from turns import PROMPT_TOKENS, take_turns

TYPES = {"bfloat16": gguf.GGMLQuantizationType.BF16, "float32": gguf.GGMLQuantizationType.F32}
TYPES["int8"] = gguf.GGMLQuantizationType.Q8_0


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
        loading = llama_cpp.llama_model_default_params()
        # 0.3.36's AMX buffers, which Q8_0 gets, end in a segmentation fault.
        loading.use_extra_bufts = False
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), loading)
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


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", type=Path, required=True)
    parser.add_argument("--dtype", choices=tuple(TYPES), default="bfloat16")
    parser.add_argument("--rows", type=int, default=32, help="at most")
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        write_gguf(args.gguf, path, TYPES[args.dtype])
        model = Model(path, args.rows, 1024, args.threads)

        def turn(of: dict[str, Any]) -> float:
            if of["what"] == "prefill":
                return time_prefill(model, of["tokens"])
            return time_decode(model, of["rows"], PROMPT_TOKENS, of["steps"])

        versions = {"llama-cpp-python": importlib.metadata.version("llama-cpp-python")}
        take_turns(f"llama.cpp, {TYPES[args.dtype].name}", versions, turn)


if __name__ == "__main__":
    main()
