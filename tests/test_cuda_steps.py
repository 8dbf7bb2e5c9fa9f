"""The polar steps of csrc/cuda, run thread by thread on the emulator, against reference.polar_*_step in float64.

Every path of csrc/cuda/step_plan.h is forced by the device that the emulator pretends to be, and asserted from the log
of launches. Bounds: a step rounds a row a few times relative to its largest element, after sums in chains of at most
DEPTH additions.
"""
import math

import pytest
import torch
from simt import emulator as simt
from test_cuda_emulated import (DEPTH, emulator, fenced, library, pytestmark,  # noqa: F401  (fixtures)
                                unit_roundoff)

from wnkernels import reference

f32, f64, bf16, f16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
TYPES = [(f32, f32), (f64, f64), (f32, bf16), (f32, f16)]  # of weight and gradient
LR, RADIUS_LR, BETAS, EPS = 0.05, 0.02, (0.9, 0.99), 1e-3
SGD = {"sgd": dict(weight_decay=0.1, radius_weight_decay=0.05), "sgd_momentum": dict(momentum=0.9, weight_decay=0.1)}
ADAM = {"adam": dict(weight_decay=0.1, radius_weight_decay=0.05), "adam_amsgrad": dict(decoupled=False, weight_decay=0.1)}
STEPS = {**SGD, **ADAM}
INPUTS = {"sgd": 2, "sgd_momentum": 3, "adam": 4, "adam_amsgrad": 5}
STATE = {"sgd": [], "sgd_momentum": ["momentum_buffer"], "adam": ["exp_avg", "exp_avg_sq"],
         "adam_amsgrad": ["exp_avg", "exp_avg_sq", "max_exp_avg_sq"]}


def rows(x):
    return x.view(1, -1, 1)


class Weight:
    """One weight with its state, for the emulator and for the reference."""

    def __init__(self, step, layout, types=(f32, f32), kind="swn", offsets=(0,) * 7, exponents=((0, 0),)):
        self.step, self.layout, self.kind, (weight_type, gradient_type) = step, layout, kind, types
        count = layout[1]
        length = math.sqrt(max(1, layout[0] * layout[2]))
        scale = [[10.0 ** (e or 0) * (e is not None) for e in column] for column in zip(*exponents)]
        scale = [torch.tensor(column, dtype=f64).repeat(count)[:count] for column in scale]
        w = torch.randn(layout, dtype=f64) / length * rows(scale[0])
        self.w = fenced(w, weight_type, offsets[0])
        self.G = fenced(torch.randn(layout, dtype=f64) / length * rows(scale[1]), gradient_type, offsets[1])
        half = gradient_type in (bf16, f16)
        self.copy = fenced(torch.zeros(layout), gradient_type, offsets[2]) if half else None
        size = self.w.tensor.double().norm(dim=(0, 2)) if w.numel() else torch.zeros(count, dtype=f64)
        # Equal to |w| but for rounding, as the weight was left by an earlier step.
        self.radius = size.log() if kind == "ewn" else size * torch.where(torch.rand(count) < 0.5, -1.0, 1.0)
        self.norm = torch.rand(count, dtype=f64) + 0.5
        self.telemetry = torch.full((count, 4), math.nan, dtype=f64)
        self.state = [fenced(torch.randn(layout, dtype=f64) / length, weight_type, o) for o in offsets[3:]][:len(STATE[step])]
        self.row_state = [torch.randn(count, dtype=f64) for _ in self.state]
        for x in [*(x.tensor for x in self.state[1:]), *self.row_state[1:]]:
            x.square_()
        if step == "adam_amsgrad":  # the largest ones are larger
            self.state[2].tensor.add_(self.state[1].tensor)
            self.row_state[2].add_(self.row_state[1])

    def arguments(self):
        return dict(layout=self.layout, inputs=[self.w.tensor, self.G.tensor, *(x.tensor for x in self.state)],
                    row_state=self.row_state, radius=self.radius, norm=self.norm, telemetry=self.telemetry,
                    copy=self.copy and self.copy.tensor)

    def numbers(self):
        """All that a step writes, by the names of the reference."""
        values = {"weight": self.w.tensor, "radius": self.radius, "norm": self.norm}
        for name, x, y in zip(STATE[self.step], self.state, self.row_state):
            values |= {name: x.tensor, "radius_" + name: y}
        return values

    def expected(self, count=3, **options):
        self.before = {name: x.double().clone() for name, x in self.numbers().items()}
        state = {name: x for name, x in self.before.items() if name not in ("weight", "radius", "norm")}
        function = reference.polar_sgd_step
        if self.step in ADAM:
            function, state["step"] = reference.polar_adam_step, count - 1
            options = dict(betas=BETAS, eps=EPS, amsgrad=self.step == "adam_amsgrad") | options
        weight, radius, norm = (self.before[name] for name in ("weight", "radius", "norm"))
        return function(weight, self.G.tensor.double(), radius, norm, state, lr=LR,
                        radius_lr=RADIUS_LR, kind=self.kind, dim=1, **STEPS[self.step], **options)

    def check(self, expected):
        u = unit_roundoff(f64 if self.w.tensor.dtype == f64 else f32)

        for name, got in self.numbers().items():
            wanted = expected.state.get(name) if name in expected.state else getattr(expected, name)
            scale = torch.maximum(wanted.abs(), self.before[name].abs())
            if wanted.dim() == 3 and wanted.numel():
                scale = scale.amax((0, 2), keepdim=True)
            excess = (got.double() - wanted).abs() / (DEPTH * u * scale + torch.finfo(self.w.tensor.dtype).tiny)
            assert bool((excess <= 1).all()), f"{name}: {excess.max().item()} times the bound"
        if self.copy:
            assert torch.equal(self.copy.tensor, self.w.tensor.to(self.copy.tensor.dtype))
        for x in [self.w, self.G, self.copy, *self.state]:
            assert x is None or x.intact(), "a kernel wrote outside of a tensor"


