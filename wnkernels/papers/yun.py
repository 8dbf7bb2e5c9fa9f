"""Yun, Krishnan and Mobahi, A unifying view on implicit bias in training linear neural networks (arXiv:2010.02501).

Claims P1-1 to P1-7. The paper's networks are not normalized. From layers of equal norm, plain gradient flow keeps the
norms equal to one another, and EWN with one norm for each layer, d w_l/dt = -||w_l||^2 dL/dw_l, is then the same path
in another time: the classification experiments run so on our kernels, and as plain flow for the backend "torch". A
start with a zero layer, as of the regression claims, has no direction to normalize; these run as plain descent and
flow.
"""

import math

import numpy as np
import torch

from ..dynamics.flow import polar_flow, weight_flow
from ..dynamics.losses import exponential
from ..models.tensor import CircularConvNet, DecomposableNet, DiagonalTensorNet, FullyConnectedNet, TensorNet
from ..theory import implicit_bias, margin
from .claims import Claim

__all__ = ["TITLE", "claims", "figures"]

TITLE = "Yun, Krishnan & Mobahi 2021: linear tensor networks"

POINT = torch.tensor([[1.0, 2.0]], dtype=torch.float64)  # one example for regression, of target 1
PAIR = torch.tensor([[1.0, 2.0], [0.0, -3.0]], dtype=torch.float64), torch.tensor([1.0, -1.0], dtype=torch.float64)
ETAS = ((1.0, 1.0), (2.0, 0.5))
ALPHAS = {2: (0.01, 0.1, 0.5, 1.0), 3: (0.01, 0.1, 0.5, 1.0), 4: (0.1, 0.5, 1.0)}
SEEDS = (2501, 2502, 2503, 2504)  # of the random starts and data
PLANE_SEEDS = tuple(range(2501, 2509))
START = 0.5  # the norm of every layer where the starts are random
MARGINS = (10.0, 1e2, 1e3, 1e4)


def draws(seed):
    """Standard normal tensors of a seed."""
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=generator)


def equal_norms(layers):
    return [w * (START / w.norm()) for w in layers]


# ---------------------------------------------------------------------------------------------------------- regression


def regression_paths(alphas=(0.01, 0.5, 1.0), lr=1e-3, steps=5000, every=25):
    """The paper's figure 1: coefficients of three nets of two layers that learn f([1, 2]) = 1, from alpha^2 zbar.

    The first layer is alpha times the identity, the last alpha zbar for four random directions zbar.

    Returns: name -> (T, len(alphas), 4, 2).
    """
    angles = 2 * math.pi * torch.rand(4, dtype=torch.float64, generator=torch.Generator().manual_seed(SEEDS[0]))
    directions = torch.stack([angles.cos(), angles.sin()], 1).repeat(len(alphas), 1)
    scale = torch.tensor(alphas, dtype=torch.float64).repeat_interleave(4)[:, None]
    last, ones = scale * directions, scale.expand(-1, 2)
    nets = {"diagonal": DiagonalTensorNet([ones, last]),
            "fully connected": FullyConnectedNet([torch.diag_embed(ones), last]),
            "convolutional": CircularConvNet([ones * torch.tensor([1.0, 0.0]), last])}
    paths = {}
    for name, net in nets.items():
        layers, path = [w.detach() for w in net.layers], []
        for step in range(steps + 1):
            beta = net.coefficients(layers)
            if step % every == 0:
                path.append(beta)
            for w, slope in zip(layers, net.pullback(layers, (beta @ POINT.mT - 1.0) * POINT)):
                w.sub_(slope, alpha=lr)
        paths[name] = torch.stack(path).view(-1, len(alphas), 4, 2).numpy()
    return paths


def alpha_eta_start(alphas, etas, depth):
    """w_1 = ... = w_{L-1} = alpha eta, w_L = 0: (R, d) each, a row for every pair of alpha and eta."""
    rows = torch.tensor([[a * e for e in eta] for a in alphas for eta in etas], dtype=torch.float64)
    return [rows.clone() for _ in range(depth - 1)] + [torch.zeros_like(rows)]


