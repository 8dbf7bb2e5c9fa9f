"""The claims of five papers on weight normalization, checked: `python -m wnkernels papers`."""
