"""Spherical motion dynamics (Wan, Zhu, Zhang and Sun, arXiv:2006.08419): the equilibrium of weight decay, and
its loss.

Under weight decay on v every weight that is normalized turns by sqrt(2 lambda eta/(1 + alpha)) a step,
whatever the loss, once |v| is at its equilibrium; after a decay of eta the norm, and so the angle, needs
thousands of steps to follow, unless it is rescaled. `theory.spherical` has the formulas.

The polar optimizer is made for this: v is the weight of the paper, its norm and its angular update are the
telemetry of the step. For a scale-invariant weight under BatchNorm the plain step is the step on v with a
fixed radius, kind "unit": the optimizer trains the plain net, and reports |v| of the plain weight.

The nets are MLPs 64-128-128-10 on scikit-learn's digits, batch 32, with input noise .2; a tenth of the labels
of every batch is drawn anew, so that the loss stays above 0 and cannot be learnt by heart.
"""

import functools
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from .. import optim
from ..dynamics.descent import multi_stage
from ..dynamics.diagnostics import angular_update, from_gradient
from ..functional import row_norm
from ..theory import spherical as theory
from .claims import Claim, Options

TITLE = "Wan, Zhu, Zhang and Sun: spherical motion dynamics"

SEED = 0
WIDTH, BATCH, INPUT_NOISE, LABEL_NOISE = 128, 32, 0.2, 0.1


class Setting(NamedTuple):
    lr: float
    weight_decay: float
    momentum: float

    def __str__(self) -> str:
        return f"{self.lr:g}/{self.weight_decay:g}/{self.momentum:g}"


# Synthetic gradients: two rates for each momentum. Digits: 3/x steps of the settings are 600, 1500 and 3000.
SIZE = 256  # of the weight that synthetic gradients move
WALKS = tuple(Setting(0.1, decay, momentum) for momentum in (0.0, 0.5, 0.9) for decay in (5e-3, 2e-2))
SETTINGS = (Setting(0.1, 5e-3, 0.9), Setting(0.1, 1e-2, 0.5), Setting(0.1, 1e-2, 0.0))
STAGES = Setting(0.1, 2e-3, 0.9)  # the first stage, of BEFORE = 4/x steps; then eta is divided by FACTOR
BEFORE, FACTOR = 2000, 10
WINDOW = 200
WINDOWS = (20, 500, 1000, 2000, 3000, 5000)  # starts, in steps after the decay


def rms(x: np.ndarray, axis=None) -> np.ndarray:
    return np.sqrt(np.mean(np.square(x), axis))


# ---------------------------------------------------------------------------------------- synthetic gradients


def walk(
    settings, steps: int, window: int, *, backend: str, constant: bool = False, rows: int = 8, size: int = SIZE
) -> tuple[np.ndarray, np.ndarray]:
    """Descent along isotropic gradients that are tangent to the sphere: (rms angular update, mean norm) of
    each setting.

    Averages are over the last `window` steps and `rows` independent weights of `size` elements. The unit
    gradient is standard normal in the tangent space, so its mean square is size - 1; with `constant` it is
    divided by its length.
    """
    noise = torch.Generator().manual_seed(SEED)
    momentum = settings[0].momentum  # one number in the optimizer; rates and decays are by row
    if any(s.momentum != momentum for s in settings):
        raise ValueError(f"settings must share one momentum, got {[s.momentum for s in settings]}")
    lr, decay = (
        torch.tensor([getattr(s, name) for s in settings], dtype=torch.float64).repeat_interleave(rows)
        for name in ("lr", "weight_decay")
    )
    w = nn.Parameter(F.normalize(torch.randn(len(lr), size, generator=noise, dtype=torch.float64)))
    if backend == "wnkernels":
        options = {"lr": lr, "momentum": momentum, "weight_decay": decay}
        optimizer = optim.PolarSGD([w], **options, kind="unit", telemetry=True)
    else:
        buffer = torch.zeros_like(w)
    angles, norms = np.zeros((2, window, len(lr)))
    for step in range(steps):
        gradient = torch.randn(w.shape, generator=noise, dtype=torch.float64)
        theta = F.normalize(w.detach())
        if constant or backend == "torch":  # the polar step projects by itself
            gradient -= (gradient * theta).sum(1, keepdim=True) * theta
        if constant:
            gradient = F.normalize(gradient)
        if backend == "wnkernels":
            w.grad = gradient
            optimizer.step()
        else:
            gradient /= w.detach().norm(dim=1, keepdim=True)
            buffer.mul_(momentum).add_(gradient + decay[:, None] * w.detach())
            w = w.detach() - lr[:, None] * buffer
        if step >= steps - window:
            at = step - (steps - window)
            if backend == "wnkernels":
                telemetry = optimizer.telemetry()["0.0"]
                angles[at], norms[at] = telemetry["angular_update"], telemetry["norm"]
            else:
                angles[at], norms[at] = angular_update(theta, w), w.norm(dim=1)
    by_setting = len(settings), rows
    return rms(angles, 0).reshape(by_setting).mean(1), norms.mean(0).reshape(by_setting).mean(1)


