"""What a Llama is: its config, its table of tensors, its mesh, its cache and its forward pass."""
