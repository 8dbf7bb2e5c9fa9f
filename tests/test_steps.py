"""The polar steps against the specification, which tests/test_reference.py holds against torch.optim."""

import math

import pytest
import torch

from wnkernels import functional as wF

SHAPES = [((6, 10), 0), ((6, 10), 1), ((6, 10), None), ((40, 9), 0), ((4, 3, 5, 5), 0), ((4, 3, 5, 5), 1), ((3, 5000), 0),
          ((2, 70001), 0), ((1, 1), 0), ((7, 2), 0), ((0, 4), 0), ((70, 5), 0), ((70, 4), 0), ((50, 3), 0), ((35, 8), 0),
          ((35, 16), 0), ((70, 31), 0), ((37, 70), 0), ((19, 400), 0), ((21, 1024), 0)]
SGD = [dict(), dict(weight_decay=0.1, radius_weight_decay=0.05, ratio=0.3, maximize=True), dict(momentum=0.9),
       dict(momentum=0.9, dampening=0.1, weight_decay=0.1, radius_weight_decay=0.1, ratio=0.5),
       dict(momentum=0.9, nesterov=True, weight_decay=0.1, ratio=2.0)]
ADAM = [dict(), dict(weight_decay=0.1, radius_weight_decay=0.05, ratio=0.3, maximize=True),
        dict(amsgrad=True, weight_decay=0.1), dict(amsgrad=True, decoupled=False, weight_decay=0.1, radius_weight_decay=0.1)]


class Net:
    """One weight as torch has it, (g | alpha, v) with torch's optimizer, and as the polar steps have it."""

    def __init__(self, shape, dim, kind, dtype, options, adam=False, lr=0.05):
        self.dim, self.kind, self.adam, self.lr, self.options = dim, kind, adam, lr, dict(options)
        self.ratio = self.options.pop("ratio", 1.0)
        self.dims = [i for i in range(len(shape)) if dim is None or i != dim]
        v = torch.randn(shape, dtype=torch.float64)
        g = torch.randn([1 if i in self.dims else n for i, n in enumerate(shape)], dtype=torch.float64)
        self.v, self.g = v.requires_grad_(), g.requires_grad_()
        self.w = self.effective().detach().to(dtype)
        self.radius, self.norm = self.g.detach().flatten().clone(), self.length().detach().flatten()
        zeros, row_zeros = (lambda: [torch.zeros_like(self.w)]), (lambda: [torch.zeros_like(self.radius)])
        wd, rwd = self.options.get("weight_decay", 0), self.options.get("radius_weight_decay", 0)
        groups = [dict(params=[self.v], weight_decay=wd), dict(params=[self.g], lr=lr * self.ratio, weight_decay=rwd)]
        torchs = {k: x for k, x in self.options.items() if k not in ("weight_decay", "radius_weight_decay", "decoupled")}
        if adam:
            optimizer = torch.optim.AdamW if self.options.get("decoupled", True) else torch.optim.Adam
            self.state = [zeros(), zeros(), row_zeros(), row_zeros()]
            if self.options.pop("amsgrad", False):
                self.state += [zeros(), row_zeros()]
        else:
            optimizer = torch.optim.SGD
            self.state = [zeros(), row_zeros()] if "momentum" in options else []
        self.optimizer = optimizer(groups, lr=lr, **torchs)
        self.steps = 0

    def length(self):
        return self.v.square().sum(self.dims, keepdim=True).sqrt() if self.dims else self.v.abs()

    def effective(self):
        return self.v * ((self.g if self.kind == "swn" else self.g.exp()) / self.length())

    def step(self, G, **more):
        self.steps += 1
        self.optimizer.zero_grad()
        self.effective().backward(G)
        self.optimizer.step()
        self.polar_step(G.to(self.w.dtype), **more)

    def polar_step(self, G, **more):
        function = wF.polar_adam_ if self.adam else wF.polar_sgd_
        more |= dict(step=self.steps) if self.adam else dict(first_step=self.steps == 1)
        function([self.w], [G], [self.radius], [self.norm], *self.state, kind=self.kind, dims=[self.dim], lr=self.lr,
                 radius_lr=self.lr * self.ratio, **self.options, **more)

    def assert_same(self, tolerance):
        for name, got, expected in (("w", self.w, self.effective()), ("radius", self.radius, self.g.flatten()),
                                    ("norm", self.norm, self.length().flatten())):
            scale = expected.abs().max().item() if expected.numel() else 0.0
            torch.testing.assert_close(got.double(), expected.double().detach(), rtol=0, atol=tolerance * max(scale, 1e-3),
                                       msg=lambda m: f"{name}: {m}")  # noqa: B023