def walks(steps: int, *, backend: str, bar=iter) -> np.ndarray:
    """(settings of WALKS, 2): angular update and norm over theory."""
    ratios = []
    for momentum in bar(sorted({s.momentum for s in WALKS})):
        settings = [s for s in WALKS if s.momentum == momentum]
        for s, angle, norm in zip(settings, *walk(settings, steps, steps // 4, backend=backend)):
            ratios.append([angle / theory.equilibrium_angle(*s), norm / theory.equilibrium_norm(SIZE - 1, *s)])
    return np.array(ratios)


# ----------------------------------------------------------------------------------------------------- digits


@functools.cache
def digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's 1797 images, (n, 64) in [0, 1], and their classes."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    return torch.tensor(x / 16, dtype=torch.float32), torch.tensor(y)


def batches(steps: int, seed: int):
    """Noisy batches of the digits."""
    x, y = digits()
    noise = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        chosen = torch.randint(len(x), (BATCH,), generator=noise)
        inputs = x[chosen] + INPUT_NOISE * torch.randn(BATCH, x.shape[1], generator=noise)
        wrong = torch.rand(BATCH, generator=noise) < LABEL_NOISE
        yield inputs, torch.where(wrong, torch.randint(10, (BATCH,), generator=noise), y[chosen])


def mlp(normalization: str, dtype=torch.float32) -> tuple[nn.Module, list[str]]:
    """A plain MLP, and the names of its weights that are scale-invariant under `normalization`: "layer" and
    "row" are weight normalization with one g for each, "batch" is BatchNorm in the hidden layers."""
    hidden = []
    for width in (64, WIDTH):
        if normalization == "batch":
            hidden += [nn.Linear(width, WIDTH, bias=False), nn.BatchNorm1d(WIDTH), nn.ReLU()]
        else:
            hidden += [nn.Linear(width, WIDTH), nn.ReLU()]
    model = nn.Sequential(*hidden, nn.Linear(WIDTH, 10)).to(dtype)
    linear = [f"{name}.weight" for name, module in model.named_children() if isinstance(module, nn.Linear)]
    return model, linear[:-1] if normalization == "batch" else linear


class Recorded(NamedTuple):
    """(steps, R) of each weight, R rows or 1: the angular update of the step, and |v| after it."""

    angle: np.ndarray
    norm: np.ndarray


def _split(model: nn.Module, names: list[str]) -> list[list]:
    """Named parameters: the normalized weights, the other matrices, and the vectors, which do not decay."""
    parts = [[], [], []]
    for name, p in model.named_parameters():
        parts[0 if name in names else 1 if p.ndim > 1 else 2].append((name, p))
    return parts


class _Ours:
    """The polar optimizer on the plain model; what it records is its telemetry."""

    def __init__(self, model, names, normalization, setting) -> None:
        normalized, matrices, vectors = _split(model, names)
        kind = "unit" if normalization == "batch" else "swn"
        decay, dim = {"weight_decay": setting.weight_decay}, 0 if normalization == "row" else None
        groups = [
            {"params": normalized, "kind": kind, "dim": dim, "telemetry": True, **decay},
            {"params": matrices, "kind": None, **decay},
            {"params": vectors, "kind": None},
        ]
        groups = [group for group in groups if group["params"]]
        self.optimizer = optim.PolarSGD(groups, lr=setting.lr, momentum=setting.momentum)

    def before(self) -> None:
        pass

    def after(self) -> dict[str, tuple[Tensor, Tensor]]:
        return {name: (t["angular_update"], t["norm"]) for name, t in self.optimizer.telemetry().items()}


class _Torch:
    """torch's parametrization, or the plain BatchNorm net, with torch.optim.SGD; copies v to record."""

    def __init__(self, model, names, normalization, setting) -> None:
        normalized, matrices, vectors = _split(model, names)
        self.dim = 0 if normalization == "row" else None
        self.vs = {}
        for name, weight in normalized:
            if normalization != "batch":
                module = model.get_submodule(name.removesuffix(".weight"))
                parametrizations.weight_norm(module, dim=self.dim)
                vectors.append((name, module.parametrizations.weight.original0))
                weight = module.parametrizations.weight.original1
            self.vs[name] = weight
        decayed = [*self.vs.values(), *(p for _, p in matrices)]
        groups = [
            {"params": decayed, "weight_decay": setting.weight_decay},
            {"params": [p for _, p in vectors]},
        ]
        self.optimizer = _RescalingSGD(groups, lr=setting.lr, momentum=setting.momentum)
        self.optimizer.directions = list(self.vs.values())

    def before(self) -> None:
        self.old = {name: v.detach().clone() for name, v in self.vs.items()}

    def after(self) -> dict[str, tuple[Tensor, Tensor]]:
        return {
            name: (angular_update(self.old[name], v, self.dim), row_norm(v.detach(), self.dim).reshape(-1))
            for name, v in self.vs.items()
        }


class _RescalingSGD(torch.optim.SGD):
    """With `rescale_direction`, as of the polar optimizers, for the parameters in `directions`."""

    @torch.no_grad()
    def rescale_direction(self, k: float) -> None:
        for v in self.directions:
            v.mul_(k)
            self.state[v]["momentum_buffer"].div_(k)


def train(
    setting: Setting, normalization: str, steps: int, *, backend: str, decay_at: int | None = None,
    rescale: bool = False, dtype: torch.dtype = torch.float32, bar=iter,
) -> dict[str, Recorded]:
    """Trains an MLP on digits, and records every step of every normalized weight.

    Args:
        normalization: "layer", "row" or "batch", see `mlp`.
        decay_at: the number of steps after which eta becomes eta/FACTOR; with `rescale` |v| goes to its new
            equilibrium at once.
    """
    torch.manual_seed(SEED)
    model, names = mlp(normalization, dtype)
    data = ((inputs.to(dtype), targets) for inputs, targets in batches(steps, SEED + 1))
    return _record(model, names, bar(data), setting, normalization, backend, decay_at, rescale)


def _record(
    model, names, data, setting, normalization, backend, decay_at=None, rescale=False
) -> dict[str, Recorded]:
    trained = (_Ours if backend == "wnkernels" else _Torch)(model, names, normalization, setting)
    stages = multi_stage(trained.optimizer, [] if decay_at is None else [decay_at], FACTOR, rescale=rescale)
    records = {name: ([], []) for name in names}
    for inputs, targets in data:
        trained.optimizer.zero_grad()
        F.cross_entropy(model(inputs), targets).backward()
        trained.before()
        trained.optimizer.step()
        for name, values in trained.after().items():
            for column, value in zip(records[name], values):
                column.append(value)
        stages.step()
    return {
        name: Recorded(*(torch.stack(column).double().cpu().numpy() for column in columns))
        for name, columns in records.items()
    }


def growth_error(steps: int, *, backend: str) -> float:
    """Without weight decay and momentum |v|^2 grows by eta^2 |dL/dv|^2 a step: the largest error of the sum
    over |v|^2, over all rows and times of a run in float64. dL/dv comes from dL/dw, not from the step."""
    torch.manual_seed(SEED)
    model, names = mlp("row", torch.float64)
    setting = Setting(0.1, 0.0, 0.0)
    trained = (_Ours if backend == "wnkernels" else _Torch)(model, names, "row", setting)

    def squares(name):
        if backend == "torch":
            return trained.vs[name].detach().square().sum(1)
        return trained.optimizer.state[model.get_parameter(name)]["norm"] ** 2

    expected = {name: squares(name).clone() for name in names}
    worst = 0.0
    for inputs, targets in batches(steps, SEED + 1):
        trained.optimizer.zero_grad()
        F.cross_entropy(model(inputs.double()), targets).backward()
        for name in names:
            if backend == "torch":
                gradient = trained.vs[name].grad.square().sum(1)
            else:
                w = model.get_parameter(name)
                gradient = from_gradient(w, w.grad)["unit_gradient"] ** 2 / squares(name)
            expected[name] += setting.lr**2 * gradient
        trained.optimizer.step()
        worst = max(worst, *((squares(name) / expected[name] - 1).abs().max().item() for name in names))
    return worst


# --------------------------------------------------------------------------------------- ResNet-18, for a GPU


class _Block(nn.Module):
    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.path = nn.Sequential(
            nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU(),
            nn.Conv2d(after, after, 3, 1, 1, bias=False), nn.BatchNorm2d(after),
        )
        same = before == after and stride == 1
        self.skip = nn.Identity() if same else nn.Sequential(
            nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after)
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.path(x) + self.skip(x))


def resnet18() -> tuple[nn.Module, list[str]]:
    """ResNet-18 for images of 32 x 32 (He et al., arXiv:1512.03385), and the names of its convolutions'
    weights, all of them under BatchNorm."""
    layers, width = [nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU()], 64
    for after, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        layers += [_Block(width, after, stride), _Block(after, after, 1)]
        width = after
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))
    return model, [f"{name}.weight" for name, m in model.named_modules() if isinstance(m, nn.Conv2d)]


