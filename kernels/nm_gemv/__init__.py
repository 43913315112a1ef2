"""N:M matrix, as many values in every group, times 1 to 8 vectors. `dispatch` has the public names."""
