"""Chou, Rauhut and Ward, Robust implicit regularization via weight normalization (arXiv:2305.05448).

Claims P4-1 to P4-9: gradient descent and flow on ||A x - y||^2/2 with x = u^L - v^L, (u, v) = w = r v/||v||, one
radius for the whole vector. A is a 25 x 60 matrix of N(0, 1/25), y = A x* for x* of three entries +-U(0.5, 1.5), and
w(0) = alpha 1. Everything runs as an ensemble: instances (seeds, scales, ratios of the rates, step sizes) are the rows
of one weight, and one polar step with rates per row moves all of them.
"""

import itertools
import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .. import functional
from ..dynamics.flow import polar_flow, weight_flow
from ..models.diagonal import DiagonalNet
from ..theory import implicit_bias
from .claims import Claim

__all__ = ["TITLE", "claims", "figures"]

TITLE = "Chou, Rauhut & Ward 2023: weight-normalized diagonal linear nets"

MEASUREMENTS, SIZE, SPARSITY = 25, 60, 3
SEEDS = (0, 1, 2)
STEPS, LR = 40_000, 0.02
TIME = 1e5  # the end of the flows
NAMES = {"swn": "SWN", "ewn": "EWN", None: "plain"}


@dataclass
class Problem:
    """A (M, N), x (N,) sparse, y = A x (M,): float64 tensors; B = [A, -A] in numpy for the predictions."""

    A: Tensor
    x: Tensor
    y: Tensor
    B: np.ndarray

    def error(self, signal):
        """||x - x*||/||x*|| of signals (..., N)."""
        return torch.linalg.vector_norm(torch.as_tensor(signal) - self.x, dim=-1) / self.x.norm()


def problem(seed, measurements=MEASUREMENTS, sparsity=SPARSITY):
    rng = np.random.default_rng(seed)
    A = rng.normal(size=(measurements, SIZE)) / np.sqrt(measurements)
    x = np.zeros(SIZE)
    support = rng.choice(SIZE, sparsity, replace=False)
    x[support] = rng.choice([-1, 1], sparsity) * rng.uniform(0.5, 1.5, sparsity)
    return Problem(torch.tensor(A), torch.tensor(x), torch.tensor(A @ x), implicit_bias.two_sided(A))


def constant_start(alphas):
    """w(0) = alpha 1: (R, 2N)."""
    return torch.as_tensor(alphas, dtype=torch.float64)[:, None].expand(-1, 2 * SIZE).contiguous()


# ------------------------------------------------------------------------------------------------- descent of ensembles


@dataclass
class Run:
    """The end of R descents: weight (R, 2N), signal (R, N), radius at the start and the end, and ||v||, (R,) each.

    recorded: signals (T, R, N) at steps (T,), where asked for.
    """

    weight: Tensor
    signal: Tensor
    r_start: Tensor
    r_end: Tensor
    norm: Tensor
    steps: list[int]
    recorded: list[Tensor]

    def kappa(self, eta, kind):
        return implicit_bias.kappa(self.r_end.numpy(), self.r_start.numpy(), np.asarray(eta), kind)


def polar_stepper(w, kind, lr, radius_lr, retraction):
    """Our kernel: a function that steps w (R, 2N) in place on its gradient, and ||v||, which starts at 1."""
    radius = functional.row_norm(w)
    radius = radius.log() if kind == "ewn" else radius
    norm = torch.ones_like(radius)

    def step(grad):
        functional.polar_sgd_([w], [grad], [radius], [norm], kind=kind, dims=[0], lr=lr, radius_lr=radius_lr,
                              retraction=retraction)

    return step, norm


