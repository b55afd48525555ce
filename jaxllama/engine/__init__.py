"""Continuous batching: who runs when (no JAX), and the thread that owns the devices."""
