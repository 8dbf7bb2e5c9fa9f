"""The harness that the benchmarks stand on: its statistics, its files, and that every benchmark's cases run."""

import csv
import math
import os
import time

import numpy as np
import pytest
import torch

from bench import compare, digits, harness, kernels, layers, overhead, providers, readme


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


def test_summary_columns():
    times = {"plain": np.full(8, 2e-3), "ours": np.full(8, 1e-3)}
    columns = harness.summary(times, "ours", {"plain": "plain"})
    assert columns["rounds"] == 8 and columns["ms"] == pytest.approx(1) and columns["ms_q90"] == pytest.approx(1)
    assert [columns[f"ratio_plain{end}"] for end in ("", "_low", "_high")] == pytest.approx([0.5] * 3)
    assert harness.summary(times, "plain", {"plain": "plain"})["ratio_plain_low"] == 1


def test_csv_has_the_environment_in_every_row(tmp_path):
    facts = harness.environment("cpu")
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


def test_fits():
    assert harness.fits(1, "cpu") and not harness.fits(2**60, "cpu")


@pytest.mark.parametrize("name", layers.PROVIDERS)
def test_providers_compute_the_same_function(name):
    torch.manual_seed(0)
    plain = torch.nn.Linear(24, 17, dtype=torch.float64)
    torch.manual_seed(0)
    layer = layers.PROVIDERS[name](24, 17, dtype=torch.float64)
    x = torch.randn(5, 24, dtype=torch.float64)
    torch.testing.assert_close(layer(x), plain(x), rtol=1e-12, atol=1e-12)
    layers.three_steps(name, 16, 4, torch.float32, "cpu", True)


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
    t = kernels.tensors(8, 33, torch.float64, "cpu")
    for name, (_, calls) in kernels.KERNELS.items():
        if len(calls) == 2:
            torch.manual_seed(0)
            G, out = torch.randn_like(t.G), torch.randn_like(t.out)
            results = []
            for call in calls.values():
                t.G.copy_(G), t.out.copy_(out)
                results.append((call(t), t.G.clone(), t.out.clone()))
            torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12, msg=lambda m: f"{name}: {m}")


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


def test_the_readme_says_what_was_measured():
    page = (readme.ROOT / "README.md").read_text()
    assert readme.render(page) == page, "run python -m bench.readme"


def test_readme_sections_follow_their_tables(tmp_path):
    for path in readme.FOLDER.glob("*.csv"):
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
        for row in rows:
            row |= {name: 9.25 for name in row if name.startswith("ratio_") and row[name]}
        harness.write_csv(tmp_path / path.name, rows, {})
    page = readme.render((readme.ROOT / "README.md").read_text(), tmp_path)
    assert page.count("9.25") > 30
    with pytest.raises(LookupError, match="digits"):
        readme.render(page.replace("<!-- digits -->", ""))
