"""The harness that the benchmarks stand on: its statistics, its files, and that every benchmark's cases run."""

import copy
import csv
import functools
import math
import os
import sys
import time
import types

import numpy as np
import pytest
import torch

from bench import (compare, digits, harness, in_backward, kernels, layers, models, optimizers, overhead,
                   providers, readme, training)
from wnkernels import reference


def test_ratio_finds_a_factor_in_drifting_noise():
    rng = np.random.default_rng(0)
    drift = np.exp(np.cumsum(rng.normal(0, 0.02, 400)))
    base = drift * rng.lognormal(0, 0.05, 400)
    value, low, high = harness.ratio(1.3 * drift * rng.lognormal(0, 0.05, 400), base)
    assert low < 1.3 < high and high - low < 0.1 and low <= value <= high


def test_ratio_interval_covers_the_truth():
    rng = np.random.default_rng(1)
    covered = 0
    for i in range(100):
        _, low, high = harness.ratio(rng.lognormal(0, 0.1, 60), rng.lognormal(0, 0.1, 60), resamples=200, seed=i)
        covered += low <= 1 <= high
    assert covered >= 85


def test_measure_interleaves_and_meets_its_minimum():
    called = []
    times = harness.measure({"a": lambda: called.append("a") or time.sleep(2e-3), "b": lambda: called.append("b")},
                            seconds=0.02, rounds=12, sample=0)
    assert len(times["a"]) == len(times["b"]) >= 12
    assert np.median(times["a"]) > 2e-3 > np.median(times["b"])
    rounds = called[-24:]  # sample=0: one call a sample
    pairs = {tuple(rounds[i:i + 2]) for i in range(0, 24, 2)}
    assert pairs == {("a", "b"), ("b", "a")}, "every round has both, in either order"


def test_measure_warms_every_sample_up(monkeypatch):
    called = []
    monkeypatch.setattr(harness, "_cpu_seconds", lambda call, repeats: [call() for _ in range(repeats)] and 0.01)
    calls = {"a": lambda: called.append("a"), "b": lambda: called.append("b")}
    harness.measure(calls, seconds=0, rounds=3, sample=0, warm_up=0.045)
    measured = "".join(called[2 + 6 :])  # before: each once, and three times for its speed
    assert all(measured[i : i + 10] in ("aaaaabbbbb", "bbbbbaaaaa") for i in range(0, 30, 10)), "four calls, then a sample"
    assert len(measured) == 30


def test_measure_calls_before_every_sample():
    called = []
    harness.measure({"a": lambda: called.append("a")}, seconds=0, rounds=3, before=lambda: called.append("before"))
    assert called[-6:] == ["before", "a"] * 3


def test_summary_columns():
    times = {"plain": np.full(8, 2e-3), "ours": np.full(8, 1e-3)}
    columns = harness.summary(times, "ours", {"plain": "plain"})
    assert columns["rounds"] == 8 and columns["ms"] == pytest.approx(1) and columns["ms_q90"] == pytest.approx(1)
    assert [columns[f"ratio_plain{end}"] for end in ("", "_low", "_high")] == pytest.approx([0.5] * 3)
    assert harness.summary(times, "plain", {"plain": "plain"})["ratio_plain_low"] == 1


def test_csv_has_the_environment_in_every_row(tmp_path):
    facts = harness.environment("cpu")
    assert facts["cpu"].startswith(facts["device"])  # and the family and model, where the system tells them
    harness.write_csv(tmp_path / "new" / "x.csv", [{"a": 1, "b": 1 / 3}, {"a": 2, "c": "two"}], facts)
    rows = list(csv.DictReader((tmp_path / "new" / "x.csv").open()))
    assert list(rows[0]) == ["a", "b", "c", *facts]
    assert rows[0]["b"] == "0.333333" and rows[0]["c"] == "" and rows[1]["c"] == "two"
    for row in rows:
        assert row["torch"] == torch.__version__ and int(row["threads"]) == torch.get_num_threads()
        assert row["device"] and row["commit"] and row["date"]


def test_rotation_exceeds_the_cache():
    following = harness.rotate(object, harness.cache_bytes("cpu"), "cpu")
    first, second = following(), following()
    assert first is not second and following() is first


def allocate(size):
    torch.ones(size, dtype=torch.uint8)


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="peak memory is measured on Linux only")
def test_peak_memory():
    assert harness.peak_memory(allocate, 100_000_000) == pytest.approx(1e8, rel=0.05)


def test_table_aligns():
    lines = harness.table(["name", "ms"], [["a", "1.0"], ["bc", "10.0"]]).splitlines()
    assert lines == ["name    ms", "----  ----", "a      1.0", "bc    10.0"]


def test_progress_in_a_log_is_ten_lines(capsys):
    with harness.Progress(100, "x") as progress:
        for _ in range(100):
            progress.step()
    assert len(capsys.readouterr().err.splitlines()) == 10


