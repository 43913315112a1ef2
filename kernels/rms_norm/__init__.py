"""Root mean square norm of a few rows. `dispatch` has the public name."""
