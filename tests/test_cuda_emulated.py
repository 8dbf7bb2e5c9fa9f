"""The CUDA kernels of csrc/cuda, compiled by g++ and run thread by thread in random order (tests/simt).

Every path of csrc/cuda/heuristics.h is forced by the device that the emulator pretends to be, asserted from the log of
launches, and compared with the formulas in float64. Error bounds are those of the arithmetic: a sum of squares of
positive terms in chains of at most DEPTH additions, then one rounding per operation.
"""
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from simt import emulator as simt

f32, f64, bf16, f16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
PAIRS = [(f32, f32), (f64, f64), (bf16, bf16), (f16, f16), (f32, bf16), (f32, f16), (bf16, f32), (f16, f32)]
DEPTH = 48
FENCE = 16  # elements around every tensor that nobody may touch

pytestmark = pytest.mark.skipif(platform.system() != "Linux" or simt.compiler() == [None],
                                reason="the emulator needs Linux and g++")


@pytest.fixture(scope="module")
def library():
    return simt.Emulator(simt.build())


@pytest.fixture
def emulator(library):
    library.device()
    library.seed(torch.randint(2**31, ()).item())
    return library


class Fenced:
    """A tensor in the middle of a larger one; `intact` tells whether the surroundings are as they were."""

    def __init__(self, shape, dtype, offset=0):
        length = torch.Size(shape).numel()
        self.storage = torch.full((length + 2 * FENCE + offset,), -1.5, dtype=dtype)
        self.tensor = self.storage[FENCE + offset:FENCE + offset + length].view(shape)

    def intact(self):
        length = self.tensor.numel()
        begin = self.tensor.storage_offset()
        return bool((self.storage[:begin] == -1.5).all() and (self.storage[begin + length:] == -1.5).all())


def fenced(values, dtype, offset=0):
    result = Fenced(values.shape, dtype, offset)
    result.tensor.copy_(values)
    return result


def poisoned(shape, dtype, offset=0):
    result = Fenced(shape, dtype, offset)
    result.tensor.fill_(float("nan"))
    return result


def along_rows(x):
    return x.view(1, -1, 1)


def row_sum(x):
    return x.sum((0, 2))


def unit_roundoff(dtype):
    return torch.finfo(dtype).eps / 2


def assert_within(actual, expected, bound):
    """|actual - expected| <= bound, plus the rounding of the result to its type (subnormal numbers included)."""
    info = torch.finfo(actual.dtype)
    allowed = bound + unit_roundoff(actual.dtype) * expected.abs() * (1 + 1e-3) + info.tiny * info.eps
    excess = (actual.double() - expected).abs() / allowed
    assert not excess.isnan().any(), "NaN where a number was expected"
    assert excess.max().item() <= 1 if excess.numel() else True


class Oracle:
    """The formulas in float64. Rows are scaled by powers of two, so that no square leaves the range."""

    def __init__(self, kind, v, radius, gradient=None):
        self.v, self.gradient = v.double(), None if gradient is None else gradient.double()
        self.u = unit_roundoff(f64 if v.dtype == f64 else f32)
        self.s = radius.double().exp() if kind == "ewn" else radius.double()
        self.kind = kind
        self.n = self.length(self.v)
        self.t = torch.where(along_rows(self.n) == 0, 0.0, self.v / along_rows(self.n).clamp_min(5e-324))
        if gradient is not None:
            self.size = self.length(self.gradient)
            scale = torch.where(self.size > 0, self.size, 1.0)
            self.p = row_sum(self.gradient / along_rows(scale) * self.t) * scale

    @staticmethod
    def length(x):
        largest = x.abs().amax((0, 2)) if x.numel() else x.new_zeros(x.shape[1])
        scale = torch.exp2(torch.floor(torch.log2(torch.where(largest > 0, largest, 1.0))))
        return row_sum((x / along_rows(scale)) ** 2).sqrt() * scale

    def check_norm(self, norm):
        assert_within(norm, self.n, DEPTH * self.u * self.n)

    def check_scale(self, scale):
        expected = torch.where(self.n == 0, 0.0, self.s / self.n)
        assert_within(scale, expected, DEPTH * self.u * expected.abs())

    def check_forward(self, w):
        expected = along_rows(self.s) * self.t
        assert_within(w, expected, DEPTH * self.u * expected.abs())

    def check_backward(self, dv):
        tangential = self.gradient - along_rows(self.p) * self.t
        scale = along_rows(torch.where(self.n == 0, 0.0, self.s / self.n).abs())
        bound = DEPTH * self.u * scale * (self.gradient.abs() + self.t.abs() * along_rows(self.size))
        expected = tangential * along_rows(torch.where(self.n == 0, 0.0, self.s / self.n))
        assert_within(dv, expected, bound)

    def check_radius_gradient(self, dr):
        factor = self.s if self.kind == "ewn" else torch.ones_like(self.s)
        factor = torch.where(self.n == 0, 0.0, factor)
        assert_within(dr, factor * self.p, DEPTH * self.u * self.size * factor.abs())


