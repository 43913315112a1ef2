"""Factorisations of a Gram matrix that always give an answer: a damping ladder, then the diagonal."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import Log, silent

DAMPING_LADDER = (0.01, 0.1, 1.0)
_FLOOR = 1e-12  # share of the largest diagonal entry that an input which never fires gets: the factor stays invertible


def damped(gram: Tensor, damping: float) -> Tensor:
    """gram + damping * mean(diag gram) * I, a new float32 tensor [n, n]."""
    result = gram.to(torch.float32, copy=True)
    result.diagonal().add_(damping * float(gram.diagonal().mean(dtype=torch.float64)))
    return result


def upper_factor(gram: Tensor, log: Log = silent) -> Tensor:
    """Upper triangular R, float32 [n, n], with R R^T = gram + damping * mean(diag gram) * I.

    The damping climbs 0.01, 0.1, 1.0 until the factorisation succeeds; then R is diagonal with R_jj^2 = gram_jj (ones
    if all inputs are zero). `log` hears about every step beyond the first. At most 2 n^2 floats beside the argument.
    """
    for step, damping in enumerate(DAMPING_LADDER):
        factor = _reversed_cholesky(damped(gram, damping))
        if factor is not None:
            if step:
                log(f"the Gram matrix is not positive definite; damping raised to {damping:g} of its mean diagonal")
            return factor
    diagonal = gram.diagonal().to(torch.float32).clamp_min(0)
    if bool((diagonal == 0).all()):
        log("all calibration inputs are zero; weights are compared by magnitude, none is adjusted")
        return torch.eye(len(diagonal), dtype=torch.float32, device=gram.device)
    log(
        "the Gram matrix has no Cholesky factor at any damping; only its diagonal is used (Wanda scores, no adjustment)"
    )
    return torch.diag(diagonal.clamp_min(_FLOOR * float(diagonal.max())).sqrt())


def _reversed_cholesky(matrix: Tensor) -> Tensor | None:
    """Upper R with R R^T = matrix: the lower factor of the matrix read backwards, read backwards. None on failure."""
    matrix = matrix.flip((0, 1))
    lower, info = torch.linalg.cholesky_ex(matrix)
    del matrix
    if int(info) != 0 or not bool(torch.isfinite(lower.diagonal()).all()):
        return None
    return lower.flip((0, 1))