def descend_to_point(depth, alphas, lr, tolerance=1e-9, max_steps=200_000):
    """Gradient descent of diagonal nets on (f([1, 2]) - 1)^2/2, a row for every pair of `alphas` and `ETAS`.

    Returns: a dict for each row: depth, alpha, eta, limit, predicted, error (the largest of a coordinate), steps (until
    the residual is within the tolerance).
    """
    net = DiagonalTensorNet(alpha_eta_start(alphas, ETAS, depth))
    layers = [w.detach() for w in net.layers]
    steps = torch.full((len(layers[0]),), -1)
    for step in range(max_steps):
        residual = net.coefficients(layers) @ POINT.mT - 1.0
        if step % 100 == 0:
            done = residual[:, 0].abs() <= tolerance
            steps[done & (steps < 0)] = step
            if done.all():
                break
        for w, slope in zip(layers, net.pullback(layers, residual * POINT)):
            w.sub_(slope, alpha=lr)
    limits = net.coefficients(layers).numpy()
    rows = []
    for (alpha, eta), limit, count in zip([(a, e) for a in alphas for e in ETAS], limits, steps.tolist()):
        predicted = implicit_bias.interpolation_limit(POINT.numpy(), [1.0], depth, alpha, eta)
        rows.append(dict(depth=depth, alpha=alpha, eta=eta, limit=limit, predicted=predicted, steps=count,
                         error=float(np.abs(limit - predicted).max())))
    return rows


def flow_to_interpolation(net, x, y, time=1e5):
    """The end of plain gradient flow on sum (f(x_i) - y_i)^2/2: the layers, and the largest residual."""
    def gradient(layers):
        return net.pullback(layers, (net.coefficients(layers) @ x.mT - y) @ x)

    def fitted(_, layers):
        return float((net.coefficients(layers) @ x.mT - y).abs().max()) - 1e-12

    fitted.terminal = True
    start = [w.detach() for w in net.layers]
    flow = weight_flow(gradient, start, time, rtol=1e-12, atol=1e-15, events=fitted)
    end = [w[-1] for w in flow.weight]
    return end, float((net.coefficients(end) @ x.mT - y).abs().max())


