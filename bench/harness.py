"""Side-by-side measurement: interleaved timing, ratios with confidence intervals, memory, environment, CSV and plots.

A machine's speed drifts (other processes, clocks, temperature), so figures from different runs do not compare. Here
all providers are timed in turn within each round, in a fresh random order, and a ratio is of rounds shared by both.
"""

import argparse
import csv
import functools
import gc
import itertools
import math
import multiprocessing
import os
import platform
import random
import re
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from unittest import mock

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent


# Timing

def _cpu_seconds(call, repeats):
    started = time.perf_counter_ns()
    for _ in range(repeats):
        call()
    return (time.perf_counter_ns() - started) * 1e-9 / repeats


def _cuda_seconds(call, repeats, lead=0.0):
    """Time on the device. During `lead` seconds the device sleeps while the host queues the calls, so that the cost of
    launching them does not show."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    if lead:
        torch.cuda._sleep(int(lead * 2e9))  # cycles; no clock is faster than 2 GHz by much
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3 / repeats


def measure(calls, *, device="cpu", seconds=2.0, rounds=20, sample=1e-3, warm_up=0.0, hide_launch=False, before=None,
            seed=0):
    """Times `calls` (name -> function of no arguments) side by side; returns name -> array of seconds per call, where
    element i of every array comes from round i.

    Every round times each call once, in a random order. There are at least `rounds` rounds, and more until `seconds`
    have passed. One sample is a run of calls long enough for the fastest of them to take `sample` seconds; the same
    number for all, since the first of a run finds colder caches than the rest. Before a sample as many untimed calls are
    made as the fastest makes in `warm_up` seconds: for what is called again and again where it is used. On CUDA
    `hide_launch` measures the device alone (for kernels); without it a launch-bound call shows its launches (for layers). A
    function `before` is called, untimed, before every sample; a sample is one call then.
    """
    cuda = torch.device(device).type == "cuda"
    timer = _cuda_seconds if cuda else _cpu_seconds
    for call in calls.values():
        call()
    fastest = min(timer(call, 1) for call in calls.values() for _ in range(3))
    repeats = min(max(math.ceil(sample / fastest), 1), 64 if cuda else 1000)  # CUDA queues about 1000 launches
    repeats = 1 if before else repeats
    untimed = int(warm_up / fastest)
    if cuda and hide_launch:
        host = max(_cpu_seconds(call, repeats) for call in calls.values()) * repeats
        timer = functools.partial(_cuda_seconds, lead=2 * host)

    order = list(calls)
    shuffle = random.Random(seed).shuffle
    times = {name: [] for name in calls}
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        deadline = time.perf_counter() + seconds
        while len(times[order[0]]) < rounds or time.perf_counter() < deadline:
            shuffle(order)
            for name in order:
                if before:
                    before()
                for _ in range(untimed):
                    calls[name]()
                times[name].append(timer(calls[name], repeats))
    finally:
        if collecting:
            gc.enable()
    return {name: np.array(values) for name, values in times.items()}


def cache_bytes(device):
    """The last cache before memory."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = [p.read_text().strip() for p in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    units = {"K": 2**10, "M": 2**20}
    return max((int(s[:-1]) * units[s[-1]] for s in sizes), default=32 * 2**20)


def rotate(make, size, device):
    """A function that returns the next of several `make()`s, so many that their `size` bytes each cannot all stay in
    the last cache: a kernel timed again and again would otherwise read from there."""
    return itertools.cycle([make() for _ in range(max(1, math.ceil(2 * cache_bytes(device) / size)))]).__next__


# Statistics

