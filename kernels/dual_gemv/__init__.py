"""Sparse matrix times 1 to 8 mostly small vectors. `dispatch` has the public names."""