def torch_stepper(w, kind, lr, radius_lr, retraction):
    """The same in pure torch: leaves (g or alpha, v), autograd, and w overwritten."""
    if retraction != "project":
        raise ValueError(f"retraction must be 'project' in pure torch, got {retraction!r}")
    length = w.norm(dim=1, keepdim=True)
    radius, v = (length.log() if kind == "ewn" else length.clone()).requires_grad_(), (w / length).requires_grad_()
    norm = torch.ones(len(w), dtype=w.dtype, device=w.device)
    rates = radius_lr[:, None], lr[:, None]

    def effective():
        return (radius.exp() if kind == "ewn" else radius) * v / v.norm(dim=1, keepdim=True)

    def step(grad):
        slopes = torch.autograd.grad(effective(), (radius, v), grad)
        with torch.no_grad():
            for leaf, slope, rate in zip((radius, v), slopes, rates):
                leaf.sub_(slope * rate)
            w.copy_(effective())
            norm.copy_(v.norm(dim=1))

    return step, norm


def descend(A, y, start, depth, kind, lr, eta=1.0, steps=STEPS, every=0, retraction="project", backend="wnkernels"):
    """Gradient descent of R instances at once.

    Args:
        A, y: (M, N) and (M,), or (R, M, N) and (R, M).
        start: (R, 2N), w(0).
        kind: "swn", "ewn" or None.
        lr, eta: numbers or (R,): the rate of the direction, and that of the radius over it.
        every: record the signals every so many steps, 0 for never.
        backend: "wnkernels", or "torch" for leaves (g or alpha, v) and autograd.
    """
    net = DiagonalNet(start, depth, two_sided=True)
    matrix, w = net.matrix(A), start.clone()
    lr, eta = (torch.as_tensor(rate, dtype=w.dtype, device=w.device).expand(len(w)).contiguous() for rate in (lr, eta))
    norm = torch.ones(len(w), dtype=w.dtype, device=w.device)
    if kind is not None:
        make = polar_stepper if backend == "wnkernels" else torch_stepper
        take, norm = make(w, kind, lr, lr * eta, retraction)
    at, recorded = [], []
    for step in range(steps + 1):
        if every and step % every == 0:
            at.append(step)
            recorded.append(net.signal(w).detach())
        if step == steps:
            break
        grad, _ = net.gradient(w, matrix, y)
        if kind is None:
            w.sub_(grad.mul_(lr[:, None]))
        else:
            take(grad)
    return Run(w, net.signal(w).detach(), start.norm(dim=1), w.norm(dim=1), norm, at, recorded)


def flow_end(data, start, depth, kind, eta=1.0, end=TIME, backend="wnkernels"):
    """The weight (1, 2N) at the end of the flow from start (2N,): polar on our kernels, or in w without them."""
    net = DiagonalNet(start[None], depth, two_sided=True)
    matrix = net.matrix(data.A)
    options = dict(method="LSODA", rtol=1e-10, atol=1e-13)

    def gradient(w):
        return net.gradient(w, matrix, data.y)[0]

    rates = {} if kind is None else dict(radius_rate=eta)
    run = weight_flow if kind is None or backend == "torch" else polar_flow
    return run(gradient, start[None], [end], kind=kind, **rates, **options).weight[-1]


# --------------------------------------------------------------------------------------------------------- experiments


def invariants(data, lrs, depths, eta=0.3, alpha=0.1, steps=STEPS, backend="wnkernels", bar=iter):
    """(depth, kind) -> the `Run` of a row for each step size, and the relative residual of the invariant for each."""
    found = {}
    for depth, kind in bar(list(itertools.product(depths, ("swn", "ewn")))):
        start = constant_start([alpha] * len(lrs))
        run = descend(data.A, data.y, start, depth, kind, torch.tensor(lrs, dtype=torch.float64), eta, steps,
                      backend=backend)
        residuals = [implicit_bias.invariant_residual(w, w0, k, data.B, depth)
                     for w, w0, k in zip(run.weight.numpy(), start.numpy(), run.kappa(eta, kind))]
        found[depth, kind] = run, np.array(residuals)
    return found


def flow_invariants(data, depths, eta=0.3, alpha=0.1, backend="wnkernels"):
    """(depth, kind) -> kappa and the relative residual of the invariant at the end of the flow."""
    found = {}
    start = constant_start([alpha])[0]
    for depth, kind in itertools.product(depths, ("swn", "ewn")):
        w = flow_end(data, start, depth, kind, eta, backend=backend)[0]
        kappa = float(implicit_bias.kappa(float(w.norm()), float(start.norm()), eta, kind))
        found[depth, kind] = kappa, implicit_bias.invariant_residual(w.numpy(), start.numpy(), kappa, data.B, depth)
    return found