def take(emulator, weights, count=3.0, **more):
    first = weights[0]
    options = dict(STEPS[first.step])
    numbers = {"lr": LR, "radius_lr": RADIUS_LR, "weight_decay": 0.0, "radius_weight_decay": 0.0}
    if first.step == "sgd_momentum":
        numbers["gradient_weight"] = 1.0
    if first.step in ADAM:
        numbers |= {"beta1": BETAS[0], "beta2": BETAS[1], "eps": EPS, "step": count}
    return emulator.steps(first.step, [w.arguments() for w in weights], first.G.tensor.dtype, kind=first.kind,
                          **numbers | options | more)


# A device (multiprocessors, capability, shared memory), a layout for a row of `bytes` in all inputs, and the launches.
BIG, SMALL, TINY = 227 << 10, 163 << 10, 14 << 10
PATHS = {
    "short": ((4, 90, BIG), lambda of: (1, 37, of(600) + 1), "steps"),
    "whole packs": ((4, 90, BIG), lambda of: (1, 37, of(600)), "steps"),
    "warp": ((4, 90, BIG), lambda of: (1, 11, of(12 << 10) + 1), "steps"),
    "block": ((4, 90, BIG), lambda of: (1, 5, of(70 << 10) + 1), "steps"),
    "segments": ((4, 90, BIG), lambda of: (3, 5, 43), "steps"),
    "many segments": ((4, 90, BIG), lambda of: (50, 4, 33), "steps"),
    "big": ((2, 80, SMALL), lambda of: (1, 3, of(100 << 10) + 1), "steps, big blocks"),
    "streamed": ((1, 75, TINY), lambda of: (1, 2, of(30 << 10) + 1), "steps"),
    "cluster": ((8, 90, BIG), lambda of: (1, 3, of(270 << 10) + 1), "steps, clusters"),
    "cluster segments": ((8, 90, BIG), lambda of: (41, 3, of(7 << 10) + 1), "steps, clusters"),
    "split": ((24, 80, SMALL), lambda of: (1, 2, of(100 << 10) + 1), "steps, split"),
    "split segments": ((24, 80, SMALL), lambda of: (41, 2, of(5 << 10) + 1), "steps, split"),
    "split columns": ((24, 80, SMALL), lambda of: (1200, 3, 1), "steps, split"),
    "columns": ((2, 90, BIG), lambda of: (37, 21, 1), "steps"),
    "many columns": ((2, 90, BIG), lambda of: (5, 100, 1), "steps"),
    "narrow": ((2, 90, BIG), lambda of: (19, 5, 9), "steps"),
    "narrow tiles": ((9, 90, BIG), lambda of: (19, 40, 6), "steps"),
    "big columns": ((1, 75, 48 << 10), lambda of: (of(4 << 10), 21, 1), "steps, big blocks"),
    "columns streamed": ((1, 75, TINY), lambda of: (600, 11, 1), "steps"),
}
SOME = ["short", "block", "big", "streamed", "cluster", "split", "columns", "narrow", "split columns"]


