"""LoRA adapters of PEFT, merged into a model's weights while those are read.

settings.py     adapter_config.json        adapter.py   the files, and which tensor is what
tensors.py      merged matrices, row by row        merging.py   a model with its adapters
"""