def images(steps: int, batch: int, device: str):
    """Batches of synthetic images: one of ten smooth patterns in noise of twice its size, a tenth of the
    labels drawn anew."""
    noise = torch.Generator(device).manual_seed(SEED)
    coarse = torch.randn(10, 3, 4, 4, generator=noise, device=device)
    patterns = F.interpolate(coarse, size=32, mode="bilinear")
    for _ in range(steps):
        y = torch.randint(10, (batch,), generator=noise, device=device)
        x = patterns[y] + 2 * torch.randn(batch, 3, 32, 32, generator=noise, device=device)
        wrong = torch.rand(batch, generator=noise, device=device) < LABEL_NOISE
        yield x, torch.where(wrong, torch.randint(10, (batch,), generator=noise, device=device), y)


def train_resnet(setting: Setting, steps: int, *, backend: str, device: str, batch: int = 128, bar=iter):
    """As `train`, of `resnet18` on `images`."""
    torch.manual_seed(SEED)
    model, names = resnet18()
    return _record(model.to(device), names, bar(images(steps, batch, device)), setting, "batch", backend)


# ----------------------------------------------------------------------------------------------------- claims


def _range(values, form: str = ".3f") -> str:
    return f"{np.min(values):{form}}..{np.max(values):{form}}"


def _steady(options: Options, normalization: str, settings=SETTINGS) -> tuple[list, float, float]:
    """For each setting the angular updates over theory, name -> (1000, R), from 3/x steps on."""
    ratios, seconds = [], np.zeros(2)
    for setting in settings:
        steps, window = math.ceil(3 / theory.rate(*setting)), 1000
        run = options.measure(
            train, setting, normalization, steps + window,
            bar=lambda items: options.bar(items, f"{normalization} {setting}", steps + window),
        )
        angle = theory.equilibrium_angle(*setting)
        ratios.append({name: record.angle[-window:] / angle for name, record in run.value.items()})
        seconds += run.seconds, run.torch_seconds
    return ratios, *seconds


