"""Many rows times a sparse matrix in CSR, and products sampled at its positions: for sparse deltas."""
