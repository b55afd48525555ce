"""The way back: weights as Hugging Face safetensors, with all the files that transformers wants beside them."""