def kappa_grid(data, alphas, etas, kind, lr, steps, retraction="project", backend="wnkernels", device="cpu"):
    """The ensemble of all pairs (alpha, eta) in one batch, depth 2, and its predictions without a flow.

    Returns: a dict for each pair: alpha, eta, kappa, predicted, distance (the largest of a coordinate to the predicted
    limit), error (to x*).
    """
    pairs = list(itertools.product(alphas, etas))
    start = constant_start([alpha for alpha, _ in pairs])
    run = descend(data.A.to(device), data.y.to(device), start.to(device), 2, kind, lr, [eta for _, eta in pairs], steps,
                  retraction=retraction, backend=backend)
    kappas = implicit_bias.kappa(run.r_end.cpu().numpy(), run.r_start.cpu().numpy(), [eta for _, eta in pairs], kind)
    rows = []
    for (alpha, eta), signal, kappa, w0 in zip(pairs, run.signal.cpu(), kappas, start.numpy()):
        predicted, limit = implicit_bias.predicted_limit(data.B, data.y.numpy(), w0, eta, kind)
        distance = np.abs(signal.numpy() - (limit[:SIZE] - limit[SIZE:])).max()
        rows.append(dict(kind=kind, lr=lr, alpha=alpha, eta=eta, kappa=float(kappa), predicted=float(predicted),
                         distance=float(distance), error=float(data.error(signal))))
    return rows


def batch_speed(data, alphas, etas, steps, lr=LR):
    """Seconds of the grid as one batch, of the fastest way one by one, its name, and the largest difference of signals.

    One by one: our step, the same in pure torch, and numpy without torch; the fastest on the first instance runs all.
    """
    pairs = list(itertools.product(alphas, etas))
    start, eta = constant_start([alpha for alpha, _ in pairs]), [eta for _, eta in pairs]

    def numpy_alone(i):
        w, y = start[i].numpy(), data.y.numpy()
        r, n = np.sqrt(w @ w), 1.0
        B, columns = data.B, np.ascontiguousarray(data.B.T)
        for _ in range(steps):
            grad = 2 * w * (columns @ (B @ (w * w) - y))
            theta = w / r
            radial = theta @ grad
            v = n * theta - (lr * r / n) * (grad - radial * theta)
            r -= lr * eta[i] * radial
            n = np.sqrt(v @ v)
            w = (r / n) * v
        return torch.tensor(w[:SIZE] ** 2 - w[SIZE:] ** 2)

    def torch_alone(i, backend):
        return descend(data.A, data.y, start[i:i + 1], 2, "swn", lr, eta[i], steps, backend=backend).signal[0]

    ways = {"numpy": numpy_alone, "polar step": lambda i: torch_alone(i, "wnkernels"),
            "pure torch": lambda i: torch_alone(i, "torch")}

    def timed(function, *args):
        begin = time.perf_counter()
        value = function(*args)
        return value, time.perf_counter() - begin

    name = min(ways, key=lambda way: timed(ways[way], 0)[1])
    together, batch = timed(lambda: descend(data.A, data.y, start, 2, "swn", lr, eta, steps).signal)
    alone, single = timed(lambda: torch.stack([ways[name](i) for i in range(len(pairs))]))
    return batch, single, name, float((together - alone).abs().max())


def equivalence(data, runs, eta=0.3, alpha=0.1, depths=(2, 3)):
    """(depth, kind) -> the largest difference of a coordinate of the end of the first row of `invariants` and that of
    plain flow from kappa w(0)."""
    differences = {}
    for depth, kind in itertools.product(depths, ("swn", "ewn")):
        run, _ = runs[depth, kind]
        start = float(run.kappa(eta, kind)[0]) * constant_start([alpha])[0]
        net = DiagonalNet(start[None], depth, two_sided=True)
        limit = net.signal(flow_end(data, start, depth, None)).detach()[0]
        differences[depth, kind] = float((run.signal[0] - limit).abs().max())
    return differences


