"""Dense matrix times 1 to 8 vectors: the honest baseline. `dispatch` has the public names."""
