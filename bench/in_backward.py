"""A full training step of one Linear layer with SGD, where the step is taken inside the backward: time and peak memory,
against the plain layer with torch's fused SGD; with momentum and AdamW, whose buffers are written there too; and a step under autocast, where the polar step
writes the 16-bit weight.

    python -m bench.in_backward [--device cuda]
"""

from typing import NamedTuple

import torch
from torch import nn

from wnkernels.optim import PolarAdamW, PolarSGD, autocast_copy, in_backward, polar_groups

from . import harness, training
from .providers import torch_swn

# Goals: to plain + SGD(fused) by (width, batch); to the same product on a plain layer; of the memory.
BOUND_PLAIN = {(4096, 16): 0.50, (4096, 128): 0.75, (4096, 512): 1.00, (1024, 16): 0.80}
BOUND_TRICK = 1.05
BOUND_MEMORY = 0.60
MEMORY_WIDTH = 8192
# A step of training comes after one of the same layer; at 1024 the first ones after another contender's, which has left
# its tensors in the cache, take up to twice the time.
WARM_UP = 1e-2


# name -> (torch's, ours, options, weight-sized buffers)
OPTIMIZERS = {
    "SGD": (torch.optim.SGD, PolarSGD, {}, 0),
    "SGD, momentum": (torch.optim.SGD, PolarSGD, {"momentum": 0.9}, 1),
    "AdamW": (torch.optim.AdamW, PolarAdamW, {}, 2),
}


def inside(kind, optimizer="SGD"):
    def make(width, device):
        layer = nn.Sequential(nn.Linear(width, width, device=device))
        parameters = polar_groups(layer, kind) if kind else layer.parameters()
        _, ours, options, _ = OPTIMIZERS[optimizer]
        stepped = ours(parameters, lr=training.LR, kind=kind, **options)
        in_backward(layer, stepped)
        return layer, stepped

    return make


def fused(layer_of, optimizer="SGD"):
    def make(width, device):
        layer = layer_of(width, width).to(device)
        torchs, _, options, _ = OPTIMIZERS[optimizer]
        return layer, torchs(layer.parameters(), lr=training.LR, fused=True, **options)

    return make


def polar(optimizer="SGD", **copies):
    def make(width, device):
        layer = nn.Sequential(nn.Linear(width, width, device=device))
        _, ours, options, _ = OPTIMIZERS[optimizer]
        stepped = ours(polar_groups(layer), lr=training.LR, **options)
        if copies:
            autocast_copy(layer, stepped, **copies)
        return layer, stepped

    return make


class Case(NamedTuple):
    """providers: name -> (maker of layer and optimizer, set_to_none). bytes: for each element of the weight in a step, each
    read and each write counted."""

    providers: dict
    bytes: dict
    autocast: str = ""
    optimizer: str = "SGD"


# As few bytes as can be: the weight for y, the weight for dx and the update, the weight written (plain: see bench.layers).
FLOAT32 = Case({
    "plain": (fused(nn.Linear), True),
    "plain, set_to_none=False": (fused(nn.Linear), False),
    "plain, in backward": (inside(None), True),
    "torch SWN": (fused(torch_swn), True),
    "PolarSGD": (polar(), True),
    "SWN, in backward": (inside("swn"), True),
    "EWN, in backward": (inside("ewn"), True),
}, {"plain": 24, "plain, in backward": 12, "SWN, in backward": 12, "EWN, in backward": 12})
# A buffer is read and written besides.
BUFFERS = {
    name: Case({
        "plain": (fused(nn.Linear, name), True),
        "plain, in backward": (inside(None, name), True),
        "torch SWN": (fused(torch_swn, name), True),
        "PolarSGD" if "SGD" in name else "PolarAdamW": (polar(name), True),
        "SWN, in backward": (inside("swn", name), True),
        "EWN, in backward": (inside("ewn", name), True),
    }, {provider: moved + 8 * buffers for provider, moved in FLOAT32.bytes.items()}, optimizer=name)
    for name, (_, _, _, buffers) in OPTIMIZERS.items() if buffers
}
# Bytes as each does it.
BFLOAT16 = Case({
    "plain": (fused(nn.Linear), True),
    "PolarSGD": (polar(), True),
    "PolarSGD, copy": (polar(dtype=torch.bfloat16), True),
    "PolarSGD, copy, low gradients": (polar(dtype=torch.bfloat16, low_gradients=True), True),
    "SWN, in backward": (inside("swn"), True),
}, {"plain": 30, "PolarSGD": 30, "PolarSGD, copy": 26, "PolarSGD, copy, low gradients": 18, "SWN, in backward": 22},
    autocast="bf16")


def parts(case, name, width, batch, device="cpu"):
    """(forward, optimizer, input, gradient of the output) and the options of `training.timed`."""
    make, set_to_none = case.providers[name]
    torch.manual_seed(0)
    layer, optimizer = make(width, device)
    x = torch.randn(batch, width, device=device, requires_grad=True)
    dy = torch.randn(batch, width, device=device)

    def lowered(x):
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            return layer(x)

    forward, dy = (lowered, dy.bfloat16()) if case.autocast else (layer, dy)
    return (forward, optimizer, x, dy), {"set_to_none": set_to_none}


def memory_of(name, width, batch, device):
    arguments, options = parts(FLOAT32, name, width, batch, device)
    training.three_steps(*arguments, **options)


