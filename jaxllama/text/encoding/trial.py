"""Tries a tokenizer out in a process of its own, bounded in memory and time.

A tokenizer's files come with a model and may be hostile: a normaliser that makes gigabytes of a line, a pattern that
never ends or that panics in Rust, with pages on stderr. Here all of that ends a process that was made for it.

The process is started anew, not forked, and imports no JAX: a trial takes a third of a second and the tokenizer's own
time.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

from jaxllama.errors import TokenizerError, one_line
from jaxllama.text.encoding.tokenizer import load_tokenizer

MEMORY_BYTES = 2 * 2**30
"""The most, of addresses and not of pages in use. Llama 3's tokenizer, 128,000 tokens, takes a fifth of it and 3 s."""
CPU_S = 40
"""The most."""
# Each about three times what a vocabulary of 256,000 in a file of 10 MB takes: 34 bytes a byte, and 0.3 s a megabyte.
_MEMORY_BYTES_PER_BYTE, _LEAST_MEMORY_BYTES = 96, 2**29
_CPU_S_PER_BYTE, _LEAST_CPU_S = 1e-6, 10
_WALL_S = 4 * CPU_S  # for a machine that is busy with other things

_TEXT = "The quick brown fox jumps over the lazy DOG, 1234567890. " * 20
# A byte is three bytes after some normalisers, and each of those may be a token.
_MOST_TOKENS_PER_CHAR = 4


def bounds_of(folder: Path) -> tuple[int, int]:
    """The bytes of memory and seconds of processor time that the tokenizer in `folder` may take, by its files' sizes.

    What grows in memory, or never ends, is mostly small; a large vocabulary needs more of both.
    """
    num_bytes = sum(path.stat().st_size for path in folder.glob("tokenizer*") if path.is_file())
    memory_bytes = _LEAST_MEMORY_BYTES + _MEMORY_BYTES_PER_BYTE * num_bytes
    cpu_s = _LEAST_CPU_S + int(_CPU_S_PER_BYTE * num_bytes)
    return min(memory_bytes, MEMORY_BYTES), min(cpu_s, CPU_S)


def try_tokenizer(
    folder: Path,
    vocab_size: int,
    *,
    memory_bytes: int | None = None,
    cpu_s: int | None = None,
    wall_s: float = _WALL_S,
) -> None:
    """Loads the tokenizer in `folder`, encodes and decodes a text, in another process.

    The bounds on memory and processor time (None: `bounds_of`) are the operating system's, where it has them (not on
    Windows, and on macOS not on memory); `wall_s` holds everywhere.

    Raises: TokenizerError, on one line, if it cannot be loaded, does not fit `vocab_size`, makes no tokens or far too
        many, or goes beyond the bounds.
    """
    usual_memory_bytes, usual_cpu_s = bounds_of(folder)
    memory_bytes = usual_memory_bytes if memory_bytes is None else memory_bytes
    cpu_s = usual_cpu_s if cpu_s is None else cpu_s
    command = [sys.executable, "-P", "-m", "jaxllama.text.encoding.trial"]
    command += [str(folder), str(vocab_size), str(memory_bytes), str(cpu_s)]
    # The modules are found as here, wherever they are; one thread, which is enough and does not reserve memory.
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "TOKENIZERS_PARALLELISM": "false"}
    try:
        done = subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, timeout=wall_s, check=False
        )
    except subprocess.TimeoutExpired:
        raise TokenizerError(f"{folder}: a trial took longer than {wall_s:g} s") from None
    with contextlib.suppress(ValueError, KeyError, TypeError):
        problem = json.loads(done.stdout)["problem"]
        if problem is None:
            return
        raise TokenizerError(problem)
    if done.returncode > 0:
        raise TokenizerError(f"{folder}: a trial ended with {_last_line(done.stderr)}")
    bounds = f"{memory_bytes / 2**30:.2g} GiB of memory or {cpu_s} s of processor time"
    raise TokenizerError(f"{folder}: a trial crashed, or went beyond {bounds}")


def _main(folder: str, vocab_size: str, memory_bytes: str, cpu_s: str) -> None:
    _bound(int(memory_bytes), int(cpu_s))
    problem = None
    try:
        _try_out(Path(folder), int(vocab_size))
    except TokenizerError as error:
        problem = one_line(error, 600)
    # A Rust panic is no `Exception`.
    except BaseException as error:
        problem = f"{folder}: {type(error).__name__}: {one_line(error)}"
    print(json.dumps({"problem": problem}))


def _try_out(folder: Path, vocab_size: int) -> None:
    tokenizer = load_tokenizer(folder, vocab_size)
    ids = tokenizer.encode(_TEXT, add_bos=False)
    if not ids:
        raise TokenizerError(f"{folder}: the tokenizer makes no tokens of a text")
    if len(ids) > _MOST_TOKENS_PER_CHAR * len(_TEXT):
        raise TokenizerError(f"{folder}: the tokenizer makes {len(ids)} tokens of a text of {len(_TEXT)} characters")
    tokenizer.decode(ids)


def _bound(memory_bytes: int, cpu_s: int) -> None:
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return
    limits = {"RLIMIT_AS": memory_bytes, "RLIMIT_CPU": cpu_s, "RLIMIT_CORE": 0}
    for name, limit in limits.items():
        # A system may lack one of them, or have a lower limit already.
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(getattr(resource, name), (limit, limit))


def _last_line(output: bytes) -> str:
    lines = output.decode(errors="replace").strip().splitlines()
    return one_line(lines[-1] if lines else "no message")


if __name__ == "__main__":
    _main(*sys.argv[1:])
