"""The polar steps against torch's optimizers on the plain model and on torch's parametrization of it: the step alone, for
one weight of several shapes and for many small ones, and a full training step of one Linear layer. The step alone also
against all that it replaces in torch (`the_same_step`).

    python -m bench.optimizers
    python -m bench.optimizers --device cuda
"""

from functools import partial

import torch
from torch import nn

from wnkernels.optim import PolarAdamW, PolarSGD, polar_groups

from . import harness, training
from .providers import parametrized

# name -> (torch's optimizer, ours, options, bytes of a step per byte of weight, bound on the step of a 4096^2 weight)
OPTIMIZERS = {
    "SGD": (torch.optim.SGD, PolarSGD, {}, 3, 1.05),
    "SGD, momentum": (torch.optim.SGD, PolarSGD, {"momentum": 0.9}, 5, 1.08),
    "AdamW": (torch.optim.AdamW, PolarAdamW, {"weight_decay": 1e-2}, 7, 1.08),
}
SAME = "torch, the same step"
MEMORY = ("torch fused", "torch parametrized", "wnkernels")  # whose peak memory is taken


def polar(ours, model, options, **more):
    return ours(polar_groups(model, kind="swn"), lr=training.LR, **options, **more)


def providers(torchs, ours, options):
    """name -> function from a maker of models to (model, optimizer)."""
    theirs = lambda model, **more: torchs(model.parameters(), lr=training.LR, **options, **more)  # noqa: E731
    return {
        "torch fused": lambda make: (m := make(), theirs(m, fused=True)),
        "torch foreach": lambda make: (m := make(), theirs(m, foreach=True)),
        "torch parametrized": lambda make: (m := parametrized(make()), theirs(m, fused=True)),
        "wnkernels": lambda make: (m := make(), polar(ours, m, options)),
        "wnkernels, telemetry": lambda make: (m := make(), polar(ours, m, options, telemetry=True)),
    }


def one(rows, columns):
    """A maker of models of one weight."""
    return lambda: nn.Sequential(nn.Linear(columns, rows, bias=False))


def small():
    return nn.Sequential(*(nn.Linear(16, 16, bias=False) for _ in range(200)))


# case -> (maker of models, mode, batch)
CASES = {
    "step, 4096x4096": (one(4096, 4096), "step", 1),
    "step, 200 of 16x16": (small, "step", 1),
    "full step, 4096x4096, batch 16": (one(4096, 4096), "full", 16),
}
SHAPES = {f"step, {rows}x{columns}": (one(rows, columns), "step", 1) for rows, columns in (
    (64, 4096), (256, 1024), (512, 512), (1024, 256), (1024, 1024), (16384, 768), (65536, 9),
    (65536, 4))}
# after writes that fill the last cache twice, as between the steps of a large model
COLD = {f"cold {case}": SHAPES[case] for case in ("step, 512x512", "step, 1024x256", "step, 1024x1024")}
CASES |= SHAPES | COLD


def parts(case, optimizer, provider, device):
    """Model, optimizer, input and gradient of the output."""
    make, _, batch = CASES[case]
    with torch.device(device):
        model, steps = providers(*OPTIMIZERS[optimizer][:3])[provider](make)
        rows, columns = model[0].out_features, model[0].in_features
        return model, steps, torch.randn(batch, columns, requires_grad=True), torch.randn(batch, rows)


def the_same_step(model, optimizer):
    """What a polar step does with the gradient of w, in torch: w from (g, v), the way back to them, and their step."""
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    gradients = [torch.randn_like(layer.weight) for layer in layers]

    def step():
        torch.autograd.backward([layer.weight for layer in layers], gradients)
        optimizer.step()
        optimizer.zero_grad()

    return step


def three_steps(*names):
    training.three_steps(*parts(*names))


def main(arguments=None):
    parser = harness.parser(__doc__, seconds=10)
    parser.add_argument("--only", default="", help="cases with this in their name")
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="skip the peak memory")
    options = parser.parse_args(arguments)
    facts, folder = harness.begin(options)
    elsewhere = torch.zeros(2 * harness.cache_bytes(options.device) // 4, device=options.device)
    rows, missed, chosen = [], [], {name: case for name, case in CASES.items() if options.only in name}
    with harness.Progress(len(chosen) * len(OPTIMIZERS), "optimizers") as progress:
        for case, (_, mode, _) in chosen.items():
            for name, (torchs, ours, settings, passes, bound) in OPTIMIZERS.items():
                models = {p: parts(case, name, p, options.device) for p in providers(torchs, ours, settings)}
                calls = {p: training.timed(mode, *made) for p, made in models.items()}
                baselines = {"fused": "torch fused", "foreach": "torch foreach"}
                if mode == "step":
                    models[SAME] = parts(case, name, "torch parametrized", options.device)
                    calls[SAME] = the_same_step(*models[SAME][:2])
                    baselines["same"] = SAME
                if all(len(model) == 1 for model, *_ in models.values()):
                    for call in calls.values():
                        call()
                    training.in_the_same_memory(optimizer for _, optimizer, *_ in models.values())
                source, copy = (torch.randn(4096, 4096, device=options.device) for _ in range(2))
                if "4096x4096" in case:
                    calls["copy"] = lambda: copy.copy_(source)  # noqa: B023
                times = harness.measure(calls, device=options.device, seconds=options.seconds,
                                        before=partial(elsewhere.add_, 1) if case in COLD else None)
                for provider in calls:
                    row = {"case": case, "optimizer": name, "provider": provider}
                    row |= harness.summary(times, provider, baselines)
                    if case == "step, 4096x4096" and provider != "copy":
                        copied, _, _ = harness.ratio(times[provider], times["copy"])
                        row["percent_of_copy"] = 100 * passes / 2 / copied
                    if mode == "full" and provider in MEMORY and options.memory:
                        point = case, name, provider, options.device
                        row["peak_bytes"] = harness.peak_memory(three_steps, *point, device=options.device)
                    rows.append(row)
                goal = bound if case == "step, 4096x4096" else 1.02 if case.startswith("full") else 1.0
                mine = next(r for r in reversed(rows) if r["provider"] == "wnkernels")
                for other in baselines:
                    if mine[f"ratio_{other}"] > goal:
                        missed.append(f"{case}, {name}: {harness.interval(mine, other)} of {baselines[other]}, goal {goal}")
                progress.step(f"{case}, {name}")
    print(f"{facts['device']}, {facts['threads']} threads, torch {facts['torch']}, commit {facts['commit']}\n")
    print(harness.table(["case", "optimizer", "provider", "ms", "vs torch fused", "vs torch, the same", "% of copy", "peak MB"], [
        [r["case"], r["optimizer"], r["provider"], f"{r['ms']:.3f}", harness.interval(r, "fused"),
         harness.interval(r, "same") if "ratio_same" in r else "",
         f"{r['percent_of_copy']:.0f}" if "percent_of_copy" in r else "",
         f"{r['peak_bytes'] / 1e6:.0f}" if "peak_bytes" in r else ""] for r in rows]))
    print("\nmedians; ratios of medians [95% confidence interval]; % of copy: bytes moved per second against a "
          "copy; peak MB: memory of three steps, weights included")
    for line in missed:
        print(f"missed: {line}")
    harness.write_csv(folder / "optimizers.csv", rows, facts)
    print(f"\nwritten: {folder}/optimizers.csv")


if __name__ == "__main__":
    main()
