"""A full training step of one Linear layer (forward, backward, SGD(fused=True), zero_grad) over width and batch: plain,
torch's parametrization, wnkernels, and wnkernels with each of its two paths forced.

    python -m bench.layers [--quick] [--device cuda]
"""

import sys

import torch

from . import harness
from .providers import FORCED, LINEAR

WIDTHS = (64, 256, 1024, 4096)
BATCHES = (1, 16, 128, 512)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Goals: against the plain layer by (width, batch), and against torch's parametrization at every point.
BOUND_PLAIN = {(4096, 16): 1.15, (4096, 128): 1.10}
BOUND_TORCH = 1.03
PROVIDERS = LINEAR | FORCED


def training_step(make, width, batch, dtype, device, hidden):
    """A function that takes one step. The gradient of the output is given, so that no loss adds to the time; the rate
    is so small that the weights stay what they are however often it runs."""
    torch.manual_seed(0)
    layer = make(width, width, dtype=dtype, device=device)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e-9, fused=True)
    x = torch.randn(batch, width, dtype=dtype, device=device, requires_grad=hidden)
    dy = torch.randn(batch, width, dtype=dtype, device=device)

    def step():
        layer(x).backward(dy)
        optimizer.step()
        optimizer.zero_grad()
        x.grad = None

    return step


def three_steps(name, *point):
    step = training_step(PROVIDERS[name], *point)
    for _ in range(3):
        step()


def run(point, options):
    """Rows of one (width, batch, dtype, device, hidden): a row per provider."""
    width, batch, dtype, device, hidden = point
    times = harness.measure({name: training_step(make, *point) for name, make in PROVIDERS.items()},
                            device=device, seconds=options.seconds)
    rows = []
    for name in PROVIDERS:
        row = {"width": width, "batch": batch, "dtype": str(dtype).removeprefix("torch."), "input_gradient": hidden,
               "provider": name}
        reference = "torch EWN" if "EWN" in name else "torch SWN"
        row |= harness.summary(times, name, {"plain": "plain", "torch": reference})
        if options.memory and width >= 1024:  # below, a weight is lost in the allocator's noise
            row["peak_bytes"] = harness.peak_memory(three_steps, name, *point, device=device)
        rows.append(row)
    return rows


def points(options):
    widths, batches = ((4096,), (16, 128)) if options.quick else (options.widths, options.batches)
    for width in widths:
        for batch in batches:
            # A hidden layer's input needs a gradient; the first layer's does not, which hides less of the overhead.
            for hidden in (True, False) if width == 4096 else (True,):
                yield width, batch, DTYPES[options.dtype], options.device, hidden


def show(rows):
    header = ["width", "batch", "dx", "provider", "ms", "vs plain", "vs torch", "peak MB"]
    print(harness.table(header, [[
        r["width"], r["batch"], "yes" if r["input_gradient"] else "no", r["provider"], f"{r['ms']:.3f}",
        harness.interval(r, "plain"), harness.interval(r, "torch"),
        f"{r['peak_bytes'] / 1e6:.0f}" if "peak_bytes" in r else "",
    ] for r in rows]))
    print("""
medians; ratios of medians [95% confidence interval]; vs torch: to torch's parametrization of the same kind;
dx: whether the input needs a gradient; peak MB: memory of three steps alone, weights included""")


def missed(rows):
    """One line for every goal that is missed."""
    for r in rows:
        if not r["provider"].startswith("wnkernels"):
            continue
        for label, bound in (("plain", BOUND_PLAIN.get((r["width"], r["batch"]))), ("torch", BOUND_TORCH)):
            if bound is not None and r[f"ratio_{label}"] > bound:
                sure = "" if r[f"ratio_{label}_low"] > bound else " (within the noise)"
                dx = "with" if r["input_gradient"] else "no"
                yield (f"{r['width']}, batch {r['batch']}, {dx} dx, {r['provider']}: "
                       f"{harness.interval(r, label)} of {label}, goal {bound}{sure}")


def main(arguments=None):
    parser = harness.parser(__doc__, seconds=15)
    parser.add_argument("--quick", action="store_true", help="width 4096, batch 16 and 128 only")
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS)
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="skip the peak memory")
    parser.add_argument("--name", default="layers", help="of the CSV file")
    options = parser.parse_args(arguments)
    facts, folder = harness.begin(options)
    rows, chosen = [], list(points(options))
    with harness.Progress(len(chosen), "layers") as progress:
        for point in chosen:
            width, batch, dtype, device, hidden = point
            # Each provider holds parameters, gradients and a temporary, and its input, output and their gradients.
            size = len(PROVIDERS) * dtype.itemsize * (4 * width * width + 4 * batch * width)
            if harness.fits(size, device):
                rows += run(point, options)
            else:
                print(f"skipped, {size / 1e9:.0f} GB do not fit: width {width}, batch {batch}", file=sys.stderr)
            progress.step(f"width {width}, batch {batch}")
    print(f"{facts['device']}, {facts['threads']} threads, torch {facts['torch']}, commit {facts['commit']}\n")
    show(rows)
    for line in missed(rows):
        print(f"missed: {line}")
    harness.write_csv(folder / f"{options.name}.csv", rows, facts)
    groups = {}
    for r in rows:
        if r["input_gradient"] and r["provider"] != "plain":
            point = groups.setdefault(f"{r['width']}, batch {r['batch']}", {})
            point[r["provider"]] = [r[f"ratio_plain{end}"] for end in ("", "_low", "_high")]
    harness.plot_bars(folder / f"{options.name}.png", groups, ylabel="time of a step / plain nn.Linear",
                      title=f"Training step of one layer, {options.dtype}, {facts['device']}", reference=1)
    print(f"\nwritten: {folder}/{options.name}.csv")


if __name__ == "__main__":
    main()
