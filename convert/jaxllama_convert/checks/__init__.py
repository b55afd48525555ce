"""What a model is and whether it is whole: `jaxllama inspect` and `jaxllama verify`."""
