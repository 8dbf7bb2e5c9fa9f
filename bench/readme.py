"""Writes the measured tables of README.md from the CSV files of one device.

    python -m bench.readme [--device-folder bench/results/amd-epyc-2-cores]

What stands between `<!-- name -->` and `<!-- /name -->` is replaced; the rest of the page is left alone.
"""

import argparse
import csv
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "bench" / "results" / "amd-epyc-2-cores"


def rows(folder, name, **point):
    """The rows of a CSV file that have these values, as strings."""
    with open(folder / f"{name}.csv", newline="") as file:
        return [row for row in csv.DictReader(file) if all(row[key] == str(value) for key, value in point.items())]


def value(folder, name, column, **point):
    """The number of the one row at a point. Raises: LookupError where there is none, or more than one."""
    found = rows(folder, name, **point)
    if len(found) != 1:
        raise LookupError(f"{name}.csv has {len(found)} rows of {point}, and must have one")
    return float(found[0][column])


def table(header, lines):
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, ["---"] * len(header), *lines])


def digits(folder):
    def line(row):
        both = [f"{float(row[c]):.1e}".replace("e-0", "e-") for c in ("difference_fp32", "difference_fp64") if row[c]]
        return [row["provider"], f"{float(row['final_loss']):.4f}", f"{float(row['test_accuracy']):.2%}",
                " / ".join(both), f"{float(row['ms']):.1f}", f"{float(row['ratio_plain']):.2f}", f"{float(row['peak_bytes']) / 1e6:.0f}"]

    header = ["", "final loss", "test accuracy", "largest difference of the loss curve, fp32 / fp64", "ms per step",
              "to plain", "peak MB"]
    return table(header, map(line, rows(folder, "digits", model="64-2048-2048-10")))


def layers(folder):
    batches = (1, 16, 128, 512)

    def line(name, provider):
        point = {"provider": provider, "width": 4096, "input_gradient": True}
        return [name, *(f"{value(folder, 'layers', 'ratio_plain', batch=b, **point):.2f}" for b in batches)]

    shown = table(["4096→4096, batch", *map(str, batches)],
                  [line("torch's parametrization", "torch SWN"), line("wnkernels.nn.Linear", "wnkernels SWN")])
    ours = [row for row in rows(folder, "layers", input_gradient=True) if row["provider"].startswith("wnkernels")]
    small = sorted(float(row["ratio_torch"]) for row in ours if int(row["width"]) <= 1024)
    return (f"{shown}\n\nAt widths of 64 to 1024, batches of 1 to 512, SWN and EWN, it takes {small[0]:.2f} to "
            f"{small[-1]:.2f} times the\ntime of torch's parametrization.")


def overhead(folder):
    def of(call):
        return value(folder, "overhead", "ratio_base", call=call, provider="wnkernels")

    layer = value(folder, "overhead", "above_us", call="Linear, forward recorded for backward",
                  provider="wnkernels.nn.Linear")

    return (f"forward {of('weight_norm, forward'):.2f}, forward recorded for backward "
            f"{of('weight_norm, forward recorded for backward'):.2f}, forward and\n"
            f"backward {of('weight_norm, forward + backward'):.2f} times; the layer's forward "
            f"{layer:.1f} µs over `nn.Linear` (`overhead.csv`).")


def optimizers(folder):
    kinds = ("SGD", "SGD, momentum", "AdamW")

    def line(name, case, provider):
        return [name, *(f"{value(folder, 'optimizers', 'ratio_fused', case=case, provider=provider, optimizer=k):.2f}"
                        for k in kinds)]

    large, full, small = "step, 4096x4096", "full step, 4096x4096, batch 16", "step, 200 of 16x16"
    return table(["", *kinds], [
        line("step alone", large, "wnkernels"),
        line("step with telemetry", large, "wnkernels, telemetry"),
        line("full training step, batch 16", full, "wnkernels"),
        line("full training step of torch's parametrization", full, "torch parametrized"),
        line("step on 200 weights of 16×16", small, "wnkernels"),
        line("the same, torch's `foreach`", small, "torch foreach"),
    ])


def in_backward(folder):
    points = [(4096, 16), (4096, 128), (4096, 512), (1024, 16), (1024, 128)]

    def line(name, provider):
        point = {"provider": provider, "autocast": ""}
        return [name, *(f"{value(folder, 'in_backward', 'ratio_plain', width=w, batch=b, **point):.2f}" for w, b in points)]

    return table(["", *(f"{w}, batch {b}" for w, b in points)], [
        line("`in_backward`, SWN", "SWN, in backward"),
        line("the same on a plain layer", "plain, in backward"),
        line("torch's parametrization", "torch SWN"),
    ])


SECTIONS = {f.__name__: f for f in (digits, layers, overhead, optimizers, in_backward)}


def render(text, folder=FOLDER):
    """`text` with every section as measured. Raises: LookupError for a section that is not in it."""
    for name, section in SECTIONS.items():
        text, count = re.subn(rf"(<!-- {name} -->\n).*?(\n<!-- /{name} -->)",
                              lambda m, section=section: m[1] + section(folder) + m[2], text, flags=re.S)
        if count != 1:
            raise LookupError(f"README.md must have <!-- {name} --> and <!-- /{name} --> once, has them {count} times")
    return text


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device-folder", type=Path, default=FOLDER)
    folder, page = parser.parse_args(arguments).device_folder, ROOT / "README.md"
    page.write_text(render(page.read_text(), folder))


if __name__ == "__main__":
    main()
