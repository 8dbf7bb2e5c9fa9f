"""Inductive bias of gradient descent for weight-normalized nets (Morwani and Ramaswamy, arXiv:2010.12909).

Gradients and identities of the parametrization, flows, trajectories, loss rates, and the sparsity of EWN late
in training. The recipes of the replays are the authors' published ones (wnkernels/papers/data).
"""

import dataclasses
import gzip
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from .. import functional, reference
from ..dynamics import losses, normalized_descent, objective, polar_flow, polar_weights, pruning, weight_flow
from ..dynamics.diagnostics import participation_ratio, top_share
from ..models.homogeneous import mlp
from ..theory import rates
from .claims import Claim, Options, read_data

TITLE = "Morwani and Ramaswamy: EWN and SWN, sparsity and loss rates"

KINDS = ("ewn", "swn", None)
F64 = torch.float64


def name_of(kind: str | None) -> str:
    return "plain" if kind is None else kind.upper()


def spread(values: Tensor) -> float:
    """(max - min)/mean."""
    return ((values.max() - values.min()) / values.mean()).item()


# ---------------------------------------------------------------------------- P0-1, P0-2: gradients and steps

SHAPES = (((7, 5), 0), ((7, 5), 1), ((3, 11), None), ((1, 4), 0), ((4, 3, 3, 3), 0), ((5, 4, 2), 1))


def gradient_errors(device: str) -> dict[str, float]:
    """The worst relative error of the kernels' gradients, and of v . dv = 0, over kinds and shapes.

    In float64 against central differences of the reference, in float32 against autograd of the reference in
    float64.
    """
    worst = {"differences": 0.0, "float32": 0.0, "orthogonal": 0.0}
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=F64)

    for kind in ("swn", "ewn"):
        for shape, dim in SHAPES:
            v, c = draw(*shape), draw(*shape)
            g = draw(*(() if dim is None else (shape[dim],)))

            def loss(v, g):
                return (c * torch.sin(reference.weight_norm(v, g, dim, kind))).sum()

            def kernel_gradients(dtype):
                leaves = [x.to(device, dtype).requires_grad_() for x in (v, g)]
                w = functional.weight_norm(*leaves, dim, kind)
                # The gradient of w is that of the float64 loss, so that only the kernels' own errors show.
                exact = reference.weight_norm(*(x.detach().to("cpu", F64) for x in leaves), dim, kind)
                grads = torch.autograd.grad(w, leaves, (c * torch.cos(exact)).to(device, dtype))
                return [x.cpu().double() for x in grads]

            for dtype, key, truth in (
                (F64, "differences", differences(loss, v, g)),
                (
                    torch.float32,
                    "float32",
                    torch.func.grad(loss, (0, 1))(v.float().double(), g.float().double()),
                ),
            ):
                grads = kernel_gradients(dtype)
                for ours, exact in zip(grads, truth):
                    worst[key] = max(worst[key], ((ours - exact).norm() / exact.norm()).item())
                if dtype == F64:
                    dims = reference._reduced_dims(v, dim)
                    inner = (v * grads[0]).sum(dims).abs()
                    lengths = (torch.linalg.vector_norm(x, dim=dims) for x in (v, grads[0]))
                    worst["orthogonal"] = max(worst["orthogonal"], (inner / math.prod(lengths)).max().item())
    return worst


def differences(loss: Callable, *tensors: Tensor, h: float = 1e-4) -> list[Tensor]:
    """Central differences, with Richardson's extrapolation to fourth order."""
    result = []
    for k, x in enumerate(tensors):
        slopes = torch.zeros_like(x).reshape(-1)
        for i in range(x.numel()):

            def at(delta):
                moved = x.clone().reshape(-1)
                moved[i] += delta
                return loss(*tensors[:k], moved.view(x.shape), *tensors[k + 1 :]).item()

            slopes[i] = (8 * (at(h) - at(-h)) - (at(2 * h) - at(-2 * h))) / (12 * h)
        result.append(slopes.view(x.shape))
    return result


def step_errors(dtype: torch.dtype, rows: int, device: str, backend: str) -> float:
    """The worst relative error of |v'|^2 = |v|^2 + (lr |dv|)^2 and tan angle = lr |dv|/|v|, 20 steps.

    dv = (s/|v|) (G - <G, theta> theta) is computed here, in float64, from the weight before the step.
    """
    generator = torch.Generator().manual_seed(0)

    def draw():
        return torch.randn(rows, 9, generator=generator, dtype=F64).to(device, dtype)

    def state(point):
        """theta (R, N), |s| and |v| (R, 1), in float64; where g is negative theta is -w/|w|."""
        w = point.weights[0].double()
        length = w.norm(dim=1, keepdim=True)
        sign = torch.sign(point.radius[0])[:, None] if point.kinds[0] == "swn" else 1.0
        return sign * w / length, length, point.norm[0].double().clone()[:, None]

    worst, lr = 0.0, 0.03
    for kind in ("swn", "ewn"):
        point = polar_weights([draw()], kind, backend=backend)
        for _ in range(20):
            (theta, length, n), G = state(point), draw()
            point.step([G], lr)
            G = G.double()
            turn = lr * length / n * (G - (G * theta).sum(1, keepdim=True) * theta).norm(dim=1, keepdim=True)
            new_theta, _, new_n = state(point)
            angle = 2 * torch.asin((new_theta - theta).norm(dim=1, keepdim=True) / 2)
            errors = new_n**2 / (n**2 + turn**2) - 1, torch.tan(angle) / (turn / n) - 1
            worst = max(worst, *(e.abs().max().item() for e in errors))
    return worst


# ------------------------------------------------------------------------------------------- P0-3: flows in w


