"""Trains classifiers of scikit-learn's handwritten digits with no normalization, SWN and EWN, the latter two in pure
torch and by wnkernels. All providers train in lockstep from the same initial function on the same batches, one step
each in turn, so the loss curves and the times compare. Fails when a curve leaves its pure-torch counterpart.

    python -m bench.digits
"""

import random
import sys
import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from . import harness
from .providers import COUNTERPART, LINEAR

COMPARED = 100  # steps over which the curves must agree
BOUNDS = {torch.float32: 1e-5, torch.float64: 1e-12}
WARMUP = 10  # steps left out of the times


@dataclass(frozen=True)
class Task:
    name: str
    hidden: int
    batch: int
    steps: int
    lr: float


TASKS = (
    Task("64-128-128-10", hidden=128, batch=64, steps=1000, lr=0.1),
    Task("64-2048-2048-10", hidden=2048, batch=64, steps=500, lr=0.1),
)


def digits(dtype, device):
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split
    x, y = load_digits(return_X_y=True)
    parts = train_test_split(x / 16, y, test_size=0.25, random_state=0, stratify=y)
    return [torch.tensor(p, device=device, dtype=dtype if p.ndim == 2 else torch.int64) for p in parts]


def network(provider, task, dtype, device):
    torch.manual_seed(0)
    linear, h = LINEAR[provider], task.hidden
    # Not ReLU: where rounding puts a unit on the other side of its kink, curves part by a finite step (1e-4 in fp32,
    # between any two ways to compute the same function), and the comparison says nothing about the kernels.
    return nn.Sequential(
        linear(64, h, dtype=dtype, device=device), nn.Tanh(),
        linear(h, h, dtype=dtype, device=device), nn.Tanh(),
        linear(h, 10, dtype=dtype, device=device),
    )


class Training:
    def __init__(self, provider, task, dtype, device):
        self.model = network(provider, task, dtype, device)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=task.lr, fused=True)
        self.losses = []
        self.seconds = []

    def step(self, x, y):
        started = time.perf_counter()
        self.optimizer.zero_grad()
        loss = F.cross_entropy(self.model(x), y)
        loss.backward()
        self.optimizer.step()
        self.losses.append(loss.item())  # waits for the device
        self.seconds.append(time.perf_counter() - started)

    @torch.no_grad()
    def evaluate(self, x, y):
        """(mean loss, accuracy)"""
        logits = self.model(x)
        return F.cross_entropy(logits, y).item(), (logits.argmax(1) == y).double().mean().item()


def train(task, steps, data, dtype, device, label):
    """`steps` steps of every provider in lockstep: provider -> Training."""
    x, _, y, _ = data
    trainings = {provider: Training(provider, task, dtype, device) for provider in LINEAR}
    order, shuffle = list(trainings), random.Random(0).shuffle
    batches = torch.Generator().manual_seed(0)
    chosen = torch.empty(0, dtype=torch.int64)
    with harness.Progress(steps, label) as progress:
        for _ in range(steps):
            if len(chosen) < task.batch:
                chosen = torch.randperm(len(x), generator=batches)
            rows, chosen = chosen[:task.batch].to(device), chosen[task.batch:]
            shuffle(order)
            for provider in order:
                trainings[provider].step(x[rows], y[rows])
            progress.step(f"loss {trainings['plain'].losses[-1]:.3f}")
    return trainings


def train_alone(provider, task, device):
    """What the peak memory is taken of; the values do not matter to it."""
    training = Training(provider, task, torch.float32, device)
    x, y = torch.randn(task.batch, 64, device=device), torch.randint(10, (task.batch,), device=device)
    for _ in range(5):
        training.step(x, y)


def difference(losses, reference):
    """Largest relative difference of two curves over the compared steps."""
    a, b = np.array(losses[:COMPARED]), np.array(reference[:COMPARED])
    return float(np.max(np.abs(a - b) / np.abs(b)))


def differences(trainings):
    return {ours: difference(trainings[ours].losses, trainings[theirs].losses) for ours, theirs in COUNTERPART.items()}


