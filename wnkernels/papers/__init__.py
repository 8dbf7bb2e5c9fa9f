"""The claims of five papers on weight normalization, checked: `python -m wnkernels papers`.

One module for each paper; `claims` says what it consists of, `command` is the command line.
"""

from .claims import Claim, Options, read_data

__all__ = ["Claim", "Options", "PAPERS", "read_data"]

PAPERS = ("morwani", "yun", "kumar", "wan", "chou")  # in the order of their numbers, P0 to P4
