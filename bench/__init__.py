"""Benchmarks: `python -m bench.digits` for the quick picture; `layers`, `kernels` and `overhead` for more."""