def quadratic(seed: int) -> tuple[Callable, Tensor]:
    """The gradient of a positive definite quadratic of a (3, 4) weight, and a start."""
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(12, 12, generator=generator, dtype=F64)
    A = A @ A.T / 12 + torch.eye(12, dtype=F64)
    target, start = torch.randn(2, 3, 4, generator=generator, dtype=F64)
    return lambda w: (A @ (w - target).reshape(-1)).view(3, 4), start


FLOWS = (  # kind, |v|, rate of the radius, rate of the direction
    ("ewn", 1.0, 1.0, 1.0),
    ("swn", 1.0, 1.0, 1.0),
    ("ewn", 1.7, 0.3, 1.5),
    ("swn", 1.7, 0.3, 1.5),
)


def flow_difference(
    kind: str, norm: float, radius_rate: float, direction_rate: float, time: float = 1.0
) -> float:
    """The largest difference of a weight between the polar flow and its equivalent in w, at all times."""
    gradient, start = quadratic(0)
    times = np.linspace(0, time, 11)
    options = dict(kind=kind, norm=norm, radius_rate=radius_rate, direction_rate=direction_rate)
    polar, plain = (flow(gradient, start, times, **options) for flow in (polar_flow, weight_flow))
    return (polar.weight - plain.weight).abs().max().item()


def descent_errors(
    kind: str, norm: float, radius_rate: float, direction_rate: float, backend: str, time: float = 1.0
) -> list[float]:
    """The distance of polar descent from the flow in w at a time, for four rates that halve."""
    gradient, start = quadratic(0)
    exact = weight_flow(
        gradient, start, time, kind=kind, norm=norm, radius_rate=radius_rate, direction_rate=direction_rate
    ).weight[-1]
    errors = []
    for steps in (200, 400, 800, 1600):
        ratio = radius_rate / direction_rate
        point = polar_weights([start], kind, norm=norm, radius_lr_ratio=ratio, backend=backend)
        for _ in range(steps):
            point.step([gradient(point.weights[0])], direction_rate * time / steps)
        errors.append((point.weights[0] - exact).norm().item())
    return errors


# -------------------------------------------------------------------------- P0-4: trajectories of two neurons

STARTS = ((1.0, 1.0), (3.0, 1.0), (1.0, 3.0), (5.0, 1.0), (1.0, 5.0))
INPUT = (2.0, 1.0)


def trajectories(
    kind: str | None, scale: float, backend: str, stop: float = -50.0
) -> tuple[np.ndarray, list[np.ndarray]]:
    """f = <x, w> with loss e^-f from all STARTS at once, each scalar weight its own neuron.

    Returns: the ends (5, 2), and the points on the way, (5, 2) each.
    """
    x = torch.tensor(INPUT, dtype=F64)

    def log_domain(weights):  # the two weights of a start are two rows
        w = weights[0].view(-1, 2)
        return -(w @ x), [-x.repeat(len(w))[:, None]]

    start = torch.tensor(STARTS, dtype=F64).reshape(-1, 1)
    point = polar_weights([start], kind, instances=len(STARTS), backend=backend)
    path = []
    run = normalized_descent(
        log_domain,
        point,
        lr=0.01 / scale,
        lr_cap=0.1 / scale,
        frac=10,
        stop=stop,
        callback=lambda step, _, point, __: path.append(point.weights[0].view(-1, 2).numpy().copy()),
    )
    return run.weights[0].view(-1, 2).numpy(), path


def bounded_limits() -> np.ndarray:
    """The flows from all STARTS until f = 1e4, in another time: their weights, (5, 2)."""
    x = torch.tensor(INPUT, dtype=F64)

    def far(_, w):
        return (w[:, 0] @ x).item() - 1e4

    far.terminal = True
    ends = []
    for start in STARTS:
        w0 = torch.tensor(start, dtype=F64)[:, None]
        flow = polar_flow(lambda w: -x[:, None] / w.square().sum(), w0, 1e5, kind="ewn", events=far)
        ends.append(flow.weight[-1][:, 0].numpy())
    return np.stack(ends)


# ------------------------------------------------------------------------------- P0-5, P0-6: how fast it goes


def replay_rates(backend: str) -> dict[str, list[tuple[int, float, float]]]:
    """conv_rate with one layer: kind -> (updates made, our loss, the logged one)."""
    data = read_data("conv_rate_1layer")
    x, y = (torch.tensor(data[key], dtype=F64) for key in ("x", "y"))
    result = {}
    for kind in KINDS:
        logged = data["loss_after_updates"][kind or "none"]
        point = polar_weights(
            [torch.tensor([data["w_init"]], dtype=F64)], kind, norm="weight", backend=backend
        )
        result[kind or "none"] = rows = []
        for step in range(data["steps"]):
            margins = y * (x @ point.weights[0][0])
            log_loss, slope = losses.logistic(margins)
            loss = log_loss.exp()
            if str(step) in logged:
                rows.append((step, loss.item(), logged[str(step)]))
            point.step([(slope * y * loss @ x)[None]], data["lr"])
    return result