def test_fits(capsys):
    assert harness.fits(1, "cpu", "small") and not harness.fits(2**60, "cpu", "width 2")
    assert capsys.readouterr().err == "skipped, 1152921505 GB do not fit: width 2\n"


@pytest.mark.parametrize("name", providers.linear("cpu", forced=True))
def test_providers_compute_the_same_function(name):
    torch.manual_seed(0)
    plain = torch.nn.Linear(24, 17, dtype=torch.float64)
    torch.manual_seed(0)
    layer = providers.linear("cpu", forced=True)[name](24, 17, dtype=torch.float64)
    x = torch.randn(5, 24, dtype=torch.float64)
    with providers.compiling(backward_again=True):
        torch.testing.assert_close(layer(x), plain(x), rtol=1e-12, atol=1e-12)
        if name in providers.COMPILED:
            optimizer, dy = torch.optim.SGD(layer.parameters()), torch.ones(5, 17, dtype=torch.float64)
            backward = training.timed("backward", layer, optimizer, x, dy)
            torch.testing.assert_close(backward(), backward(), rtol=0, atol=0)
        else:
            layers.three_steps(name, 16, 4, torch.float32, "cpu", True)


@pytest.fixture
def flag_gems(monkeypatch):
    """What is used of FlagGems, in torch: that it is called rightly is all that can be seen without a GPU."""
    backward = torch.ops.aten._weight_norm_interface_backward
    stub = types.SimpleNamespace(weight_norm_interface=torch._weight_norm_interface,
                                 weight_norm_interface_backward=backward)
    monkeypatch.setitem(sys.modules, "flag_gems", stub)


def test_flag_gems_is_a_provider_where_it_is_installed(monkeypatch, flag_gems):
    assert providers.has_flag_gems("cuda") and not providers.has_flag_gems("cpu")
    monkeypatch.setattr(providers, "has_flag_gems", lambda device: True)
    assert "FlagGems SWN" in providers.linear("cuda")
    function = providers.weight_norms("cuda", compile=False)["FlagGems"]
    v, G = torch.randn(2, 5, 7)
    leaves = v.requires_grad_(), torch.rand(5, 1).requires_grad_()
    results = [torch.autograd.grad(w, leaves, G) for w in (function(*leaves), reference.weight_norm(*leaves))]
    torch.testing.assert_close(*results)


def test_flag_gems_is_none_where_it_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "flag_gems", None)
    assert not providers.has_flag_gems("cuda")


def test_timed_modes():
    layer, x, dy = torch.nn.Linear(3, 2), torch.randn(4, 3, requires_grad=True), torch.randn(4, 2)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    before = [p.clone() for p in layer.parameters()]
    torch.testing.assert_close(training.timed("forward", layer, optimizer, x, dy)(), layer(x))
    backward = training.timed("backward", layer, optimizer, x, dy)
    backward()
    torch.testing.assert_close(backward(), (dy.T @ x, dy.sum(0), dy @ layer.weight))
    assert len(training.timed("backward", layer, optimizer, x.detach(), dy)()) == 2
    torch.testing.assert_close([*layer.parameters()], before, rtol=0, atol=0)
    training.timed("full", layer, optimizer, x, dy)()
    torch.testing.assert_close(layer.weight, before[0] - 0.1 * (dy.T @ x))
    assert layer.weight.grad is None and x.grad is None
    weight = layer.weight.clone()
    training.timed("step", layer, optimizer, x, dy)()
    torch.testing.assert_close(layer.weight, weight - 0.1 * layer.weight.grad)
    with pytest.raises(ValueError, match="sideways"):
        training.timed("sideways", layer, optimizer, x, dy)


@pytest.mark.parametrize("hidden", [True, False])
def test_the_floor_of_a_step_is_that_of_its_parts(hidden):
    floors = [layers.floor_bytes(mode, 100, 3, torch.float32, hidden) for mode in training.MODES]
    assert sum(floors[:3]) == floors[3] == 4 * (5 + hidden) * 100**2 + 4 * (4 + hidden) * 300


@pytest.fixture
def options(monkeypatch):
    """Of a benchmark whose figures nobody reads."""
    monkeypatch.setattr(harness, "measure", functools.partial(harness.measure, sample=0))
    return types.SimpleNamespace(device="cpu", seconds=0, rounds=1, compile=False, memory=False, forced=True, reuse=True)


def test_layers_measure_every_mode(monkeypatch, options):
    monkeypatch.setattr(harness, "cache_bytes", lambda device: 1000)
    for mode in training.MODES:
        rows = layers.run(mode, (16, 4, torch.float32, "cpu", True), options)
        assert [r["provider"] for r in rows] == [*providers.linear("cpu", compile=False, forced=True), "copy"]
        assert all(r["percent_of_copy"] > 0 and r["gb_per_s"] > 0 for r in rows[:-1])


