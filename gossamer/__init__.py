"""Gossamer: make HuggingFace language models sparse, and make the sparsity pay."""

from pkgutil import extend_path

__version__ = "0.1.0"

# Python started in the root of the checkout finds this folder before the installed package, and its sub-packages do not
# lie here: they are then taken from the installation.
__path__ = extend_path(__path__, __name__)