def run(task, device):
    """Rows of the table and the CSV, and the curves of the plot."""
    data = digits(torch.float32, device)
    trainings = train(task, task.steps, data, torch.float32, device, f"{task.name} fp32")
    single = differences(trainings)
    data64 = digits(torch.float64, device)
    double = differences(train(task, COMPARED, data64, torch.float64, device, f"{task.name} fp64"))
    times = {provider: np.array(t.seconds[WARMUP:]) for provider, t in trainings.items()}
    rows = []
    for provider, training in trainings.items():
        baselines = {"plain": "plain"} | ({"torch": COUNTERPART[provider]} if provider in COUNTERPART else {})
        rows.append({
            "model": task.name, "provider": provider, "batch": task.batch, "steps": task.steps, "lr": task.lr,
            "final_loss": training.evaluate(data[0], data[2])[0],
            "test_accuracy": training.evaluate(data[1], data[3])[1],
            "difference_fp32": single.get(provider, ""), "difference_fp64": double.get(provider, ""),
            **harness.summary(times, provider, baselines),
            "peak_bytes": harness.peak_memory(train_alone, provider, task, device, device=device),
        })
    return rows, {provider: training.losses for provider, training in trainings.items()}


def show(rows):
    header = ["model", "provider", "final loss", "test acc.", "dloss fp32", "dloss fp64",
              "ms/step", "vs plain", "vs torch", "peak MB"]
    number = lambda value: f"{value:.1e}" if value != "" else ""
    print(harness.table(header, [[
        r["model"], r["provider"], f"{r['final_loss']:.5f}", f"{r['test_accuracy']:.2%}",
        number(r["difference_fp32"]), number(r["difference_fp64"]), f"{r['ms']:.3f}",
        harness.interval(r, "plain"), harness.interval(r, "torch") if "ratio_torch" in r else "",
        f"{r['peak_bytes'] / 1e6:.1f}",
    ] for r in rows]))
    print(f"""
final loss: mean over the training set after the last step. dloss: max over the first {COMPARED} steps of |a - b| / |b|,
a this provider's batch loss and b its pure-torch counterpart's; at most {BOUNDS[torch.float32]:g} in fp32 and
{BOUNDS[torch.float64]:g} in fp64.
ms/step: median over the run, zero_grad + forward + backward + SGD(fused=True), providers in turn; ratios of medians
[95% confidence interval], to the plain model and to the pure-torch counterpart. peak MB: growth of the resident memory
of a process that trains this provider alone for 5 steps (on CUDA: torch's allocator), weights included.""")


def plot(path, rows, curves):
    plt = harness.pyplot()
    if plt is None:
        return
    figure, axes = plt.subplots(2, len(curves), figsize=(6 * len(curves), 7), layout="constrained", squeeze=False)
    colors = {provider: f"C{i}" for i, provider in enumerate(p for p in LINEAR if p not in COUNTERPART)}
    window = np.ones(20) / 20
    for (model, losses), (above, below) in zip(curves.items(), axes.T):
        for provider, curve in losses.items():
            # A thin line on the broad, pale one of its counterpart.
            style = {"linewidth": 1} if provider in COUNTERPART else {"linewidth": 4, "alpha": 0.4}
            above.plot(np.convolve(curve, window, "valid"), label=provider,
                       color=colors[COUNTERPART.get(provider, provider)], **style)
        above.set(title=model, xlabel="step", ylabel=f"batch loss, mean of {len(window)} steps", yscale="log")
        above.legend(fontsize=8)
        mine = [r for r in rows if r["model"] == model]
        below.bar([r["provider"] for r in mine], [r["ms"] for r in mine],
                  color=[colors[COUNTERPART.get(r["provider"], r["provider"])] for r in mine],
                  yerr=[[r["ms"] - r["ms_q25"] for r in mine], [r["ms_q75"] - r["ms"] for r in mine]])
        below.set(ylabel="ms per step, median and quartiles")
        below.tick_params(axis="x", labelrotation=20)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def broken(rows):
    """One line for every curve that left its counterpart."""
    for row in rows:
        for name, bound in (("fp32", BOUNDS[torch.float32]), ("fp64", BOUNDS[torch.float64])):
            value = row[f"difference_{name}"]
            if value != "" and not value <= bound:  # a nan is broken too
                yield (f"{row['model']}, {row['provider']}: the {name} loss curve is {value:.1e} off pure torch's, "
                       f"allowed {bound:g}")


def main(arguments=None):
    options = harness.parser(__doc__).parse_args(arguments)
    facts, folder = harness.begin(options)
    rows, curves = [], {}
    for task in TASKS:
        new, curves[task.name] = run(task, options.device)
        rows += new
    print(f"{facts['device']}, {facts['threads']} threads, torch {facts['torch']}, commit {facts['commit']}\n")
    show(rows)
    harness.write_csv(folder / "digits.csv", rows, facts)
    plot(folder / "digits.png", rows, curves)
    print(f"\nwritten: {folder}/digits.csv, digits.png")
    failures = list(broken(rows))
    for line in failures:
        print(f"FAILED: {line}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
