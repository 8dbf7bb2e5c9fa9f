"""Training of one Linear layer with SGD(fused=True) over width and batch: the full step, and its parts at two
batches. Plain, torch's parametrization, torch.compile of it and of the formula, wnkernels, and with --forced wnkernels
with each of its two paths.

    python -m bench.layers [--quick] [--device cuda]
"""

import torch

from . import harness, providers, training

WIDTHS = (64, 256, 1024, 4096)
BATCHES = (1, 16, 128, 512)
PART_BATCHES = (16, 128)
MEMORY_POINT = (4096, 16)  # of small weights little is seen beside the allocator's noise
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Goals: against the plain layer by (width, batch), and against torch's parametrization at every point.
BOUND_PLAIN = {(4096, 16): 1.15, (4096, 128): 1.10}
BOUND_TORCH = 1.03


def parts(make, width, batch, dtype, device, hidden):
    """Layer, optimizer, input and gradient of the output."""
    torch.manual_seed(0)
    layer = make(width, width, dtype=dtype, device=device)
    optimizer = torch.optim.SGD(layer.parameters(), lr=training.LR, fused=True)
    x = torch.randn(batch, width, dtype=dtype, device=device, requires_grad=hidden)
    return layer, optimizer, x, torch.randn(batch, width, dtype=dtype, device=device)


def three_steps(name, *point):
    makers = providers.linear(point[3], forced=True)
    training.three_steps(*parts(makers[name], *point))


def floor_bytes(mode, width, batch, dtype, hidden):
    """What a plain layer cannot avoid. Of weights: the forward reads one; the backward writes a gradient, and reads
    the weight for that of the input; SGD reads both and writes the weight. Of activations: x, y; x, dy, dx."""
    weights = {"forward": 1, "backward": 1 + hidden, "step": 3}
    activations = {"forward": 2, "backward": 2 + hidden, "step": 0}
    if mode == "full":
        return sum(floor_bytes(part, width, batch, dtype, hidden) for part in weights)
    return dtype.itemsize * width * (weights[mode] * width + activations[mode] * batch)


def run(mode, point, options):
    """Rows of one mode and (width, batch, dtype, device, hidden): a row per provider."""
    width, batch, dtype, device, hidden = point
    # Compiled layers have the parameters, and so the step, of the others.
    makers = providers.linear(device, compile=options.compile and mode != "step", forced=options.forced)
    with providers.compiling(backward_again=mode == "backward"):
        calls = {name: training.timed(mode, *parts(make, *point)) for name, make in makers.items()}
        if dtype.itemsize * width * width > harness.cache_bytes(device):
            source, target = (torch.randn(width, width, device=device).to(dtype) for _ in range(2))
            calls["copy"] = lambda: target.copy_(source)
        seconds = options.seconds if mode == "full" else options.seconds / 3
        times = harness.measure(calls, device=device, seconds=seconds)
    rows = []
    for name in calls:
        row = {"width": width, "batch": batch, "dtype": str(dtype).removeprefix("torch."), "input_gradient": hidden,
               "mode": mode, "provider": name}
        reference = "torch EWN" if "EWN" in name else "torch SWN"
        copied = {"copy": "copy"} if "copy" in calls else {}
        row |= harness.summary(times, name, {"plain": "plain", "torch": reference} | copied)
        if name != "copy":
            row["floor_bytes"] = floor_bytes(mode, width, batch, dtype, hidden)
            row["gb_per_s"] = row["floor_bytes"] / row["ms"] / 1e6
            if copied:
                copied_bytes = 2 * dtype.itemsize * width**2
                row["percent_of_copy"] = 100 * row["floor_bytes"] / copied_bytes / row["ratio_copy"]
            if options.memory and mode == "full" and hidden and (width, batch) == MEMORY_POINT:
                row["peak_bytes"] = harness.peak_memory(three_steps, name, *point, device=device, warm=True)
        rows.append(row)
    return rows