def ratio(times, base, *, resamples=1000, confidence=0.95, seed=0):
    """(ratio of medians, low, high). The bootstrap resamples rounds, the same for both: they share a round's noise."""
    times, base = np.asarray(times), np.asarray(base)
    rng = np.random.default_rng(seed)
    draws = np.empty(resamples)
    for i in range(resamples):
        chosen = rng.integers(len(times), size=len(times))
        draws[i] = np.median(times[chosen]) / np.median(base[chosen])
    low, high = np.quantile(draws, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(np.median(times) / np.median(base)), float(low), float(high)


def summary(times, name, baselines=None, unit="ms"):
    """CSV columns of provider `name`: count, median and quantiles, and its ratio to each of `baselines` (a dictionary
    of column name -> provider)."""
    scale = {"ms": 1e3, "us": 1e6}[unit]
    values = times[name] * scale
    columns = {"rounds": len(values), unit: np.median(values), f"{unit}_min": values.min()}
    columns |= {f"{unit}_q{q}": np.quantile(values, q / 100) for q in (10, 25, 75, 90)}
    for label, base in (baselines or {}).items():
        keys = (f"ratio_{label}", f"ratio_{label}_low", f"ratio_{label}_high")
        columns |= dict(zip(keys, (1.0, 1.0, 1.0) if base == name else ratio(times[name], times[base])))
    return columns


# Memory

def available_bytes(device):
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return _proc("/proc/meminfo", "MemAvailable")
    except OSError:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def fits(size, device, point):
    """Whether `size` bytes for this point of a benchmark fit; says so where they do not."""
    if size < 0.8 * available_bytes(device):
        return True
    print(f"skipped, {size / 1e9:.0f} GB do not fit: {point}", file=sys.stderr)
    return False


def _proc(path, key):
    return int(re.search(rf"^{key}:\s+(\d+) kB", Path(path).read_text(), re.MULTILINE)[1]) * 1024


def _resident_peak(run, args, threads, warm):
    torch.set_num_threads(threads)
    # What torch loads and allocates once (thread pools, its optimizers' modules: 80 MB) is not the price of `run`.
    layer = torch.nn.Linear(256, 256)
    layer(torch.randn(256, 256)).sum().backward()
    torch.optim.SGD(layer.parameters(), lr=0.1, fused=True).step()
    del layer
    if warm:
        run(*args)
        gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew from here
    before = _proc("/proc/self/status", "VmRSS")
    run(*args)
    return _proc("/proc/self/status", "VmHWM") - before


def peak_memory(run, *args, device="cpu", warm=False):
    """Peak bytes that run(*args) needs; all it uses (parameters, gradients, temporaries) must be created inside.
    `warm`: that a second run needs, without what the first compiles and loads.

    CUDA: the most that torch's allocator held at once. CPU (Linux only, else nan): the growth of the resident set,
    at its highest, of a child process that has already imported everything. There every block from 128 kB on goes back
    to the system when it is freed: what glibc keeps otherwise changes from run to run by whole weights.
    """
    if torch.device(device).type == "cuda":
        if warm:
            run(*args)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run(*args)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    if not os.access("/proc/self/clear_refs", os.W_OK):
        return math.nan
    with mock.patch.dict(os.environ, MALLOC_MMAP_THRESHOLD_=str(2**17)), \
            ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_resident_peak, run, args, torch.get_num_threads(), warm).result()


# Environment

def _output(*command):
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _version(package):
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def cpu_name():
    try:
        return re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())[1].strip()
    except (OSError, TypeError):
        return platform.processor() or platform.machine()


