"""The model's dimensions and what its family differs in, read from a Hugging Face config.json. No JAX here."""

from jaxllama.model.config.families import FAMILIES, Family
from jaxllama.model.config.llama_config import KNOWN_KEYS, LlamaConfig
from jaxllama.model.config.rope_scaling import RopeScaling

__all__ = ["FAMILIES", "KNOWN_KEYS", "Family", "LlamaConfig", "RopeScaling"]