def recovery(datas, alpha=0.1, eta=0.1, every=100, backend="wnkernels"):
    """kind -> errors (T, S) along SWN and plain descent, a row of the ensemble for each problem; and the steps (T,)."""
    A, y = torch.stack([data.A for data in datas]), torch.stack([data.y for data in datas])
    errors = {}
    for kind in ("swn", None):
        run = descend(A, y, constant_start([alpha] * len(datas)), 2, kind, LR, eta, every=every, backend=backend)
        errors[kind] = np.array([[float(data.error(x)) for data, x in zip(datas, signals)] for signals in run.recorded])
    return errors, np.array(run.steps)


def flow_errors(datas, alphas, eta=0.1, backend="wnkernels", bar=iter):
    """(kind, alpha) -> errors (S,) at the end of the flows, SWN and plain, depth 2."""
    errors = {}
    for kind, alpha in bar([(kind, alpha) for alpha in alphas for kind in ("swn", None)]):
        ends = [flow_end(data, constant_start([alpha])[0], 2, kind, eta, backend=backend)[0] for data in datas]
        errors[kind, alpha] = np.array([float(data.error(w[:SIZE] ** 2 - w[SIZE:] ** 2))
                                        for data, w in zip(datas, ends)])
    return errors


def phase_diagram(measurements, sparsities, alphas, etas, seeds, steps, device="cpu"):
    """SWN and plain descent of all combinations as one batch each, depth 2.

    Returns: kind -> errors, of shape (len(measurements), len(sparsities), len(alphas), len(etas), len(seeds)).
    """
    combinations = list(itertools.product(measurements, sparsities, alphas, etas, seeds))
    datas = [problem(seed, m, s) for m, s, _, _, seed in combinations]
    # An instance of fewer measurements has rows of zeros.
    columns = [data.A for data in datas], [data.y for data in datas]
    A, y = (torch.nn.utils.rnn.pad_sequence(column, batch_first=True).to(device) for column in columns)
    start = constant_start([alpha for _, _, alpha, _, _ in combinations]).to(device)
    eta = [eta for _, _, _, eta, _ in combinations]
    shape = [len(values) for values in (measurements, sparsities, alphas, etas, seeds)]
    errors = {}
    for kind in ("swn", None):
        signals = descend(A, y, start, 2, kind, LR, eta, steps).signal.cpu()
        errors[kind] = np.reshape([float(data.error(x)) for data, x in zip(datas, signals)], shape)
    return errors


def equal_rates(data, depths=(2, 3), alpha=0.1, backend="wnkernels"):
    """depth -> the largest difference of a coordinate of the ends of EWN flow with equal rates and of plain flow."""
    start, found = constant_start([alpha])[0], {}
    for depth in depths:
        net = DiagonalNet(start[None], depth, two_sided=True)
        ends = [net.signal(flow_end(data, start, depth, kind, backend=backend)).detach() for kind in ("ewn", None)]
        found[depth] = float((ends[0] - ends[1]).abs().max())
    return found


# -------------------------------------------------------------------------------------------------------------- claims


