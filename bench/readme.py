"""Writes the measured tables of README.md and docs/roofline.md from the CSV files of one device.

    python -m bench.readme [--device-folder bench/results/amd-epyc-2-cores]

What stands between `<!-- name -->` and `<!-- /name -->` is replaced; the rest of a page is left alone.
"""

import argparse
import csv
import re
from pathlib import Path

from . import kernels as single
from . import models as whole
from . import optimizers as steps

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "bench" / "results" / "amd-epyc-2-cores"


def rows(folder, name, **point):
    """The rows of a CSV file that have these values, as strings."""
    with open(folder / f"{name}.csv", newline="") as file:
        return [row for row in csv.DictReader(file) if all(row[key] == str(value) for key, value in point.items())]


def only(folder, name, **point):
    """The one row at a point. Raises: LookupError where there is none, or more than one."""
    found = rows(folder, name, **point)
    if len(found) != 1:
        raise LookupError(f"{name}.csv has {len(found)} rows of {point}, and must have one")
    return found[0]


def value(folder, name, column, **point):
    return float(only(folder, name, **point)[column])


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
        point = {"provider": provider, "width": 4096, "input_gradient": True, "mode": "full"}
        return [name, *(f"{value(folder, 'layers', 'ratio_plain', batch=b, **point):.2f}" for b in batches)]

    shown = table(["4096→4096, batch", *map(str, batches)],
                  [line("torch's parametrization", "torch SWN"), line("wnkernels.nn.Linear", "wnkernels SWN")])
    point = {"width": 4096, "batch": 16, "input_gradient": True, "mode": "full"}
    operator, formula = (value(folder, "layers", "ratio_plain", provider=provider, **point)
                         for provider in ("torch SWN, compiled", "g v/|v|, compiled"))
    ours = [row for row in rows(folder, "layers", input_gradient=True, mode="full")
            if row["provider"].startswith("wnkernels")]
    small = sorted(float(row["ratio_torch"]) for row in ours if int(row["width"]) <= 1024)
    return (f"{shown}\n\nAt batch 16 `torch.compile` of the parametrization takes {operator:.2f} times the plain layer's "
            f"time, of\n`g * v / v.norm()` {formula:.2f} times. At widths of 64 to 1024, batches of 1 to 512, SWN and EWN, "
            f"ours takes\n{small[0]:.2f} to {small[-1]:.2f} times the time of torch's parametrization.")


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

    def line(name, case, provider, columns=("ratio_fused",)):
        point = {"case": case, "provider": provider}
        return [name, *(" / ".join(f"{value(folder, 'optimizers', c, optimizer=k, **point):.2f}" for c in columns)
                        for k in kinds)]

    both = "ratio_fused", "ratio_same"

    large, full, small = "step, 4096x4096", "full step, 4096x4096, batch 16", "step, 200 of 16x16"
    return table(["", *kinds], [
        line("step alone", large, "wnkernels", both),
        line("step with telemetry", large, "wnkernels, telemetry", both),
        *(line(f"step with telemetry, {shape.replace('x', '×')}", f"step, {shape}", "wnkernels, telemetry", both)
          for shape in ("1024x256", "65536x9")),
        line("full training step, batch 16", full, "wnkernels"),
        line("full training step of torch's parametrization", full, "torch parametrized"),
        *(line(case.replace("x", "×"), case, "wnkernels", both) for case in steps.SHAPES | steps.COLD),
        line("step on 200 weights of 16×16", small, "wnkernels", both),
        line("torch's `foreach` on them", small, "torch foreach", both),
    ])


def in_backward(folder):
    def shown(points, *lines):
        def cells(provider, optimizer):
            point = {"provider": provider, "autocast": "", "optimizer": optimizer}
            return (f"{value(folder, 'in_backward', 'ratio_plain', width=w, batch=b, **point):.2f}" for w, b in points)

        return table(["", *(f"{w}, batch {b}" for w, b in points)], [[name, *cells(*of)] for name, *of in lines])

    sgd = shown(
        [(4096, 16), (4096, 128), (4096, 512), (1024, 16), (1024, 128)],
        ("`in_backward`, SWN", "SWN, in backward", "SGD"),
        ("the same on a plain layer", "plain, in backward", "SGD"),
        ("torch's parametrization", "torch SWN", "SGD"),
    )
    buffers = shown([(4096, 16), (4096, 128), (1024, 16), (1024, 128)], *(
        (f"{name}, {optimizer}", provider, optimizer) for optimizer in ("SGD, momentum", "AdamW")
        for name, provider in (("`in_backward`, SWN", "SWN, in backward"), ("plain layer", "plain, in backward"),
                               ("torch's parametrization", "torch SWN"))
    ))
    memory = value(folder, "in_backward", "memory_ratio", width=8192, batch=16, provider="SWN, in backward")
    copy, low = (value(folder, "in_backward", "ratio_plain", width=4096, batch=16, autocast="bf16", provider=p)
                 for p in ("PolarSGD, copy", "PolarSGD, copy, low gradients"))
    return (f"{sgd}\n\nWith buffers, over the plain layer with torch's fused step of the same optimizer:\n\n{buffers}\n\n"
            f"At 8192, batch 16, it needs {memory:.2f} times the memory. Under autocast (bf16, 4096, batch 16) "
            f"PolarSGD with\n`autocast_copy` takes {copy:.2f} times the plain step, with 16-bit gradients {low:.2f} times.")


