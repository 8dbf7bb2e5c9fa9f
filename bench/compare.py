"""What became slower between two tables of one benchmark.

    python -m bench.compare OLD.csv NEW.csv

Times of different runs do not compare, since a machine is never twice the same; ratios to what was measured beside them
do. A point is worse where a ratio's whole 95% interval lies above the old one's. The exit code is 1 if one is, else 0; rows
that only one table has are counted.
"""

import argparse
import csv
import sys

from . import harness

# Columns that say which point a row is are those that no measurement writes.
MEASURED = ("rounds", "ms", "us", "ratio_", "percent_", "gb", "peak_", "memory_", "above_", "final_", "test_",
            "difference_")


def read(path):
    """point -> row, and the ratios. Raises: ValueError for a table without ratios, or with a point twice."""
    with open(path, newline="") as file:
        reader = csv.DictReader(file)
        names = reader.fieldnames or []
        facts = set(harness.environment("cpu")) - {"threads"}
        point = [n for n in names if n not in facts and not n.startswith(MEASURED)]
        ratios = [n for n in names if n.startswith("ratio_") and n + "_low" in names]
        if not ratios:
            raise ValueError(f"{path} has no column of a ratio with its interval, only {', '.join(names) or 'nothing'}")
        rows = {}
        for row in reader:
            key = tuple((n, row[n]) for n in point if row[n])
            if key in rows:
                raise ValueError(f"{path} has two rows of {dict(key)}")
            rows[key] = row
    return rows, ratios


def worse(old, new, ratios):
    """(point, ratio's name, old row, new row) for each ratio whose interval lies above the old one's."""
    for point in old.keys() & new.keys():
        for name in ratios:
            before, after = old[point].get(name + "_high"), new[point].get(name + "_low")
            if before and after and float(after) > float(before):
                yield point, name, old[point], new[point]


def interval(row, name):
    numbers = {column: float(row[column]) for column in (name, name + "_low", name + "_high")}
    return harness.interval(numbers, name.removeprefix("ratio_"))


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old")
    parser.add_argument("new")
    options = parser.parse_args(arguments)
    try:
        (old, ratios), (new, _) = read(options.old), read(options.new)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    found = sorted(worse(old, new, ratios), key=lambda x: -float(x[3][x[1]]) / float(x[2][x[1]]))
    if found:
        header = ["point", "ratio to", "old", "new"]
        print(harness.table(header, [[", ".join(value for _, value in point), name.removeprefix("ratio_"),
                                      *(interval(row, name) for row in rows)] for point, name, *rows in found]))
    both = len(old.keys() & new.keys())
    print(f"{len(found)} ratios are worse; {both} points in both tables, {len(old) - both} only in the old, "
          f"{len(new) - both} only in the new")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
