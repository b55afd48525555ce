"""What the engine may hold, and what it holds."""

from __future__ import annotations

import os
from dataclasses import dataclass

from jaxllama.engine.scheduling.speculation import DRAFTED_MODES, MAX_DRAFT_TOKENS, MODES, SpeculationMode
from jaxllama.errors import ConfigError
from jaxllama.hosts.watch import TIMEOUT_S
from jaxllama.weights.places import PlaceLike


@dataclass(frozen=True)
class EngineOptions:
    """How much the engine may hold and how it divides its work.

    `max_context` None is the model's own; where that was extended (longrope), the one it had before: a longer one asks
    for the other frequencies (`LlamaConfig.for_context`). `num_pages` None holds `max_rows` rows of 2,048 tokens each,
    and at least one whole context; where a mesh's `data` and `rep` split rows and pages, it counts for each part.
    `chunk_sizes` are the prefill programs, in tokens, multiples of `page_size`; None leaves both to the platform (CPU:
    16 and 32, 128, 512; TPU kernels: 128 and 128, 512, 2,048). Where a whole layer is a kernel (CPU), which skips what
    is padding, the largest runs all, and the middle one says how much while others wait. A dispatch runs as many steps
    as take about `dispatch_s` seconds, at most 32: longer is less host work, shorter a smoother stream. With work
    pending and no step finished for `stall_timeout_s`, `Engine.health` says so; a device that does not finish a program
    for `device_timeout_s`, or for longer where its programs are known to take long, is named there (`hosts.watch`).
    `kv_dtype` None caches keys and values in the model's dtype, "int8" with a float32 scale a token and head: half of
    bfloat16's memory and a little more.

    Compiled programs are kept in the folder `compilation_cache` for later processes. None is `~/.cache/jaxllama/xla`,
    unless JAX has been told of a folder of its own (`JAX_COMPILATION_CACHE_DIR`) or to keep nothing; "off" leaves it to
    JAX. On a terminal and in a notebook the engine says what it compiles where that takes more than two seconds, unless
    `show_compilation` is false.

    `speculation` "lookup" looks up what followed a row's last tokens where they were before, in its prompt and its
    output, and verifies several such tokens in one step where that pays; "auto" does so in predictions too
    (`Engine.submit`). `draft` is where a smaller model of the same vocabulary is, as `load` takes it: with
    "draft" it says what may come, with "auto" where nothing is found; at most `draft_tokens` a row and step. No token
    changes by any of it.
    """

    max_rows: int = 16
    max_context: int | None = None
    page_size: int | None = None
    num_pages: int | None = None
    max_queue: int = 256
    chunk_sizes: tuple[int, ...] | None = None
    dispatch_s: float = 0.05
    stall_timeout_s: float = 15.0
    device_timeout_s: float = TIMEOUT_S
    kv_dtype: str | None = None
    compilation_cache: str | os.PathLike[str] | None = None
    show_compilation: bool = True
    speculation: SpeculationMode = "off"
    draft: PlaceLike | None = None
    draft_tokens: int = 4

    def __post_init__(self) -> None:
        for name, least in (("max_rows", 1), ("page_size", 1), ("max_queue", 1), ("max_context", 2), ("num_pages", 2)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"{name} must be at least {least}, got {value}")
        if not self.device_timeout_s > 0:
            raise ConfigError(f"device_timeout_s must be above 0, got {self.device_timeout_s}")
        if self.kv_dtype not in (None, "int8"):
            raise ConfigError(f"kv_dtype must be 'int8' or None, got {self.kv_dtype!r}")
        if self.speculation not in MODES:
            raise ConfigError(f"speculation must be one of {', '.join(MODES)}, got {self.speculation!r}")
        if self.draft is not None and self.speculation not in DRAFTED_MODES:
            raise ConfigError(
                f"a draft model needs speculation {' or '.join(map(repr, DRAFTED_MODES))}, got {self.speculation!r}"
            )
        if not 1 <= self.draft_tokens <= MAX_DRAFT_TOKENS:
            raise ConfigError(f"draft_tokens must be from 1 to {MAX_DRAFT_TOKENS}, got {self.draft_tokens}")


@dataclass(frozen=True)
class EngineStats:
    """The engine's load at one moment. `has_failed`: it has ended for good; `Engine.health` says why, and
    which device it is if one hangs. `kernel_fault`: what a kernel does wrong on these devices, so that plain JAX runs.

    `num_cached_pages` can be found by later requests. Of all prompts so far, `num_prompt_tokens` in length,
    `num_prompt_tokens_cached` were found. `num_compilations` is the process's since the engine was made.
    """

    num_running: int
    num_waiting: int
    num_pages_used: int
    num_pages: int
    ready: bool
    num_cached_pages: int = 0
    num_prompt_tokens: int = 0
    num_prompt_tokens_cached: int = 0
    has_failed: bool = False
    device_hangs: bool = False
    kernel_fault: str | None = None
    num_compilations: int = 0


@dataclass(frozen=True)
class StepReport:
    """What one dispatch did: `num_steps` of `num_rows` rows in `seconds`, over a mean of `kv_tokens` cached tokens.

    Of its `num_tokens` tokens, `num_accepted` were drafts that had been right, of `num_drafted` that were verified.
    """

    num_steps: int
    num_rows: int
    seconds: float
    kv_tokens: float
    num_tokens: int = 0
    num_drafted: int = 0
    num_accepted: int = 0
