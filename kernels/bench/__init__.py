"""Kernels measured against the best dense product of this machine, and how such times are taken."""
