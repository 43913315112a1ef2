"""A gated MLP on a subset of its neurons. `dispatch` has the public name."""