def _invariant_claims(options):
    data, lrs = problem(0), (0.02, 0.01, 0.005, 0.0025)
    steps = STEPS // 4 if options.small else STEPS
    run = options.measure(invariants, data, lrs, (2, 3), steps=steps, bar=lambda items: options.bar(items, "P4-1"))
    options.results["chou_invariants"] = {f"L={L} {NAMES[kind]}": residuals for (L, kind), (_, residuals) in
                                          run.value.items()}
    if options.wants("P4-1"):
        for (depth, kind), (_, residuals) in run.value.items():
            ratios = residuals[:-1] / residuals[1:]
            yield Claim(f"P4-1 L={depth} {NAMES[kind]}", "residual of the invariant after raw-v descent at lr .02, "
                        ".01, .005, .0025 is of first order: its ratios", "2 each",
                        f"{', '.join(f'{r:.4f}' for r in residuals)}; {ratios.min():.2f}..{ratios.max():.2f}",
                        "ratios in [1.8, 2.2]", bool(((ratios >= 1.8) & (ratios <= 2.2)).all()), run.seconds,
                        run.torch_seconds)
        if not options.small:
            flow = options.measure(flow_invariants, data, (2, 3))
            worst = max(residual for _, residual in flow.value.values())
            yield Claim("P4-1 flow", "the same residual at the end of the flow, worst of L = 2, 3, SWN and EWN", 0.0,
                        worst, "<= 1e-8", worst <= 1e-8, flow.seconds, flow.torch_seconds)
            start, y = constant_start([0.1])[0].numpy(), data.y.numpy()
            predicted = {kind: implicit_bias.predicted_limit(data.B, y, start, 0.3, kind)[0] for kind in ("swn", "ewn")}
            worst = max(abs(flow.value[2, kind][0] / predicted[kind] - 1) for kind in predicted)
            yield Claim("P4-2 flow", "kappa of these flows, L = 2, SWN and EWN, from a scalar root and the entropic "
                        "dual: relative error", 0.0, worst, "<= 1e-6", worst <= 1e-6, flow.seconds, flow.torch_seconds)
    if options.wants("P4-3"):
        with options.clock() as clock:
            differences = equivalence(data, run.value)
        worst = max(differences.values())
        text = ", ".join(f"L={depth} {NAMES[kind]} {value:.1e}" for (depth, kind), value in differences.items())
        yield Claim("P4-3", "limit of the descent is that of plain flow from kappa w(0), largest difference of a "
                    "coordinate, alpha .1, ratio .3, lr .02", 0.0, text, "<= 5e-3", worst <= 5e-3, clock.seconds)


def _kappa_claims(options):
    data = problem(0)
    alphas, etas = (0.01, 0.03, 0.1), (0.1, 0.3, 1.0)
    cases = [("swn", 0.02, STEPS, etas, 5e-3), ("ewn", 0.02, STEPS, etas, 5e-3)][:1 if options.small else 2]
    if options.full:
        cases.append(("swn", 0.0025, 24 * STEPS, etas, 1e-3))
    elif not options.small:
        cases.append(("swn", 0.0025, 16 * STEPS, etas[1:], 1e-3))  # the end is slowest with ratio .1
    for kind, lr, steps, etas, bound in options.bar(cases, "P4-2"):
        run = options.measure(kappa_grid, data, alphas, etas, kind, lr, steps)
        options.results[f"chou_kappa_{kind}_{lr}"] = run.value
        relative = max(abs(row["kappa"] / row["predicted"] - 1) for row in run.value)
        distance = max(row["distance"] for row in run.value)
        fine = lr < 0.02
        yield Claim(f"P4-2 {NAMES[kind]} lr={lr}", f"kappa from a scalar root and the entropic dual, L = 2, "
                    f"{len(run.value)} pairs of alpha in .01 to .1 and ratio {etas[0]} to 1: relative error; largest "
                    "difference of a coordinate of the limit", 0.0, f"{relative:.1e}; {distance:.1e}",
                    f"<= {bound:g}" + ("; <= 1e-3" if fine else ""),
                    relative <= bound and (not fine or distance <= 1e-3), run.seconds, run.torch_seconds)


def _batch_claims(options):
    data = problem(0)
    alphas, etas = np.geomspace(0.003, 0.3, 8), np.geomspace(0.03, 1, 8)
    batch, single, name, difference = batch_speed(data, alphas, etas, 500 if options.small else 2000)
    speedup = single / batch
    yield Claim("P4-2 batch", f"grid of 64 pairs of alpha and ratio as one batch: time of the fastest way one "
                f"by one ({name}) over its time; largest difference of a signal", ">= 5; 0",
                f"{speedup:.1f}; {difference:.1e}", ">= 5; <= 1e-9", speedup >= 5 and difference <= 1e-9, batch)
    if not options.small:
        count = 32 if options.full else 16
        alphas, etas = np.geomspace(0.003, 0.3, count), np.geomspace(0.03, 1, count)
        options.results["chou_grid"] = kappa_grid(data, alphas, etas, "swn", LR, STEPS // (1 if options.full else 4),
                                                  device=options.device)