def prepare(emulator, name, step, dtype=f32):
    """Makes the emulator the device of a path; returns the layout."""
    device, layout, _ = PATHS[name]
    emulator.device(*device)
    return layout(lambda bytes: bytes // INPUTS[step] // 16 * 16 // dtype.itemsize)


def assert_path(name, launches, dtype_bytes):
    device, _, path = PATHS[name]
    assert launches and all(launch["path"].startswith(path) for launch in launches)
    if not path.endswith("split"):
        [launch] = launches
        assert launch["path"] == path and (launch["cluster"] > 1) == name.startswith("cluster")
        held = name.endswith("streamed")
        assert (launch["shared"] < dtype_bytes) == held, "rows are held in shared memory, or they are not"
    else:
        assert [launch["path"] for launch in launches] == [
            f"steps, split: {phase}" for phase in ["sums", "residuals", "coefficients", "outputs"]]


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("name", PATHS)
def test_paths(emulator, name, step):
    """All types take turns, so that every path meets them with one step or another."""
    types = TYPES[(list(PATHS).index(name) + list(STEPS).index(step)) % len(TYPES)]
    layout = prepare(emulator, name, step, types[0])
    weight = Weight(step, layout, types, simt.KINDS[list(PATHS).index(name) % 2])
    expected = weight.expected()
    launches = take(emulator, [weight])
    weight.check(expected)
    held = layout[0] * layout[2] * types[0].itemsize * INPUTS[step]
    assert_path(name, launches, held // (8 if name.startswith("cluster") else 1))


@pytest.mark.parametrize("types", TYPES, ids=str)
@pytest.mark.parametrize("step", STEPS)
def test_types(emulator, step, types):
    for layout in [(1, 5, 70), (4, 9, 3)]:
        weight = Weight(step, layout, types)
        expected = weight.expected()
        take(emulator, [weight])
        weight.check(expected)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("name", SOME)
def test_unaligned_views(emulator, name, step):
    """All tensors off the grid of packs alike (still vectors), and all in different ways."""
    layout = prepare(emulator, name, step)
    for offsets in [(1,) * 7, (0, 1, 3, 2, 1, 0, 3)]:
        weight = Weight(step, layout, offsets=offsets)
        expected = weight.expected()
        launches = take(emulator, [weight])
        weight.check(expected)
        if layout[2] > 40:
            assert any(launch["vectors"] > 0 for launch in launches) or offsets[0] == 0


@pytest.mark.parametrize("step", STEPS)
def test_every_short_length(emulator, step):
    for length in range(2, 24):
        weight = Weight(step, (1, 3, length))
        expected = weight.expected()
        take(emulator, [weight])
        weight.check(expected)


@pytest.mark.parametrize("step", STEPS)
def test_random_shapes(emulator, step):
    for number in range(25):
        layout = tuple(int(2 ** (torch.rand(()).item() * most)) for most in (5, 5, 7))
        if layout[0] * layout[2] == 1:
            continue
        emulator.device(multiprocessors=int(torch.randint(1, 30, ())), capability=[75, 80, 90, 120][number % 4])
        weight = Weight(step, layout, TYPES[number % 4])
        expected = weight.expected()
        take(emulator, [weight])
        weight.check(expected)


@pytest.mark.parametrize("step", STEPS)
def test_one_column(emulator, step):
    """Rows of one element have no tangent."""
    weight = Weight(step, (1, 300, 1))
    expected = weight.expected()
    take(emulator, [weight])
    weight.check(expected)
    assert bool((weight.telemetry[:, 1] <= 1e-6 * weight.G.tensor.flatten().abs()).all())
    if step == "sgd":
        norm = weight.norm.clone()
        take(emulator, [weight], weight_decay=0.0)
        assert torch.equal(weight.norm, norm)


@pytest.mark.parametrize("layout", [(1, 0, 5), (3, 0, 1), (1, 5, 0), (0, 5, 1)])
def test_empty(emulator, layout):
    weight = Weight("adam", layout)
    take(emulator, [weight])
    assert bool((weight.norm > 0).all())


@pytest.mark.parametrize("step", STEPS)
def test_many_weights_in_one_launch(emulator, step):
    """Rows and columns, short and long, and each as it is alone, to the last bit."""
    layouts = [(1, 7, 9), (3, 5, 43), (37, 21, 1), (1, 5, 3000), (1, 1, 50), (1, 0, 4), (19, 5, 9), (1, 300, 2)]
    weights = [Weight(step, layout) for layout in layouts]
    alone = []
    for weight in weights:
        expected = weight.expected()
        before = [x.clone() for x in weight.numbers().values()]
        take(emulator, [weight])
        weight.check(expected)
        alone.append([x.clone() for x in weight.numbers().values()])
        for x, value in zip(weight.numbers().values(), before):
            x.copy_(value)
    [launch] = take(emulator, weights)
    for weight, results in zip(weights, alone):
        assert all(torch.equal(a, b) for a, b in zip(weight.numbers().values(), results))


@pytest.mark.parametrize("step", ["sgd", "adam_amsgrad"])
def test_as_few_launches_as_arguments_allow(emulator, step):
    weights = [Weight(step, (1, 2, 3 + i % 5)) for i in range(150)]
    expected = [weight.expected() for weight in weights]
    launches = take(emulator, weights)
    assert 1 < len(launches) <= 4
    for weight, wanted in zip(weights, expected):
        weight.check(wanted)


def test_more_rows_than_a_grid_has_blocks(emulator):
    emulator.device(4, 90, BIG, blocks=3)
    weights = [Weight("sgd", layout) for layout in [(1, 150, 20), (9, 150, 1)]]
    expected = [weight.expected() for weight in weights]
    assert len(take(emulator, weights)) > 2
    for weight, wanted in zip(weights, expected):
        weight.check(wanted)


def test_several_split_weights(emulator):
    emulator.device(*PATHS["split"][0])
    weights = [Weight("adam", layout) for layout in [(1, 2, 6000), (1, 1, 9001), (1, 30, 40)]]
    expected = [weight.expected() for weight in weights]
    launches = take(emulator, weights)
    assert len(launches) == 5
    for weight, wanted in zip(weights, expected):
        weight.check(wanted)
    assert not any("split" in launch["path"] for launch in take(emulator, weights, workspace=False))


# ---- the range of numbers --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("name", SOME)
def test_huge_tiny_and_zero_rows(emulator, name, step):
    """Weights and gradients far apart: every row is the one of the reference. Rows without a gradient too."""
    layout = prepare(emulator, name, step)
    weight = Weight(step, layout, exponents=[(28, -28), (0, 0), (-28, 28), (0, None), (0, -25)])
    expected = weight.expected()
    take(emulator, [weight])
    weight.check(expected)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("name", SOME)
def test_a_bad_gradient_and_a_lost_row_stay_alone(emulator, name, step):
    layout = prepare(emulator, name, step)
    torch.manual_seed(5)
    clean = Weight(step, layout)
    torch.manual_seed(5)
    weight = Weight(step, layout)
    weight.G.tensor[-1, 1, -1] = math.nan
    weight.w.tensor[:, 0] = 0
    state = [x.tensor[:, 0].clone() for x in weight.state]
    take(emulator, [clean])
    take(emulator, [weight])
    others = slice(2, None)
    for a, b in zip([weight.w, *weight.state], [clean.w, *clean.state]):
        assert torch.equal(a.tensor[:, others], b.tensor[:, others])
    assert torch.equal(weight.radius[others], clean.radius[others]) and torch.equal(weight.norm[others], clean.norm[others])
    assert weight.w.tensor[:, 1].isnan().all() and not weight.norm[1].isfinite()
    assert bool((weight.w.tensor[:, 0] == 0).all()) and weight.telemetry[0, :3].eq(0).all()
    if step != "sgd_momentum":
        assert all(torch.equal(x.tensor[:, 0], before) for x, before in zip(weight.state, state))


@pytest.mark.parametrize("angle", [1e-2, 1e-5])
@pytest.mark.parametrize("name", SOME)
def test_small_angles(emulator, name, angle):
    """w and G nearly parallel, where |G|^2 - p^2 is noise: the residuals of SGD."""
    layout = prepare(emulator, name, "sgd")
    weight = Weight("sgd", layout)
    direction = weight.w.tensor.double() / rows(weight.w.tensor.double().norm(dim=(0, 2)))
    weight.G.tensor.copy_(direction + angle * weight.G.tensor.double())
    G, w = weight.G.tensor.double(), weight.w.tensor.double()
    perp = (G - rows((G * w).sum((0, 2)) / w.square().sum((0, 2))) * w).norm(dim=(0, 2))
    expected = weight.expected()
    take(emulator, [weight])
    weight.check(expected)
    torch.testing.assert_close(weight.telemetry[:, 1], perp, rtol=0.01, atol=0)


# ---- what the device knows -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", SOME)
def test_bits_do_not_depend_on_the_order_of_threads(emulator, name):
    layout = prepare(emulator, name, "adam")
    results = []
    for seed in range(2):
        emulator.seed(seed)
        torch.manual_seed(1)
        weight = Weight("adam", layout)
        take(emulator, [weight])
        results.append(torch.cat([weight.w.tensor.flatten().double(), weight.norm, weight.radius]))
    assert torch.equal(*results)


@pytest.mark.parametrize("step", STEPS)
def test_numbers_from_the_device(emulator, step):
    """Rates, one for all rows or one for each, decays and Adam's count and betas, all read by the kernel."""
    weight, same = Weight(step, (1, 6, 40)), None
    torch.manual_seed(2)
    weight = Weight(step, (1, 6, 40))
    torch.manual_seed(2)
    same = Weight(step, (1, 6, 40))
    take(emulator, [weight])
    tensors = {"lr": torch.full((6,), LR, dtype=f64), "radius_lr": torch.tensor([RADIUS_LR], dtype=f64)}
    if step in ADAM:
        tensors |= {"step": torch.tensor(3.0), "beta1": torch.tensor([BETAS[0]], dtype=f64)}
    take(emulator, [same], **tensors)
    assert torch.equal(weight.w.tensor, same.w.tensor) and torch.equal(weight.radius, same.radius)
    torch.manual_seed(2)
    faster = Weight(step, (1, 6, 40))
    tensors["lr"][2] = 2 * LR
    take(emulator, [faster], **tensors)
    changed = (faster.w.tensor != weight.w.tensor).any(2).flatten()
    assert changed.tolist() == [False, False, True, False, False, False]


@pytest.mark.parametrize("name", SOME)
def test_loss_scaling(emulator, name):
    layout = prepare(emulator, name, "sgd")
    weight = Weight("sgd", layout)
    expected = weight.expected()
    weight.G.tensor.mul_(1024)
    before = weight.w.tensor.clone(), weight.radius.clone(), weight.norm.clone()
    scale = torch.tensor([1024.0])
    take(emulator, [weight], grad_scale=scale, skip=torch.tensor([1.0]))
    assert all(torch.equal(a, b) for a, b in zip(before, (weight.w.tensor, weight.radius, weight.norm)))
    take(emulator, [weight], grad_scale=scale, skip=torch.tensor([0.0]))
    weight.check(expected)


def test_options(emulator):
    """Retractions, maximize, and the kind whose radius stays."""
    weight = Weight("sgd", (1, 5, 40), kind="unit")
    before = weight.radius.clone(), weight.norm.clone()
    take(emulator, [weight], retraction="geodesic", weight_decay=0.0)
    assert torch.equal(weight.norm, before[1]) and torch.equal(weight.radius, before[0])
    torch.testing.assert_close(weight.w.tensor.double().norm(dim=(0, 2)), before[0].abs(), rtol=1e-6, atol=0)
    for step in STEPS:
        weight = Weight(step, (1, 5, 40))
        expected = weight.expected(maximize=True)
        norm = weight.norm.clone()
        take(emulator, [weight], maximize=True, retraction="renormalize")
        assert torch.equal(weight.norm, norm)
        weight.norm.copy_(expected.norm)
        weight.check(expected)


@pytest.mark.parametrize("kind", simt.KINDS)
def test_edited_weights_are_picked_up(emulator, kind):
    weight = Weight("sgd", (1, 5, 40), kind=kind)
    weight.w.tensor.mul_(3.0)
    radius = weight.radius + math.log(3.0) if kind == "ewn" else 3.0 * weight.radius
    weight.G.tensor.zero_()
    take(emulator, [weight], weight_decay=0.0, radius_weight_decay=0.0)
    torch.testing.assert_close(weight.radius, radius, rtol=1e-6, atol=1e-6)