@pytest.mark.parametrize("model", models.MODELS)
def test_models_are_the_same_function_under_every_provider(model):
    results = []
    for provider in models.PROVIDERS.keys() - set(models.COMPILED):
        forward, optimizer, x, dy = models.parts(model, "SGD", provider, "cpu")
        forward.eval()
        with torch.no_grad():
            results.append(forward(x))
        assert dy.shape == results[-1].shape
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-4, atol=1e-4)


def test_models_measure_every_point(monkeypatch, options):
    monkeypatch.setitem(models.MODELS, "tiny", (lambda: torch.nn.Sequential(models.Encoder(8, 2)), (2, 3, 8)))
    for optimizer, mode in models.POINTS:
        names = [r["provider"] for r in models.run("tiny", optimizer, mode, options)]
        assert names[0] == "plain" and ("polar, in backward" in names) == (mode == "full")


def test_optimizers_and_steps_in_the_backward_run(monkeypatch, options):
    monkeypatch.setitem(optimizers.CASES, "tiny", (optimizers.small, "step", 1))
    for name, settings in optimizers.OPTIMIZERS.items():
        for provider in optimizers.providers(*settings[:3]):
            training.timed("step", *optimizers.parts("tiny", name, provider, "cpu"))()
    for case in (in_backward.FLOAT32, *in_backward.BUFFERS.values(), in_backward.BFLOAT16):
        rows = in_backward.run(case, 64, 3, 0)
        assert [r["provider"] for r in rows] == list(case.providers)
        assert sum("bytes_per_element" in r for r in rows) >= 4


def test_the_same_step_in_torch_is_the_polar_step(monkeypatch):
    """What the step alone is compared with, but for decay, which torch's has on the radius too."""
    monkeypatch.setattr(training, "LR", 0.1)
    for torchs, ours, options, *_ in optimizers.OPTIMIZERS.values():
        linear = torch.nn.Linear(9, 5, bias=False, dtype=torch.float64)
        made = optimizers.providers(torchs, ours, options | {"weight_decay": 0.0})
        theirs, mine = (made[p](lambda: torch.nn.Sequential(copy.deepcopy(linear)))  # noqa: B023
                        for p in ("torch parametrized", "wnkernels"))
        torch.manual_seed(0)
        step = optimizers.the_same_step(*theirs)
        torch.manual_seed(0)
        mine[0][0].weight.grad = torch.randn(5, 9, dtype=torch.float64)
        for _ in range(3):
            step(), mine[1].step()
        torch.testing.assert_close(mine[0][0].weight, theirs[0][0].weight, rtol=1e-12, atol=0)
        assert not torch.allclose(mine[0][0].weight, linear.weight, atol=1e-2)


def test_optimizers_share_their_memory():
    """Weight, gradient and momentum of each lie where those of the first one do, and are still stepped there."""
    torchs, ours, options = optimizers.OPTIMIZERS["SGD, momentum"][:3]
    made = [make(lambda: torch.nn.Linear(1024, 1024, bias=False))[1]
            for make in optimizers.providers(torchs, ours, options).values()]
    steps = [training.timed("step", None, optimizer, None, None) for optimizer in made]
    for step in steps:
        step()
    training.in_the_same_memory(made)

    def tensors(optimizer):
        (weight,) = (p for group in optimizer.param_groups for p in group["params"] if p.numel() == 2**20)
        return weight, weight.grad, optimizer.state[weight]["momentum_buffer"]

    assert len({tuple(t.data_ptr() for t in tensors(optimizer)) for optimizer in made}) == 1
    momentum = tensors(made[0])[2]
    for step in steps:
        before = momentum.clone()
        step()
        assert not torch.equal(momentum, before)


def test_digits_curves_and_verdicts(monkeypatch):
    pytest.importorskip("sklearn")
    monkeypatch.setattr(digits, "COMPARED", 20)
    task = digits.Task("tiny", hidden=32, batch=64, steps=40, lr=0.1)
    monkeypatch.setattr(harness, "peak_memory", lambda *_, **__: math.nan)
    rows, curves = digits.run(task, "cpu")
    assert [r["provider"] for r in rows] == list(providers.LINEAR)
    assert not list(digits.broken(rows))
    assert all(losses[-1] < losses[0] for losses in curves.values())
    rows[-1]["difference_fp64"] = math.nan
    rows[-2]["difference_fp32"] = 2e-5
    assert len(list(digits.broken(rows))) == 2


