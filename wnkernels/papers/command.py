"""`python -m wnkernels papers`: runs the papers' experiments, and holds their claims to the bounds.

The exit code is the verdict: 0 if no claim fails, 1 if one does, 2 for arguments that make no sense.
"""

import argparse
import dataclasses
import importlib
import re
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from . import PAPERS
from .claims import BACKENDS, Claim, Options, text_of, verdict, write_csv

__all__ = ["main"]

COLUMNS = (
    ("claim", 11),
    ("what", 44),
    ("predicted", 22),
    ("measured", 30),
    ("bound", 24),
    ("holds", 6),
    ("s", 6),
)
TORCH_COLUMN = ("torch s", 7)


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser("python -m wnkernels papers", description=__doc__)
    result.add_argument(
        "names", nargs="*", metavar="paper", help=f"which of {', '.join(PAPERS)}; default all"
    )
    size = result.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="the default: minutes on two cores")
    size.add_argument("--full", action="store_true", help="the large versions, for a GPU")
    size.add_argument(
        "--small", action="store_true", help="the form for continuous integration: a fast part of quick"
    )
    result.add_argument("--device", default="cpu", help="of the large experiments, such as cuda")
    result.add_argument(
        "--out", type=Path, help="folder for claims.csv and the figures; nothing is written without"
    )
    result.add_argument(
        "--backend",
        choices=BACKENDS,
        default="wnkernels",
        help="torch: the same in pure torch; both: our kernels, and the time that torch takes",
    )
    result.add_argument("--claims", default="", metavar="P0-1,P2-3", help="only these; default all")
    result.add_argument("--list", action="store_true", help="print the papers, and stop")
    return result


def modules(names: Sequence[str]) -> dict:
    """name -> module. Raises: ValueError for a name that is none of a paper."""
    for name in names:
        if name not in PAPERS:
            raise ValueError(f"paper must be one of {', '.join(map(repr, PAPERS))}, got {name!r}")
    return {
        name: importlib.import_module(f"{__package__}.{name}")
        for name in PAPERS
        if not names or name in names
    }


def line(cells: Sequence[str], columns) -> str:
    """One row of the table, its cells wrapped to the widths of the columns."""
    wrapped = [textwrap.wrap(cell, width) or [""] for cell, (_, width) in zip(cells, columns)]
    height = max(map(len, wrapped))
    lines = zip(*(cell + [""] * (height - len(cell)) for cell in wrapped))
    return "\n".join(
        "  ".join(f"{x:{width}}" for x, (_, width) in zip(row, columns)).rstrip() for row in lines
    )


def cells(claim: Claim) -> list[str]:
    seconds = (f"{s:.1f}" if s == s else "" for s in (claim.seconds, claim.torch_seconds))
    return [
        claim.id,
        claim.text,
        text_of(claim.predicted),
        text_of(claim.measured),
        claim.bound,
        verdict(claim.holds),
        *seconds,
    ]


def check(name: str, module, options: Options, columns) -> list[Claim]:
    """Runs a paper, and prints each claim when it is there."""
    print(f"\n{name}: {module.TITLE}\n\n{line([title for title, _ in columns], columns)}")
    print(line(["-" * width for _, width in columns], columns), flush=True)
    found = []
    for claim in module.claims(options):
        found.append(claim)
        print(line(cells(claim), columns), flush=True)
    if options.out is not None and options.results:
        options.out.mkdir(parents=True, exist_ok=True)
        module.figures(options.results, options.out)
    return found


def save(folder: Path, claims: dict[str, list[Claim]], options: Options) -> None:
    """claims.csv, of which the rows of claims that have not run now stay."""
    import csv

    path = folder / "claims.csv"
    facts = {
        "mode": "full" if options.full else "small" if options.small else "quick",
        "backend": options.backend,
        "device": torch.cuda.get_device_name() if options.device.startswith("cuda") else "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    rows = {name: [] for name in PAPERS}
    if path.exists():
        with open(path, newline="") as file:
            for row in csv.DictReader(file):
                rows[row["paper"]].append(row)
    for name, found in claims.items():
        old = [row for row in rows[name] if row["id"] not in {claim.id for claim in found}]
        new = [
            {"paper": name} | dataclasses.asdict(claim) | {"holds": verdict(claim.holds)} | facts
            for claim in found
        ]
        rows[name] = sorted(old + new, key=lambda row: int(re.search(r"-(\d+)", row["id"])[1]))
    for row in (row for some in rows.values() for row in some):
        for key in ("seconds", "torch_seconds"):
            row[key] = "" if row[key] in ("", "nan") or row[key] != row[key] else f"{float(row[key]):.3f}"
    write_csv(path, [row for some in rows.values() for row in some])


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    given = parser().parse_args(arguments)
    try:
        chosen = modules(given.names)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if error.name not in ("scipy", "sklearn", "matplotlib", "tqdm"):
            raise
        print(f"{error.name} is missing: pip install 'wnkernels[papers]'", file=sys.stderr)
        return 2
    if given.list:
        for name, module in chosen.items():
            print(f"{name:8}  P{PAPERS.index(name)}-*  {module.TITLE}")
        return 0
    if given.device.startswith("cuda") and not torch.cuda.is_available():
        print(f"--device {given.device}: torch finds no CUDA device", file=sys.stderr)
        return 2
    only = frozenset(x.strip() for x in given.claims.split(",") if x.strip())
    options = Options(
        full=given.full,
        small=given.small,
        device=given.device,
        out=given.out,
        backend=given.backend,
        progress=sys.stderr.isatty(),
        only=only,
    )
    columns = (*COLUMNS, TORCH_COLUMN) if given.backend != "wnkernels" else COLUMNS
    started, found = time.perf_counter(), {}
    for name, module in chosen.items():
        if not only or any(x.startswith(f"P{PAPERS.index(name)}-") for x in only):
            found[name] = check(name, module, dataclasses.replace(options, results={}), columns)
    claims = [claim for some in found.values() for claim in some]
    if not claims:
        print(f"there is no claim {given.claims!r}", file=sys.stderr)
        return 2
    if options.out is not None:
        save(options.out, found, options)
    failed = [claim.id for claim in claims if claim.holds is False]
    reports, seconds = sum(claim.holds is None for claim in claims), time.perf_counter() - started
    good = len(claims) - len(failed) - reports
    print(f"\n{good} hold, {len(failed)} do not, {reports} report without a bound; {seconds:.0f} s")
    if failed:
        print("do not hold: " + ", ".join(failed))
    return 1 if failed else 0
