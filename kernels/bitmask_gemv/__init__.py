"""Bitmask matrix times 1 to 8 vectors, and its machine layout. `dispatch` has the public names."""
