"""The formats that people publish, read tensor by tensor: safetensors and GGUF."""
