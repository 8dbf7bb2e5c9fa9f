"""Two-homogeneous networks from a small start (Kumar and Haupt, arXiv:2402.09226): escape, alignment,
saddles.

Networks H(x; W) = sum_j max(0, <w_j, x>)^2 of 20 neurons learn 5 max(0, x_1)^2 + 4 max(0, -x_1)^2 from 50
inputs on the circle, by gradient descent on |H(X) - y|^2/2 from W(0) = delta W_0. `theory.two_homogeneous`
says what to expect.

Plain gradient flow is followed in the paper's own coordinates, log|W| and W/|W|, which are those of EWN with
one radius for each network: with the rate eta/|W|^2 for both, d log|W| = -eta <G, W>/|W|^2 and dW/|W| = -eta
G_t/|W|. So the growth near the origin is exact for any step, and delta may be as small as one likes. All
seeds and all delta are the rows of one weight.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import functional
from ..models.two_layer import TwoLayer
from ..optim import PolarSGD
from ..theory import two_homogeneous as theory
from .claims import Claim, Options

TITLE = "Kumar and Haupt: two-homogeneous networks near the origin and near saddles"

SEEDS = (0, 1, 2)
INPUTS, NEURONS = 50, 20
LR = 5e-5
STEPS = 50_000
ESCAPE = tuple(10.0**-k for k in range(4, 11))  # delta of P2-1, P2-4 and P2-5
ALIGN = tuple(10.0**-k for k in range(1, 9))  # of P2-2
RADIUS = 0.1  # where the escape ends: the loss is still that of the origin, or of the saddle


@dataclass(frozen=True)
class Task:
    """X (n, 2), y (n,), and standard normal weights (m, 2)."""

    X: np.ndarray
    y: np.ndarray
    weight: np.ndarray

    def start(self, delta: float) -> np.ndarray:
        """The weights, of norm delta."""
        return self.weight * (delta / np.linalg.norm(self.weight))


def task(seed: int) -> Task:
    rng = np.random.default_rng(seed)
    angle = rng.uniform(0, 2 * math.pi, INPUTS)
    X = np.stack([np.cos(angle), np.sin(angle)], 1)
    y = 5 * np.maximum(X[:, 0], 0) ** 2 + 4 * np.maximum(-X[:, 0], 0) ** 2
    return Task(X, y, rng.normal(size=(NEURONS, 2)))


class Descent:
    """E networks at once, each of them a sum of parts with norms of their own, in the field of the squared
    loss.

    Args:
        X: (E, n, d).  y: (E, n).  parts: the weights at the start, each (E, m, d).
        backend: "wnkernels" for the polar coordinates of the module's docstring; "torch" for plain gradient
            descent.
    """

    def __init__(self, X, y, parts: Sequence[np.ndarray], lr: float, backend: str, device="cpu") -> None:
        self.X, self.y = (torch.tensor(x, device=device) for x in (X, y))
        self.lr, self.polar, self.parts = lr, backend == "wnkernels", []
        for weight in parts:
            E, m, d = weight.shape
            part = TwoLayer(d, m, instances=E, dtype=torch.float64, device=device)
            with torch.no_grad():
                part.weight.copy_(torch.tensor(weight))
            self.parts.append(part)
        weights = [part.weight for part in self.parts]
        if self.polar:
            groups = [{"params": [w], "lr": torch.full((len(w),), lr, dtype=torch.float64, device=device)}
                      for w in weights]
            self.optimizer = PolarSGD(groups, kind="ewn", dim=0, direction_norm=1.0, retraction="geodesic")
        else:
            self.optimizer = torch.optim.SGD(weights, lr=lr)

    def step(self) -> Tensor:
        """Takes a step and returns the losses (E,) before it."""
        self.optimizer.zero_grad()
        loss = (sum(part(self.X) for part in self.parts) - self.y).square().sum(-1) / 2
        loss.sum().backward()
        if self.polar:
            for group in self.optimizer.param_groups:
                log_norm = self.optimizer.state[group["params"][0]]["radius"]
                group["lr"].copy_(self.lr * torch.exp(-2 * log_norm))
        self.optimizer.step()
        return loss.detach()

    def weight(self, part: int = -1) -> np.ndarray:
        return self.parts[part].weight.detach().cpu().numpy().copy()

    def norms(self) -> np.ndarray:
        """|W| of the last part of each network."""
        return functional.row_norm(self.parts[-1].weight.detach()).cpu().numpy()


class Grown(NamedTuple):
    """When the norm of the last part of each network passed its threshold, that part then, and how far the
    first part had moved."""

    time: np.ndarray
    weight: np.ndarray
    moved: np.ndarray


def grow(
    X, y, parts, threshold: Sequence[float], *, backend: str, lr=LR, max_steps=20_000, device="cpu"
) -> Grown:
    """Follows each network until the norm of its last part passes its threshold.

    Raises: RuntimeError if one does not get there.
    """
    descent = Descent(X, y, parts, lr, backend, device)
    before, threshold = descent.norms(), np.asarray(threshold, float)
    time = np.where(before >= threshold, 0.0, np.nan)
    weight, moved, first = descent.weight(), np.zeros(len(time)), descent.weight(0)
    for step in range(max_steps):
        if not np.isnan(time).any():
            break
        descent.step()
        after = descent.norms()
        for i in np.flatnonzero(np.isnan(time) & (after >= threshold)):
            share = math.log(threshold[i] / before[i]) / math.log(after[i] / before[i])  # of the step
            time[i] = lr * (step + share)
            weight[i], moved[i] = descent.weight()[i], np.linalg.norm(descent.weight(0)[i] - first[i])
        before = after
    if missing := np.isnan(time).sum():
        raise RuntimeError(
            f"{missing} of {len(time)} networks have not reached their norm in {max_steps} steps"
        )
    return Grown(time, weight, moved)


def _stack(tasks: Sequence[Task], copies: int) -> tuple[np.ndarray, np.ndarray]:
    return tuple(np.repeat(np.stack([getattr(t, name) for t in tasks]), copies, 0) for name in ("X", "y"))


def at_saddle(t: Task) -> tuple[np.ndarray, np.ndarray]:
    """One neuron (1, 2) that fits what it can along the largest NCF, and the labels that it leaves."""
    top = theory.ncf_maximum(t.X, t.y)
    neuron = theory.fit_neurons(t.X, t.y, 2 * top.u[None])
    return neuron, t.y - theory.outputs(neuron, t.X).sum(0)


def escape(
    seeds: Sequence[int], deltas: Sequence[float], threshold: Callable, *, saddle: bool = False, backend: str
) -> Grown:
    """From the origin, or beside the neuron of `at_saddle`; arrays of shape (seeds, deltas, ...).

    threshold: delta -> the norm to reach.
    """
    tasks = [task(seed) for seed in seeds]
    parts = [np.stack([t.start(delta) for t in tasks for delta in deltas])]
    if saddle:
        parts.insert(0, np.repeat(np.stack([at_saddle(t)[0] for t in tasks]), len(deltas), 0))
    thresholds = [threshold(delta) for _ in seeds for delta in deltas]
    found = grow(*_stack(tasks, len(deltas)), parts, thresholds, backend=backend)
    return Grown(*(x.reshape(len(seeds), len(deltas), *x.shape[1:]) for x in found))


def wide(
    neurons: int, features: int, inputs: int, deltas: Sequence[float], *, backend: str, device: str, bar=iter
) -> tuple[list[float], float]:
    """Escape times, by delta, and N* of a wide network for inputs on a sphere.

    The labels are those of `task`, times the dimension: of order one.
    """
    rng = np.random.default_rng(0)
    X = rng.normal(size=(inputs, features))
    X /= np.linalg.norm(X, axis=1, keepdims=True)
    y = features * np.where(X[:, 0] > 0, 5, 4) * X[:, 0] ** 2
    weight = rng.normal(size=(1, neurons, features))
    weight /= np.linalg.norm(weight)
    best = theory.ncf_maximum(X, y, starts=32).value
    how = {"backend": backend, "device": device, "lr": 0.01 / best}
    radius = [RADIUS / math.sqrt(features)]
    times = [grow(X[None], y[None], [delta * weight], radius, **how).time.item() for delta in bar(deltas)]
    return times, best


@dataclass(frozen=True)
class Trajectory:
    """loss: (steps + 1, E), in every step. step: (T,), and there norm (T, E), angle (T, E, m) in degrees and
    neuron (T, E, m), the norms of the neurons. passed: (E, m, 2), the weights when |W| first was at RADIUS;
    passed_loss: (E,)."""

    loss: np.ndarray
    step: np.ndarray
    norm: np.ndarray
    angle: np.ndarray
    neuron: np.ndarray
    passed: np.ndarray
    passed_loss: np.ndarray


def full_run(
    seeds: Sequence[int], steps: int, *, backend: str, std: float = 1e-4, every: int = 20, bar=iter
) -> Trajectory:
    """The experiment of the paper: descent from weights of that standard deviation."""
    tasks = [task(seed) for seed in seeds]
    descent = Descent(*_stack(tasks, 1), [np.stack([std * t.weight for t in tasks])], LR, backend)
    losses, snapshots = [], []
    passed, passed_loss = descent.weight(), np.full(len(tasks), np.nan)
    for step in bar(range(steps + 1)):
        if step % every == 0:
            snapshots.append(descent.weight())
        inside = np.isnan(passed_loss)
        new = inside & (descent.norms() >= RADIUS) if inside.any() else inside
        if new.any():
            passed[new] = descent.weight()[new]
        losses.append(descent.step().numpy())
        passed_loss[new] = losses[-1][new]
    W = np.stack(snapshots)
    return Trajectory(
        np.stack(losses), np.arange(0, steps + 1, every), np.linalg.norm(W, axis=(2, 3)),
        np.degrees(np.arctan2(W[..., 1], W[..., 0])), np.linalg.norm(W, axis=-1), passed, passed_loss,
    )


def drops(loss: np.ndarray) -> tuple[np.ndarray, float]:
    """The steps at which the loss falls fastest, drops of their own (prominence a tenth of the fastest), and
    the loss at the slowest point between the first two (NaN without two)."""
    from scipy.signal import find_peaks

    speed = -np.diff(loss)
    peaks, _ = find_peaks(np.concatenate([[0.0], speed, [0.0]]), prominence=0.1 * speed.max())
    peaks = peaks - 1
    if len(peaks) < 2:
        return peaks, math.nan
    return peaks, float(loss[peaks[0] + np.argmin(speed[peaks[0] : peaks[1]])])


# ----------------------------------------------------------------------------------------------------- claims


def _list(values, form: str = ".3g") -> str:
    return " ".join(f"{x:{form}}" for x in values)


def _aligned(delta: float) -> float:
    """|W| at which its direction is measured; passed at the start for delta above .09."""
    return 0.3 * math.sqrt(delta)


def _slopes(deltas: Sequence[float], time: np.ndarray, values: Sequence[float]) -> np.ndarray:
    """d time/d log(1/delta), for time (seeds, deltas), over its prediction 1/(2 N) of each seed."""
    return 2 * np.array(values) * np.polyfit(np.log(1 / np.array(deltas)), np.transpose(time), 1)[0]


def claims(options: Options):
    tasks = [task(seed) for seed in SEEDS]
    seeds = f"seeds {', '.join(map(str, SEEDS))}"

    if options.wants("P2-1"):
        values = [theory.ncf_maximum(t.X, t.y).value for t in tasks]
        run = options.measure(escape, SEEDS, ESCAPE, lambda _: RADIUS)
        options.results["escape"] = {"delta": ESCAPE, "time": run.value.time, "values": values}
        slopes = _slopes(ESCAPE, run.value.time, values)
        yield Claim(
            "P2-1", f"escape time over log(1/delta), delta = 1e-4..1e-10, over 1/(2 N*), {seeds}", "1",
            _list(slopes, ".4f"), "within 1%", (abs(slopes - 1) <= 0.01).all(),
            run.seconds, run.torch_seconds,
        )

    if options.full and options.wants("P2-1"):
        sizes = (100_000, 1000, 4000) if options.device.startswith("cuda") else (500, 20, 400)
        deltas, bar = (1e-4, 1e-7, 1e-10), lambda items: options.bar(items, "wide")
        run = options.measure(wide, *sizes, deltas, device=options.device, bar=bar)
        times, best = run.value
        (ratio,) = _slopes(deltas, [times], [best])
        yield Claim(
            "P2-1 wide", "the same of {} neurons in {} dimensions, for {} inputs".format(*sizes), "1", ratio,
            "within 1%", abs(ratio - 1) <= 0.01, run.seconds, run.torch_seconds,
        )

    if options.wants("P2-2"):
        run = options.measure(escape, SEEDS, ALIGN, _aligned)
        residuals, shares = [], []
        for t, weights in zip(tasks, run.value.weight):
            residuals.append([theory.kkt_residual(w, t.X, t.y) for w in weights])
            u = weights[-1] / np.linalg.norm(weights[-1])
            shares.append(theory.ncf(u, t.X, t.y).sum() / theory.ncf_maximum(t.X, t.y).value)
        residuals, shares = np.array(residuals), np.array(shares)
        options.results["align"] = {"delta": ALIGN, "residual": residuals}
        good = (np.diff(residuals) < 0).all() and (residuals[:, -1] <= 0.05).all() and (shares >= 0.99).all()
        yield Claim(
            "P2-2", f"KKT residual of the whole net at |W| = .3 sqrt(delta), delta = 1e-1..1e-8, {seeds}",
            "to 0",
            f"{'; '.join(f'{line[0]:.2g} to {line[-1]:.2g}' for line in residuals)}; "
            f"N(u)/N* {_list(shares, '.4f')}",
            "decreasing; at 1e-8 <= .05 and N(u)/N* >= .99", good, run.seconds, run.torch_seconds,
        )

    if options.wants("P2-3", "P2-6"):
        steps = 10_000 if options.small else STEPS
        run = options.measure(full_run, SEEDS, steps, bar=lambda items: options.bar(items, "full run"))
        path = options.results["full_run"] = run.value
        if options.wants("P2-3"):
            angles = np.degrees([
                theory.angle_to_nearest(w, theory.kkt_directions_in_plane(t.X, t.y))
                for t, w in zip(tasks, path.passed)
            ])
            shares = path.passed_loss / path.loss[0]
            yield Claim(
                "P2-3", f"angle to the nearest KKT direction, by |w|^2, at |W| = .1 from std 1e-4, {seeds}",
                "0 deg", f"{_list(angles)} deg; loss over the first {_list(shares, '.4f')}", "<= 3 deg",
                (angles <= 3).all(), run.seconds, run.torch_seconds,
            )
        if options.wants("P2-6"):
            found, final = [drops(loss) for loss in path.loss.T], path.loss[-1]
            levels = [(rest**2).sum() / 2 for _, rest in map(at_saddle, tasks)]
            yield Claim(
                "P2-6", f"full run of {steps} steps: final loss, and drops of the loss, {seeds}",
                "0; 2 drops",
                f"{_list(final)}; {_list((len(at) for at, _ in found), 'd')} drops, between them the loss is"
                f" {_list(loss for _, loss in found)} (at the saddles {_list(levels)})",
                "<= 1e-5; 2 drops", (final <= 1e-5).all() and all(len(at) == 2 for at, _ in found),
                run.seconds, run.torch_seconds,
            )

    if options.full and options.wants("P2-6"):
        run = options.measure(full_run, range(20), STEPS, bar=lambda items: options.bar(items, "20 seeds"))
        final = run.value.loss[-1]
        yield Claim(
            "P2-6 20 seeds", f"seeds 0 to 19 that end below 1e-5 after {STEPS} steps; the largest loss", "20",
            f"{(final <= 1e-5).sum()}; {final.max():.1e}", "report only", None,
            run.seconds, run.torch_seconds,
        )

    if options.wants("P2-4", "P2-5"):
        saddles = [at_saddle(t) for t in tasks]
        if options.wants("P2-4"):
            values = [theory.ncf_maximum(t.X, rest).value for t, (_, rest) in zip(tasks, saddles)]
            run = options.measure(escape, SEEDS, ESCAPE, lambda _: RADIUS, saddle=True)
            options.results["saddle"] = {"delta": ESCAPE, "time": run.value.time, "values": values}
            slopes = _slopes(ESCAPE, run.value.time, values)
            yield Claim(
                "P2-4", f"from a saddle: escape time as in P2-1, with N* of the residual labels, {seeds}",
                "1", _list(slopes, ".4f"), "within 1%", (abs(slopes - 1) <= 0.01).all(),
                run.seconds, run.torch_seconds,
            )
        if options.wants("P2-5"):
            run = options.measure(escape, SEEDS, (1e-8,), _aligned, saddle=True)
            residuals = np.array([
                theory.kkt_residual(w[0], t.X, rest)
                for t, (_, rest), w in zip(tasks, saddles, run.value.weight)
            ])
            moved = run.value.moved.ravel()
            yield Claim(
                "P2-5", f"from a saddle, delta = 1e-8: KKT residual, and move of the large neuron, {seeds}",
                "0", f"{_list(residuals)}; |dw_n| {_list(moved, '.1e')}", "<= .02; <= 1e-10",
                (residuals <= 0.02).all() and (moved <= 1e-10).all(), run.seconds, run.torch_seconds,
            )


def figures(results: dict, folder: Path) -> None:
    """kumar_trajectory.png, the paper's figure 1, and kumar_escape.png, of the experiments that have run."""
    from matplotlib.figure import Figure

    if "full_run" in results:
        path = results["full_run"]
        figure = Figure(figsize=(11, 3.5), layout="constrained")
        loss, angle = figure.subplots(1, 2)
        shown = path.step <= 5000
        loss.semilogy(path.step[shown], path.loss[path.step[shown], 0], label="loss")
        loss.semilogy(path.step[shown], path.norm[shown, 0], label="|W|")
        loss.set(title=f"seed {SEEDS[0]}", xlabel="step")
        loss.legend()
        angle.plot(path.step[shown], (path.angle[shown, 0] + 90) % 360 - 90, linewidth=0.8)
        angle.set(title="angle of each neuron", xlabel="step", ylabel="degrees")
        figure.savefig(folder / "kumar_trajectory.png", dpi=110)
    if "escape" in results or "align" in results or "saddle" in results:
        figure = Figure(figsize=(11, 3.5), layout="constrained")
        panels = figure.subplots(1, 3)
        for panel, name, title in zip(panels, ("escape", "saddle"), ("from the origin", "from a saddle")):
            found = results.get(name, {"delta": (), "time": (), "values": ()})
            x = np.log(1 / np.array(found["delta"]))
            for seed, time, value in zip(SEEDS, found["time"], found["values"]):
                (line,) = panel.plot(x, time, "o", label=f"seed {seed}")
                panel.plot(x, time[-1] + (x - x[-1]) / (2 * value), color=line.get_color(), linewidth=1)
            panel.set(title=f"{title}: time to |W| = {RADIUS}, and slope 1/(2 N*)", xlabel="log 1/delta")
            panel.title.set_fontsize(9)
        if "align" in results:
            panels[2].loglog(results["align"]["delta"], results["align"]["residual"].T, "o-")
        panels[2].set(title="KKT residual at |W| = .3 sqrt(delta)", xlabel="delta")
        panels[2].title.set_fontsize(9)
        figure.savefig(folder / "kumar_escape.png", dpi=110)
