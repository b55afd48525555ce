"""Converts Hugging Face safetensors and GGUF files to jaxllama checkpoints."""

from jaxllama_convert.staging import OutputError
from jaxllama_convert.write import ConversionReport, convert

__all__ = ["ConversionReport", "OutputError", "convert"]
