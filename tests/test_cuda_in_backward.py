"""The row kernels of csrc/cuda/in_backward_rows.cu, run thread by thread on the emulator, between torch's products: a step
inside the backward against reference.polar_sgd_step in float64."""
import math

import pytest
import torch
from simt import emulator as simt
from test_cuda_emulated import emulator, fenced, library, poisoned, pytestmark, unit_roundoff  # noqa: F401  (fixtures)

from wnkernels import reference
from wnkernels.functional import telemetry

f32, f64 = torch.float32, torch.float64
NUMBERS = dict(lr=0.3, radius_lr=0.1, weight_decay=0.2, radius_weight_decay=0.05)
BIAS = dict(bias_lr=0.2, bias_weight_decay=0.1)
NAMES = ["rho", "radius", "norm", "telemetry", "weight", "scale", "bias", "dy", "x"]
ROOM = 64  # times the rounding of a sum over the batch that a result may be off


class Layer:
    """Rows u, their state and a batch; everything that a kernel may write stands in fences."""

    def __init__(self, batch, rows, width, kind="swn", dtype=f64, size=1.0, telemetry=False):
        self.batch, self.kind, self.dtype = batch, kind, dtype
        u = torch.randn(rows, width, dtype=f64) / width**0.5
        radius = torch.randn(rows, dtype=f64)
        rho = torch.empty(rows, dtype=f64).uniform_(0.6, 1.8) * torch.randn(rows).sign()
        self.weight = fenced(u, dtype)
        norm = rho.abs() * self.weight.tensor.double().norm(dim=1)
        s = radius.exp() if kind == "ewn" else radius
        self.rho, self.radius, self.norm = (fenced(t, f64) for t in (rho, radius, norm))
        self.scale = fenced(s * rho / norm, dtype)
        self.bias = fenced(torch.randn(rows), dtype)
        self.telemetry = poisoned((rows, 4), f64) if telemetry else None
        self.x = fenced(torch.randn(batch, width), dtype)
        self.dy = fenced(size * torch.randn(batch, rows) / max(1, batch) ** 0.5, dtype)

    def fences(self):
        return [value for name in NAMES if (value := getattr(self, name)) is not None]

    def true_weight(self):
        return self.scale.tensor.double().unsqueeze(1) * self.weight.tensor.double()

    def expected(self, sign=1.0, numbers=NUMBERS):
        """The step in float64, dx and the new bias, for `check`."""
        w, dy, x = self.true_weight(), self.dy.tensor.double(), self.x.tensor.double()
        self.before = {"w": w, "norm": self.norm.tensor.clone(), "radius": self.radius.tensor.clone(),
                       "bias": self.bias.tensor.double()}
        self.G, self.lr, self.radius_lr = sign * dy.t() @ x, numbers["lr"], numbers["radius_lr"]
        step = reference.polar_sgd_step(w, self.G, self.radius.tensor.clone(), self.norm.tensor.clone(), kind=self.kind,
                                        **numbers)
        bias = self.bias.tensor.double()
        bias = bias - BIAS["bias_lr"] * (sign * dy.sum(0) + BIAS["bias_weight_decay"] * bias)
        return step, dy @ w, bias

    def take(self, emulator, sign=1.0, measure=False, refresh=False, keep_norm=False, need_x=True, gram=None,
             numbers=NUMBERS):
        """The outline of csrc/in_backward_cuda.cpp; returns dx and the launches."""
        dy, x, u = self.dy.tensor, self.x.tensor, self.weight.tensor
        of_weight = poisoned(dy.shape, self.dtype) if measure else fenced((x @ x.t()) @ dy if gram is None else gram,
                                                                          self.dtype)
        of_x = poisoned(dy.shape, self.dtype) if need_x else None
        scratch = poisoned((emulator.in_backward_scratch(len(dy), len(u)) // 8,), f64)
        values = {name: value.tensor for name in NAMES[:7] if (value := getattr(self, name)) is not None}
        values |= dict(z=x @ u.t(), of_weight=of_weight.tensor, scratch=scratch.tensor, dy=dy, kind=self.kind, sign=sign,
                       keep_norm=keep_norm, known=not measure, measured=measure or refresh, **numbers, **BIAS)
        if need_x:
            values["of_x"] = of_x.tensor
        launches = emulator.in_backward("prepare", **values)
        dx = of_x.tensor @ u if need_x else None
        launches += emulator.in_backward("fold", **values)
        u.addmm_(of_weight.tensor.t(), x)
        launches += emulator.in_backward("finish", **values)
        assert all(t.intact() for t in [*self.fences(), of_weight, scratch, *([of_x] if need_x else [])])
        return dx, [launch["path"] for launch in launches]

    def check(self, expected, dx=None):
        step, wanted_dx, bias = expected
        u = ROOM * unit_roundoff(self.dtype) * (self.batch + 8) ** 0.5
        dy, before = self.dy.tensor.double().abs(), self.before
        size, length = self.G.norm(dim=1), before["w"].norm(dim=1)
        moved = self.radius_lr * (1 + length) * size  # g' or alpha', and with it w', is a difference too
        # v' is the difference of v and a multiple of G, and n'^2 the sum of a square and a difference of squares.
        terms = before["norm"] + self.lr * length / before["norm"] * size
        lost = 1 + terms / step.norm + (terms / step.norm) ** 2
        for name, got, wanted, bound in [
            ("weight", self.true_weight(), step.weight, (step.weight.norm(dim=1) * lost + moved).unsqueeze(1)),
            ("radius", self.radius.tensor, step.radius, 1 + step.radius.abs() + moved),
            ("norm", self.norm.tensor, step.norm, step.norm * lost),
            ("bias", self.bias.tensor.double(), bias, 1 + before["bias"].abs() + dy.sum(0)),
            ("length", self.rho.tensor.abs() * self.weight.tensor.double().norm(dim=1), self.norm.tensor, step.norm * lost),
            *([("dx", dx.double(), wanted_dx, dy @ before["w"].abs())] if dx is not None else []),
        ]:
            excess = (got - wanted).abs() / (u * bound)
            assert bool((excess <= 1).all()), f"{name}: {excess.max().item()} times the bound"
        free = step.norm != self.before["norm"]  # what is renormalized is folded by the next step
        assert bool((~free | (self.rho.tensor.abs() >= 0.5 * (1 - u)) & (self.rho.tensor.abs() <= 2 * (1 + u))).all())
        if self.telemetry is not None:
            self.check_telemetry(step.weight, u)

    def check_telemetry(self, new, u):
        values = telemetry(self.telemetry.tensor, self.radius.tensor, self.norm.tensor, self.kind)
        old_direction, direction = (self.directions(w, radius) for w, radius in [(self.before["w"], self.before["radius"]),
                                                                            (new, self.radius.tensor)])
        radial = (self.G * old_direction).sum(1)
        torch.testing.assert_close(values["radius"], (new * direction).sum(1), rtol=u, atol=0)
        torch.testing.assert_close(values["radial_gradient"], radial, rtol=0, atol=u * self.G.norm(dim=1).max().item())
        perp = (self.G - radial.unsqueeze(1) * old_direction).norm(dim=1)
        torch.testing.assert_close(values["tangential_gradient"], perp, rtol=100 * u, atol=0)
        turned = 2 * torch.asin((direction - old_direction).norm(dim=1) / 2)
        torch.testing.assert_close(values["angular_update"], turned, rtol=100 * u, atol=0)

    def directions(self, w, radius):
        """Of v: w may point the other way."""
        return w / w.norm(dim=1, keepdim=True) * (1 if self.kind == "ewn" else radius.sign().unsqueeze(1))


WHOLE = ["in backward: rows", "in backward: fold", "in backward: finish"]
SPLIT = ["in backward, split: sums", "in backward, split: rows", "in backward, split: outputs", *WHOLE[1:]]


@pytest.mark.parametrize("dtype", [f32, f64])
@pytest.mark.parametrize("kind", simt.STEP_KINDS)
@pytest.mark.parametrize("batch, rows, width", [
    (1, 1, 1), (1, 1, 7), (3, 33, 2), (16, 32, 40), (17, 65, 33), (50, 31, 100), (0, 5, 6), (500, 40, 3)])
def test_one_step(emulator, batch, rows, width, kind, dtype):
    for measure in (False, True):
        layer = Layer(batch, rows, width, kind, dtype)
        expected = layer.expected()
        dx, launches = layer.take(emulator, measure=measure)
        layer.check(expected, dx)
        assert launches == WHOLE[:2] + ["rows, streamed"] * measure + WHOLE[2:]


@pytest.mark.parametrize("dtype", [f32, f64])
def test_options(emulator, dtype):
    for options in [dict(sign=-1.0), dict(need_x=False), dict(refresh=True), dict(keep_norm=True),
                    dict(measure=True, keep_norm=True, need_x=False)]:
        layer = Layer(9, 37, 21, "ewn", dtype)
        step, *others = layer.expected(options.get("sign", 1.0))
        if options.get("keep_norm"):
            step = step._replace(norm=layer.norm.tensor.clone())
        dx, launches = layer.take(emulator, **options)
        layer.check((step, *others), dx)
        assert ("rows, streamed" in launches) == ("measure" in options or "refresh" in options)


@pytest.mark.parametrize("kind", ["swn", "ewn"])
def test_telemetry(emulator, kind):
    for dtype in (f32, f64):
        layer = Layer(12, 34, 50, kind, dtype, telemetry=True)
        expected = layer.expected()
        layer.take(emulator)
        layer.check(expected)


@pytest.mark.parametrize("multiprocessors, batch, rows", [(40, 1024, 33), (2, 2100, 31), (2, 1030, 40), (9, 5000, 3)])
def test_a_large_batch_is_split(emulator, multiprocessors, batch, rows):
    emulator.device(multiprocessors)
    for measure in (False, True):
        layer = Layer(batch, rows, 5, "ewn", f32, telemetry=not measure)
        expected = layer.expected()
        dx, launches = layer.take(emulator, measure=measure)
        layer.check(expected, dx)
        assert launches == SPLIT[:4] + ["rows, streamed"] * measure + SPLIT[4:]


def test_bits_do_not_depend_on_the_order_of_threads(emulator):
    emulator.device(2)
    results = []
    for seed in range(2):
        emulator.seed(seed)
        torch.manual_seed(1)
        layer = Layer(1100, 33, 4, "swn", f32)
        dx, launches = layer.take(emulator)
        assert launches == SPLIT
        results.append([dx, *(t.tensor for t in layer.fences())])
    assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.parametrize("size", [30.0, 1e4])
def test_rows_that_leave_the_range_are_folded(emulator, size):
    """c = rho'/rho of every sign and size, and exactly 0."""
    numbers = NUMBERS | {"radius_lr": 0.1 / size**2}
    layer = Layer(5, 40, 9, "swn", f64, size)
    layer.dy.tensor[:, ::4] *= 1e-3 / size  # rows that stay
    expected = layer.expected(numbers=numbers)
    dx, _ = layer.take(emulator, numbers=numbers)
    layer.check(expected, dx)
    folded = layer.rho.tensor == 1
    assert folded.sum() > 10 and (~folded[::4]).all()

    layer = Layer(1, 1, 3, "swn", f64)
    u = torch.tensor([[3.0, 4.0, 0.0]], dtype=f64)
    layer.weight.tensor.copy_(u)
    for t, value in [(layer.rho, 1.0), (layer.radius, 5.0), (layer.norm, 5.0), (layer.scale, 1.0), (layer.dy, 1.0)]:
        t.tensor.fill_(value)
    layer.x.tensor.copy_(torch.tensor([[-3.0, -4.0, 5.0]]))  # with lr 1, v + lr k p v/n = 0
    layer.take(emulator, numbers=dict(lr=1.0, radius_lr=0.0, weight_decay=0.0, radius_weight_decay=0.0))
    assert torch.equal(layer.weight.tensor, torch.tensor([[3.0, 4.0, -5.0]], dtype=f64)) and layer.rho.tensor == 1


@pytest.mark.parametrize("size", [1e20, 1e25])
def test_a_gradient_whose_square_leaves_float32(emulator, size):
    """x x^T is infinite, and x x^T dy not a number: the rows are measured, without being told so."""
    numbers = dict(lr=1e-3, radius_lr=0.0, weight_decay=0.0, radius_weight_decay=0.0)
    layer = Layer(6, 35, 20, "swn", f32)
    layer.x.tensor.mul_(size)
    layer.dy.tensor[:, 3] = 0  # a row without a gradient
    expected = layer.expected(numbers=numbers)
    gram = (layer.x.tensor @ layer.x.tensor.t()) @ layer.dy.tensor
    assert gram.isnan().any()
    _, launches = layer.take(emulator, numbers=numbers, gram=gram)
    assert launches == WHOLE
    layer.check(expected)


def test_a_gradient_whose_square_leaves_float64(emulator):
    numbers = dict(lr=1e-3, radius_lr=0.0, weight_decay=0.0, radius_weight_decay=0.0)
    layer = Layer(6, 3, 600, "swn", f64, telemetry=True)
    layer.x.tensor.mul_(1e170)
    layer.take(emulator, numbers=numbers)
    length = 1e170 * (layer.weight.tensor / 1e170).norm(dim=1)
    torch.testing.assert_close(layer.rho.tensor.abs() * length, layer.norm.tensor, rtol=1e-12, atol=0)
    torch.testing.assert_close(layer.true_weight().norm(dim=1), layer.radius.tensor.abs(), rtol=1e-12, atol=0)
    assert not layer.telemetry.tensor.isnan().any() and layer.telemetry.tensor[:, 1].isinf().all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_gradient_and_a_lost_row_stay_alone(emulator, bad):
    results = []
    for value in (1.0, bad):
        torch.manual_seed(3)
        layer = Layer(4, 37, 8, "swn", f32)
        layer.weight.tensor[1] = 0
        layer.rho.tensor[1] = layer.scale.tensor[1] = 0
        layer.dy.tensor[2, 5] = value
        dx, _ = layer.take(emulator)
        results.append(layer)
    others = torch.arange(37) != 5
    for name in ["weight", "scale", "radius", "norm", "bias"]:
        a, b = (getattr(layer, name).tensor for layer in results)
        assert torch.equal(a[others], b[others]) and a[others].isfinite().all()
    assert not results[1].weight.tensor[5].isfinite().any()
    assert layer.weight.tensor[1].eq(0).all() and layer.rho.tensor[1] == layer.scale.tensor[1] == 0


def test_plain_layers_step_their_bias(emulator):
    for batch, multiprocessors in [(7, 4), (1100, 4)]:
        emulator.device(multiprocessors)
        layer = Layer(batch, 33, 5)
        _, _, expected = layer.expected(-1.0)
        scratch = poisoned((emulator.in_backward_scratch(batch, 33) // 8,), f64)
        launches = emulator.in_backward("prepare", layer.dy.tensor, layer.weight.tensor, bias=layer.bias.tensor, sign=-1.0,
                                        scratch=scratch.tensor, **BIAS)
        torch.testing.assert_close(layer.bias.tensor, expected, rtol=0, atol=1e-13 * batch)
        assert [launch["path"] for launch in launches] == (WHOLE[:1] if batch == 7 else SPLIT[:2])
        assert all(t.intact() for t in [*layer.fences(), scratch])


@pytest.mark.parametrize("kind", ["swn", "ewn"])
def test_many_steps(emulator, kind):
    """Forty steps on the kernels' own state, which folds rows on its way."""
    layer = Layer(3, 40, 11, kind)
    folds = 0
    for step in range(40):
        layer.x.tensor.normal_()
        layer.dy.tensor.normal_(std=0.3)
        expected = layer.expected()
        rho = layer.rho.tensor.clone()
        layer.take(emulator, refresh=step % 7 == 0)
        layer.check(expected)
        folds += ((layer.rho.tensor == 1) & (rho != 1)).sum().item()
    assert folds > 20


def test_no_rows(emulator):
    layer = Layer(3, 0, 4)
    _, launches = layer.take(emulator)
    assert launches == []
