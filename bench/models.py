"""Training of whole models, the full step and its parts: plain, torch's parametrization of every Linear and
convolution, torch.compile of both, wnkernels' layers, the plain model under a polar optimizer, and that inside the
backward.

    python -m bench.models [--device cuda]
"""

import sys

import torch
from torch import nn
from torch.nn import functional as F

import wnkernels
from wnkernels.optim import PolarAdamW, PolarSGD, in_backward, polar_groups

from . import harness, providers, training


class Residual(nn.Module):
    def __init__(self, channels, width, stride):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width))
        self.skip = nn.Identity() if channels == width else nn.Conv2d(channels, width, 1, stride, bias=False)

    def forward(self, x):
        return F.relu(self.body(x) + self.skip(x))


class Encoder(nn.Module):
    """One layer of a transformer's encoder, normalized before each part. (That of torch keeps the weights of
    attention outside of Linear layers.)"""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.before_attention, self.before_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x):
        q, k, v = self.qkv(self.before_attention(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.before_mlp(x))


def mlp():
    hidden = [layer for _ in range(2) for layer in (nn.Linear(1024, 1024), nn.Tanh())]
    return nn.Sequential(nn.Linear(64, 1024), nn.Tanh(), *hidden, nn.Linear(1024, 10))


def resnet():
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, 1, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        Residual(32, 32, 1), Residual(32, 64, 2), Residual(64, 128, 2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))


def transformer():
    return nn.Sequential(*(Encoder(256, heads=4) for _ in range(2)), nn.Linear(256, 256))


# name -> (maker, shape of the input)
MODELS = {
    "MLP 64-1024-1024-1024-10": (mlp, (64, 64)),
    "ResNet, 9 convolutions": (resnet, (16, 3, 32, 32)),
    "transformer, 2 layers of 256": (transformer, (8, 64, 256)),
}
# name -> (torch's, ours)
OPTIMIZERS = {"SGD": (torch.optim.SGD, PolarSGD), "AdamW": (torch.optim.AdamW, PolarAdamW)}


def fused(model, optimizer):
    return OPTIMIZERS[optimizer][0](model.parameters(), lr=training.LR, fused=True)


def converted(model):
    wnkernels.convert(model, "swn")
    return model


def polar(model, optimizer, inside=False):
    steps = OPTIMIZERS[optimizer][1](polar_groups(model, "swn"), lr=training.LR)
    if inside:
        in_backward(model, steps)
    return model, steps


# name -> function from (model, name of the optimizer) to (forward, optimizer)
PROVIDERS = {
    "plain": lambda m, o: (m, fused(m, o)),
    "plain, compiled": lambda m, o: (providers.compiled(m), fused(m, o)),
    "torch SWN": lambda m, o: (providers.parametrized(m), fused(m, o)),
    "torch SWN, compiled": lambda m, o: (providers.compiled(providers.parametrized(m)), fused(m, o)),
    "wnkernels SWN": lambda m, o: (converted(m), fused(m, o)),
    "polar": polar,
    "polar, in backward": lambda m, o: polar(m, o, inside=True),
}
# A compiled model has the parameters, and so the step, of the other; under a polar optimizer forward and backward are
# the plain model's, and a step inside the backward has no parts.
COMPILED = ("plain, compiled", "torch SWN, compiled")
WITHOUT = {"forward": ("polar", "polar, in backward"), "backward": ("polar", "polar, in backward"),
           "step": (*COMPILED, "polar, in backward"), "full": ()}
POINTS = [*(("SGD", mode) for mode in training.MODES), ("AdamW", "full")]  # (optimizer, mode)


def parts(model, optimizer, provider, device):
    """(forward, optimizer, input, gradient of the output)"""
    make, shape = MODELS[model]
    torch.manual_seed(0)
    forward, steps = PROVIDERS[provider](make().to(device), optimizer)
    x = torch.randn(shape, device=device)
    with torch.no_grad():
        dy = torch.randn_like(make().to(device)(x))
    return forward, steps, x, dy


def three_steps(*point):
    training.three_steps(*parts(*point))


def run(model, optimizer, mode, options):
    """Rows of one model, optimizer and mode: a row per provider."""
    names = [n for n in PROVIDERS if n not in WITHOUT[mode] and (options.compile or n not in COMPILED)]
    with providers.compiling(backward_again=mode == "backward"):
        calls = {name: training.timed(mode, *parts(model, optimizer, name, options.device)) for name in names}
        times = harness.measure(calls, device=options.device, seconds=options.seconds)
    rows = []
    for name in names:
        row = {"model": model, "optimizer": optimizer, "mode": mode, "provider": name}
        row |= harness.summary(times, name, {"plain": "plain", "torch": "torch SWN"})
        if mode == "full" and optimizer == "SGD" and options.memory:
            row["peak_bytes"] = harness.peak_memory(three_steps, model, optimizer, name, options.device,
                                                    device=options.device, warm=True)
        rows.append(row)
    return rows


def show(rows):
    header = ["model", "optimizer", "mode", "provider", "ms", "ms q90", "vs plain", "vs torch", "peak MB"]
    print(harness.table(header, [[
        r["model"], r["optimizer"], r["mode"], r["provider"], f"{r['ms']:.3f}", f"{r['ms_q90']:.3f}",
        harness.interval(r, "plain"), harness.interval(r, "torch"),
        f"{r['peak_bytes'] / 1e6:.1f}" if "peak_bytes" in r else "",
    ] for r in rows]))
    print("\nmedians; ratios of medians [95% confidence interval]; peak MB: memory of three steps, weights included")


def plot(path, rows, device):
    groups = {}
    for r in rows:
        if r["mode"] == "full" and r["provider"] != "plain":
            point = groups.setdefault(f"{r['model']}, {r['optimizer']}", {})
            point[r["provider"]] = [float(r[f"ratio_plain{end}"]) for end in ("", "_low", "_high")]
    harness.plot_bars(path, groups, ylabel="time of a step / plain model", title=f"Training step, {device}",
                      reference=1)


def main(arguments=None):
    parser = harness.parser(__doc__, seconds=5)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave torch.compile out")
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="skip the peak memory")
    options = parser.parse_args(arguments)
    facts, folder = harness.begin(options)
    rows, points = [], [(model, *point) for model in options.models for point in POINTS]
    with harness.Progress(len(points), "models") as progress:
        for point in points:
            rows += run(*point, options)
            progress.step(", ".join(point))
    print(f"{facts['device']}, {facts['threads']} threads, torch {facts['torch']}, commit {facts['commit']}\n")
    show(rows)
    harness.write_csv(folder / "models.csv", rows, facts)
    plot(folder / "models.png", rows, facts["device"])
    print(f"\nwritten: {folder}/models.csv, models.png")


if __name__ == "__main__":
    sys.exit(main())