def cpu_generation():
    """The name of a virtual machine's processor may leave open which one it is: `AMD EPYC, family 26, model 2`."""
    try:
        numbers = dict(re.findall(r"^(cpu family|model)\s*:\s*(\d+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE))
        return f"{cpu_name()}, family {numbers['cpu family']}, model {numbers['model']}"
    except (OSError, KeyError):
        return cpu_name()


def environment(device):
    """What a figure depends on; every CSV row carries it."""
    cuda = torch.device(device).type == "cuda"
    commit = _output("git", "rev-parse", "--short=12", "HEAD")
    edited = _output("git", "status", "--porcelain", "--untracked-files=no", "--", ".", ":!bench/results")
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if cuda else ""
    return {
        "device": torch.cuda.get_device_name(device) if cuda else cpu_name(),
        "cpu": cpu_generation(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "driver": driver.splitlines()[0] if driver else "",
        "cuda": (torch.version.cuda or "") if cuda else "",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "wnkernels": _version("wnkernels"),
        "commit": (commit + "+edits" if edited else commit) or "unknown",
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    }


def device_directory(device):
    """`nvidia-h200`, `amd-epyc-2-cores`: the folder of a device's results."""
    cuda = torch.device(device).type == "cuda"
    name = torch.cuda.get_device_name(device) if cuda else f"{cpu_name()} {os.cpu_count()} cores"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


# Output

def write_csv(path, rows, facts):
    """`rows` (dictionaries; a column may be missing in some) with the environment's `facts` in the last columns,
    where a row says nothing else."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = list(dict.fromkeys([*(key for row in rows for key in row), *facts]))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            row = {key: f"{v:.6g}" if isinstance(v, float) else v for key, v in row.items()}
            writer.writerow(facts | row)


def table(header, rows):
    """Text columns: the first left-aligned, the others right-aligned unless they are words."""
    rows = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(header, *rows)]
    numeric = [all(re.match(r"[-+]?[\d.]|$", row[i]) for row in rows) and i > 0 for i in range(len(header))]

    def aligned(line):
        cells = (cell.rjust(w) if right else cell.ljust(w) for cell, w, right in zip(line, widths, numeric))
        return "  ".join(cells).rstrip()

    return "\n".join(map(aligned, [header, ["-" * w for w in widths], *rows]))


def interval(columns, label):
    """`1.02 [1.00, 1.05]` of a ratio in `summary`'s columns."""
    value, low, high = (columns[f"ratio_{label}{end}"] for end in ("", "_low", "_high"))
    return f"{value:.2f}" if low == high else f"{value:.2f} [{low:.2f}, {high:.2f}]"


class Progress:
    """tqdm's bar on a terminal; a line per tenth of the way in a log, where a bar would only leave rubbish."""

    def __init__(self, total, label):
        self.total, self.label, self.done, self.bar = total, label, 0, None
        if sys.stderr.isatty():
            try:
                from tqdm import tqdm
                self.bar = tqdm(total=total, desc=label, leave=False)
            except ImportError:
                pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self.bar is not None:
            self.bar.close()

    def step(self, note=""):
        if self.bar is not None:
            self.bar.set_postfix_str(note, refresh=False)
            self.bar.update()
            return
        before, self.done = self.done, self.done + 1
        if self.done * 10 // self.total > before * 10 // self.total:
            print(f"{self.label}: {self.done}/{self.total} {note}".rstrip(), file=sys.stderr, flush=True)


def pyplot():
    """matplotlib without a display, or None where it is not installed: the CSV holds all that a plot shows."""
    try:
        import matplotlib
    except ImportError:
        print("matplotlib is not installed: no plot", file=sys.stderr)
        return None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    return plt


def plot_bars(path, groups, *, ylabel, title, reference=None):
    """`groups`: group -> series -> (value, low, high); one cluster of bars per group."""
    plt = pyplot()
    if plt is None:
        return
    series = list(dict.fromkeys(name for bars in groups.values() for name in bars))
    width = 0.8 / len(series)
    figure, axes = plt.subplots(figsize=(max(6, 0.22 * len(series) * len(groups) + 2), 4.5), layout="constrained")
    for j, name in enumerate(series):
        places = [i for i, bars in enumerate(groups.values()) if name in bars]
        value, low, high = np.array([bars[name] for bars in groups.values() if name in bars], float).T
        axes.bar([i + (j - (len(series) - 1) / 2) * width for i in places], value, width, label=name,
                 yerr=np.maximum([value - low, high - value], 0), error_kw={"elinewidth": 0.8})
    if reference is not None:
        axes.axhline(reference, color="black", linewidth=0.8)
    slanted = {"rotation": 45, "ha": "right"} if len(groups) > 4 else {}
    axes.set_xticks(range(len(groups)), list(groups), **slanted)
    axes.set(ylabel=ylabel, title=title)
    axes.legend(fontsize=8, ncols=min(len(series), 4))
    figure.savefig(path, dpi=130)
    plt.close(figure)


# Command line

def parser(description, seconds=None, several_threads=False):
    arguments = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    arguments.add_argument("--threads", type=int, nargs="+" if several_threads else None,
                           help="torch.set_num_threads (default: torch's own choice)")
    if seconds is not None:
        arguments.add_argument("--seconds", type=float, default=seconds,
                               help="least time for one point (default: %(default)s)")
    arguments.add_argument("--out", type=Path, default=ROOT / "bench" / "results", help="folder of results")
    return arguments


def begin(options):
    """Applies the common options; returns (environment facts, the device's folder of results)."""
    if torch.device(options.device).type == "cuda" and not torch.cuda.is_available():
        sys.exit("--device cuda: torch sees no CUDA device")
    if isinstance(options.threads, int):
        torch.set_num_threads(options.threads)
    return environment(options.device), options.out / device_directory(options.device)
