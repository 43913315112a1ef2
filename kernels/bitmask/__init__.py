"""Bit-packed masks, and matrices with only their kept values. `dispatch` has the public names."""
