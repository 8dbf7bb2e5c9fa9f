"""What a paper's module is made of: claims, the options of a run, and what the command line does with them.

A paper's module has

    TITLE: str
    def claims(options) -> Iterator[Claim]       # runs the experiments, yields the rows of the table
    def figures(results, folder) -> None         # draws what the experiments have left in options.results

Claims are numbered as P<paper>-<n>. The bound of a claim is fixed before its experiment runs.
"""

import csv
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["Claim", "Clock", "Measured", "Options", "read_data", "write_csv"]

BACKENDS = ("wnkernels", "torch", "both")


@dataclass(frozen=True)
class Claim:
    """One row of the table.

    id: "P0-3"; a claim of several rows has them as "P0-3 SWN" and so on.
    text: the claim in words.
    predicted, measured: numbers or text.
    bound: what the measurement must meet, in words.
    holds: the verdict; None for a row that reports without a bound.
    seconds: of the experiment, shared by all claims that come from it; torch_seconds: of the same in pure
    torch.
    """

    id: str
    text: str
    predicted: str | float
    measured: str | float
    bound: str
    holds: bool | None
    seconds: float = math.nan
    torch_seconds: float = math.nan

    def __post_init__(self) -> None:
        if self.holds is not None:  # numpy's bool is not `False`
            object.__setattr__(self, "holds", bool(self.holds))


class Clock:
    """`with options.clock() as clock: ...`, then clock.seconds."""

    seconds = math.nan


class Measured(NamedTuple):
    """The value of an experiment and its time, on our kernels and in pure torch; NaN where it did not run."""

    value: Any
    seconds: float
    torch_seconds: float


@dataclass
class Options:
    """How the experiments are to run.

    full: the large versions; small: the form for continuous integration, seconds per paper. Neither: the
    quick form.
    device: of the tensors, where an experiment is large enough to leave the CPU.
    out: the folder for CSV and figures, or None.
    backend: "wnkernels", "torch" (the same in pure torch), or "both", of which the values are those of
    wnkernels.
    progress: show progress bars.
    only: ids of the claims to check ("P0-3"); empty for all.
    results: filled by the experiments, name -> plain data, for the figures.
    """

    full: bool = False
    small: bool = False
    device: str = "cpu"
    out: Path | None = None
    backend: str = "wnkernels"
    progress: bool = False
    only: frozenset[str] = frozenset()
    results: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))}, got {self.backend!r}")
        if self.full and self.small:
            raise ValueError("full and small must not both be set")

    def wants(self, *ids: str) -> bool:
        """Is any of these claims asked for?"""
        return not self.only or not self.only.isdisjoint(ids)

    def bar(self, items: Iterable | None, text: str, total: int | None = None):
        """tqdm over `items` (None: a bar to update by hand), silent without `progress`."""
        from tqdm import tqdm

        return tqdm(items, desc=text, total=total, disable=not self.progress, leave=False, dynamic_ncols=True)

    @contextmanager
    def clock(self) -> Iterator[Clock]:
        clock, started = Clock(), time.perf_counter()
        yield clock
        clock.seconds = time.perf_counter() - started

    def measure(self, experiment: Callable, *args, **kwargs) -> Measured:
        """experiment(*args, backend=..., **kwargs) on the backend, or on both, with their times."""
        if self.backend == "torch":
            with self.clock() as clock:
                value = experiment(*args, backend="torch", **kwargs)
            return Measured(value, math.nan, clock.seconds)
        with self.clock() as ours:
            value = experiment(*args, backend="wnkernels", **kwargs)
        theirs = Clock()
        if self.backend == "both":
            with self.clock() as theirs:
                experiment(*args, backend="torch", **kwargs)
        return Measured(value, ours.seconds, theirs.seconds)


def read_data(name: str) -> dict:
    """A published recipe of wnkernels/papers/data: "conv_rate_1layer", "linsep" or "xor".

    Raises: ValueError for another name.
    """
    import json
    from importlib.resources import files

    folder = files(__package__) / "data"
    names = sorted(f.name.removesuffix(".json") for f in folder.iterdir() if f.name.endswith(".json"))
    if name not in names:
        raise ValueError(f"name must be one of {', '.join(map(repr, names))}, got {name!r}")
    return json.loads((folder / f"{name}.json").read_text())


def text_of(value: str | float) -> str:
    """A cell of the table."""
    return value if isinstance(value, str) else f"{value:.4g}"


def verdict(holds: bool | None) -> str:
    return "report" if holds is None else "yes" if holds else "NO"


def write_csv(path: Path, rows: Iterable[dict]) -> None:
    """Plain rows; the keys of the first are the columns."""
    rows = list(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(
            file, list(rows[0]) if rows else [f.name for f in fields(Claim)], lineterminator="\n"
        )
        writer.writeheader()
        writer.writerows(rows)
