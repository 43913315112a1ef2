"""Kept values as 8-bit integers with a scale per group of inputs. `dispatch` has the public names."""