def points(options):
    """(mode, point of `run`)"""
    widths, batches = ((4096,), PART_BATCHES) if options.quick else (options.widths, options.batches)
    for width in widths:
        for batch in batches:
            # A hidden layer's input needs a gradient; the first layer's does not, which hides less of the overhead.
            for hidden in (True, False) if width == 4096 else (True,):
                for mode in options.modes:
                    part = PART_BATCHES[:1] if mode == "step" else PART_BATCHES  # a step knows no batch
                    if mode == "full" or (hidden and batch in part):
                        yield mode, (width, batch, DTYPES[options.dtype], options.device, hidden)


def show(rows):
    header = ["width", "batch", "dx", "mode", "provider", "ms", "vs plain", "vs torch", "GB/s", "% of copy",
              "peak MB"]
    print(harness.table(header, [[
        r["width"], r["batch"], "yes" if r["input_gradient"] else "no", r["mode"], r["provider"],
        f"{r['ms']:.3f}", harness.interval(r, "plain"), harness.interval(r, "torch"),
        f"{r['gb_per_s']:.1f}" if "gb_per_s" in r else "",
        f"{r['percent_of_copy']:.0f}" if "percent_of_copy" in r else "",
        f"{r['peak_bytes'] / 1e6:.0f}" if "peak_bytes" in r else "",
    ] for r in rows]))
    print("""
medians; ratios of medians [95% confidence interval]; vs torch: to torch's parametrization of the same kind;
dx: whether the input needs a gradient; GB/s and % of copy: of the bytes that a plain layer cannot avoid
(floor_bytes), beside a copy of the weight in the same run; peak MB: memory of three steps alone, weights included""")


def missed(rows):
    """One line for every goal of a full step that is missed."""
    for r in rows:
        if not r["provider"].startswith("wnkernels") or r["mode"] != "full":
            continue
        for label, bound in (("plain", BOUND_PLAIN.get((r["width"], r["batch"]))), ("torch", BOUND_TORCH)):
            if bound is not None and r[f"ratio_{label}"] > bound:
                sure = "" if r[f"ratio_{label}_low"] > bound else " (within the noise)"
                dx = "with" if r["input_gradient"] else "no"
                yield (f"{r['width']}, batch {r['batch']}, {dx} dx, {r['provider']}: "
                       f"{harness.interval(r, label)} of {label}, goal {bound}{sure}")


def main(arguments=None):
    parser = harness.parser(__doc__, seconds=8)
    parser.add_argument("--quick", action="store_true", help="width 4096, batch 16 and 128 only")
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS)
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--modes", nargs="+", choices=training.MODES, default=training.MODES,
                        help="parts of a step are measured with a third of the time, at batches 16 and 128")
    parser.add_argument("--forced", action="store_true", help="wnkernels' two paths as providers too")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave torch.compile out")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="skip the peak memory")
    parser.add_argument("--name", default="layers", help="of the CSV file")
    options = parser.parse_args(arguments)
    facts, folder = harness.begin(options)
    rows, chosen = [], list(points(options))
    with harness.Progress(len(chosen), "layers") as progress:
        for mode, point in chosen:
            width, batch, dtype, device, hidden = point
            # Each provider holds parameters, gradients and a temporary, and its input, output and their gradients.
            size = 10 * dtype.itemsize * (4 * width * width + 4 * batch * width)
            label = f"width {width}, batch {batch}, {mode}"
            if harness.fits(size, device, label):
                rows += run(mode, point, options)
            progress.step(label)
    print(f"{facts['device']}, {facts['threads']} threads, torch {facts['torch']}, commit {facts['commit']}\n")
    show(rows)
    for line in missed(rows):
        print(f"missed: {line}")
    harness.write_csv(folder / f"{options.name}.csv", rows, facts)
    groups = {}
    for r in rows:
        if r["input_gradient"] and r["mode"] == "full" and r["provider"] not in ("plain", "copy"):
            point = groups.setdefault(f"{r['width']}, batch {r['batch']}", {})
            point[r["provider"]] = [r[f"ratio_plain{end}"] for end in ("", "_low", "_high")]
    harness.plot_bars(folder / f"{options.name}.png", groups, ylabel="time of a step / plain nn.Linear",
                      title=f"Training step of one layer, {options.dtype}, {facts['device']}", reference=1)
    print(f"\nwritten: {folder}/{options.name}.csv")


if __name__ == "__main__":
    main()
