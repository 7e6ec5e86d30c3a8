"""Tabular preference structures: one prompt, a few actions, a matrix of preferences for each objective."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from mopo_cli.base.errors import UserError

TOLERANCE = 1e-9


@dataclass(frozen=True, slots=True)
class Structure:
    """K objectives on A actions. Nothing is assumed of the preferences but P_k(a, b) + P_k(b, a) = 1."""

    name: str
    preferences: np.ndarray  # (K, A, A) probability that the row's action beats the column's
    counts: np.ndarray  # (A,) mu in proportion

    @property
    def mu(self) -> np.ndarray:
        """(A,)"""
        return self.counts / self.counts.sum()

    @property
    def win_rates(self) -> np.ndarray:
        """(A, K) p_bar: how often an action beats one drawn from mu."""
        return (self.preferences @ self.mu).T

    def first(self, objectives: int) -> Structure:
        """The structure with its first `objectives` objectives."""
        return Structure(self.name, self.preferences[:objectives], self.counts)


def read_structure(name: str, node: Any) -> Structure:
    """A structure from its config; UserError that names the matrix and the entry where one is wrong."""
    where = f"structures.{name}"
    if not isinstance(node, dict) or set(node) != {"counts", "preferences"}:
        raise UserError(f"{where}: must have `counts` and `preferences`, and nothing else")
    matrices = node["preferences"]
    if not isinstance(matrices, list) or len(matrices) < 2:
        raise UserError(f"{where}.preferences: must list two matrices or more, the primary objective's first")
    preferences = [_matrix(f"{where}.preferences[{k}]", rows) for k, rows in enumerate(matrices)]
    sizes = {len(matrix) for matrix in preferences}
    if len(sizes) > 1:
        raise UserError(f"{where}.preferences: matrices of {sorted(sizes)} actions; all must have the same")
    return Structure(name, np.stack(preferences), _counts(f"{where}.counts", node["counts"], sizes.pop()))


def _matrix(where: str, rows: Any) -> np.ndarray:
    if not isinstance(rows, list) or not rows or not all(isinstance(row, list) for row in rows):
        raise UserError(f"{where}: must be a list of rows of numbers")
    widths = [len(row) for row in rows]
    if any(width != len(rows) for width in widths):
        raise UserError(f"{where}: not square: {len(rows)} rows, of {', '.join(map(str, sorted(set(widths))))} numbers")
    try:
        matrix = np.array(rows, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: must hold numbers ({error})") from error
    for i, j in np.argwhere(~((matrix >= 0) & (matrix <= 1))):
        raise UserError(f"{where}[{i}][{j}] = {matrix[i, j]:g}: must be in [0, 1]")
    for i, j in np.argwhere(np.abs(matrix + matrix.T - 1) > TOLERANCE):
        raise UserError(
            f"{where}: [{i}][{j}] + [{j}][{i}] = {matrix[i, j]:g} + {matrix[j, i]:g}: must be 1"
            + (", so 1/2 on the diagonal" if i == j else "")
        )
    return matrix


def _counts(where: str, counts: Any, actions: int) -> np.ndarray:
    if not isinstance(counts, list) or len(counts) != actions or not all(type(c) in (int, float) for c in counts):
        raise UserError(f"{where}={counts}: must be {actions} numbers, one an action")
    if not all(np.isfinite(c) and c > 0 for c in counts):
        raise UserError(f"{where}={counts}: must be above 0; an action that mu never takes has no place here")
    return np.array(counts, dtype=np.float64)