def bytes_of(case, width, batch):
    """Of a run, roughly: each provider with a weight, its gradient, a temporary and what the step keeps of the batch."""
    return 4 * len(case.providers) * (4 * width * width + 6 * batch * width)


def run(case, width, batch, seconds, device="cpu", hide_launch=False):
    made = {name: parts(case, name, width, batch, device) for name in case.providers}
    training.in_the_same_memory(optimizer for (_, optimizer, _, _), _ in made.values())
    (_, _, x, dy), _ = made["plain"]  # all have the same values, and so the same memory
    calls = {name: training.timed("full", *layer_and_optimizer, x, dy, **options)
             for name, ((*layer_and_optimizer, _, _), options) in made.items()}
    if 4 * width * width > harness.cache_bytes(device):
        source, target = (torch.randn(width, width, device=device) for _ in range(2))
        calls["copy"] = lambda: target.copy_(source)
    times = harness.measure(calls, device=device, seconds=seconds, warm_up=WARM_UP, hide_launch=hide_launch)
    rows = []
    for name in calls:
        row = {"width": width, "batch": batch, "autocast": case.autocast, "optimizer": case.optimizer, "provider": name}
        bases = {"plain": "plain"} | ({"trick": "plain, in backward"} if "plain, in backward" in calls else {})
        row |= harness.summary(times, name, bases)
        if moved := case.bytes.get(name):
            row["bytes_per_element"] = moved
            if "copy" in calls:
                row["percent_of_copy"] = 100 * moved / 8 / harness.ratio(times[name], times["copy"])[0]
        rows.append(row)
    return rows


def missed(rows):
    for r in rows:
        if "WN, in backward" not in r["provider"] or r["autocast"] or r["optimizer"] != "SGD":
            continue
        bounds = {"plain": BOUND_PLAIN.get((r["width"], r["batch"])),
                  "trick": BOUND_TRICK if (r["width"], r["batch"]) in BOUND_PLAIN else None}
        for label, bound in bounds.items():
            if bound is not None and r.get(f"ratio_{label}", 0) > bound:
                yield f"{r['width']}, batch {r['batch']}, {r['provider']}: {harness.interval(r, label)} of {label}, goal {bound}"
        if r.get("memory_ratio", 0) > BOUND_MEMORY:
            yield f"{r['width']}, {r['provider']}: {r['memory_ratio']:.2f} of plain's memory, goal {BOUND_MEMORY}"


def main(arguments=None):
    parser = harness.parser(__doc__, seconds=10)
    parser.add_argument("--widths", type=int, nargs="+", default=(4096, 1024))
    parser.add_argument("--batches", type=int, nargs="+", default=(16, 128, 512))
    parser.add_argument("--autocast-batches", type=int, nargs="*", default=(16, 128))
    parser.add_argument("--buffers-batches", type=int, nargs="*", default=(16, 128))
    parser.add_argument("--memory-width", type=int, default=MEMORY_WIDTH, help="0: skip the peak memory")
    parser.add_argument("--hide-launch", action="store_true", help="CUDA: the time of the device alone, as in a CUDA graph")
    parser.add_argument("--name", default="in_backward", help="of the CSV file")
    options = parser.parse_args(arguments)
    facts, folder = harness.begin(options)
    rows = []
    points = [(FLOAT32, w, b) for w in options.widths for b in options.batches]
    points += [(case, w, b) for case in BUFFERS.values() for w in options.widths for b in options.buffers_batches]
    points += [(BFLOAT16, max(options.widths), b) for b in options.autocast_batches]
    with harness.Progress(len(points) + 1, "in_backward") as progress:
        for case, width, batch in points:
            label = f"width {width}, batch {batch}"
            if harness.fits(bytes_of(case, width, batch), options.device, label):
                rows += run(case, width, batch, options.seconds, options.device, options.hide_launch)
            progress.step(label)
        if options.memory_width:
            names = ("plain", "plain, in backward", "SWN, in backward")
            peaks = {name: harness.peak_memory(memory_of, name, options.memory_width, 16, options.device, device=options.device)
                     for name in names}
            for name, peak in peaks.items():
                rows.append({"width": options.memory_width, "batch": 16, "autocast": "", "optimizer": "SGD", "provider": name,
                             "peak_bytes": peak, "memory_ratio": peak / peaks["plain"]})
        progress.step("memory")
    print(f"{facts['device']}, {facts['threads']} threads, torch {facts['torch']}, commit {facts['commit']}\n")
    print(harness.table(["width", "batch", "autocast", "optimizer", "provider", "ms", "vs plain", "vs plain in backward", "peak MB"], [[
        r["width"], r["batch"], r["autocast"], r["optimizer"], r["provider"], f"{r['ms']:.3f}" if "ms" in r else "",
        harness.interval(r, "plain") if "ratio_plain" in r else f"{r['memory_ratio']:.2f}",
        harness.interval(r, "trick") if "ratio_trick" in r else "",
        f"{r['peak_bytes'] / 1e6:.0f}" if "peak_bytes" in r else "",
    ] for r in rows]))
    print("\nmedians; ratios of medians [95% confidence interval]; of peak MB in rows that have it: memory of three steps, "
          "weights included")
    for line in missed(rows):
        print(f"missed: {line}")
    harness.write_csv(folder / f"{options.name}.csv", rows, facts)
    print(f"\nwritten: {folder}/{options.name}.csv")


if __name__ == "__main__":
    main()
