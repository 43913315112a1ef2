"""Which entries of a dense matrix are large, and how large its channels are: for the growth of sparse deltas."""