def random_problem(layout, dtype_v, dtype_w, kind, offsets=(0, 0, 0)):
    outer, rows, inner = layout
    radius_type = f64 if dtype_v == f64 else f32
    v = fenced(torch.randn(outer, rows, inner), dtype_v, offsets[0])
    gradient = fenced(torch.randn(outer, rows, inner), dtype_w, offsets[1])
    radius = torch.randn(rows, dtype=radius_type)
    return v, gradient, (radius if kind == "swn" else 0.3 * radius)


def run_all(emulator, layout, dtype_v, dtype_w, kind, path, workspace=True, offsets=(0, 0, 0), vectors=None):
    """Every formula on one layout, each compared with the oracle; `path` is what every launch has to report."""
    v, gradient, radius = random_problem(layout, dtype_v, dtype_w, kind, offsets)
    oracle = Oracle(kind, v.tensor, radius, gradient.tensor)
    arguments = {"layout": layout, "kind": kind, "workspace": workspace, "v": v.tensor, "radius": radius}
    launched = []

    def launch(formula, **tensors):
        launches = emulator.call(formula, **arguments, **tensors)
        assert path(formula, launches), f"{formula} took {launches}"
        launched.extend(launches)

    w = poisoned(layout, dtype_w, offsets[2])
    launch("forward", out=w.tensor)
    oracle.check_forward(w.tensor)

    dv, dr = poisoned(layout, dtype_v, offsets[2]), poisoned((layout[1],), radius.dtype)
    launch("backward", gradient=gradient.tensor, out=dv.tensor, result=dr.tensor)
    oracle.check_backward(dv.tensor)
    oracle.check_radius_gradient(dr.tensor)

    dr2 = poisoned((layout[1],), radius.dtype)
    launch("radius_backward", gradient=gradient.tensor, result=dr2.tensor)
    oracle.check_radius_gradient(dr2.tensor)

    projected = fenced(gradient.tensor, dtype_w, offsets[1])
    launch("backward", gradient=projected.tensor, out=projected.tensor, result=dr2.tensor)
    oracle.check_backward(projected.tensor)

    norm, scale = poisoned((layout[1],), radius.dtype), poisoned((layout[1],), radius.dtype)
    launch("row_norm", result=norm.tensor)
    oracle.check_norm(norm.tensor)
    launch("row_scale", result=scale.tensor)
    oracle.check_scale(scale.tensor)

    for tensor in [v, gradient, w, dv, dr, dr2, projected, norm, scale]:
        assert tensor.intact(), "a kernel wrote outside of a tensor"
    return launched


def is_path(with_outputs, without_outputs, **numbers):
    def check(formula, launches):
        expected = with_outputs if formula in ("forward", "backward") else without_outputs
        return all(launch["path"].startswith(expected) for launch in launches) and len(launches) > 0 and all(
            launches[0][key] == value for key, value in numbers.items())
    return check