def threads(folder):
    """The numbers of threads that kernels were measured with, ascending."""
    return sorted({int(row["threads"]) for row in rows(folder, "kernels_reuse")})


OF = {"copy": "a copy", "add": "an add"}


def kernels(folder):
    counts = threads(folder)
    ours = [r for r in rows(folder, "kernels_reuse", provider="wnkernels", threads=counts[-1])
            if r["kernel"] in (*single.GOALS, "backward")]
    cached = [r for r in ours if (int(r["rows"]), int(r["length"])) in single.CACHED]
    ours = [r for r in ours if r["kernel"] in single.GOALS and r not in cached]

    def line(row):
        of, bound, met = single.goal(row)
        middle, low, high = (float(row[f"ratio_{of}{end}"]) for end in ("", "_low", "_high"))
        point = {key: row[key] for key in ("rows", "length", "dtype", "kernel", "provider")}
        alone = value(folder, "kernels_reuse", "ms", threads=counts[0], **point)
        return [f"{row['rows']}×{row['length']}", row["dtype"], f"`{row['kernel']}`",
                f"{float(row['percent_of_copy']):.0f}", f"{middle:.2f} [{low:.2f}, {high:.2f}] of {OF[of]}",
                f"{bound:.2f}{'' if met else ', **missed**'}", f"{float(row['ratio_torch']):.2f}",
                f"{alone / float(row['ms']):.2f}"]

    def spread(kernel):
        of, _ = single.GOALS[kernel]
        found = sorted(float(r[f"ratio_{of}"]) for r in ours if r["kernel"] == kernel and not single.goal(r))
        return f"`{kernel}` {found[0]:.2f} to {found[-1]:.2f} of {OF[of]}"

    def of_torch(kernel, dtype):
        found = sorted(float(r["ratio_torch"]) for r in cached if r["kernel"] == kernel and r["dtype"] == dtype)
        return f"{found[0]:.2f} to {found[-1]:.2f}"

    def shapes(of):
        return ", ".join(dict.fromkeys(f"{r['rows']}×{r['length']}" for r in of))

    header = ["shape", "", "kernel", "% of a copy's speed", "time", "goal", "to torch",
              f"speed of {counts[-1]} threads to {counts[0]}"]
    return (table(header, [line(r) for r in ours if single.goal(r)])
            + f"\n\nOver the other shapes ({shapes(r for r in ours if not single.goal(r))}), without goals:\n"
            + ",\n".join(spread(kernel) for kernel in single.GOALS) + ".\n\n"
            + f"Weights that stay in a cache ({shapes(cached)}), time over torch's in fp32 / bf16:\n"
            + ",\n".join(f"`{kernel}` {of_torch(kernel, 'float32')} / {of_torch(kernel, 'bfloat16')}"
                         for kernel in (*single.GOALS, "backward")) + ".")


def models(folder):
    names = {"torch SWN": "torch's parametrization", "torch SWN, compiled": "`torch.compile` of it",
             "plain, compiled": "`torch.compile` of the plain model", "wnkernels SWN": "`wnkernels.convert`",
             "polar": "plain model, polar optimizer",
             "polar, in backward": "the same, step inside the backward"}

    def cells(model, provider):
        point = {"model": model, "provider": provider, "mode": "full"}
        times = [value(folder, "models", "ratio_plain", optimizer=o, **point) for o in whole.OPTIMIZERS]
        peak, plain = (value(folder, "models", "peak_bytes", **point | {"provider": p}, optimizer="SGD")
                       for p in (provider, "plain"))
        return [" / ".join(f"{x:.2f}" for x in times), f"{peak / plain:.2f}"]

    header = ["SGD / AdamW", *(cell for model in whole.MODELS for cell in (model, "memory"))]
    return table(header, [[name, *(cell for model in whole.MODELS for cell in cells(model, provider))]
                          for provider, name in names.items()])


