"""Attention of one query per sequence over ranges of a cache. `dispatch` has the public names."""