# ---- every path, every dtype pair ------------------------------------------------------------------------------------

# A device (multiprocessors, capability, shared memory), a layout for `pack` elements per 16 bytes, and the paths with
# and without outputs that they force.
BIG, SMALL, TINY = 227 << 10, 163 << 10, 12 << 10
PATHS = {
    "short": ((4, 90, BIG), lambda pack: (1, 7, 9 * pack + 1), "rows, registers", "rows, streamed"),
    "warp": ((4, 90, BIG), lambda pack: (1, 5, 100 * pack + 1), "rows, registers", "rows, streamed"),
    "block": ((4, 90, BIG), lambda pack: (1, 4, 700 * pack + 1), "rows, registers", "rows, streamed"),
    "whole packs": ((4, 90, BIG), lambda pack: (1, 4, 700 * pack), "rows, registers", "rows, streamed"),
    "segments": ((4, 90, BIG), lambda pack: (3, 5, 43), "rows, registers", "rows, streamed"),
    "many segments": ((4, 90, BIG), lambda pack: (50, 4, 33), "rows, registers", "rows, streamed"),
    "shared": ((2, 80, SMALL), lambda pack: (1, 2, 2100 * pack + 1), "rows, shared", "rows, streamed"),
    "streamed": ((2, 75, TINY), lambda pack: (1, 2, 2100 * pack + 1), "rows, streamed", "rows, streamed"),
    "cluster": ((8, 90, BIG), lambda pack: (1, 3, 4300 * pack + 1), "rows, shared", ("rows", "split")),
    "cluster segments": ((8, 90, BIG), lambda pack: (41, 3, 105 * pack + 1), "rows, shared", ("rows", "split")),
    "split": ((12, 80, SMALL), lambda pack: (1, 2, 4300 * pack + 1), "rows, split", "rows, split"),
    "split segments": ((12, 80, SMALL), lambda pack: (41, 2, 105 * pack + 1), "rows, split", "rows, split"),
    "columns": ((2, 90, BIG), lambda pack: (37, 21, 1), "columns, shared", "columns, streamed"),
    "columns of packs": ((2, 90, BIG), lambda pack: (37, 24, 1), "columns, shared", "columns, streamed"),
    "narrow": ((2, 90, BIG), lambda pack: (19, 5, 9), "columns, shared", "columns, streamed"),
    "narrow packs": ((2, 90, BIG), lambda pack: (19, 40, 6), "columns, shared", "columns, streamed"),
    "columns streamed": ((1, 75, TINY), lambda pack: (500, 21, 1), "columns, streamed", "columns, streamed"),
    "columns split": ((24, 80, SMALL), lambda pack: (1200, 5, 1), "columns, split", "columns, split"),
    "narrow split": ((24, 80, SMALL), lambda pack: (1200, 2, 3), "columns, split", "columns, split"),
}


def split_or(path):
    """The coefficients of split rows and of split columns come from one kernel."""
    return (path, "split: coefficients") if path in ("rows, split", "columns, split") else path


def pack_of(*dtypes):
    return 16 // max(dtype.itemsize for dtype in dtypes)


def prepare(emulator, name, *dtypes):
    """Makes the emulator the device of a path; returns the layout and the check of its launches."""
    device, layout, with_outputs, without_outputs = PATHS[name]
    emulator.device(*device)
    return layout(pack_of(*dtypes)), is_path(split_or(with_outputs), split_or(without_outputs))


def pair_name(pair):
    return "-".join(str(dtype).removeprefix("torch.") for dtype in pair)


@pytest.mark.parametrize("pair", PAIRS, ids=pair_name)
@pytest.mark.parametrize("name", PATHS)
def test_paths(emulator, name, pair):
    layout, path = prepare(emulator, name, *pair)
    launches = run_all(emulator, layout, *pair, "ewn" if PAIRS.index(pair) % 2 else "swn", path)
    assert any(launch["cluster"] > 1 for launch in launches) == name.startswith("cluster")