def test_kernels_agree():
    normed = providers.weight_norms("cpu")
    with providers.compiling(backward_again=True):
        t = kernels.tensors(8, 33, torch.float64, "cpu", normed)
        for name, (_, calls) in kernels.kernels(normed).items():
            torch.manual_seed(0)
            G, out = torch.randn_like(t.G), torch.randn_like(t.out)
            results = []
            for call in calls.values():
                t.G.copy_(G), t.out.copy_(out)
                results.append((call(t), t.G.clone(), t.out.clone()))
            for result in results[1:]:
                torch.testing.assert_close(result, results[0], rtol=1e-10, atol=1e-12,
                                           msg=lambda m: f"{name}: {m}")


@pytest.mark.parametrize("cached", [(), ((4, 8),)])
def test_kernels_against_their_goals(monkeypatch, options, cached):
    monkeypatch.setattr(kernels, "CACHED", cached)
    monkeypatch.setattr(kernels, "QUICK", ((4, 8),))
    monkeypatch.setattr(harness, "cache_bytes", lambda device: 0)
    rows = kernels.run((4, 8), torch.float32, options)
    assert {r["threads"] for r in rows} == {torch.get_num_threads()}
    for r in rows:
        assert ("ratio_add" in r) == (r["floor_bytes"] == 3 * 4 * 4 * 8)
        r |= {f"ratio_{of}{end}": 1.0 for of in ("copy", "add") for end in ("", "_low", "_high")}
    assert {r["kernel"] for r in rows if kernels.goal(r)} == set(kernels.GOALS)
    assert [line.split(",")[1] for line in kernels.missed(rows)] == [" row norm"]
    assert not list(kernels.missed([r | {"outputs": "fresh"} for r in rows]))


def test_overhead_calls_run():
    for calls in overhead.groups("cpu").values():
        for call in calls.values():
            call()


def write_ratios(path, ratios, drop=()):
    rows = [{"width": w, "provider": "ours", "rounds": 9, "ms": 1.0, "ratio_plain": r, "ratio_plain_low": r - 0.05,
             "ratio_plain_high": r + 0.05} for w, r in ratios.items() if w not in drop]
    harness.write_csv(path, rows, {"device": "x", "commit": str(path), "date": "today"})


def test_compare_names_what_is_surely_slower(tmp_path, capsys):
    old, new = tmp_path / "old.csv", tmp_path / "new.csv"
    write_ratios(old, {64: 1.0, 256: 1.0, 1024: 1.0, 2048: 1.0})
    write_ratios(new, {64: 1.2, 256: 1.08, 1024: 0.7, 4096: 3.0})
    assert compare.main([str(old), str(new)]) == 1
    out = capsys.readouterr().out
    assert "64, ours" in out and "1.20 [1.15, 1.25]" in out and "256" not in out and "1024" not in out
    assert "1 ratios are worse; 3 points in both tables, 1 only in the old, 1 only in the new" in out
    assert compare.main([str(old), str(old)]) == 0
    assert compare.main([str(new), str(tmp_path / "none.csv")]) == 2


def test_compare_refuses_tables_without_ratios(tmp_path):
    path = tmp_path / "other.csv"
    harness.write_csv(path, [{"width": 1, "ms": 2.0}], {"device": "x"})
    with pytest.raises(ValueError, match="no column of a ratio"):
        compare.read(path)
    write_ratios(path, {64: 1.0})
    path.write_text(path.read_text() + path.read_text().splitlines()[1] + "\n")
    with pytest.raises(ValueError, match="two rows"):
        compare.read(path)


def test_compare_keeps_thread_counts_apart(tmp_path, capsys):
    old, new = tmp_path / "old.csv", tmp_path / "new.csv"
    for path, ratio in ((old, 1.0), (new, 2.0)):
        rows = [{"kernel": "k", "threads": t, "ratio_copy": r, "ratio_copy_low": r, "ratio_copy_high": r}
                for t, r in ((1, 1.0), (2, ratio))]
        harness.write_csv(path, rows, {"device": "x", "threads": 7})
    assert compare.main([str(old), str(new)]) == 1
    assert "1 ratios are worse; 2 points in both tables" in capsys.readouterr().out


@pytest.mark.parametrize("page", readme.PAGES)
def test_the_pages_say_what_was_measured(page):
    assert readme.render(page) == (readme.ROOT / page).read_text(), "run python -m bench.readme"


def test_readme_sections_follow_their_tables(tmp_path):
    for path in readme.FOLDER.glob("*.csv"):
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
        for row in rows:
            row |= {name: 9.25 for name in row if name.startswith(("ratio_", "percent_")) and row[name]}
        harness.write_csv(tmp_path / path.name, rows, {})
    page = readme.render("README.md", tmp_path)
    assert page.count("9.25") > 60 and page.count("**missed**") == 12
    page = readme.render("docs/roofline.md", tmp_path)
    assert page.count("| 9 |") + page.count("| 9 / 9 |") == 19, "every row's % of a copy"
    with pytest.raises(LookupError, match="digits"):
        readme.render("README.md", text="no section")
