"""Llama-family inference on JAX: load a converted checkpoint, generate, stream, chat, read logits.

>>> llama = jaxllama.load("models/smollm2")
>>> llama.generate("Once upon a time", jaxllama.SamplingParams(max_tokens=32)).text
"""

from jaxllama.decode.params import SamplingParams
from jaxllama.decode.scoring import PromptLogprob
from jaxllama.engine.compilation import keep_weights_as_they_are as _keep_weights_as_they_are
from jaxllama.engine.engine import Engine
from jaxllama.engine.options import EngineOptions, EngineStats
from jaxllama.engine.request import EngineRequest, TokenLogprob, TokenOutput
from jaxllama.llama import Completion, CompletionDelta, Llama, load
from jaxllama.model.config import LlamaConfig, RopeScaling
from jaxllama.model.mesh import make_mesh
from jaxllama.text.chat import ChatTemplate
from jaxllama.text.encoding.tokenizer import Tokenizer
from jaxllama.text.output import OutputAssembler
from jaxllama.text.structured import Structured
from jaxllama.weights.checkpoint import Checkpoint

__version__ = "0.1.0"

_keep_weights_as_they_are()

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
    "PromptLogprob",
    "RopeScaling",
    "SamplingParams",
    "Structured",
    "TokenLogprob",
    "TokenOutput",
    "Tokenizer",
    "load",
    "make_mesh",
]
