"""Benchmarks: `python -m bench.digits` for the quick picture; `kernels`, `layers`, `optimizers`, `models`, `in_backward`
and `overhead` for more; `compare` for two of their tables; `readme` writes them into the pages."""
