"""The linear and integer programs of the plan solver, as scipy's HiGHS takes them.

Everywhere: c [heads, rules] is minimised, coupling [k, heads, rules] sums to at most upper [k], keep [heads, rules] are
the rules that may be chosen.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, linprog, milp

Array = NDArray[np.float64]
GAP = 1e-5


class OutOfTime(Exception):
    """The relaxation was not solved in its time."""


def scaled(coupling: Array, upper: Array) -> tuple[Array, Array]:
    """Every coupling constraint in units of its bound, so that HiGHS' absolute tolerances mean the same for each."""
    unit = np.where(np.abs(upper) > 0, np.abs(upper), 1.0)
    return coupling / unit[:, None, None], upper / unit


def undominated(c: Array, coupling: Array) -> NDArray[np.bool_]:
    """bool [heads, rules]: rules that no other rule of the head beats everywhere; the first of equal ones stays."""
    terms = np.concatenate([c[None], coupling])  # [k, heads, rules]
    keep = np.ones(c.shape, dtype=bool)
    for head in range(c.shape[0]):
        t = terms[:, head]
        no_worse = (t[:, :, None] <= t[:, None, :]).all(0)  # [a, b]: a no worse than b
        equal = no_worse & no_worse.T
        first = np.triu(np.ones_like(equal), 1)
        keep[head] = ~((no_worse & ~equal) | (equal & first)).any(0)
    return keep


def _matrices(
    c: Array, coupling: Array, keep: NDArray[np.bool_]
) -> tuple[NDArray[np.int64], NDArray[np.int64], Array, Array, sparse.csr_matrix]:
    """Variables (heads, rules), their cost, the coupling rows, and the one-rule-per-head rows over them."""
    heads, rules = np.nonzero(keep)
    ones = sparse.csr_matrix((np.ones(len(heads)), (heads, np.arange(len(heads)))), shape=(c.shape[0], len(heads)))
    return heads, rules, c[heads, rules], coupling[:, heads, rules], ones


def relax(
    c: Array, coupling: Array, upper: Array, keep: NDArray[np.bool_], time_limit: float
) -> tuple[Array, float] | None:
    """(x [heads, rules], value) of the LP relaxation at a vertex; None when it is infeasible. OutOfTime."""
    if time_limit <= 0:
        raise OutOfTime
    heads, rules, cost, rows, ones = _matrices(c, coupling, keep)
    unit = max(float(np.abs(cost).max()), 1e-300)
    result = linprog(
        cost / unit, A_ub=sparse.csr_matrix(rows), b_ub=upper, A_eq=ones, b_eq=np.ones(c.shape[0]),
        bounds=(0, None), method="highs-ds", options={"time_limit": time_limit},
    )  # fmt: skip
    if result.x is None:
        if result.status == 1:
            raise OutOfTime
        return None
    x = np.zeros(c.shape)
    x[heads, rules] = result.x
    return x, float(result.fun) * unit


def integer(
    c: Array, coupling: Array, upper: Array, keep: NDArray[np.bool_], time_limit: float, gap: float
) -> tuple[NDArray[np.int64] | None, bool]:
    """(best choice found, whether it is proved optimal) of the integer program over these heads."""
    if time_limit <= 0:
        return None, False
    heads, rules, cost, rows, ones = _matrices(c, coupling, keep)
    unit = max(float(np.abs(cost).max()), 1e-300)
    result = milp(
        cost / unit,
        integrality=np.ones(len(cost)),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(rows, -np.inf, upper), LinearConstraint(ones, 1, 1)],
        options={"time_limit": time_limit, "mip_rel_gap": gap / 10},
    )
    if result.x is None:
        return None, False
    x = np.zeros(c.shape)
    x[heads, rules] = result.x
    choice = x.argmax(1)
    if (coupling[:, np.arange(len(choice)), choice].sum(1) > upper + 1e-7).any():
        return None, False
    return choice, result.status == 0