def _recovery_claims(options):
    datas = [problem(seed) for seed in SEEDS]
    if options.wants("P4-4", "P4-8"):
        run = options.measure(recovery, datas)
        errors, steps = run.value
        options.results["chou_recovery"] = run.value
        times = run.seconds, run.torch_seconds
        ratio = float((errors[None][-1] / errors["swn"][-1]).min())
        yield Claim("P4-4 descent", f"alpha .1, L = 2: error of plain descent over that of SWN, ratio .1, {steps[-1]} "
                    f"steps, least of {len(SEEDS)} seeds", "> 1", ratio, ">= 50", ratio >= 50, *times)
        reached = [int(steps[np.argmax(column <= 1e-2)]) if (column <= 1e-2).any() else -1 for column in
                   errors["swn"].T]
        never = bool((errors[None] > 1e-2).all())
        yield Claim("P4-8", "steps until an error of 1e-2, alpha .1, L = 2: SWN with ratio .1, by seed; does plain "
                    "descent get there?", "SWN only", f"{', '.join(map(str, reached))}; {'no' if never else 'yes'}",
                    "<= 2000; never", all(0 <= step <= 2000 for step in reached) and never, *times)
    if options.wants("P4-4", "P4-5", "P4-6") and not options.small:
        run = options.measure(flow_errors, datas, (1e-3, 1e-2, 0.1, 0.3),
                              bar=lambda items: options.bar(items, "P4-4, 5, 6"))
        errors, times = run.value, (run.seconds, run.torch_seconds)
        options.results["chou_flow_errors"] = errors
        ratios = errors[None, 0.1] / errors["swn", 0.1]
        yield Claim("P4-4 flow", f"the same at the end of the flows, T = {TIME:g}", "> 1",
                    ", ".join(f"{r:.2g}" for r in ratios), ">= 100", bool((ratios >= 100).all()), *times)
        ours, theirs = (errors[kind, 1e-3] / errors[kind, 1e-2] for kind in ("swn", None))
        yield Claim("P4-5", "error of the flow from alpha = 1e-3 over that from 1e-2, L = 2: SWN with ratio .1; plain",
                    "1; below 1", f"{', '.join(f'{r:.2f}' for r in ours)}; {', '.join(f'{r:.2f}' for r in theirs)}",
                    "in [.5, 2]; <= .2", bool(((ours >= 0.5) & (ours <= 2)).all() and (theirs <= 0.2).all()), *times)
        gains = 1 - errors["swn", 0.3] / errors[None, 0.3]
        least = max(float(data.x.abs().sum()) for data in datas)
        yield Claim("P4-6", f"r(0)^2 = 10.8 > ||x*||_1 <= {least:.2g}: the error falls by (share of the plain one)",
                    "hardly", ", ".join(f"{g:.0%}" for g in gains), "<= 15%", bool((gains <= 0.15).all()), *times)


