"""Checks nestloop against tensors recorded from the official implementations.

`python -m tests.golden DIR` checks every *.safetensors file of a folder. What is run is decided by the
hyper-parameters in each file's own metadata; `families/` holds one module a kind of file.
"""
