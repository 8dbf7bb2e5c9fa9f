"""The command line of the papers, what it writes, and the claims of paper 0 that take seconds."""

import csv
import dataclasses
import math

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from scipy.special import expi

from wnkernels.papers import PAPERS, claims, command, morwani, read_data
from wnkernels.theory import rates


@pytest.fixture(autouse=True)
def one_thread():
    """The tensors are tiny."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Fake:
    """A paper with a claim of each verdict."""

    TITLE = "A paper"

    def __init__(self, *verdicts):
        self.verdicts = verdicts

    def claims(self, options):
        for i, holds in enumerate(self.verdicts):
            if options.wants(f"P0-{i}"):
                run = options.measure(lambda backend: backend)
                options.results["seen"] = run.value
                yield claims.Claim(f"P0-{i}", "text " * 20, "a", 0.12345678, "<= 1", holds, *run[1:])

    def figures(self, results, folder):
        (folder / "figure.png").write_text(results["seen"])


@pytest.fixture
def fake(monkeypatch):
    def install(*verdicts):
        monkeypatch.setattr(command, "modules", lambda names: {"morwani": Fake(*verdicts)})

    return install


@pytest.mark.parametrize(
    "verdicts, code", [((True, True), 0), ((True, None), 0), ((True, False, None), 1), ((False,), 1)]
)
def test_the_exit_code_is_the_verdict(fake, capsys, verdicts, code):
    fake(*verdicts)
    assert command.main([]) == code
    out = capsys.readouterr().out
    assert (
        f"{verdicts.count(True)} hold, {verdicts.count(False)} do not, {verdicts.count(None)} report" in out
    )
    assert max(map(len, out.splitlines())) <= 160


def test_what_is_written(fake, tmp_path, capsys):
    fake(True, False, None)
    other = {"paper": "chou", "id": "P4-1", "seconds": "2.000"}
    assert command.main(["--out", str(tmp_path), "--backend", "both"]) == 1
    with open(tmp_path / "claims.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(r["id"], r["holds"]) for r in rows] == [("P0-0", "yes"), ("P0-1", "NO"), ("P0-2", "report")]
    assert (
        float(rows[0]["measured"]) == 0.12345678
        and rows[0]["backend"] == "both"
        and rows[0]["device"] == "cpu"
    )
    assert float(rows[0]["seconds"]) >= 0 and float(rows[0]["torch_seconds"]) >= 0
    assert (tmp_path / "figure.png").read_text() == "wnkernels"  # the values are of our kernels
    # Rows of claims that do not run stay, and those of one that runs are replaced.
    claims.write_csv(tmp_path / "claims.csv", [{**rows[0], **other}, rows[0], rows[1]])
    assert command.main(["--out", str(tmp_path), "--claims", "P0-1"]) == 1
    with open(tmp_path / "claims.csv", newline="") as file:
        assert [(r["paper"], r["id"]) for r in csv.DictReader(file)] == [
            ("morwani", "P0-0"),
            ("morwani", "P0-1"),
            ("chou", "P4-1"),
        ]


def test_pure_torch_alone_has_no_time_of_ours(fake, tmp_path):
    fake(True)
    assert command.main(["--out", str(tmp_path), "--backend", "torch"]) == 0
    with open(tmp_path / "claims.csv", newline="") as file:
        [row] = csv.DictReader(file)
    assert row["seconds"] == "" and float(row["torch_seconds"]) >= 0
    assert (tmp_path / "figure.png").read_text() == "torch"


def test_wrong_arguments(fake, capsys):
    assert command.main(["einstein"]) == 2
    assert (
        "paper must be one of 'morwani', 'yun', 'kumar', 'wan', 'chou', got 'einstein'"
        in capsys.readouterr().err
    )
    fake(True)
    assert command.main(["--claims", "P0-77"]) == 2
    assert "no claim 'P0-77'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command.main(["--quick", "--full"])
    if not torch.cuda.is_available():
        assert command.main(["--device", "cuda"]) == 2
        assert "torch finds no CUDA device" in capsys.readouterr().err
    with pytest.raises(ValueError, match="backend must be"):
        claims.Options(backend="jax")
    with pytest.raises(ValueError, match="full and small"):
        claims.Options(full=True, small=True)


def test_the_list_names_all_papers(capsys):
    assert command.main(["--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(PAPERS)


def test_published_recipes():
    for name in ("conv_rate_1layer", "linsep", "xor"):
        assert "authors" in read_data(name)["source"]
    with pytest.raises(
        ValueError, match="name must be one of 'conv_rate_1layer', 'linsep', 'xor', got 'mnist'"
    ):
        read_data("mnist")


# ------------------------------------------------------------------------------------------ predictions of P0


@pytest.mark.parametrize("margin", [5.0, 20.0, 50.0])
def test_rates_are_those_of_the_flows(margin):
    """Against dt/dw integrated step by step from w = 1; t there is 0, and for EWN the antiderivative Ei(1) -
    e."""

    def time(slope):
        return solve_ivp(slope, (1.0, margin), [0.0], rtol=1e-11, atol=1e-13).y[0, -1]

    for depth in (1, 2, 3, 4):
        power = 2 - 2 / depth
        t = time(lambda w, t: np.exp(w) / (depth**2 * w**power))
        exact = depth**2 * math.exp(-margin) * t * math.log(t) ** power
        assert rates.plain_rate(margin, depth) == pytest.approx(exact, rel=1e-7)
    t = time(lambda w, t: np.exp(w) / w**2) + expi(1) - math.e
    assert rates.ewn_rate(margin) == pytest.approx(math.exp(-margin) * t * math.log(t) ** 2, rel=1e-7)


def test_trajectories_conserve_their_invariant():
    x, w0 = (2.0, 1.0), (0.7, 1.9)
    for margin in (5.0, 50.0, 1e4):
        w = rates.trajectory_point(w0, x, margin)
        assert w @ np.array(x) == pytest.approx(margin, rel=1e-9)
        assert rates.trajectory_invariant(w, x) == pytest.approx(rates.trajectory_invariant(w0, x), rel=1e-9)
    limits = rates.trajectory_limits(w0, x)
    bounded = np.isfinite(limits)
    assert bounded.sum() == 1 and limits[bounded] == pytest.approx(w[bounded], rel=1e-3)


# ----------------------------------------------------------------------------------------------- claims of P0

QUICK = ("P0-1", "P0-2", "P0-3", "P0-4", "P0-5", "P0-6", "P0-7")


@pytest.mark.parametrize("name", QUICK)
def test_claims_of_seconds_hold(name):
    found = list(morwani.claims(claims.Options(small=True, only=frozenset({name}))))
    assert found and {claim.id for claim in found} == {name}
    for claim in found:
        assert claim.holds is (None if name == "P0-7" else True), claim
        assert [f.name for f in dataclasses.fields(claim) if getattr(claim, f.name) is None] in (
            [],
            ["holds"],
        )


def test_one_batch_of_xor_is_its_instances_one_by_one():
    start = torch.stack([morwani.xor_start(seed) for seed in (2, 3)])
    run = morwani.xor(start, morwani.KINDS, "wnkernels")
    rows = run.weights[0].view(len(morwani.KINDS), len(start), -1, 2)
    for k, kind in enumerate(morwani.KINDS):
        for i, w in enumerate(start):
            one = morwani.xor(w[None], [kind], "wnkernels")
            assert one.reached and run.reached[2 * k + i] and one.steps == run.steps[2 * k + i]
            torch.testing.assert_close(one.weights[0], rows[k, i], rtol=1e-8, atol=1e-10)
            exact, steps = morwani.xor_in_numpy(w.numpy(), kind)
            assert steps == one.steps
            torch.testing.assert_close(rows[k, i], torch.from_numpy(exact), rtol=1e-8, atol=1e-10)


def test_an_experiment_that_is_wrong_does_not_hold(monkeypatch):
    """The verdicts come from the measurement."""
    monkeypatch.setattr(
        morwani,
        "gradient_errors",
        lambda device: dict.fromkeys(("differences", "float32", "orthogonal"), 1.0),
    )
    monkeypatch.setattr(morwani, "step_errors", lambda *args, backend: math.nan)
    found = list(morwani.claims(claims.Options(small=True, only=frozenset({"P0-1", "P0-2"}))))
    assert len(found) == 5 and all(claim.holds is False for claim in found)


def test_figures_are_drawn(tmp_path):
    options = claims.Options(small=True, out=tmp_path, only=frozenset({"P0-4", "P0-7"}))
    assert list(morwani.claims(options))
    morwani.figures(options.results, tmp_path)
    assert {f.name for f in tmp_path.iterdir()} == {"morwani_trajectories.png", "morwani_xor.png"}


def test_pure_torch_gives_the_same(capsys):
    ours, theirs = (
        [c.measured for c in morwani.claims(claims.Options(backend=b, only=frozenset({"P0-4"})))]
        for b in ("wnkernels", "torch")
    )
    assert ours == theirs
