"""Llama-family inference on JAX."""
