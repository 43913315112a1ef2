"""Modules that hold sparse weights in place of torch's dense ones."""