def _phase_claims(options):
    measurements, sparsities = (10, 20, 30, 40), (1, 2, 4, 8)
    alphas, etas = (1e-3, 1e-2, 0.1, 0.3), (0.03, 0.1, 0.3, 1.0)
    with options.clock() as clock:
        errors = phase_diagram(measurements, sparsities, alphas, etas, range(16), STEPS // 2, options.device)
    options.results["chou_phase"] = errors
    for i, alpha in enumerate(alphas):
        found = {kind: (values[:, :, i] <= 1e-2).mean((0, 1, 3)) for kind, values in errors.items()}
        yield Claim(f"P4-5 alpha={alpha:g}", "10 to 40 measurements, 1 to 8 entries, 16 seeds: share recovered to "
                    f"1e-2, SWN with ratio {', '.join(map(str, etas))}; plain", "SWN > plain",
                    f"{', '.join(f'{share:.0%}' for share in found['swn'])}; {found[None][0]:.0%}", "reported", None,
                    clock.seconds)


def _endpoint_claims(options):
    if options.wants("P4-7"):
        run = options.measure(equal_rates, problem(0), (2,) if options.small else (2, 3))
        worst = max(run.value.values())
        yield Claim("P4-7", "EWN flow with equal rates ends where plain flow ends, largest difference of a coordinate, "
                    f"L in {sorted(run.value)}", 0.0, worst, "<= 1e-4", worst <= 1e-4, run.seconds, run.torch_seconds)
    if options.wants("P4-9"):
        with options.clock() as clock:
            datas = [problem(seed) for seed in SEEDS]
            found = [implicit_bias.basis_pursuit(data.A.numpy(), data.y.numpy()) for data in datas]
            worst = max(float(np.abs(x - data.x.numpy()).max()) for x, data in zip(found, datas))
        yield Claim("P4-9", f"basis pursuit by linear programming recovers x*, worst of {len(SEEDS)} seeds", 0.0, worst,
                    "<= 1e-10", worst <= 1e-10, clock.seconds)


def claims(options):
    """P4-1 to P4-9, see the module's docstring."""
    for ids, part in ((("P4-1", "P4-3"), _invariant_claims), (("P4-2",), _kappa_claims), (("P4-2",), _batch_claims),
                      (("P4-4", "P4-5", "P4-6", "P4-8"), _recovery_claims), (("P4-7", "P4-9"), _endpoint_claims)):
        if options.wants(*ids):
            yield from part(options)
    if options.full and options.wants("P4-5"):
        yield from _phase_claims(options)


def figures(results, folder):
    """Figures of what the experiments have left in `results`, as PNG files in `folder`."""
    from matplotlib.figure import Figure

    if "chou_recovery" in results:
        errors, steps = results["chou_recovery"]
        figure = Figure(figsize=(6, 4), layout="constrained")
        axis = figure.subplots()
        for k, (kind, columns) in enumerate(errors.items()):
            for j, column in enumerate(columns.T):
                label = {"swn": "SWN, ratio of rates .1", None: "plain"}[kind] if j == 0 else None
                axis.plot(steps[1:], column[1:], color=f"C{k}", label=label)
        axis.set(xscale="log", yscale="log", xlabel=f"step of gradient descent, lr {LR}", ylabel="||x - x*||/||x*||",
                 title="alpha = 0.1, L = 2")
        axis.legend()
        figure.savefig(folder / "chou_recovery.png", dpi=130)
    if "chou_flow_errors" in results:
        errors = results["chou_flow_errors"]
        alphas = sorted({alpha for _, alpha in errors})
        figure = Figure(figsize=(6, 4), layout="constrained")
        axis = figure.subplots()
        for k, kind in enumerate(("swn", None)):
            values = np.array([errors[kind, alpha] for alpha in alphas])
            label = {"swn": "SWN, ratio of rates .1", None: "plain"}[kind]
            axis.plot(alphas, values, "o-", color=f"C{k}", label=[label] + [None] * (values.shape[1] - 1))
        axis.set(xscale="log", yscale="log", xlabel="scale of the start, alpha", ylabel="||x - x*||/||x*||",
                 title=f"gradient flow to T = {TIME:g}, L = 2")
        axis.legend()
        figure.savefig(folder / "chou_scales.png", dpi=130)
    if "chou_grid" in results:
        rows = results["chou_grid"]
        alphas, etas = (sorted({row[name] for row in rows}) for name in ("alpha", "eta"))
        panels = {"log10 of ||x - x*||/||x*||": [np.log10(row["error"]) for row in rows],
                  "log10 of kappa, measured": [np.log10(row["kappa"]) for row in rows],
                  "log10 of kappa, predicted": [np.log10(row["predicted"]) for row in rows]}
        figure = Figure(figsize=(14, 4), layout="constrained")
        axes = figure.subplots(1, 3)
        for axis, (title, values) in zip(axes, panels.items()):
            image = axis.pcolormesh(alphas, etas, np.reshape(values, (len(alphas), len(etas))).T, shading="nearest")
            figure.colorbar(image, ax=axis)
            axis.set(xscale="log", yscale="log", xlabel="alpha", ylabel="ratio of the rates, eta", title=title)
        figure.savefig(folder / "chou_grid.png", dpi=130)
