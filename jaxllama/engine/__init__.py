"""Continuous batching: the thread that owns the devices, and what it asks of them."""