@pytest.mark.parametrize("kind", simt.KINDS)
@pytest.mark.parametrize("name", PATHS)
def test_kinds(emulator, name, kind):
    layout, path = prepare(emulator, name, f32)
    run_all(emulator, layout, f32, f32, kind, path)


# ---- shapes ----------------------------------------------------------------------------------------------------------

def anything(formula, launches):
    return True


@pytest.mark.parametrize("pair", [(f32, f32), (bf16, bf16), (f32, bf16), (f64, f64)], ids=pair_name)
def test_every_short_length(emulator, pair):
    for length in range(1, 36):
        run_all(emulator, (1, 3, length), *pair, "swn", is_path("rows, registers", "rows, streamed"))


@pytest.mark.parametrize("pair", [(f32, f32), (bf16, f32)], ids=pair_name)
def test_random_shapes(emulator, pair):
    for _ in range(60):
        outer, rows, inner = (int(2 ** (torch.rand(()).item() * most)) for most in (5, 5, 7))
        emulator.device(multiprocessors=int(torch.randint(1, 30, ())), capability=[75, 80, 90, 120][_ % 4])
        run_all(emulator, (outer, rows, inner), *pair, simt.KINDS[_ % 2], anything)


@pytest.mark.parametrize("layout", [(1, 1, 5000), (5000, 1, 1), (10, 1, 500), (1, 4000, 1), (300, 1, 7)])
def test_one_row_and_one_column(emulator, layout):
    """Rows of one element, and single rows in any layout, which are contiguous."""
    launches = run_all(emulator, layout, f32, f32, "swn", anything)
    assert all(launch["path"].startswith(("rows", "split")) for launch in launches)


@pytest.mark.parametrize("layout", [(1, 0, 5), (3, 0, 1), (1, 0, 0)])
def test_no_rows_no_launch(emulator, layout):
    assert run_all(emulator, layout, f32, f32, "swn", anything) == []


@pytest.mark.parametrize("layout", [(1, 5, 0), (0, 5, 1), (0, 5, 70), (3, 600, 0)])
def test_rows_without_elements(emulator, layout):
    """They have norm 0 and gradient 0, and that is written."""
    assert run_all(emulator, layout, f32, f32, "ewn", anything)


@pytest.mark.parametrize("name", ["short", "block", "columns", "narrow", "cluster"])
def test_more_rows_than_a_grid_has_blocks(emulator, name):
    (multiprocessors, capability, shared), layout, *_ = PATHS[name]
    layout = layout(4)
    layout = (layout[0], 50 * layout[1], layout[2]) if name in ("short", "columns", "narrow") else layout
    emulator.device(multiprocessors, capability, shared, blocks=3 if name != "cluster" else 10)
    v, _, radius = random_problem(layout, f32, f32, "swn")
    w = poisoned(layout, f32)
    launches = emulator.call("forward", layout, v=v.tensor, radius=radius, out=w.tensor)
    assert len(launches) > 1
    Oracle("swn", v.tensor, radius).check_forward(w.tensor)


# ---- alignment -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("pair", [(f32, f32), (f16, f16), (f32, bf16)], ids=pair_name)
@pytest.mark.parametrize("name", PATHS)
def test_unaligned_views(emulator, name, pair):
    """Views that begin an element or more into their storage: all alike (still vectors), and all different."""
    layout, path = prepare(emulator, name, *pair)
    for offsets in [(1, 1, 1), (0, 1, 3)]:
        run_all(emulator, layout, *pair, "swn", path, offsets=offsets)