@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-12), (torch.float32, 2e-5)])
@pytest.mark.parametrize("kind", ["swn", "ewn"])
@pytest.mark.parametrize("adam,options", [(False, o) for o in SGD] + [(True, o) for o in ADAM])
def test_equals_torch_on_the_parametrized_weight(adam, options, kind, dtype, tolerance):
    for shape, dim in SHAPES:
        if adam and math.prod(shape) == 1:
            continue  # a row of one element: see below
        net = Net(shape, dim, kind, dtype, options, adam, lr=0.01)
        for _ in range(6):
            net.step(torch.randn(shape, dtype=torch.float64) / max(1, math.sqrt(math.prod(shape))))
        net.assert_same(tolerance)


@pytest.mark.parametrize("adam", [False, True])
def test_a_row_of_one_element_keeps_its_direction(adam):
    net = Net((5, 1), 0, "swn", torch.float32, {}, adam)
    norm, sign = net.norm.clone(), net.w.sign() * net.radius.sign()[:, None]
    for _ in range(20):
        net.steps += 1
        net.polar_step(torch.randn(5, 1))
    assert torch.equal(net.norm, norm)
    torch.testing.assert_close(net.w.double(), net.radius[:, None] * sign, rtol=1e-6, atol=0)


@pytest.mark.parametrize("adam", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(9, 33), (9, 21), (20, 16), (70, 9), (20, 5), (20, 2)])
def test_16bit_parameters(shape, dtype, adam):
    net = Net(shape, 0, "ewn", torch.float32, {}, adam)
    copy = torch.full(shape, math.nan, dtype=dtype)
    for _ in range(5):
        G = (torch.randn(shape) * 0.1).to(dtype)
        net.steps += 1
        net.optimizer.zero_grad()
        net.effective().backward(G.double())
        net.optimizer.step()
        net.polar_step(G, copies=[copy])
    net.assert_same(2e-5)
    assert torch.equal(copy, net.w.to(dtype))


@pytest.mark.parametrize("angle", [1e-2, 1e-4, 1e-6])
@pytest.mark.parametrize("options", [{}, dict(momentum=0.5)])
def test_small_angles_in_float32(angle, options):
    """w and G nearly parallel: |G|^2 - p^2 would be noise, telemetry is right to 1%."""
    w = torch.randn(4, 3000, dtype=torch.float64)
    w /= w.norm(dim=1, keepdim=True)
    t = torch.randn_like(w)
    t -= (t * w).sum(1, keepdim=True) * w
    t /= t.norm(dim=1, keepdim=True)
    w32, G32 = w.float(), (w + angle * t).float()
    w, G = w32.double(), G32.double()
    n = w.norm(dim=1)
    G_perp = (G - (G * w).sum(1, keepdim=True) / n[:, None].square() * w).norm(dim=1)
    telemetry = torch.empty(4, 4, dtype=torch.float64)
    radius, norm = n.clone(), torch.ones(4, dtype=torch.float64)
    state = [[torch.zeros_like(w32)], [torch.zeros(4, dtype=torch.float64)]] if options else []
    wF.polar_sgd_([w32], [G32], [radius], [norm], *state, kind="swn", dims=[0], lr=0.01, radius_lr=0.0, first_step=True,
                  telemetry=[telemetry], **options)
    values = wF.telemetry(telemetry, radius, norm, "swn")
    torch.testing.assert_close(values["tangential_gradient"], G_perp, rtol=0.01, atol=0)
    torch.testing.assert_close(values["angular_update"], torch.atan(0.01 * n * G_perp), rtol=0.01, atol=0)


def test_geodesic_turns_by_its_angle_and_keeps_the_norm():
    net = Net((5, 40), 0, "swn", torch.float64, {})
    G, w, telemetry = torch.randn(5, 40, dtype=torch.float64), net.w.clone(), torch.empty(5, 4, dtype=torch.float64)
    s, n = net.radius.clone(), net.norm.clone()
    theta = w / s[:, None]
    G_perp = G - (G * theta).sum(1, keepdim=True) * theta
    net.steps = 1
    net.polar_step(G, retraction="geodesic", telemetry=[telemetry])
    size = G_perp.norm(dim=1)
    phi = net.lr * s / n.square() * size
    expected = phi.cos()[:, None] * theta - phi.sin()[:, None] * G_perp / size[:, None]
    torch.testing.assert_close(net.w / net.radius[:, None], expected, rtol=1e-12, atol=1e-13)
    angle = wF.telemetry(telemetry, net.radius, net.norm, "swn")["angular_update"]
    torch.testing.assert_close(angle, phi.abs(), rtol=1e-12, atol=0)
    assert torch.equal(net.norm, n)


