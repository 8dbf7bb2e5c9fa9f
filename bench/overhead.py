"""The cost of a call, where the arithmetic is nothing: a 16x16 weight.

    python -m bench.overhead
"""

import torch

import wnkernels.functional as wf
import wnkernels.nn

from . import harness

FUNCTION_BOUND = 1.5  # times torch's own op
LAYER_BOUND = 6.0  # microseconds above plain nn.Linear


def groups(device):
    """name -> calls that are compared, the baseline first."""
    v = torch.randn(16, 16, device=device)
    g = torch.linalg.vector_norm(v, dim=1, keepdim=True)
    vg, gg = v.clone().requires_grad_(), g.clone().requires_grad_()
    dw = torch.randn_like(v)
    x = torch.randn(16, 16, device=device)
    plain, normed = torch.nn.Linear(16, 16, device=device), wnkernels.nn.Linear(16, 16, device=device)
    parametrized = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(16, 16, device=device))
    frozen = [layer.requires_grad_(False) for layer in
              (torch.nn.Linear(16, 16, device=device), wnkernels.nn.Linear(16, 16, device=device))]
    return {
        "weight_norm, forward": {
            "torch._weight_norm": lambda: torch._weight_norm(v, g, 0),
            "wnkernels": lambda: wf.weight_norm(v, g),
        },
        "weight_norm, forward recorded for backward": {
            "torch._weight_norm": lambda: torch._weight_norm(vg, gg, 0),
            "wnkernels": lambda: wf.weight_norm(vg, gg),
        },
        "weight_norm, forward + backward": {
            "torch._weight_norm": lambda: torch.autograd.grad(torch._weight_norm(vg, gg, 0), (vg, gg), dw),
            "wnkernels": lambda: torch.autograd.grad(wf.weight_norm(vg, gg), (vg, gg), dw),
        },
        "Linear, forward, parameters frozen": {
            "nn.Linear": lambda: frozen[0](x),
            "wnkernels.nn.Linear": lambda: frozen[1](x),
        },
        "Linear, forward recorded for backward": {
            "nn.Linear": lambda: plain(x),
            "wnkernels.nn.Linear": lambda: normed(x),
            "torch parametrization": lambda: parametrized(x),
        },
    }


def main(arguments=None):
    parser = harness.parser(__doc__, seconds=6)
    parser.add_argument("--rounds", type=int, default=2000, help="least number of rounds (default: %(default)s)")
    options = parser.parse_args(arguments)
    facts, folder = harness.begin(options)
    rows, verdicts = [], []
    measured = groups(options.device)
    with harness.Progress(len(measured), "overhead") as progress:
        for name, calls in measured.items():
            # Short samples, many of them: a sample that the scheduler interrupts must not weigh on its neighbours.
            times = harness.measure(calls, device=options.device, seconds=options.seconds, rounds=options.rounds,
                                    sample=1e-4)
            base = next(iter(calls))
            new = [{"call": name, "provider": p, **harness.summary(times, p, {"base": base}, unit="us")} for p in calls]
            for row in new:
                row["above_us"] = row["us"] - new[0]["us"]
            rows += new
            ours = next(row for row in new if row["provider"].startswith("wnkernels"))
            if "Linear" in base:
                met = ours["above_us"] <= LAYER_BOUND
                verdicts.append((name, f"{ours['above_us']:+.2f} us", f"{LAYER_BOUND:+} us", met))
            else:
                met = ours["ratio_base"] <= FUNCTION_BOUND
                verdicts.append((name, f"{ours['ratio_base']:.2f}x", f"{FUNCTION_BOUND}x", met))
            progress.step(name)
    print(f"{facts['device']}, {facts['threads']} threads, torch {facts['torch']}, commit {facts['commit']}\n")
    print(harness.table(["call", "provider", "us", "us q10", "above base", "ratio"], [
        [r["call"], r["provider"], f"{r['us']:.2f}", f"{r['us_q10']:.2f}", f"{r['above_us']:+.2f}",
         harness.interval(r, "base")] for r in rows]) + "\n")
    for name, value, bound, met in verdicts:
        print(f"{'met' if met else 'MISSED'}: {name}: {value}, goal {bound}")
    harness.write_csv(folder / "overhead.csv", rows, facts)
    print(f"\nwritten: {folder}/overhead.csv")


if __name__ == "__main__":
    main()
