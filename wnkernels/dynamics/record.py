"""Diagnostics along a descent, as a tidy table: one line for each time, weight, row and quantity.

    table = Recorder(every=10)
    normalized_descent(..., callback=table)
    table.plot("norms.png", "norm", "cosine")

A `Recorder` is a callback of `normalized_descent`; in a loop of one's own, call `record`.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

__all__ = ["QUANTITIES", "Recorder"]


def _rows(x: Tensor) -> Tensor:
    return x.reshape(len(x), -1)


def _norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(_rows(x), dim=1)


# Of the rows u of a weight w with gradient G over L, both (R, ...): (w, G) -> (R,).
QUANTITIES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "norm": lambda w, g: _norm(w),
    "gradient_norm": lambda w, g: _norm(g),
    "cosine": lambda w, g: (_rows(w) * _rows(g)).sum(1) / (_norm(w) * _norm(g)).clamp(min=1e-300),
    "product": lambda w, g: _norm(w) * _norm(g),  # equal over rows in the limit of EWN
    "ratio": lambda w, g: (
        _norm(g) / _norm(w).clamp(min=1e-300)
    ),  # and in that of SWN, arXiv:2010.12909, theorem 2
}


class Recorder:
    """Collects quantities of the rows of weights.

    Args:
        every: record each this many accepted steps, and the first.
        quantities: name -> function (w, G) -> (R,); default `QUANTITIES`. The norms |v| are taken along where
            the point has them, as "direction_norm".
        names: of the weights, default "0", "1", ...

    Attributes: columns, the table: step, log_loss, weight, row, quantity, value, as lists of equal length.
    """

    def __init__(
        self, every: int = 1, quantities: dict[str, Callable] | None = None, names: Sequence[str] = ()
    ) -> None:
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}")
        self.every, self.quantities, self.names = every, quantities or QUANTITIES, list(names)
        self.columns = {key: [] for key in ("step", "log_loss", "weight", "row", "quantity", "value")}
        self._calls = 0

    def __call__(self, step: int, log_loss: Tensor, point, grads: Sequence[Tensor]) -> None:
        if self._calls % self.every == 0:
            self.record(step, log_loss, point.weights, grads, point.norm)
        self._calls += 1

    def record(
        self, step: int, log_loss, weights: Sequence[Tensor], grads: Sequence[Tensor], norms=()
    ) -> None:
        """Adds the lines of one time; weights and gradients over L as lists, norms: the |v| of each."""
        for i, (w, g) in enumerate(zip(weights, grads)):
            values = {name: quantity(w, g) for name, quantity in self.quantities.items()}
            if i < len(norms) and norms[i] is not None:
                values["direction_norm"] = norms[i]
            name = self.names[i] if i < len(self.names) else str(i)
            for quantity, column in values.items():
                for row, value in enumerate(column.tolist()):
                    line = (step, float(torch.as_tensor(log_loss).max()), name, row, quantity, value)
                    for key, x in zip(self.columns, line):
                        self.columns[key].append(x)

    def table(self) -> list[dict]:
        """The lines as dicts, for csv.DictWriter or a DataFrame."""
        return [dict(zip(self.columns, line)) for line in zip(*self.columns.values())]

    def series(self, quantity: str, weight: str | None = None) -> tuple[np.ndarray, np.ndarray]:
        """(steps (T,), values (T, R)) of a quantity of a weight, the first by default.

        Raises: ValueError for a quantity or weight that was not recorded.
        """
        weight = self.columns["weight"][0] if weight is None and self.columns["weight"] else weight
        lines = [
            (step, row, value)
            for step, w, row, q, value in zip(
                *(self.columns[k] for k in ("step", "weight", "row", "quantity", "value"))
            )
            if (q, w) == (quantity, weight)
        ]
        if not lines:
            raise ValueError(
                f"quantity must have been recorded of weight {weight!r}, got {quantity!r}; there are "
                f"{sorted(set(self.columns['quantity']))} of {sorted(set(self.columns['weight']))}"
            )
        steps = sorted({step for step, _, _ in lines})
        rows = max(row for _, row, _ in lines) + 1
        values = np.array([value for _, _, value in lines]).reshape(len(steps), rows)
        return np.array(steps), values

    def plot(self, path: str | Path, *quantities: str) -> None:
        """One panel for each weight and quantity, a line for each row, over the steps; by default all."""
        from matplotlib.figure import Figure

        quantities = quantities or tuple(dict.fromkeys(self.columns["quantity"]))
        weights = list(dict.fromkeys(self.columns["weight"]))
        figure = Figure(figsize=(4 * len(quantities), 3 * len(weights)), layout="constrained")
        axes = figure.subplots(len(weights), len(quantities), squeeze=False)
        for weight, line in zip(weights, axes):
            for quantity, panel in zip(quantities, line):
                panel.plot(*self.series(quantity, weight), linewidth=1)
                panel.set(title=f"{quantity}, weight {weight}", xlabel="step")
        figure.savefig(path, dpi=110)
