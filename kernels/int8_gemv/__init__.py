"""Bitmask matrix of int8 values and group scales times 1 to 8 vectors. `dispatch` has the public names."""
