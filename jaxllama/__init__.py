"""Llama-family inference on JAX: load a converted checkpoint, generate, stream, chat, read logits.

>>> llama = jaxllama.load("models/smollm2")
>>> llama.generate("Once upon a time", jaxllama.SamplingParams(max_tokens=32)).text
"""

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxllama.decode import functional
    from jaxllama.decode.params import SamplingParams
    from jaxllama.decode.steering import Steering
    from jaxllama.engine.engine import Engine
    from jaxllama.engine.options import EngineOptions, EngineStats
    from jaxllama.engine.scheduling.request import EngineRequest, PromptLogprob, TokenLogprob, TokenOutput
    from jaxllama.llama import Completion, CompletionDelta, Llama, Score, Trace, load
    from jaxllama.model.config import LlamaConfig, RopeScaling
    from jaxllama.model.dense import Patch
    from jaxllama.model.mesh import make_mesh
    from jaxllama.text.chat import ChatTemplate
    from jaxllama.text.encoding.tokenizer import Tokenizer
    from jaxllama.text.output import OutputAssembler
    from jaxllama.text.structured import Structured
    from jaxllama.weights.checkpoint import Checkpoint

__version__ = "0.1.0"

__all__ = [
    "ChatTemplate",
    "Checkpoint",
    "Completion",
    "CompletionDelta",
    "Engine",
    "EngineOptions",
    "EngineRequest",
    "EngineStats",
    "Llama",
    "LlamaConfig",
    "OutputAssembler",
    "Patch",
    "PromptLogprob",
    "RopeScaling",
    "SamplingParams",
    "Score",
    "Steering",
    "Structured",
    "TokenLogprob",
    "TokenOutput",
    "Tokenizer",
    "Trace",
    "functional",
    "load",
    "make_mesh",
]
_MODULES = {
    "decode": ("functional",),
    "decode.params": ("SamplingParams",),
    "decode.steering": ("Steering",),
    "engine.engine": ("Engine",),
    "engine.options": ("EngineOptions", "EngineStats"),
    "engine.scheduling.request": ("EngineRequest", "PromptLogprob", "TokenLogprob", "TokenOutput"),
    "llama": ("Completion", "CompletionDelta", "Llama", "Score", "Trace", "load"),
    "model.config": ("LlamaConfig", "RopeScaling"),
    "model.dense": ("Patch",),
    "model.mesh": ("make_mesh",),
    "text.chat": ("ChatTemplate",),
    "text.encoding.tokenizer": ("Tokenizer",),
    "text.output": ("OutputAssembler",),
    "text.structured": ("Structured",),
    "weights.checkpoint": ("Checkpoint",),
}
_MODULE_OF = {name: f"jaxllama.{module}" for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    # On first use: what needs no JAX (`--help`, a tokenizer's trial) does not wait seconds for it.
    if name in _MODULE_OF:
        module = importlib.import_module(_MODULE_OF[name])
        # A name may be a module's own.
        value = getattr(module, name, None) or importlib.import_module(f"{module.__name__}.{name}")
        globals()[name] = value
        return value
    if not name.startswith("_") and importlib.util.find_spec(f"jaxllama.{name}") is not None:
        return importlib.import_module(f"jaxllama.{name}")
    raise AttributeError(f"module 'jaxllama' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
