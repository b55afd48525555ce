"""Quantised formats: which stored tensors make a matrix, and how its rows are dequantised. One module a family."""
