"""Public checkpoint formats: one reader, one writer, and key maps that are used in both directions.

`open_weights` reads safetensors, Hugging Face folders and PyTorch's files without PyTorch;
`KeyMap` says which of their tensors is which of ours.
"""