def _stages(options: Options, normalization: str, rescale: bool):
    steps = BEFORE + WINDOWS[0 if options.small else -1] + WINDOW
    return options.measure(
        train, STAGES, normalization, steps, decay_at=BEFORE, rescale=rescale,
        bar=lambda items: options.bar(items, f"{normalization}, eta/{FACTOR}", steps),
    )


def _windows(record: Recorded) -> np.ndarray:
    """The rms angular update in each of WINDOWS, as far as the run goes, over the new equilibrium."""
    target = theory.equilibrium_angle(STAGES.lr / FACTOR, STAGES.weight_decay, STAGES.momentum)
    starts = [BEFORE + s for s in WINDOWS if BEFORE + s + WINDOW <= len(record.angle)]
    return np.array([rms(record.angle[s : s + WINDOW]) for s in starts]) / target


def _predicted_windows() -> np.ndarray:
    x = theory.rate(STAGES.lr / FACTOR, STAGES.weight_decay, STAGES.momentum)
    return np.array([rms(theory.transient_ratio(FACTOR, x * np.arange(s, s + WINDOW))) for s in WINDOWS])


NETS = {"layer": "WN", "batch": "BN"}


def claims(options: Options):
    if options.wants("P3-1"):
        run = options.measure(walks, 8000, bar=lambda items: options.bar(items, "walks"))
        shown = ", ".join(map(str, WALKS))
        yield Claim(
            "P3-1", f"tangent gradients: angular update, and norm, over theory; eta/lambda/alpha {shown}",
            "1", f"{_range(run.value[:, 0], '.4f')}; {_range(run.value[:, 1], '.4f')}", "within 1%",
            (abs(run.value - 1) <= 0.01).all(), run.seconds, run.torch_seconds,
        )

    if options.wants("P3-2"):
        settings = [Setting(0.1, decay, 0.0) for decay in (5e-3, 0.5, 1.0)]
        run = options.measure(walk, settings, 12_000, 10, constant=True, rows=1, size=64)
        exact = np.array([float(theory.exact_equilibrium_angle(s.lr, s.weight_decay)) for s in settings])
        yield Claim(
            "P3-2", "constant unit gradient: arccos(1 - eta lambda), eta lambda = .0005, .05, .1",
            " ".join(f"{x:.5f}" for x in exact), " ".join(f"{x:.5f}" for x in run.value[0]), "1e-4",
            (abs(run.value[0] - exact) <= 1e-4).all(), run.seconds, run.torch_seconds,
        )

    settings = SETTINGS[:1] if options.small else SETTINGS
    shown = f"{', '.join(map(str, settings))}; seed {SEED}"
    for claim, normalization, text in (
        ("P3-3", "layer", "one |v| per layer"), ("P3-4", "batch", "BatchNorm, kind='unit'"),
    ):
        if options.wants(claim):
            ratios, *seconds = _steady(options, normalization, settings)
            values = [[rms(angles) for angles in found.values()] for found in ratios]
            yield Claim(
                claim, f"digits, {text}: rms angular update over theory, by weight; eta/lambda/alpha {shown}",
                "1", "; ".join(" ".join(f"{x:.3f}" for x in line) for line in values), "[.93, 1.05]",
                ((np.array(values) >= 0.93) & (np.array(values) <= 1.05)).all(), *seconds,
            )

    if options.wants("P3-5"):
        (found,), *seconds = _steady(options, "row", SETTINGS[:1])
        rows = {name: rms(angles, 0) for name, angles in found.items()}
        options.results["rows"] = rows
        yield Claim(
            "P3-5", f"digits, |v| per row: rms over rows over theory, by weight; {SETTINGS[0]}, seed {SEED}",
            "1", "; ".join(f"{rms(r):.3f} ({_range(r)}, median {np.median(r):.3f})" for r in rows.values()),
            "report only", None, *seconds,
        )

    if options.full and options.wants("P3-4"):
        setting = Setting(0.1, 5e-4, 0.9)
        steps = math.ceil(3 / theory.rate(*setting)) + 1000
        run = options.measure(train_resnet, setting, steps, device=options.device,
                              bar=lambda items: options.bar(items, "ResNet-18", steps))
        target = theory.equilibrium_angle(*setting)
        values = np.array([rms(r.angle[-1000:]) for r in run.value.values()]) / target
        yield Claim(
            "P3-4 ResNet-18",
            f"ResNet-18, synthetic 32 x 32 images: the same of {len(values)} convolutions; {setting}", "1",
            _range(values), "[.9, 1.1]", ((values >= 0.9) & (values <= 1.1)).all(),
            run.seconds, run.torch_seconds,
        )

    yield from _claims_of_stages(options)

    if options.wants("P3-10"):
        run = options.measure(growth_error, 100 if options.small else 500)
        yield Claim(
            "P3-10", "digits, no decay: |v|^2 = |v_0|^2 + sum of eta^2 |dL/dv|^2, relative error, float64",
            0.0, run.value, "1e-10", run.value <= 1e-10, run.seconds, run.torch_seconds,
        )


