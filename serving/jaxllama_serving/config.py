"""`ServerConfig`: every choice the server makes, fixed before it starts. No HTTP library is imported here."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from pathlib import Path

from jaxllama.errors import JaxLlamaError

REASONING_FIELDS = ("reasoning_content", "reasoning", "both")
TOOL_PARSERS = ("hermes", "llama3", "r1", "mistral", "mistral-args", "granite", "phi")


class ServerConfigError(JaxLlamaError, ValueError):
    """A command line flag, a key file or an environment variable has no usable value.

    The message names it, its range and the value; of keys never the value. A port that is taken and a model that a
    server cannot serve (no tokenizer, no chat template) are of this kind too.

    **What to do:** change the flag: `jaxllama serve --help` lists them in groups. `--port 0` takes a free port.
    """


@dataclass(frozen=True)
class ServerConfig:
    """How one server behaves. Validated when made; times are seconds, prices dollars per million tokens.

    `model_names` are the names clients may ask for; the first is listed first. `api_keys` empty means that no key is
    needed. `peak_bandwidth` is that of one device's memory in GB/s; None: what is known of it. `request_timeout_s` None
    means no deadline. Past `max_pending_tokens`, prompt tokens of all running and waiting requests, another is refused.
    A stream whose reader is more than `max_stream_tokens` tokens behind, or takes nothing for `write_timeout_s`, is
    dropped. With a `profile_dir` whoever has a key may have traces recorded there.

    Raises: ServerConfigError naming the field, its range and the value.
    """

    model_names: tuple[str, ...]
    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    cors_origins: tuple[str, ...] = ()
    price_input: float | None = None
    price_output: float | None = None
    peak_bandwidth: float | None = None
    exit_on_engine_failure: bool = False
    exit_on_device_hang: bool = False
    profile_dir: Path | None = None
    generation_config: str = "none"
    strict_length: bool = False
    strict_fields: bool = False
    stop_in_reasoning: bool = False
    reasoning_field: str = "reasoning_content"
    tool_parser: str | None = None
    max_n: int = 16
    max_body_bytes: int = 4 * 2**20
    max_connections: int = 512
    max_stream_tokens: int = 2048
    max_pending_tokens: int = 4 * 2**20
    header_timeout_s: float = 10.0
    body_timeout_s: float = 30.0
    write_timeout_s: float = 30.0
    idle_timeout_s: float = 55.0
    request_timeout_s: float | None = None
    sse_keepalive_s: float = 15.0
    drain_timeout_s: float = 30.0

    def __post_init__(self) -> None:
        if not self.model_names or not all(0 < len(name) <= 256 and name.isprintable() for name in self.model_names):
            raise ServerConfigError(f"model names must be 1 to 256 printable characters each, got {self.model_names!r}")
        if self.generation_config not in ("none", "auto"):
            raise ServerConfigError(f"generation_config must be 'none' or 'auto', got {self.generation_config!r}")
        if self.reasoning_field not in REASONING_FIELDS:
            raise ServerConfigError(f"reasoning_field must be one of {REASONING_FIELDS}, got {self.reasoning_field!r}")
        if self.tool_parser is not None and self.tool_parser not in TOOL_PARSERS:
            raise ServerConfigError(f"tool_parser must be one of {TOOL_PARSERS}, got {self.tool_parser!r}")
        if self.profile_dir is not None and not self.api_keys:
            raise ServerConfigError(
                "profile_dir needs API keys: without one anybody who reaches the server could fill the disk. "
                "Give --api-key-file or JAXLLAMA_API_KEYS"
            )
        bounds = {
            "port": (0, 65_535),
            "max_n": (1, 16),
            "max_body_bytes": (1024, 2**30),
            "max_connections": (1, 1_000_000),
            "max_stream_tokens": (1, 1_000_000),
            "max_pending_tokens": (1, 2**40),
            "drain_timeout_s": (0, 86_400),
            "price_input": (0, 1e6),
            "price_output": (0, 1e6),
            "peak_bandwidth": (1e-3, 1e6),
        }
        for item in fields(self):
            value = getattr(self, item.name)
            low, high = bounds.get(item.name, (1e-3, 86_400) if item.name.endswith("_s") else (None, None))
            if value is None or low is None or high is None:
                continue
            if not math.isfinite(value) or not low <= value <= high:
                raise ServerConfigError(f"{item.name} must be from {low} to {high}, got {value!r}")
        for origin in self.cors_origins:
            if origin == "*" or "://" not in origin or origin.endswith("/"):
                raise ServerConfigError(
                    f"cors_origins: {origin!r} is not an origin. Give each as scheme://host[:port]; '*' is not allowed."
                )

    def cost(self, prompt_tokens: int, completion_tokens: int) -> float | None:
        """Returns the dollars of one request, or None when no price is set (one price alone counts the other as 0)."""
        if self.price_input is None and self.price_output is None:
            return None
        dollars = prompt_tokens * (self.price_input or 0.0) + completion_tokens * (self.price_output or 0.0)
        return round(dollars / 1e6, 12)
