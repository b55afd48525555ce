"""Converts Hugging Face safetensors and GGUF files to jaxllama checkpoints."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxllama_convert.staging import OutputError
    from jaxllama_convert.write import ConversionReport, convert

__all__ = ["ConversionReport", "OutputError", "convert"]


def __getattr__(name: str) -> Any:
    # On first use, so that the command line can offer `convert` without loading JAX.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from jaxllama_convert import staging, write

    return getattr(staging if name == "OutputError" else write, name)
