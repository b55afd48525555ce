"""Tokenizers: one front, a backend for each kind of file, and decoding token by token."""