def test_vectors_move_almost_everything(emulator):
    """Rows of odd length, and views that are off the grid alike, lose only their first and last pack."""
    for dtype in [f32, bf16]:
        pack = pack_of(dtype)
        for layout, offset in [((1, 4, 4097), 0), ((1, 4, 4096), 1), ((7, 5, 333), 0)]:
            v, _, radius = random_problem(layout, dtype, dtype, "swn", (offset, 0, 0))
            w = poisoned(layout, dtype, offset)
            [launch] = emulator.call("forward", layout, v=v.tensor, radius=radius, out=w.tensor)
            whole = layout[0] * layout[1] * (layout[2] // pack - 1)
            assert launch["vectors"] >= 2 * whole
    [launch] = emulator.call("forward", (1, 4, 4097), v=random_problem((1, 4, 4097), f32, f32, "swn")[0].tensor,
                             radius=torch.ones(4), out=poisoned((1, 4, 4097), f32, 1).tensor)
    assert launch["vectors"] == 0, "pointers off the grid by different amounts cannot use vectors"


# ---- the range of numbers --------------------------------------------------------------------------------------------

def scaled_rows(tensor, exponents):
    """Rows times powers of ten, row by row in turn; None makes a row of zeros."""
    for row in range(tensor.shape[1]):
        exponent = exponents[row % len(exponents)]
        tensor[:, row] = 0 if exponent is None else tensor[:, row] * 10.0**exponent


@pytest.mark.parametrize("dtype", [f32, f64])
@pytest.mark.parametrize("name", PATHS)
def test_huge_tiny_and_zero_rows(emulator, name, dtype):
    layout, _ = prepare(emulator, name, dtype)
    far = 30 if dtype == f32 else 300
    for v_exponents, g_exponents in [([far, 0, -far, None, far], [0, far, 0, 0, -far]),
                                     ([None, -far], [-far, far, None])]:
        v, gradient, radius = random_problem(layout, dtype, dtype, "swn")
        scaled_rows(v.tensor, v_exponents)
        scaled_rows(gradient.tensor, g_exponents)
        oracle = Oracle("swn", v.tensor, radius, gradient.tensor)
        arguments = {"layout": layout, "v": v.tensor, "radius": radius}

        w = poisoned(layout, dtype)
        emulator.call("forward", **arguments, out=w.tensor)
        oracle.check_forward(w.tensor)
        norm = poisoned((layout[1],), dtype)
        emulator.call("row_norm", **arguments, result=norm.tensor)
        oracle.check_norm(norm.tensor)
        dr = poisoned((layout[1],), dtype)
        emulator.call("radius_backward", **arguments, gradient=gradient.tensor, result=dr.tensor)
        oracle.check_radius_gradient(dr.tensor)

        # dv = G/v in size: compared where it is a number of the type.
        dv = fenced(gradient.tensor, dtype)
        emulator.call("backward", **arguments, gradient=dv.tensor, out=dv.tensor, result=dr.tensor)
        oracle.check_radius_gradient(dr.tensor)
        size = oracle.size * torch.where(oracle.n == 0, 0.0, oracle.s.abs() / oracle.n.clamp_min(5e-324))
        representable = (size < torch.finfo(dtype).max / 1e3) & ((size > torch.finfo(dtype).tiny * 1e9) | (size == 0))
        assert representable.any()
        for name_ in ["v", "gradient", "n", "s", "t", "p", "size"]:
            value = getattr(oracle, name_)
            setattr(oracle, name_, value[:, representable] if value.dim() == 3 else value[representable])
        oracle.check_backward(dv.tensor[:, representable])
        assert all(x.intact() for x in [v, gradient, w, norm, dr, dv])


@pytest.mark.parametrize("name", ["short", "block", "shared", "cluster", "split", "columns", "columns split"])
def test_coefficients_out_of_range(emulator, name):
    """exp(alpha)/n that overflows or vanishes in float although w does not."""
    layout, _ = prepare(emulator, name, f32)
    v, _, _ = random_problem(layout, f32, f32, "ewn")
    for exponent, alpha in [(-36, 80.0), (30, -85.0), (0, -87.0)]:
        scaled_rows(v.tensor, [exponent])
        radius = torch.full((layout[1],), alpha)
        w = poisoned(layout, f32)
        emulator.call("forward", layout, "ewn", v=v.tensor, radius=radius, out=w.tensor)
        Oracle("ewn", v.tensor, radius).check_forward(w.tensor)
        v, _, _ = random_problem(layout, f32, f32, "ewn")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", PATHS)
def test_a_bad_gradient_stays_in_its_row(emulator, name, bad):
    layout, _ = prepare(emulator, name, f32)
    v, gradient, radius = random_problem(layout, f32, f32, "swn")
    results = []
    for value in [gradient.tensor[-1, 1, -1].item(), bad]:
        gradient.tensor[-1, 1, -1] = value
        dv, dr = poisoned(layout, f32), poisoned((layout[1],), f32)
        emulator.call("backward", layout, v=v.tensor, radius=radius, gradient=gradient.tensor, out=dv.tensor,
                      result=dr.tensor)
        results.append((dv.tensor, dr.tensor))
    others = torch.arange(layout[1]) != 1
    (good_dv, good_dr), (bad_dv, bad_dr) = results
    assert torch.equal(good_dv[:, others], bad_dv[:, others]) and torch.equal(good_dr[others], bad_dr[others])
    assert not bad_dr[1].isfinite() and not bad_dv[:, 1].isfinite().any()


# ---- determinism and interface ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", PATHS)
def test_bits_do_not_depend_on_the_order_of_threads(emulator, name):
    layout, _ = prepare(emulator, name, f32)
    v, gradient, radius = random_problem(layout, f32, f32, "ewn")
    runs = []
    for seed in range(3):
        emulator.seed(seed)
        dv, dr = poisoned(layout, f32), poisoned((layout[1],), f32)
        emulator.call("backward", layout, "ewn", v=v.tensor, radius=radius, gradient=gradient.tensor, out=dv.tensor,
                      result=dr.tensor)
        runs.append(torch.cat([dv.tensor.flatten(), dr.tensor]))
    assert torch.equal(runs[0], runs[1]) and torch.equal(runs[0], runs[2])


@pytest.mark.parametrize("name", ["split", "columns split", "narrow split"])
def test_without_a_workspace_rows_are_not_split(emulator, name):
    layout, _ = prepare(emulator, name, f32)
    launches = run_all(emulator, layout, f32, f32, "swn", anything, workspace=False)
    assert launches and not any("split" in launch["path"] for launch in launches)


def test_units_in_place(emulator):
    """Unit projection is the forward with radius 1 onto its own input."""
    for name in ["short", "shared", "split", "columns"]:
        layout, _ = prepare(emulator, name, f32)
        v, _, _ = random_problem(layout, f32, f32, "swn")
        oracle = Oracle("swn", v.tensor, torch.ones(layout[1]))
        emulator.call("forward", layout, v=v.tensor, out=v.tensor, radius=torch.ones(layout[1]))
        oracle.check_forward(v.tensor)


def test_radius_and_results_of_every_type(emulator):
    layout = (1, 6, 50)
    for dtype in simt.DTYPES:
        v, gradient, radius = random_problem(layout, f32, f32, "swn")
        radius = radius.to(dtype)
        oracle = Oracle("swn", v.tensor, radius, gradient.tensor)
        dv, dr = poisoned(layout, f32), poisoned((6,), dtype)
        emulator.call("backward", layout, v=v.tensor, radius=radius, gradient=gradient.tensor, out=dv.tensor,
                      result=dr.tensor)
        oracle.check_backward(dv.tensor)
        oracle.check_radius_gradient(dr.tensor)


def test_dtypes_without_a_kernel(emulator):
    layout = (1, 2, 3)
    v, radius = torch.ones(layout), torch.ones(2)
    with pytest.raises(RuntimeError, match="no kernel for v of float32 with w of float64"):
        emulator.call("forward", layout, v=v, radius=radius, out=torch.ones(layout, dtype=f64))
    with pytest.raises(RuntimeError, match="no kernel for v of bfloat16 with w of float16"):
        emulator.call("backward", layout, v=v.to(bf16), radius=radius, gradient=v.to(f16), out=v.to(bf16))
    with pytest.raises(RuntimeError, match="no kernel for a gradient of v in float16"):
        emulator.call("backward", layout, v=v, radius=radius, gradient=v, out=v.to(f16))


# ---- the emulator itself ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("number, message", list(enumerate(
    ["", "left out", "waits for ever", "outside of its mask", "without being in its own mask", "misaligned store", "",
     "outside of its cluster"])))
