"""The table of quantised formats by their quant_method."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxllama.errors import ConfigError, ConversionError
from jaxllama.weights.sources.quantized.awq import read_awq
from jaxllama.weights.sources.quantized.bitsandbytes import read_bitsandbytes
from jaxllama.weights.sources.quantized.compressed import read_compressed_tensors
from jaxllama.weights.sources.quantized.fp8 import read_fbgemm, read_fp8
from jaxllama.weights.sources.quantized.gptq import read_gptq
from jaxllama.weights.sources.quantized.interface import Format, QuantizedTensor, Settings
from jaxllama.weights.sources.source import SourceTensor

QUANTIZATION_CONFIG = "quantization_config"
FORMATS: dict[str, Format] = {
    "awq": read_awq,
    "bitsandbytes": read_bitsandbytes,
    "compressed-tensors": read_compressed_tensors,
    "fbgemm_fp8": read_fbgemm,
    "fp8": read_fp8,
    "gptq": read_gptq,
}


def dequantized(config: Mapping[str, Any], tensors: Mapping[str, SourceTensor]) -> Mapping[str, SourceTensor]:
    """The parameters by name, of whatever stored tensors each consists, as config.json's quantization_config says.

    Raises: ConfigError for a format or a setting that is not supported, ConversionError for parts that do not fit.
    """
    value = config.get(QUANTIZATION_CONFIG)
    if value is None or value == {}:
        return tensors
    if not isinstance(value, Mapping):
        raise ConfigError(f"config.json: {QUANTIZATION_CONFIG} must be an object, got {str(value)[:100]!r}")
    method = value.get("quant_method")
    if not isinstance(method, str) or method not in FORMATS:
        raise ConfigError(
            f"config.json: quantization {str(method)[:100]!r} is not supported, expected one of "
            f"{', '.join(FORMATS)}; or convert from the unquantised weights"
        )
    parameters = FORMATS[method](Settings(value, f"config.json: {QUANTIZATION_CONFIG}"), tensors)
    if not any(isinstance(tensor, QuantizedTensor) for tensor in parameters.values()):
        raise ConversionError(
            f"config.json: quantization is {method!r}, but no tensor is of this format. Is config.json from this model?"
        )
    return parameters
