"""The front: a loaded model that generates, scores and saves, and what its calls return."""

from jaxllama.llama.laboratory import Trace
from jaxllama.llama.llama import Llama, load
from jaxllama.llama.outputs import Completion, CompletionDelta
from jaxllama.llama.scores import Score

__all__ = ["Completion", "CompletionDelta", "Llama", "Score", "Trace", "load"]