def deep_rates(kind: str | None, depth: int, steps: int, backend: str, device: str = "cpu") -> list[float]:
    """conv_rate with 1 to 4 linear layers of width 100: the loss after each of `steps` updates.

    All start with the same function: the layers are torch's, and the first is moved the least to give w_init.
    """
    data = read_data("conv_rate_1layer")
    x, y, target = (torch.tensor(data[key], dtype=F64, device=device) for key in ("x", "y", "w_init"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        widths = [2] + [100] * (depth - 1) + [1]
        start = [nn.Linear(a, b, bias=False).weight.detach().double() for a, b in zip(widths, widths[1:])]
    start = [w.to(device) for w in start]
    rest = torch.eye(1, dtype=F64, device=device)
    for w in reversed(start[1:]):
        rest = rest @ w
    start[0] = start[0] + rest.T @ (target[None] - rest @ start[0]) / rest.square().sum()
    point = polar_weights(start, kind, norm="weight", backend=backend)

    def forward(weights):
        f = x.T
        for w in weights:
            f = w @ f
        return y * f[0]

    gradient, trace = objective(forward, losses.logistic), []
    for _ in range(steps):
        log_loss, grads = gradient(point.weights)
        trace.append(log_loss)
        loss = log_loss.exp()
        point.step([g * loss for g in grads], data["lr"])
    return torch.stack(trace).exp().tolist()


def scalar_rate(kind: str, depth: int, margins: Sequence[float]) -> list[float]:
    """depth^2 L t (log t)^(2-2/depth) of the net w^depth with loss e^-margin, or L t (log t)^2.

    The flow runs on the kernels, in the time of the margin: the gradient over L is divided by the margin's
    speed, and dt = e^margin/speed d margin is summed up beside it.
    """

    def speed(w):  # of the margin in the true time, over L
        return w**2 if kind == "ewn" else depth**2 * w ** (2 * depth - 2)

    grid = np.arange(1.0, max(margins) + 1e-9, 0.01)
    start = torch.ones(1, 1, dtype=F64)
    flow = polar_flow(lambda w: -depth * w ** (depth - 1) / speed(w), start, grid - 1 + 1e-300, kind=kind)
    w = flow.weight[:, 0, 0].numpy()
    margin = w**depth
    logs = margin - np.log(speed(w))
    result = []
    for m in margins:
        from scipy.integrate import simpson

        n = int(np.argmin(np.abs(grid - m))) + 1
        scaled = simpson(np.exp(logs[:n] - margin[n - 1]), x=margin[:n])  # t L
        power = 2.0 if kind == "ewn" else 2 - 2 / depth
        result.append(
            (1 if kind == "ewn" else depth**2) * scaled * (margin[n - 1] + math.log(scaled)) ** power
        )
    return result


# -------------------------------------------------------------------------------------------- P0-7, P0-8: XOR

XOR_SEEDS = tuple(range(20))
XOR_PATIENCE = 500  # steps; some starts cannot fit the four points, and some descents stop at a kink of relu


def xor_start(seed: int) -> Tensor:
    """The first layer that torch draws: (20, 2)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Linear(2, 20, bias=False).weight.detach().double()


def xor(
    start: Tensor,
    kinds: Sequence[str | None],
    backend: str,
    callback: Callable | None = None,
    device: str = "cpu",
):
    """2 -> 20 relu -> +-1 on the points of XOR, from E weights (E, 20, 2), in each of the kinds: a `Descent`
    of one batch, all starts of the first kind first."""
    data = read_data("xor")
    x, y, out = (torch.tensor(data[key], dtype=F64, device=device) for key in ("x", "y", "output_weights"))
    E, width, _ = start.shape
    instances, signed = E * len(kinds), y[:, None] * x

    def log_domain(weights):
        hidden = nn.functional.linear(x, weights[0]).relu_().view(4, -1, width)
        log_loss, slope = losses.logistic((hidden @ out).T * y)
        back = hidden.sign_().mul_(slope.T.unsqueeze(-1) * out)
        return log_loss if instances > 1 else log_loss[0], [back.view(4, -1).T @ signed]

    def of_kinds(key):
        each = [data[key][kind or "none"] for kind in kinds]
        return torch.tensor(each, dtype=F64).repeat_interleave(E) if instances > 1 else each[0]

    point = polar_weights(
        [start.reshape(-1, 2).repeat(len(kinds), 1).to(device)],
        dict.fromkeys(kinds, E),
        instances=instances,
        backend=backend,
    )
    with torch.inference_mode(backend == "wnkernels"):  # nothing here needs autograd but torch's own backend
        return normalized_descent(
            log_domain,
            point,
            lr=data["lr"],
            lr_cap=of_kinds("lr_cap"),
            frac=of_kinds("frac"),
            stop=data["stop_log_loss"],
            patience=XOR_PATIENCE,
            callback=callback,
            shrink=callback is None,
        )


def xor_in_numpy(start: np.ndarray, kind: str | None) -> tuple[np.ndarray, int]:
    """`xor` of one start (20, 2), written by hand in numpy for this one net: the referee of the batch.

    Nothing of wnkernels is in it, and it is the fastest way known to run the instances one by one.

    Returns: the weights at the end, and the steps tried.
    """
    data, name = read_data("xor"), kind or "none"
    x, y, out = (np.array(data[key], float) for key in ("x", "y", "output_weights"))
    columns = np.ascontiguousarray(x.T)
    lr, cap, power = data["lr"], data["lr_cap"][name], 1 / data["frac"][name]

    def log_domain(w):  # log L and (dL/dw)/L of the logistic loss
        before = w @ columns
        active = before > 0
        margins = (out @ (before * active)) * y
        each = np.logaddexp(0.0, -margins)
        logs = np.where(margins > 40, -margins, np.log(np.maximum(each, 1e-300)))
        top = logs.max()
        log_loss = top + math.log(np.exp(logs - top).sum())
        slope = -np.exp(-np.logaddexp(0.0, margins) - log_loss) * y
        return log_loss, (active * slope * out[:, None]) @ x

    w, n, steps, before = start.copy(), np.ones(len(start)), 0, math.inf
    radius = np.sqrt((w * w).sum(1))
    if kind == "ewn":
        radius = np.log(radius)
    log_loss, G = log_domain(w)
    while log_loss > data["stop_log_loss"]:
        if steps % XOR_PATIENCE == 0:
            if not log_loss < before - 1e-3:
                break
            before = log_loss
        steps += 1
        rate = lr * math.exp(log_loss * power)
        if kind is None:
            new = w - rate * G
        else:
            s = np.exp(radius) if kind == "ewn" else radius
            theta = w / s[:, None]
            radial = (G * theta).sum(1)
            v = n[:, None] * theta - (rate * s / n)[:, None] * (G - radial[:, None] * theta)
            new_n = np.sqrt((v * v).sum(1))
            new_radius = radius - rate * (radial * s if kind == "ewn" else radial)
            new = ((np.exp(new_radius) if kind == "ewn" else new_radius) / new_n)[:, None] * v
        new_loss, new_G = log_domain(new)
        if not new_loss < log_loss:
            lr /= 1.1
            continue
        w, log_loss, G = new, new_loss, new_G
        if kind is not None:
            radius, n = new_radius, new_n
        if lr < cap:
            lr *= 1.1
    return w, steps


def xor_norms(
    start: Tensor, kinds: Sequence[str | None], backend: str, device: str = "cpu"
) -> dict[str | None, tuple[Tensor, Tensor]]:
    """kind -> norms of the neurons at the end (E, 20), and which instances got to log L = -50 (E,)."""
    run = xor(start, kinds, backend, device=device)
    norms = run.weights[0].norm(dim=1).view(len(kinds), len(start), -1).cpu()
    return dict(zip(kinds, zip(norms, run.reached.view(len(kinds), -1).cpu())))


def xor_top4(norms: Tensor) -> Tensor:
    """The share of the four largest neurons in the sum of squared norms."""
    return top_share(norms, 4)


# ---------------------------------------------------------------------------------------------- P0-9: lin-sep


def linsep(kind: str, backend: str, callback: Callable | None = None) -> tuple[list[Tensor], list[Tensor]]:
    """2 -> 8 relu^2 -> 1 on four points, to log L = -300: weights and gradients over L."""
    data = read_data("linsep")
    x, y = (torch.tensor(data[key], dtype=F64) for key in ("x", "y"))
    log_domain = objective(lambda w: y * (torch.relu(x @ w[0].T).square() @ w[1][0]), losses.logistic)
    point = polar_weights([torch.tensor(data[key], dtype=F64) for key in ("w1", "w2")], kind, backend=backend)
    run = normalized_descent(
        log_domain,
        point,
        lr=data["lr"],
        lr_cap=data["lr_cap"],
        frac=data["frac"],
        stop=data["stop_log_loss"],
        callback=callback,
    )
    return run.weights, list(log_domain(run.weights)[1])


def alive_rows(weights: Sequence[Tensor], grads: Sequence[Tensor]) -> dict[str, Tensor]:
    """Of neurons with at least half of the largest norm in their layer: relations of w and G."""
    columns = {"norm": [], "gradient": [], "product": [], "ratio": [], "cosine": []}
    for w, G in zip(weights, grads):
        n, m, inner = w.norm(dim=1), G.norm(dim=1), (w * G).sum(1)
        alive = n >= n.max() / 2
        for key, value in zip(columns, (n, m, n * m, m / n, inner / (n * m))):
            columns[key].append(value[alive])
    return {key: torch.cat(values) for key, values in columns.items()}


# -------------------------------------------------------------------------------------- P0-10, P0-11: pruning

PRUNING_SEEDS = (9192, 3576, 2356)  # the authors'
PRUNED = (0.0, 0.5, 0.7, 0.8, 0.85, 0.9, 0.95)


def digits(device: str) -> list[Tensor]:
    """scikit-learn's digits, 1437 and 360, with the mean 0 and variance 1 that the paper gives its images."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    x, y = load_digits(return_X_y=True)
    parts = train_test_split((x - x.mean()) / x.std(), y, test_size=360, random_state=0, stratify=y)
    return [
        torch.tensor(p, device=device, dtype=torch.float32 if p.ndim == 2 else torch.int64) for p in parts
    ]


def mnist(device: str) -> list[Tensor] | None:
    """8000 and 2000 of MNIST's 10 000 test images, from the folder WN_MNIST, or None."""
    folder = os.environ.get("WN_MNIST")
    if not folder:
        return None
    x, y = (
        np.frombuffer(gzip.open(Path(folder, f"t10k-{name}-ubyte.gz")).read(), np.uint8, offset=offset)
        for name, offset in (("images-idx3", 16), ("labels-idx1", 8))
    )
    order = np.random.default_rng(0).permutation(len(y))
    x, y = (x.reshape(-1, 784)[order] / 255 - 0.1307) / 0.3081, y[order].astype(np.int64)
    parts = x[:8000], x[8000:], y[:8000], y[8000:]
    return [torch.tensor(p, device=device) for p in parts]


def outputs(weights: Sequence[Tensor], x: Tensor) -> Tensor:
    first, bias, second = weights
    return torch.relu(torch.addmm(bias, x, first.T)) @ second.T


def train_for_pruning(
    kind: str | None,
    seed: int,
    data: Sequence[Tensor],
    width: int,
    levels: Sequence[float],
    backend: str,
    progress: Callable | None = None,
) -> dict[float, list[Tensor]]:
    """A net with one hidden layer, the first weight normalized, by full-batch descent with the rate lr/L.

    Returns: level of log L -> [first weight, its bias, second weight], with those of the start under 0.
    """
    x, _, y, _ = data
    net = mlp([x.shape[1], width, int(y.max()) + 1], bias=True, seed=seed, dtype=x.dtype, device=x.device)
    start = [p.detach() for p in net.parameters()]
    point = polar_weights(start, [kind, None, None], backend=backend)
    log_domain = objective(lambda w: outputs(w, x), lambda f: losses.cross_entropy(f, y))
    run = normalized_descent(
        log_domain,
        point,
        lr=0.01,
        lr_cap=math.inf,
        frac=0,
        stop=min(levels),
        levels=levels,
        callback=progress,
    )
    return {0.0: start} | run.snapshots


def pruned_accuracy(
    states: dict[float, list[Tensor]], level: float, data: Sequence[Tensor]
) -> dict[float, float]:
    """Fraction pruned -> percent right of the test set, for the best of the paper's scores.

    The scores are the norm, and its growth since each of the earlier levels.
    """
    _, x, _, y = data
    weights = states[level]
    net = mlp([x.shape[1], len(weights[0]), len(weights[2])], bias=True, dtype=x.dtype, device=x.device)
    with torch.no_grad():
        for p, w in zip(net.parameters(), weights):
            p.copy_(w)
    scores = [pruning.norms(net[0])]
    scores += [pruning.growth(net[0], states[earlier][0]) for earlier in states if earlier > level]
    result = {}
    for fraction in PRUNED:
        nets = [pruning.prune(net, 0, 2, pruning.largest(score, 1 - fraction)) for score in scores]
        result[fraction] = max((small(x).argmax(1) == y).double().mean().item() * 100 for small in nets)
    return result


# ------------------------------------------------------------------------------------------------- the claims


def numbers(values, form: str = "{:.3g}") -> str:
    return " ".join(form.format(float(v)) for v in values)


def claims(options: Options) -> Iterator[Claim]:
    if options.wants("P0-1"):
        with options.clock() as clock:
            worst = gradient_errors(options.device)
        for name, key, bound in (
            ("float64 gradients against central differences", "differences", 1e-7),
            ("float32 gradients against autograd in float64", "float32", 1e-5),
            ("v . dL/dv = 0", "orthogonal", 1e-12),
        ):
            yield Claim(
                "P0-1",
                f"{name}, SWN and EWN, all shapes and dims",
                0.0,
                worst[key],
                f"rel. <= {bound:g}",
                worst[key] <= bound,
                clock.seconds,
            )
    if options.wants("P0-2"):
        rows = 1_000_000 if options.full else 1000
        for dtype, bound in ((F64, 1e-12), (torch.float32, 1e-5)):
            run = options.measure(step_errors, dtype, rows, options.device)
            yield Claim(
                "P0-2",
                f"|v'|^2 = |v|^2 + lr^2 |dv|^2 and tan angle = lr |dv|/|v|, {str(dtype).split('.')[1]}, "
                f"{rows} rows, 20 steps",
                0.0,
                run.value,
                f"rel. <= {bound:g}",
                run.value <= bound,
                *run[1:],
            )
    if options.wants("P0-3"):
        yield from flow_claims(options)
    if options.wants("P0-4"):
        yield from trajectory_claims(options)
    if options.wants("P0-5"):
        run = options.measure(replay_rates)
        worst = max(
            abs(ours / logged - 1)
            for rows in run.value.values()
            for step, ours, logged in rows
            if step >= 499
        )
        options.results["rates"] = run.value
        yield Claim(
            "P0-5",
            "conv_rate, one layer: the 12 losses after 500, 1000, 2000 and 5000 steps are the authors'",
            "their log",
            f"off by {worst:.1e}",
            "rel. <= 1e-4",
            worst <= 1e-4,
            *run[1:],
        )
        if options.full:
            yield from deep_rate_claims(options)
    if options.wants("P0-6"):
        yield from scalar_claims(options)
    if options.wants("P0-7"):
        yield from xor_replay_claims(options)
    if options.wants("P0-8"):
        yield from xor_claims(options)
    if options.wants("P0-9"):
        yield from linsep_claims(options)
    if options.wants("P0-10", "P0-11") and not options.small:  # minutes
        yield from pruning_claims(options)
        if options.full:
            yield from image_claims(options)


def flow_claims(options: Options) -> Iterator[Claim]:
    for flow in FLOWS:
        kind, norm, radius_rate, direction_rate = flow
        what = f"{kind.upper()}, |v| = {norm:g}, rates {radius_rate:g} and {direction_rate:g}"
        with options.clock() as clock:
            worst = flow_difference(*flow)
        yield Claim(
            "P0-3",
            f"the polar flow is the flow in w: {what}",
            0.0,
            worst,
            "<= 1e-6",
            worst <= 1e-6,
            clock.seconds,
        )
        run = options.measure(descent_errors, *flow)
        ratios = [a / b for a, b in zip(run.value, run.value[1:])]
        yield Claim(
            "P0-3",
            f"half the step halves the distance of descent from the flow: {what}",
            2.0,
            numbers(ratios),
            "[1.8, 2.2]",
            all(1.8 <= r <= 2.2 for r in ratios),
            *run[1:],
        )


def trajectory_claims(options: Options) -> Iterator[Claim]:
    before = rates.trajectory_invariant(STARTS, INPUT)
    for scale, what, bound in ((1, "the authors' steps", 0.05), (30, "lr and cap divided by 30", 3e-3)):
        run = options.measure(trajectories, "ewn", scale)
        ends, path = run.value
        drift = rates.trajectory_invariant(ends, INPUT) - before
        worst = np.abs(drift).max()
        yield Claim(
            "P0-4",
            f"drift of x2/w1 - x1/w2 to e^-50 from five starts, {what}",
            0.0,
            numbers(drift, "{:+.2g}"),
            f"|.| <= {bound:g}",
            bool(worst <= bound),
            *run[1:],
        )
        if scale == 1:
            options.results["trajectories"] = {"ewn": np.stack(path)}
            options.results["trajectories"]["plain"] = np.stack(trajectories(None, 1, "wnkernels")[1])
            exact = np.stack([rates.trajectory_point(start, INPUT, 50.0) for start in STARTS])
            off = np.abs(ends / exact - 1).max()
            yield Claim(
                "P0-4",
                "ends at e^-50 against those of the flow in closed form",
                numbers(exact.ravel(), "{:.2f}"),
                numbers(ends.ravel(), "{:.2f}"),
                "rel. <= 5%",
                bool(off <= 0.05),
                *run[1:],
            )
    with options.clock() as clock:
        far = bounded_limits()
    limits = np.stack([rates.trajectory_limits(start, INPUT) for start in STARTS])
    finite = np.isfinite(limits)
    off = np.abs(far[finite] / limits[finite] - 1).max()
    yield Claim(
        "P0-4",
        "limit of the bounded weight, the polar flow at margin 1e4",
        numbers(limits[finite], "{:.4g}"),
        numbers(far[finite], "{:.5g}"),
        "rel. <= 1%",
        bool(off <= 0.01),
        clock.seconds,
    )


def deep_rate_claims(options: Options, steps: int = 1_000_000) -> Iterator[Claim]:
    depths = (1, 2, 3, 4)
    for kind, text, good in (
        ("ewn", "spread <= .1", lambda x: x <= 0.1),
        (None, "spread >= .3", lambda x: x >= 0.3),
    ):
        slopes, seconds = [], np.zeros(2)
        for depth in options.bar(depths, f"P0-5, {name_of(kind)}"):
            run = options.measure(deep_rates, kind, depth, steps, device=options.device)
            half = steps // 2
            slopes.append(math.log(run.value[-1] / run.value[half - 1]) / math.log(steps / half))
            seconds += run[1:]
        gap = max(slopes) - min(slopes)
        yield Claim(
            "P0-5",
            f"conv_rate, 1 to 4 layers, {name_of(kind)}: slope of log L over log t, the last half of {steps} "
            "steps",
            "the same" if kind else "falls with depth",
            f"{numbers(slopes)}; spread {gap:.2f}",
            text,
            good(gap),
            *seconds,
        )


def scalar_claims(options: Options) -> Iterator[Claim]:
    margins = (50, 100, 200, 400, 600)
    for kind, depth in (("ewn", 1), ("swn", 1), ("swn", 2), ("swn", 3), ("swn", 4)):
        with options.clock() as clock:
            measured = scalar_rate(kind, depth, margins)
        predicted = [rates.ewn_rate(m) if kind == "ewn" else rates.plain_rate(m, depth) for m in margins]
        off = max(abs(a / b - 1) for a, b in zip(measured, predicted))
        what = (
            "EWN: L t (log t)^2"
            if kind == "ewn"
            else f"SWN, depth {depth}: {depth}^2 L t (log t)^{2 - 2 / depth:.3g}"
        )
        yield Claim(
            "P0-6",
            f"{what} at margins {numbers(margins)}",
            numbers(predicted),
            numbers(measured),
            "rel. <= 1%",
            off <= 0.01,
            clock.seconds,
        )


def xor_replay_claims(options: Options) -> Iterator[Claim]:
    start = torch.tensor(read_data("xor")["w1"], dtype=F64)[None]
    for kind in KINDS:
        path = []

        def keep(step, log_loss, point, _):
            path.append((log_loss.item(), point.weights[0].norm(dim=1).numpy()))

        run = options.measure(xor, start, [kind], callback=keep)
        n = run.value.weights[0].norm(dim=1)
        options.results.setdefault("xor", {})[name_of(kind)] = path
        yield Claim(
            "P0-7",
            f"XOR, seed 9156, {name_of(kind)}: largest norms at e^-50, and the share of four",
            "few hold all" if kind == "ewn" else "spread",
            f"{numbers(n.sort(descending=True).values[:4])}; {xor_top4(n):.3f}",
            "none stated",
            None,
            *run[1:],
        )


def xor_claims(options: Options) -> Iterator[Claim]:
    seeds = range(10_000) if options.full else XOR_SEEDS
    start = torch.stack([xor_start(seed) for seed in seeds])
    run = options.measure(xor_norms, start, KINDS, device=options.device)
    fit = torch.stack([reached for _, reached in run.value.values()]).all(0)
    shares = {kind: xor_top4(norms)[fit] for kind, (norms, _) in run.value.items()}
    options.results["xor_shares"] = {name_of(kind): share.numpy() for kind, share in shares.items()}
    count = f"{int(fit.sum())} of {len(seeds)} seeds from {seeds[0]} on, those where all three get to e^-50"
    for kind, bound, holds in (
        ("ewn", "min >= .85", shares["ewn"].min() >= 0.85),
        ("swn", "max <= .5", shares["swn"].max() <= 0.5),
        (None, "max <= .65", shares[None].max() <= 0.65),
    ):
        share = shares[kind]
        yield Claim(
            "P0-8",
            f"XOR, {name_of(kind)}: share of the four largest neurons; {count}",
            "near 1" if kind == "ewn" else "spread",
            f"{share.min():.3f} to {share.max():.3f}, mean {share.mean():.3f}",
            bound,
            bool(holds),
            *run[1:],
        )
    if not options.full and not options.small:
        yield batch_claim(start, options)


def batch_claim(start: Tensor, options: Options) -> Claim:
    """The batch against one by one: our own code for one instance, the same in torch, and a loop in numpy.

    SWN's large steps amplify rounding, in a few seeds to 1e-6 of the weights; the count of steps is exact.
    """

    ways = {
        "wnkernels": lambda one, kind: xor(one[None], [kind], "wnkernels"),
        "torch": lambda one, kind: xor(one[None], [kind], "torch"),
        "numpy": lambda one, kind: xor_in_numpy(one.numpy(), kind),
    }
    times, ends = {}, {}
    for name, way in ways.items():
        with options.clock() as clock:
            ends[name] = [
                way(one, kind)
                for kind in KINDS
                for one in options.bar(list(start), f"P0-8, one by one, {name}, {name_of(kind)}")
            ]
        times[name] = clock.seconds
    with options.clock() as clock:
        batch = xor(start, KINDS, "wnkernels")
    weights, steps = zip(*ends["numpy"])
    exact = torch.from_numpy(np.stack(weights))
    apart = (batch.weights[0].view_as(exact) - exact).abs().amax((1, 2)) / exact.abs().amax((1, 2))
    same = batch.steps.tolist() == list(steps) and apart.max().item() <= 1e-5
    fastest = min(times, key=times.get)
    ratio = times[fastest] / clock.seconds
    return Claim(
        "P0-8",
        "all seeds and kinds as one batch, against the fastest way one by one, "
        f"{fastest} ({', '.join(f'{name} {seconds:.1f} s' for name, seconds in times.items())})",
        "",
        f"{ratio:.1f}x faster; {'' if same else 'NOT '}the steps and weights of numpy, "
        f"{apart.max():.0e} apart",
        ">= 5x, the same",
        ratio >= 5 and same,
        clock.seconds,
    )


def linsep_claims(options: Options) -> Iterator[Claim]:
    options.results["linsep"] = {}
    for kind, equal, other, bound, share in (
        ("ewn", "product", "ratio", 0.10, 0.15),
        ("swn", "ratio", "product", 0.05, 0.25),
    ):
        run = options.measure(linsep, kind)
        rows = alive_rows(*run.value)
        options.results["linsep"][kind] = [
            (w.norm(dim=1).numpy(), g.norm(dim=1).numpy()) for w, g in zip(*run.value)
        ]
        a, b = spread(rows[equal]), spread(rows[other])
        form = {"product": "|w| |G|", "ratio": "|G|/|w|"}
        name = kind.upper()
        yield Claim(
            "P0-9",
            f"lin-sep at e^-300, {name}: spread of {form[equal]} over the {len(rows['norm'])} alive neurons",
            0.0,
            a,
            f"<= {bound:.2f}",
            a <= bound,
            *run[1:],
        )
        yield Claim(
            "P0-9",
            f"{name}: that spread over the one of {form[other]}",
            0.0,
            a / b,
            f"<= {share:.2f}",
            a / b <= share,
            *run[1:],
        )
        worst = rows["cosine"].max().item()
        yield Claim(
            "P0-9",
            f"{name}: largest cosine of w and G, alive neurons",
            -1.0,
            worst,
            "<= -.96",
            worst <= -0.96,
            *run[1:],
        )


def pruning_claims(options: Options) -> Iterator[Claim]:
    data, width = digits(options.device), 128
    states, times = {}, {}
    # The control runs on, to see the norms concentrate further.
    wanted = [(kind, seed) for seed in PRUNING_SEEDS for kind in KINDS]
    if not options.wants("P0-10"):
        wanted = [("ewn", seed) for seed in PRUNING_SEEDS]
    for kind, seed in options.bar(wanted, "P0-10, P0-11"):
        late = kind == "ewn" and seed == PRUNING_SEEDS[0] and options.wants("P0-11")
        levels = (-10.0, -50.0, -100.0) if late else (-10.0, -50.0)
        with options.bar(None, f"{name_of(kind)}, seed {seed}: -log L", total=-int(min(levels))) as bar:

            def progress(step, log_loss, *_):
                if step % 100 == 0:
                    bar.n = max(0, int(-log_loss.item()))
                    bar.refresh()

            # A second time in pure torch takes minutes: one seed shows how long.
            single = dataclasses.replace(options, backend="wnkernels")
            measure = (options if options.backend == "torch" or seed == PRUNING_SEEDS[0] else single).measure
            run = measure(train_for_pruning, kind, seed, data, width, levels, progress=progress)
        states[kind, seed] = run.value
        times[kind, seed] = run
    total = {
        kind: sum(times[kind, seed].seconds for seed in PRUNING_SEEDS)
        for kind in KINDS
        if (kind, PRUNING_SEEDS[0]) in times
    }
    torch_total = {kind: sum(times[kind, seed].torch_seconds for seed in PRUNING_SEEDS) for kind in total}
    ratios = {
        key: {level: participation_ratio(pruning.norms(w[0])).item() for level, w in levels.items()}
        for key, levels in states.items()
    }
    options.results["participation"] = ratios
    if options.wants("P0-10"):
        accuracy = {key: pruned_accuracy(state, -50.0, data) for key, state in states.items()}
        options.results["pruning"] = accuracy
        seeds = f"seeds {numbers(PRUNING_SEEDS, '{:.0f}')}"
        for kind, text, good in (
            ("ewn", "<= 25", lambda r: r <= 25),
            ("swn", ">= 90", lambda r: r >= 90),
            (None, ">= 90", lambda r: r >= 90),
        ):
            found = [ratios[kind, seed][-50.0] for seed in PRUNING_SEEDS]
            yield Claim(
                "P0-10",
                f"digits at e^-50, {name_of(kind)}: participation ratio of 128 hidden norms, {seeds}",
                "concentrated" if kind == "ewn" else "spread",
                numbers(found),
                text,
                all(map(good, found)),
                total[kind],
                torch_total[kind],
            )

        def mean(kind, fraction):
            return float(np.mean([accuracy[kind, seed][fraction] for seed in PRUNING_SEEDS]))

        ewn, plain, swn = (mean(kind, 0.8) for kind in ("ewn", None, "swn"))
        everything = sum(total.values()), sum(torch_total.values())
        each = numbers((accuracy["ewn", seed][0.8] for seed in PRUNING_SEEDS), "{:.1f}")
        yield Claim(
            "P0-10",
            f"accuracy of EWN with 80% of the neurons pruned, mean of {seeds}",
            "",
            f"{ewn:.2f} ({each})",
            ">= 93",
            ewn >= 93,
            *everything,
        )
        yield Claim(
            "P0-10",
            "its lead over the plain net, points",
            "",
            ewn - plain,
            ">= 4",
            ewn - plain >= 4,
            *everything,
        )
        yield Claim("P0-10", "its lead over SWN, points", "", ewn - swn, ">= 6", ewn - swn >= 6, *everything)
        loss = mean(None, 0.0) - mean("ewn", 0.0)
        yield Claim(
            "P0-10",
            "what the unpruned EWN net loses to the unpruned plain net, points",
            "",
            loss,
            "<= 1.5",
            loss <= 1.5,
            *everything,
        )
    if options.wants("P0-11"):
        early = [ratios["ewn", seed][-10.0] for seed in PRUNING_SEEDS]
        yield Claim(
            "P0-11",
            "EWN at e^-10: participation ratio, all seeds",
            "spread",
            numbers(early),
            ">= 64",
            min(early) >= 64,
            total["ewn"],
            torch_total["ewn"],
        )
        path = [ratios["ewn", PRUNING_SEEDS[0]][level] for level in (-10.0, -50.0, -100.0)]
        yield Claim(
            "P0-11",
            f"EWN, seed {PRUNING_SEEDS[0]}: participation ratio at e^-10, e^-50, e^-100",
            "falls",
            numbers(path),
            "decreasing",
            path[0] > path[1] > path[2],
            *times["ewn", PRUNING_SEEDS[0]][1:],
        )


def image_claims(options: Options) -> Iterator[Claim]:
    """The paper's own net, on as many images as there are, by full-batch descent."""
    data = mnist(options.device)
    if data is None:
        yield Claim(
            "P0-10", "MNIST, 784-1024-10, to e^-300", "", "not run: WN_MNIST names no folder", "none", None
        )
        return
    lead, seconds = {level: [] for level in (-10.0, -300.0)}, np.zeros(2)
    for seed in options.bar(PRUNING_SEEDS, "P0-10, MNIST"):
        accuracy = {}
        for kind in ("ewn", None):
            run = options.measure(train_for_pruning, kind, seed, data, 1024, (-10.0, -100.0, -300.0))
            seconds += run[1:]
            accuracy[kind] = {level: pruned_accuracy(run.value, level, data) for level in lead}
        for level, values in lead.items():
            values.append([accuracy["ewn"][level][f] - accuracy[None][level][f] for f in (0.8, 0.9)])
    early, late = (np.mean(lead[level], 0) for level in lead)
    for id, text, value, bound, holds in (
        ("P0-10", "at e^-300, 80% pruned", late[0], ">= 2", late[0] >= 2),
        ("P0-10", "at e^-300, 90% pruned", late[1], ">= 6", late[1] >= 6),
        ("P0-11", "at e^-10, 80% pruned", early[0], "< 0", early[0] < 0),
    ):
        yield Claim(
            id,
            f"MNIST, 784-1024-10: lead of EWN over the plain net {text}, points, mean of 3 seeds",
            "",
            value,
            bound,
            holds,
            *seconds,
        )


# ------------------------------------------------------------------------------------------------ the figures


def figures(results: dict, folder: Path) -> None:
    """morwani_*.png, of the experiments that have run."""
    from matplotlib.figure import Figure

    def save(figure, name):
        figure.savefig(folder / f"morwani_{name}.png", dpi=100)

    if "trajectories" in results:
        figure = Figure(figsize=(9, 4), layout="constrained")
        for panel, (name, path) in zip(figure.subplots(1, 2), results["trajectories"].items()):
            panel.plot(path[:, :, 0], path[:, :, 1], linewidth=1)
            panel.set(title=f"{name}, to e^-50", xlabel="w1", ylabel="w2")
        save(figure, "trajectories")
    if "rates" in results:
        figure = Figure(figsize=(5, 4), layout="constrained")
        panel = figure.subplots()
        for i, (kind, rows) in enumerate(results["rates"].items()):
            steps, ours, logged = zip(*rows[1:])
            panel.loglog(steps, ours, color=f"C{i}", label=kind)
            panel.loglog(steps, logged, "o", color=f"C{i}", fillstyle="none")
        panel.set(title="conv_rate, one layer; circles: the authors' log", xlabel="step", ylabel="loss")
        panel.legend()
        save(figure, "rates")
    if "xor" in results:
        figure = Figure(figsize=(12, 3.5), layout="constrained")
        for panel, (name, path) in zip(figure.subplots(1, 3), results["xor"].items()):
            panel.plot([-loss for loss, _ in path], np.stack([n for _, n in path]), linewidth=1)
            panel.set(title=f"XOR, {name}", xlabel="-log L", ylabel="norm of each neuron")
        save(figure, "xor")
    if "linsep" in results:
        figure = Figure(figsize=(9, 4), layout="constrained")
        for panel, (kind, layers) in zip(figure.subplots(1, 2), results["linsep"].items()):
            for (n, m), label in zip(layers, ("hidden", "output")):
                panel.loglog(n, m, "o", label=label)
            panel.set(title=f"lin-sep at e^-300, {kind}", xlabel="|w|", ylabel="|G|/L")
            panel.legend()
        save(figure, "linsep")
    if "pruning" in results:
        figure = Figure(figsize=(9, 4), layout="constrained")
        curves, concentration = figure.subplots(1, 2)
        for i, kind in enumerate(KINDS):
            some = np.array([[a[f] for f in PRUNED] for (k, _), a in results["pruning"].items() if k == kind])
            curves.errorbar(
                np.array(PRUNED) * 100, some.mean(0), some.std(0), color=f"C{i}", label=name_of(kind)
            )
            for (k, _), levels in results["participation"].items():
                if k == kind:
                    concentration.plot(
                        [-x for x in levels], list(levels.values()), "o-", color=f"C{i}", linewidth=1
                    )
        curves.set(title="digits at e^-50", xlabel="percent pruned", ylabel="test accuracy")
        curves.legend()
        concentration.set(title="participation ratio of 128 hidden norms", xlabel="-log L")
        save(figure, "pruning")