def test_edited_weights_are_picked_up():
    net = Net((5, 40), 0, "ewn", torch.float32, {})
    net.w.mul_(3.0)
    before = net.radius + math.log(3.0)
    net.steps = 1
    net.polar_step(torch.zeros(5, 40))
    torch.testing.assert_close(net.radius, before, rtol=1e-6, atol=1e-6)


def test_edited_log_radii_are_right_to_the_last_bit():
    """The radius of an edited row is log |w|, of every size: the step's own logarithm."""
    net = Net((400, 3), 0, "ewn", torch.float64, {})
    net.w.mul_(10 ** (torch.rand(400, 1, dtype=torch.float64) * 590 - 295))
    net.w[1] = 1e-309  # the logarithm of a subnormal number
    lengths = [math.hypot(*row) for row in net.w.tolist()]
    net.steps = 1
    net.polar_step(torch.zeros(400, 3, dtype=torch.float64))
    for radius, length in zip(net.radius.tolist(), lengths):
        assert abs(radius - math.log(length)) <= 1e-15 * max(1.0, abs(radius)), (radius, length)


@pytest.mark.parametrize("kind", ["swn", "ewn"])
@pytest.mark.parametrize("adam,options", [(False, SGD[0]), (False, SGD[4]), (True, ADAM[1])])
def test_other_weights_of_a_call_do_not_change_the_bits(adam, options, kind):
    """Rows are solved side by side where all weights of a call fit into a cache, and one by one elsewhere."""
    state, results = torch.get_rng_state(), []
    for columns in (1, 3000):  # of the last weight
        torch.set_rng_state(state)
        shapes = (33, 300), (20, 1024), (500, 600), (5000, 48)
        nets = [Net(shape, 0, kind, torch.float32, options, adam) for shape in shapes]
        G = [torch.randn_like(net.w) for net in nets]
        G[0][3] = 2 * nets[0].w[3]  # without a tangent
        nets[1].w[5] *= 1e-30
        G[1][7] = 0
        nets.append(Net((1100, columns), 0, kind, torch.float32, options, adam))
        G.append(torch.randn_like(nets[-1].w))
        weights = [[getattr(net, name) for net in nets] for name in ("w", "radius", "norm")]
        averages = [[one[i][0] for one in (net.state for net in nets)] for i in range(len(nets[0].state))]
        step = wF.polar_adam_ if adam else wF.polar_sgd_
        step(weights[0], G, *weights[1:], *averages, kind=kind, dims=[0] * 5, lr=0.05, radius_lr=0.05,
             **{k: x for k, x in nets[0].options.items() if k != "ratio"}, **(dict(step=1) if adam else dict(first_step=True)))
        results.append([t for net in nets[:-1] for t in (net.w, net.radius, net.norm)])
    for alone, beside in zip(*results):
        assert torch.equal(alone, beside)


@pytest.mark.parametrize("columns", [5, 20, 40, 300, 1500])
@pytest.mark.parametrize("adam,options", [(False, SGD[0]), (False, SGD[2]), (True, ADAM[0])])
def test_gradients_of_zero_and_gradients_whose_squares_are(adam, options, columns):
    net = Net((40, columns), 0, "swn", torch.float32, options, adam, lr=0.01 if adam else 0.1)
    for _ in range(3):
        G = torch.randn(40, columns, dtype=torch.float64)
        G[1::3] = 0
        G[2::3] *= 1e-3
        net.steps += 1
        net.optimizer.zero_grad()
        net.effective().backward(G)
        net.optimizer.step()
        net.polar_step((G * 1e-30).float(), grad_scale=torch.tensor(1e-30))
    assert (G * 1e-30).float().square().sum() == 0
    net.assert_same(2e-6)


@pytest.mark.parametrize("columns", [2, 5, 9, 16, 21, 40])
def test_lost_rows_and_bad_gradients_stay_alone(columns):
    for adam in (False, True):
        net, clean = (Net((5, columns), 0, "swn", torch.float32, {}, adam) for _ in range(2))
        for name in ("w", "radius", "norm"):
            getattr(clean, name).copy_(getattr(net, name))
        net.w[1] = 0
        G = torch.randn(5, columns)
        bad = G.clone()
        bad[3, columns - 1] = math.nan
        for n, gradient in ((net, bad), (clean, G)):
            n.steps = 1
            n.polar_step(gradient)
        assert bool((net.w[1] == 0).all()) and bool(net.w[3].isnan().any())
        for row in (0, 2, 4):
            assert torch.equal(net.w[row], clean.w[row]) and net.norm[row] == clean.norm[row]


