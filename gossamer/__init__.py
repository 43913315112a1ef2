"""Gossamer: make HuggingFace language models sparse, and make the sparsity pay."""

__version__ = "0.1.0"