def roofline(folder):
    """Beside the floor in bytes that in weights fetched, of which a copy has two: those read, and those written
    without having been read (docs/roofline.md)."""

    def line(name, fetched, *measured):
        """`measured`: (bytes of an element, bytes moved for each element of the weight, % of a copy's speed)."""
        over = [100 * moved / size / percent / fetched for size, moved, percent in measured if fetched]
        columns = (("{:.3g}", [m[1] for m in measured]), ("{}", [fetched] if fetched else []),
                   ("{:.0f}", [m[2] for m in measured]), ("{:.2f}", over))
        return [name, *(" / ".join(map(form.format, values)) for form, values in columns)]

    def kernel(name, fetched):
        point = {"rows": 4096, "length": 4096, "kernel": name, "provider": "wnkernels"}
        measured = []
        for dtype, size in (("float32", 4), ("bfloat16", 2)):
            row = only(folder, "kernels_reuse", dtype=dtype, threads=threads(folder)[-1], **point)
            measured.append((size, float(row["floor_bytes"]) / 4096**2, float(row["percent_of_copy"])))
        return line(f"`{name}`", fetched, *measured)

    def step(name, fetched):
        point = {"case": "step, 4096x4096", "optimizer": name, "provider": "wnkernels"}
        percent = value(folder, "optimizers", "percent_of_copy", **point)
        return line(f"polar step, {name}", fetched, (4, 4 * steps.OPTIMIZERS[name][3], percent))

    def layer(mode, fetched):
        point = {"width": 4096, "batch": 16, "input_gradient": True, "mode": mode}
        row = only(folder, "layers", provider="wnkernels SWN", **point)
        return line(f"`Linear` without w, {mode}", fetched,
                    (4, float(row["floor_bytes"]) / 4096**2, float(row["percent_of_copy"])))

    def inside(name, provider, fetched=0, autocast="", optimizer="SGD"):
        row = only(folder, "in_backward", width=4096, batch=16, autocast=autocast, optimizer=optimizer, provider=provider)
        return line(f"training step, {name}", fetched,
                    (4, float(row["bytes_per_element"]), float(row["percent_of_copy"])))

    header = ["kernel", "bytes per element", "weights fetched", "% of a copy's speed", "time over the floor"]
    return table(header, [
        kernel("row norm", 1), kernel("forward", 2), kernel("backward", 3),
        kernel("project_", 2), kernel("normalize_", 1),
        step("SGD", 2), step("SGD, momentum", 3), step("AdamW", 4),
        layer("forward", 1), layer("backward", 2),
        inside("plain `Linear`, fused SGD", "plain", 5),
        inside("SWN inside the backward", "SWN, in backward", 2),
        inside("plain `Linear`, fused SGD, momentum", "plain", 6, optimizer="SGD, momentum"),
        inside("SWN inside the backward, momentum", "SWN, in backward", 3, optimizer="SGD, momentum"),
        inside("plain `Linear`, fused AdamW", "plain", 7, optimizer="AdamW"),
        inside("SWN inside the backward, AdamW", "SWN, in backward", 4, optimizer="AdamW"),
        inside("autocast, plain", "plain", autocast="bf16"),
        inside("autocast, PolarSGD with 16-bit copy", "PolarSGD, copy", autocast="bf16"),
        inside("autocast, the same with 16-bit gradients", "PolarSGD, copy, low gradients", autocast="bf16"),
    ])


PAGES = {
    "README.md": (digits, layers, kernels, overhead, optimizers, in_backward, models),
    "docs/roofline.md": (roofline,),
}


def render(page, folder=FOLDER, text=None):
    """The text of a page, by default as it is, with every section as measured. Raises: LookupError for a section
    that is not in it."""
    text = (ROOT / page).read_text() if text is None else text
    for section in PAGES[page]:
        name = section.__name__
        text, count = re.subn(rf"(<!-- {name} -->\n).*?(\n<!-- /{name} -->)",
                              lambda m, section=section: m[1] + section(folder) + m[2], text, flags=re.S)
        if count != 1:
            raise LookupError(f"{page} must have <!-- {name} --> and <!-- /{name} --> once, "
                              f"has them {count} times")
    return text


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device-folder", type=Path, default=FOLDER)
    folder = parser.parse_args(arguments).device_folder
    for page, text in {page: render(page, folder) for page in PAGES}.items():
        (ROOT / page).write_text(text)


if __name__ == "__main__":
    main()