def _claims_of_stages(options: Options):
    """P3-6 to P3-9: eta/10 at equilibrium, with and without the rescaling of |v| by 10^(-1/4)."""
    long = () if options.small else ("P3-7", "P3-9")  # these need thousands of steps after the decay
    if not options.wants("P3-6", "P3-8", *long):
        return
    runs = {(net, rescale): _stages(options, net, rescale) for net in NETS for rescale in (False, True)}
    options.results["stages"] = {key: run.value for key, run in runs.items()}
    ratios = {key: np.array([_windows(record) for record in run.value.values()]) for key, run in runs.items()}
    plain = {NETS[net]: ratios[net, False] for net in NETS}
    rescaled = {NETS[net]: ratios[net, True] for net in NETS}
    seconds = [sum(times) for times in zip(*((run.seconds, run.torch_seconds) for run in runs.values()))]
    about = f"{STAGES}, eta/{FACTOR}; seed {SEED}"
    predicted = _predicted_windows()

    def text(values, index=0):
        return "; ".join(f"{net} {_range(x[:, index])}" for net, x in values.items())

    if options.wants("P3-6"):
        first = np.concatenate([x[:, 0] for x in plain.values()])
        yield Claim(
            "P3-6", f"angular update over its new equilibrium, 20 to 220 steps after the decay; {about}",
            f"{predicted[0]:.3f}", text(plain), "[.25, .40]", ((first >= 0.25) & (first <= 0.40)).all(),
            *seconds,
        )
    if options.wants("P3-7") and not options.small:
        for net, bound in (("BN", 0.10), ("WN", 0.18)):
            error = abs(plain[net] - predicted).max()
            yield Claim(
                f"P3-7 {net}", f"the same in windows from {', '.join(map(str, WINDOWS))} steps on, {net}",
                " ".join(f"{x:.2f}" for x in predicted),
                f"{'; '.join(' '.join(f'{x:.2f}' for x in line) for line in plain[net])}: off by {error:.3f}",
                f"{bound:.2f}", error <= bound, *seconds,
            )
    if options.wants("P3-8"):
        good = all((rescaled[n][:, 0] >= np.maximum(0.75, 2 * plain[n][:, 0])).all() for n in plain)
        yield Claim(
            "P3-8", "as P3-6, with |v| rescaled by 10^(-1/4) at the decay", "1", text(rescaled),
            ">= .75, and twice the unrescaled", good, *seconds,
        )
    if options.wants("P3-9") and not options.small:
        drop = {
            NETS[net]: np.array([
                r.norm[-WINDOW:].mean() / r.norm[BEFORE - WINDOW : BEFORE].mean()
                for r in options.results["stages"][net, False].values()
            ])[:, None]
            for net in NETS
        }
        values = np.concatenate(list(drop.values()))
        yield Claim(
            "P3-9", f"|v| {WINDOWS[-1]} steps after the decay over |v| before; {about}",
            float(theory.rescale_factor(FACTOR)), text(drop), "[.45, .65]",
            ((values >= 0.45) & (values <= 0.65)).all(), *seconds,
        )


