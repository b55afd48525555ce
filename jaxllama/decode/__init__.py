"""Pure functions that generate: sampling, the state of rows, prefill, decode steps, scoring."""