def random_decomposable(seed, alpha):
    """A net of six components in 8 x 8 x 8 from the start of the theorem, two examples, and eta."""
    draw = draws(seed)
    factors = [torch.linalg.qr(draw(8, 6))[0] for _ in range(3)]
    eta = 0.5 + torch.rand(6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    start = [(alpha * eta) @ U.mT for U in factors[:2]] + [torch.zeros(8, dtype=torch.float64)]
    net = DecomposableNet(draw(6, 6), factors, [w[None] for w in start])
    return net, draw(2, 6), draw(2), eta.numpy()


def decomposable_residuals(seeds, alphas):
    """For each seed and alpha: the residual of the minimizer of Q at the end of the flow, and the distance to it."""
    rows = []
    for seed in seeds:
        for alpha in alphas:
            net, x, y, eta = random_decomposable(seed, alpha)
            end, misfit = flow_to_interpolation(net, x, y)
            rho = net.rho(end).detach().numpy()[0]
            features = (x @ net.transform.mT).numpy()
            predicted = implicit_bias.interpolation_limit(features, y.numpy(), 3, alpha, eta)
            rows.append(dict(seed=seed, alpha=alpha, misfit=misfit, distance=float(np.abs(rho - predicted).max()),
                             residual=implicit_bias.q_residual(rho, features, 3, alpha, eta)))
    return rows


def diagonal_limit(depth, alpha, eta):
    """The end of plain flow of a diagonal net on the one point."""
    net = DiagonalTensorNet(alpha_eta_start([alpha], [eta], depth))
    end, _ = flow_to_interpolation(net, POINT, torch.ones(1, dtype=torch.float64))
    return net.coefficients(end).detach().numpy()[0]


# ------------------------------------------------------------------------------------------------------ classification


def separate(net, x, y, backend="wnkernels", margin=MARGINS[-1]):
    """The flow of the exponential loss from the net's layers, of equal norm, until the least margin is `margin`.

    The time is chosen such that the log of the layers' norm grows at most by 1 per unit.

    Returns: margins (T,) (least of the examples), coefficients (T, d), layers (a list of (T, ...)), all numpy but the
    layers, at a grid of times.
    """
    signed = y[:, None] * x

    def gradient(layers):
        _, slope = exponential(net.coefficients(layers) @ signed.mT)
        slopes = net.pullback(layers, slope @ signed)
        squares = [float(w.square().sum()) for w in layers]
        scale = math.sqrt(sum(s * float(g.square().sum()) for s, g in zip(squares, slopes)) / len(slopes))
        # EWN flow has the factor ||w_l||^2 of its own.
        factor = (1.0 if backend == "wnkernels" else sum(squares) / len(squares)) / scale
        return [factor * g for g in slopes]

    def reached(_, layers):
        return float((net.coefficients(layers) @ signed.mT).min()) - 1.2 * margin

    reached.terminal = True
    start = [w.detach() for w in net.layers]
    options = dict(rtol=1e-9, atol=1e-12, method="LSODA", events=reached)
    times = np.linspace(0, 60, 4001)
    flow = polar_flow(gradient, start, times, kind="ewn", **options) if backend == "wnkernels" else \
        weight_flow(gradient, start, times, **options)
    with torch.no_grad():
        path = torch.cat([net.coefficients([w[i] for w in flow.weight]) for i in range(len(flow.t))])
    return (path @ signed.mT).amin(1).numpy(), path.numpy(), flow.weight


def at(margins, level):
    """The index of the first point of a path whose margin is `level`."""
    if margins.max() < level:
        raise RuntimeError(f"the flow has ended at a margin of {margins.max():.3g}, before {level:g}")
    return int(np.argmax(margins >= level))


def nets_on_the_plane(draw):
    """The nets of the paper's figure 2 and a deeper diagonal one, random layers of equal norm."""
    return {
        "diagonal L=2": DiagonalTensorNet(equal_norms([draw(1, 2) for _ in range(2)])),
        "diagonal L=3": DiagonalTensorNet(equal_norms([draw(1, 2) for _ in range(3)])),
        "fully connected": FullyConnectedNet(equal_norms([draw(1, 2, 2), draw(1, 2)])),
        "convolutional L=2": CircularConvNet(equal_norms([draw(1, 2) for _ in range(2)])),
    }


def plane_targets():
    """The directions in which they are to end."""
    x, y = (part.numpy() for part in PAIR)
    return {
        "diagonal L=2": margin.l1_max_margin(x, y),
        "diagonal L=3": margin.quasi_norm_max_margin(x, y, 3),
        "fully connected": margin.l2_max_margin(x, y),
        "convolutional L=2": margin.dft_l1_max_margin(x, y),
    }


def plane_angles(seeds, backend="wnkernels", bar=iter):
    """name -> angles (S, len(MARGINS)) in degrees to the max-margin direction; and the paths of the last seed."""
    targets = plane_targets()
    angles, paths = {name: [] for name in targets}, {}
    for seed in bar(seeds):
        for name, net in nets_on_the_plane(draws(seed)).items():
            margins, path, _ = separate(net, *PAIR, backend)
            angles[name].append([margin.angle(path[at(margins, level)], targets[name]) for level in MARGINS])
            paths[name] = margins, path
    return {name: np.array(rows) for name, rows in angles.items()}, paths


def conv_margins(seeds, depth, backend="wnkernels", bar=iter):
    """For each seed, three random examples in four dimensions: ||F beta||_1 over the least, and stationarity."""
    rows = []
    for seed in bar(seeds):
        draw = draws(seed)
        x, y = draw(3, 4), torch.tensor([1.0, -1.0, 1.0], dtype=torch.float64)
        net = CircularConvNet(equal_norms([draw(1, 4) for _ in range(depth)]))
        margins, path, _ = separate(net, x, y, backend)
        i = at(margins, MARGINS[-1])
        least = np.abs(np.fft.fft(margin.dft_l1_max_margin(x.numpy(), y.numpy()), norm="ortho")).sum()
        spectrum = np.fft.fft(path[i], norm="ortho")
        modulus = np.abs(spectrum)[:3]  # the fourth is the conjugate of the second
        features = np.fft.fft(x.numpy(), axis=1, norm="ortho")
        rows.append(dict(seed=seed, ratio=float(np.abs(spectrum).sum() / margins[i] / least),
                         residual=margin.stationarity(spectrum, features, y.numpy(), depth),
                         frequencies=int((modulus > 1e-2 * modulus.max()).sum())))
    return rows


def singular_vectors(seeds, backend="wnkernels", bar=iter):
    """1 - cos of layers and M(u) o (the others), the largest of three layers, at the first and the last of MARGINS."""
    rows = []
    for seed in bar(seeds):
        draw = draws(seed)
        tensor = draw(3, 3, 4, 5)  # a random 3 x 4 x 5 tensor for each of three examples
        x, y = torch.eye(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
        net = TensorNet(tensor, equal_norms([draw(1, 3), draw(1, 4), draw(1, 5)]))
        margins, path, layers = separate(net, x, y, backend)
        row = [seed]
        for level in (MARGINS[0], MARGINS[-1]):
            i = at(margins, level)
            u = -exponential(torch.tensor(path[i]))[1] @ x
            here = [w[i] for w in layers]
            images = net.pullback(here, u)
            row.append(max(float(1 - torch.cosine_similarity(w, m)) for w, m in zip(here, images)))
        rows.append(dict(zip(("seed", "first", "last"), row)))
    return rows


def norm_ratios(seeds, bar=iter):
    """Largest over least norm of a layer at a margin of 1e4, from layers of unequal norms, by plain flow."""
    ratios = []
    for seed in bar(seeds):
        draw = draws(seed)
        net = TensorNet(draw(3, 3, 4, 5), [START * draw(1, k) for k in (3, 4, 5)])
        x, y = torch.eye(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
        margins, _, layers = separate(net, x, y, "torch")
        norms = [float(w[at(margins, MARGINS[-1])].norm()) for w in layers]
        ratios.append(max(norms) / min(norms))
    return ratios


# -------------------------------------------------------------------------------------------------------------- claims


def _q_claims(options):
    alphas = {depth: values[-2:] if options.small else values for depth, values in ALPHAS.items()}
    with options.clock() as clock:
        fine = [row for depth in options.bar(alphas, "P1-1") for row in descend_to_point(depth, alphas[depth], 1e-3)]
        coarse = [row for depth in alphas for row in descend_to_point(depth, alphas[depth], 1e-2)]
    options.results["yun_q"] = [row | dict(lr=lr) for rows, lr in ((fine, 1e-3), (coarse, 1e-2)) for row in rows]
    error, steps = max(row["error"] for row in fine), max(row["steps"] for row in fine)
    done = all(row["steps"] >= 0 for row in fine)
    ratios = [b["error"] / a["error"] for a, b in zip(fine, coarse) if a["error"] > 1e-6]  # else it is the tolerance
    yield Claim("P1-1", f"limit of {len(fine)} diagonal nets, L = 2, 3, 4, is the minimizer of Q; gradient descent, "
                "step 1e-3", "argmin Q", f"error {error:.2g}, {steps} steps", "<= 5e-4, <= 8.5e4 steps",
                done and error <= 5e-4 and steps <= 8.5e4, clock.seconds)
    yield Claim("P1-1 order", "that error at step 1e-2 over the one at 1e-3 (first order: 10), median", 10.0,
                float(np.median(ratios)), "reported", None, clock.seconds)
    options.results["yun_regression"] = regression_paths()


def _flow_claims(options):
    if options.wants("P1-2"):
        with options.clock() as clock:
            rows = decomposable_residuals(SEEDS[:1] if options.small else SEEDS, (0.1, 1.0))
        options.results["yun_decomposable"] = rows
        worst = max(row["residual"] for row in rows)
        yield Claim("P1-2", f"the same for random orthogonally decomposable 8^3 tensors, 6 components, 2 examples, "
                    f"flow, {len(rows)} runs: residual of grad Q outside the row space", 0.0, worst, "<= 1e-9",
                    worst <= 1e-9, clock.seconds)
    if options.wants("P1-3"):
        cases = [((3, 0.01, (1.0, 1.0)), [0, 0.5], 1e-4, "1e-4"), ((3, 0.01, (2.0, 0.5)), [1, 0], 1e-4, "1e-4"),
                 ((3, 3.0, (1.0, 1.0)), [0.2, 0.4], 1e-3, "1e-3")]
        for (depth, alpha, eta), target, bound, text in cases:
            with options.clock() as clock:
                limit = diagonal_limit(depth, alpha, eta)
            error = float(np.abs(limit - target).max())
            yield Claim("P1-3", f"L = {depth}, alpha = {alpha}, eta = {eta}: distance of the flow's limit",
                        f"to {target}", error, f"<= {text}", error <= bound, clock.seconds)


def _plane_claims(options):
    seeds = PLANE_SEEDS[:3] if options.small else range(2501, 2525) if options.full else PLANE_SEEDS
    run = options.measure(plane_angles, seeds, bar=lambda items: options.bar(items, "P1-4"))
    angles, paths = run.value
    options.results["yun_angles"], options.results["yun_paths"] = angles, paths
    targets = plane_targets()
    for name, bound in (("diagonal L=2", 0.5), ("diagonal L=3", 0.05), ("fully connected", 0.6),
                        ("convolutional L=2", 0.3)):
        # How far a path still is at a given margin has a heavy tail over starts, those near a saddle: the median tells
        # what is typical, but the bound is for every start.
        last = angles[name][:, -1]
        share = float((last / angles[name][:, 1]).max())
        target = ", ".join(f"{value:.4g}" for value in targets[name])
        yield Claim(f"P1-4 {name}", f"angle to the max-margin direction at margin 1e4, degrees, worst of {len(seeds)} "
                    "starts; worst of angle at 1e4 over that at 1e2", f"0 to ({target})",
                    f"{last.max():.2g} (median {np.median(last):.2g}, {(last > bound).sum()} above the bound); "
                    f"{share:.2g}",
                    f"<= {bound}; <= 0.5", bool(last.max() <= bound and share <= 0.5), run.seconds,
                    run.torch_seconds)


def _conv_claims(options):
    for name, depth in (("P1-5", 2), ("P1-7", 3)):
        if not options.wants(name):
            continue
        seeds = SEEDS[:1] if options.small else SEEDS
        run = options.measure(conv_margins, seeds, depth, bar=lambda items, name=name: options.bar(items, name))
        options.results[f"yun_conv_{depth}"] = run.value
        if depth == 2:
            worst = max(row["ratio"] for row in run.value)
            yield Claim(name, f"convolutional L = 2, d = 4, 3 examples: ||F beta||_1/margin over the least, worst of "
                        f"{len(seeds)}", 1.0, f"{worst:.6f}", "<= 1.005", worst <= 1.005, run.seconds,
                        run.torch_seconds)
        else:
            free = [row["residual"] for row in run.value if row["frequencies"] > 1]
            worst, sparse = max(free, default=0.0), len(run.value) - len(free)
            yield Claim(name, f"convolutional L = 3, d = 4, 3 examples: the limit is a stationary point; worst "
                        f"residual of {len(free)}, the other {sparse} of one frequency", 0.0, worst, "<= 1e-2",
                        worst <= 1e-2, run.seconds, run.torch_seconds)


def _singular_claims(options):
    seeds = SEEDS[:1] if options.small else SEEDS
    run = options.measure(singular_vectors, seeds, bar=lambda items: options.bar(items, "P1-6"))
    options.results["yun_singular"] = run.value
    worst, falls = max(row["last"] for row in run.value), all(row["last"] < row["first"] for row in run.value)
    yield Claim("P1-6", f"random 3 x 4 x 5 tensors, 3 examples: 1 - cos of the layers and M(u) o (the others) at "
                f"margin 1e4, worst of {len(seeds)}", 0.0, worst, "<= 0.02, less than at 10", worst <= 0.02 and falls,
                run.seconds, run.torch_seconds)
    with options.clock() as clock:
        ratio = max(norm_ratios(seeds, bar=lambda items: options.bar(items, "P1-6, norms")))
    yield Claim("P1-6 norms", f"the same from unequal layers, plain flow: largest over least norm of a layer, worst of "
                f"{len(seeds)}", 1.0, f"{ratio:.4f}", "<= 1.01", ratio <= 1.01, clock.seconds)


def claims(options):
    """P1-1 to P1-7, see the module's docstring."""
    for ids, part in ((("P1-1",), _q_claims), (("P1-2", "P1-3"), _flow_claims), (("P1-4",), _plane_claims),
                      (("P1-5", "P1-7"), _conv_claims), (("P1-6",), _singular_claims)):
        if options.wants(*ids):
            yield from part(options)


def figures(results, folder):
    """Figures of what the experiments have left in `results`, as PNG files in `folder`."""
    from matplotlib.figure import Figure

    if "yun_regression" in results:
        targets = {"diagonal": (0, 0.5), "fully connected": (0.2, 0.4), "convolutional": (1 / 3, 1 / 3)}
        figure = Figure(figsize=(12, 4), layout="constrained")
        axes = figure.subplots(1, 3)
        for axis, (name, paths) in zip(axes, results["yun_regression"].items()):
            axis.axline((1, 0), (0, 0.5), color="0.8", label="interpolation")
            for k, alpha in enumerate((0.01, 0.5, 1.0)):
                for j in range(4):
                    axis.plot(*paths[:, k, j].T, color=f"C{k}", label=f"alpha = {alpha}" if j == 0 else None)
            axis.plot(*targets[name], "k*", markersize=12, label="least norm")
            axis.set(title=name, xlabel="coefficient 1", ylabel="coefficient 2")
        axes[0].legend(fontsize=8)
        figure.savefig(folder / "yun_regression.png", dpi=130)
    if "yun_q" in results:
        rows = [row for row in results["yun_q"] if row["lr"] == 1e-3]
        figure = Figure(figsize=(9, 4), layout="constrained")
        axes = figure.subplots(1, len(ETAS))
        for axis, eta in zip(axes, ETAS):
            for k, depth in enumerate(sorted(ALPHAS)):
                alphas = np.geomspace(0.01, 3, 60)
                limits = [implicit_bias.interpolation_limit(POINT.numpy(), [1.0], depth, a, eta) for a in alphas]
                axis.plot(alphas, np.array(limits)[:, 0], color=f"C{k}", label=f"L = {depth}, minimizer of Q")
                mine = [row for row in rows if row["depth"] == depth and row["eta"] == eta]
                axis.plot([row["alpha"] for row in mine], [row["limit"][0] for row in mine], "o", color=f"C{k}")
            axis.set(title=f"eta = {eta}", xscale="log", xlabel="alpha", ylabel="coefficient 1 of the limit")
        axes[0].legend(fontsize=8)
        figure.savefig(folder / "yun_limits.png", dpi=130)
    if "yun_angles" in results:
        figure = Figure(figsize=(6, 4), layout="constrained")
        axis = figure.subplots()
        for k, (name, angles) in enumerate(results["yun_angles"].items()):
            axis.plot(MARGINS, angles.T, color=f"C{k}", alpha=0.4)
            axis.plot(MARGINS, np.median(angles, 0), color=f"C{k}", linewidth=2.5, label=name)
        axis.set(xscale="log", yscale="log", xlabel="least margin", ylabel="angle to the max-margin direction, degrees")
        axis.legend(fontsize=8)
        figure.savefig(folder / "yun_angles.png", dpi=130)