def test_the_emulator_finds_faults(emulator, number, message):
    """Kernels with one fault each, in tests/simt/faults.cpp, and what the emulator says of them."""
    out = torch.zeros(64)
    said = emulator.fault(number, out)
    assert message in said and bool(message) == bool(said)
    if number == 0:
        assert torch.equal(out, torch.arange(63.0, -1, -1).view(-1, 2).flip(1).flatten())
    if number == 6:
        assert out.isnan().all(), "shared memory that nobody wrote is NaN"


def test_limits_of_the_device_are_errors(emulator):
    """A plan for one device is refused by a smaller one."""
    layout = (1, 3, 4300 * 4)
    v, w, radius = torch.randn(layout), torch.empty(layout), torch.ones(3)
    emulator.device(2, 80, 100)
    with pytest.raises(RuntimeError, match="wrong size of shared memory"):
        emulator.call("forward", layout, v=v, radius=radius, out=w)


def test_sanitizers(tmp_path):
    """The same kernels on every path under the address and undefined-behaviour sanitizers."""
    flags = simt.SANITIZERS
    probe = tmp_path / "probe.cpp"
    probe.write_text("int main() {}")
    if subprocess.run([*simt.compiler(), *flags, probe, "-o", tmp_path / "probe"], capture_output=True).returncode:
        pytest.skip("the compiler has no sanitizers")
    program = simt.build(flags, Path(__file__).with_name("simt") / "sanitized.cpp")
    run = subprocess.run([program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == [
        "columns, shared", "columns, split: outputs", "columns, split: sums", "columns, streamed",
        "in backward, split: outputs", "in backward, split: rows", "in backward, split: sums", "in backward: finish",
        "in backward: fold", "in backward: rows", "rows, registers", "rows, shared", "rows, split: outputs",
        "rows, split: sums", "rows, streamed", "split: coefficients", "steps", "steps, big blocks", "steps, clusters",
        "steps, split: coefficients", "steps, split: outputs", "steps, split: residuals", "steps, split: sums"]
    run = subprocess.run([program, "beyond"], capture_output=True, text=True)
    assert run.returncode != 0 and "AddressSanitizer" in run.stderr, "an element too many went unnoticed"


# ---- many problems in one launch -------------------------------------------------------------------------------------

# On the device below: rows that share a launch with those of the same block size, and others that cannot.
SHARED_LAYOUTS = [(1, 16, 16), (1, 3, 1), (1, 5, 1000), (3, 5, 43), (1, 1, 7), (1, 70, 33), (2, 1, 50)]
OTHER_LAYOUTS = [(37, 21, 1), (19, 5, 9), (1, 2, 40000), (1, 4, 0)]  # columns, narrow, long, empty


def list_of_problems(layouts, dtype_v, dtype_w):
    problems = []
    for i, layout in enumerate(layouts):
        kind = ["swn", "ewn"][i % 2]
        v, gradient, radius = random_problem(layout, dtype_v, dtype_w, kind, offsets=(i % 3, i % 2, i % 4))
        w, dv = poisoned(layout, dtype_w, i % 4), poisoned(layout, dtype_v, i % 3)
        problems.append((layout, kind, v, gradient, radius, w, dv, poisoned((layout[1],), radius.dtype)))
    return problems


def run_list(emulator, problems):
    """Forward and backward of a list, compared with the oracle; returns their launches."""
    launches = [
        emulator.list("forward", [(layout, kind, {"v": v.tensor, "radius": radius, "out": w.tensor})
                                  for layout, kind, v, _, radius, w, _, _ in problems]),
        emulator.list("backward", [(layout, kind, {"v": v.tensor, "gradient": gradient.tensor, "radius": radius,
                                                   "out": dv.tensor, "result": dr.tensor})
                                   for layout, kind, v, gradient, radius, _, dv, dr in problems])]
    for _, kind, v, gradient, radius, w, dv, dr in problems:
        oracle = Oracle(kind, v.tensor, radius, gradient.tensor)
        oracle.check_forward(w.tensor)
        oracle.check_backward(dv.tensor)
        oracle.check_radius_gradient(dr.tensor)
        assert all(t.intact() for t in (v, gradient, w, dv, dr)), "a kernel wrote outside of a tensor"
    return [[launch["path"] for launch in taken] for taken in launches]


@pytest.mark.parametrize("dtypes", PAIRS, ids=str)
def test_lists_share_launches(emulator, dtypes):
    emulator.device(4, 90, BIG)
    problems = list_of_problems(SHARED_LAYOUTS, *dtypes)
    assert len(problems) > 5
    for launches in run_list(emulator, problems):
        assert set(launches) == {"rows, table"} and len(launches) <= 3  # blocks of three sizes
    small = [layout for layout in SHARED_LAYOUTS if layout[0] * layout[2] < 100]
    assert run_list(emulator, list_of_problems(small, *dtypes)) == [["rows, table"]] * 2


def test_what_shares_no_launch_follows_alone(emulator):
    emulator.device(4, 90, BIG)
    forward, backward = run_list(emulator, list_of_problems(OTHER_LAYOUTS + SHARED_LAYOUTS, f32, f32))
    for launches in (forward, backward):
        assert launches[0] == "rows, table" and launches.count("rows, table") <= 3
        assert sum(path != "rows, table" for path in launches) >= len(OTHER_LAYOUTS)
    assert run_list(emulator, list_of_problems(OTHER_LAYOUTS[:2], f32, f32)) == [["columns, shared"] * 2] * 2


def test_long_lists_take_several_launches(emulator):
    emulator.device(4, 90, BIG)
    launches = run_list(emulator, list_of_problems([(1, 5, 9 + i % 7) for i in range(250)], f32, f32))
    assert [set(paths) for paths in launches] == [{"rows, table"}] * 2
    assert all(2 <= len(paths) <= 4 for paths in launches)


def test_grids_that_are_too_large_for_a_list(emulator):
    emulator.device(4, 90, BIG, 3)
    [forward, _] = run_list(emulator, list_of_problems([(1, 100, 64), (1, 40, 8), (1, 3, 200)], f32, f32))
    assert set(forward) == {"rows, table"} and len(forward) > 1


def test_bits_of_a_list_are_those_of_single_calls(emulator):
    emulator.device(4, 90, BIG)
    problems = list_of_problems(SHARED_LAYOUTS, f32, bf16)
    run_list(emulator, problems)
    for layout, kind, v, gradient, radius, w, dv, dr in problems:
        single = [torch.empty_like(t.tensor) for t in (w, dv, dr)]
        emulator.call("forward", layout, kind, v=v.tensor, radius=radius, out=single[0])
        emulator.call("backward", layout, kind, v=v.tensor, gradient=gradient.tensor, radius=radius, out=single[1],
                      result=single[2])
        assert all(torch.equal(a, b.tensor) for a, b in zip(single, (w, dv, dr)))


def test_rows_out_of_range_in_a_list(emulator):
    emulator.device(4, 90, BIG)
    problems = list_of_problems([(1, 8, 70), (1, 8, 9), (1, 2, 300)], f32, f32)
    for _, _, v, gradient, *_ in problems:
        v.tensor[:, 0] *= 1e30
        v.tensor[:, 1] = 0
        gradient.tensor[:, 0] *= 1e-30
    run_list(emulator, problems)
