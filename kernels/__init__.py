"""How sparse matrices are stored and multiplied: layouts, references, compiled kernels, dispatch. The ground floor."""
