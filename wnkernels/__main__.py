import sys

from ._info import report

if sys.argv[1:] != ["info"]:
    sys.exit(print("usage: python -m wnkernels info", file=sys.stderr) or 2)
print(report())