def test_loss_scaling():
    net, scaled = (Net((5, 40), 0, "swn", torch.float32, {}) for _ in range(2))
    for name in ("w", "radius", "norm"):
        getattr(scaled, name).copy_(getattr(net, name))
    G = torch.randn(5, 40)
    net.steps = scaled.steps = 1
    net.polar_step(G)
    scaled.polar_step(G * 1024, grad_scale=torch.tensor(1024.0), found_inf=torch.tensor(0.0))
    assert torch.equal(net.w, scaled.w) and torch.equal(net.radius, scaled.radius)
    scaled.polar_step(torch.full((5, 40), math.inf), grad_scale=torch.tensor(1024.0), found_inf=torch.tensor(1.0))
    assert torch.equal(net.w, scaled.w)


def test_row_wise_hyperparameters_and_many_weights():
    nets = [Net((3, n), 0, "swn", torch.float64, {}) for n in (4, 50, 20000)]
    gradients = [torch.randn_like(n.w) * 0.01 for n in nets]
    one = [n.w.clone() for n in nets], [n.radius.clone() for n in nets], [n.norm.clone() for n in nets]
    wF.polar_sgd_(one[0], gradients, one[1], one[2], kind="swn", dims=[0] * 3, lr=0.05, radius_lr=0.05)
    for net, G, *together in zip(nets, gradients, *one):
        w, radius, norm = net.w.clone(), net.radius.clone(), net.norm.clone()
        lr = torch.tensor([0.05, 0.0, 0.05], dtype=torch.float64)
        wF.polar_sgd_([w], [G], [radius], [norm], kind="swn", dims=[0], lr=lr, radius_lr=lr)
        net.steps = 1
        net.polar_step(G)
        assert all(torch.equal(a, b) for a, b in zip((net.w, net.radius, net.norm), together))
        assert torch.equal(w[::2], net.w[::2]) and radius[1] != net.radius[1]


BAD = [
    (ValueError, "kind must be", dict(kind="x")), (ValueError, "retraction must be", dict(retraction="x")),
    (ValueError, "geodesic", dict(retraction="geodesic", weight_decay=0.1)),
    (ValueError, "radius must be contiguous", dict(radius=[torch.ones(3, dtype=torch.float64)])),
    (TypeError, "norm must be float64", dict(norm=[torch.ones(2)])),
    (ValueError, "grads must have", dict(grads=[])), (TypeError, "grads must have", dict(grads=[torch.ones(2, 3).double()])),
    (ValueError, "dim must be", dict(dims=[5])),
]


@pytest.mark.parametrize("error,message,change", BAD, ids=[str(sorted(c)) for _, _, c in BAD])
def test_bad_arguments(error, message, change):
    w = torch.ones(2, 3)
    arguments = dict(weights=[w], grads=[torch.ones(2, 3)], radius=[torch.ones(2, dtype=torch.float64)],
                     norm=[torch.ones(2, dtype=torch.float64)], kind="swn", dims=[0], lr=0.1, radius_lr=0.1) | change
    with pytest.raises(error, match=message):
        wF.polar_sgd_(**arguments)
    assert bool((w == 1).all())


def test_weights_that_record_gradients():
    w, G = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4)
    radius = w.detach().norm(dim=1).double()
    before, arguments = w.detach().clone(), dict(kind="swn", dims=[0], lr=0.1, radius_lr=0.1)
    with pytest.raises(RuntimeError, match="no_grad"):
        wF.polar_sgd_([w], [G], [radius], [radius.clone()], **arguments)
    assert w.equal(before)
    with torch.no_grad():
        wF.polar_sgd_([w], [G], [radius], [radius.clone()], **arguments)
    assert not w.equal(before) and w._version == 1


def test_opcheck():
    w, G, r = torch.randn(3, 4), torch.randn(3, 4), torch.ones(3, dtype=torch.float64)
    numbers = [0.1, 0.1, 0.0, 0.0]
    torch.library.opcheck(torch.ops.wnkernels.polar_sgd_.default, (
        [w], [G], [r], [r.clone()], [], [], [], [], "swn", [0], [*numbers, 0.0, 1.0], [], False, False, "project", None, None))
    torch.library.opcheck(torch.ops.wnkernels.polar_adam_.default, (
        [w], [G], [r], [r.clone()], [w.clone()], [w.square()], [], [r.clone()], [r.clone()], [], [], [], "swn", [0],
        [*numbers, 0.9, 0.999, 1e-8, 1.0], [], True, False, "project", None, None))


def test_telemetry_checks_what_it_is_given():
    table, rows = torch.zeros(3, 4), torch.ones(3)
    assert wF.telemetry(table, rows, rows, "unit")["angular_update"].shape == (3,)
    for arguments, message in (
        ((table, rows, rows, "polar"), "kind must be"),
        ((table, rows[:2], rows, "swn"), "radius and norm"),
        ((table[:, :3], rows, rows, "swn"), r"table must be \(R, 4\)"),
    ):
        with pytest.raises(ValueError, match=message):
            wF.telemetry(*arguments)