def figures(results: dict, folder: Path) -> None:
    """wan_angles.png: angular updates through the decay, and their prediction; wan_rows.png: of rows."""
    from matplotlib.figure import Figure

    if "stages" in results:
        figure = Figure(figsize=(11, 3.8), layout="constrained")
        x = theory.rate(STAGES.lr / FACTOR, STAGES.weight_decay, STAGES.momentum)
        old, new = (theory.equilibrium_angle(lr, *STAGES[1:]) for lr in (STAGES.lr, STAGES.lr / FACTOR))
        for panel, net in zip(figure.subplots(1, 2, sharey=True), NETS):
            for rescale, style in ((False, "-"), (True, ":")):
                for color, (name, record) in enumerate(results["stages"][net, rescale].items()):
                    smooth = rms(record.angle[: len(record.angle) // 50 * 50, 0].reshape(-1, 50), 1)
                    at, label = np.arange(len(smooth)) * 50 + 25, f"{name}{', rescaled' if rescale else ''}"
                    panel.semilogy(at, smooth, style, color=f"C{color}", label=label)
            after = np.arange(len(record.angle) - BEFORE)
            predicted = new * theory.transient_ratio(FACTOR, x * after)
            panel.semilogy([0, BEFORE], [old, old], "k--")
            panel.semilogy(BEFORE + after, predicted, "k--", label="prediction")
            panel.set(title=NETS[net], xlabel="step", ylabel="angular update, radians")
            panel.legend(fontsize=7)
        figure.savefig(folder / "wan_angles.png", dpi=110)
    if "rows" in results:
        figure = Figure(figsize=(6, 3.5), layout="constrained")
        panel = figure.subplots()
        for name, ratios in results["rows"].items():
            panel.plot(np.linspace(0, 1, len(ratios)), np.sort(ratios), label=name)
        panel.axhline(1, color="k", linestyle="--")
        panel.set(title="angular update of each row over theory", xlabel="share of rows", ylabel="ratio")
        panel.legend()
        figure.savefig(folder / "wan_rows.png", dpi=110)
