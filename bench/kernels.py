"""Single kernels against torch's and against a copy of the same tensor in the same run.

    python -m bench.kernels [--quick] [--device cuda]
    python -m bench.kernels --reuse --threads 1 2   # CPU: outputs into memory that the process already has

On a CPU most of the time of a kernel with a large fresh output goes to the operating system, which hands out zeroed
pages. `--reuse` keeps freed memory in the process (glibc's allocator), for torch's kernels as for ours, so that only
the first call pays for pages; the results go to kernels_reuse.csv.
"""

import itertools
import os
import sys
from types import SimpleNamespace

import torch

import wnkernels.functional as wf

from . import harness, providers

SHAPES = ((4096, 4096), (16384, 1024), (64, 262144), (65536, 256), (65536, 9), (4096, 4097))
LARGE = (16384, 16384)  # beyond the cache of a GPU; the others already are beyond that of a CPU
QUICK = SHAPES[:2]
CACHED = ((1024, 256), (512, 512), (1024, 1024))  # on a CPU: the same tensors again and again, which stay there
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**60)}
# Goals of wnkernels with outputs reused, at the shapes QUICK: kernel -> (of what, most of its time).
GOALS = {"forward": ("copy", 1.15), "project_": ("add", 1.15), "row norm": ("copy", 0.65)}


def tensors(rows, length, dtype, device, normed):
    """What the kernels of one point work on. The norms n serve as radius: then a projected gradient is its own
    projection, and the in-place kernels can run for ever. `normed`: as of `providers.weight_norms`."""
    v, G, out = (torch.randn(rows, length, device=device).to(dtype) for _ in range(3))
    n = wf.row_norm(v)[:, None]
    leaves = v.detach().requires_grad_(), n.to(dtype).detach().requires_grad_()
    return SimpleNamespace(v=v, G=G, out=out, n=n, g=leaves[1].detach(), leaves=leaves,
                           w={name: function(*leaves) for name, function in normed.items()})


def torch_project(t):
    n = torch.linalg.vector_norm(t.v, dim=1, keepdim=True)
    p = (t.G * t.v).sum(1, keepdim=True) / n
    t.G.addcmul_(t.v, p / n, value=-1).mul_(t.n / n)
    return p


def kernels(normed):
    """kernel -> (tensor passes that it cannot do without, provider -> call)"""
    return {
        "copy": (2, {"torch": lambda t: t.out.copy_(t.v)}),
        "add": (3, {"torch": lambda t: torch.add(t.v, t.G, out=t.out)}),
        "row norm": (1, {
            "torch": lambda t: torch.linalg.vector_norm(t.v, dim=1),
            "wnkernels": lambda t: wf.row_norm(t.v),
        }),
        "forward": (2, {
            name: lambda t, function=function: function(t.v, t.g) for name, function in normed.items()
        }),
        "backward": (3, {
            name: lambda t, name=name: torch.autograd.grad(t.w[name], t.leaves, t.G, retain_graph=True)
            for name in normed
        }),
        "project_": (3, {
            "torch": torch_project,
            "wnkernels": lambda t: wf.project_(t.G, t.v, t.n),
        }),
        "normalize_": (2, {
            "torch": lambda t: t.out.div_(torch.linalg.vector_norm(t.out, dim=1, keepdim=True)),
            "wnkernels": lambda t: wf.normalize_(t.out),
        }),
    }


def run(shape, dtype, options):
    """Rows of one shape and dtype: a row per kernel and provider."""
    size = shape[0] * shape[1] * dtype.itemsize
    normed = providers.weight_norms(options.device, compile=options.compile)
    table = kernels(normed)
    with providers.compiling(backward_again=True):
        make = lambda: tensors(*shape, dtype, options.device, normed)  # noqa: E731
        following = itertools.repeat(make()).__next__ if shape in CACHED else harness.rotate(make, size, options.device)
        calls = {(kernel, provider): lambda call=call: call(following())
                 for kernel, (_, by_provider) in table.items() for provider, call in by_provider.items()}
        times = harness.measure(calls, device=options.device, seconds=options.seconds, rounds=options.rounds,
                                hide_launch=True)
    rows = []
    for (kernel, provider) in calls:
        passes = table[kernel][0]
        row = {"rows": shape[0], "length": shape[1], "dtype": str(dtype).removeprefix("torch."), "kernel": kernel,
               "provider": provider, "outputs": "reused" if options.reuse else "fresh",
               "threads": torch.get_num_threads(), "floor_bytes": passes * size}
        bases = {"torch": (kernel, "torch"), "copy": ("copy", "torch")}
        if passes == 3:
            bases["add"] = ("add", "torch")
        row |= harness.summary(times, (kernel, provider), bases)
        row["gb_per_s"] = passes * size / row["ms"] / 1e6
        row["percent_of_copy"] = 100 * passes / 2 / row["ratio_copy"]
        rows.append(row)
    return rows


def goal(row):
    """(of what, bound, whether it is met) of a row that has a goal, else None."""
    known = row["provider"] == "wnkernels" and row["outputs"] == "reused" and row["kernel"] in GOALS
    if not known or (int(row["rows"]), int(row["length"])) not in QUICK:
        return None
    of, bound = GOALS[row["kernel"]]
    return of, bound, float(row[f"ratio_{of}"]) <= bound


def missed(rows):
    """One line for every goal that is missed."""
    for r in rows:
        of, bound, met = goal(r) or ("", 0, True)
        if not met:
            yield (f"{r['rows']}x{r['length']} {r['dtype']}, {r['kernel']}, {r['threads']} threads: "
                   f"{harness.interval(r, of)} of {of}, goal {bound}")


def show(rows):
    header = ["shape", "dtype", "threads", "kernel", "provider", "ms", "GB/s", "% of copy", "time / torch",
              "time / copy"]
    print(harness.table(header, [[
        f"{r['rows']}x{r['length']}", r["dtype"], r["threads"], r["kernel"], r["provider"], f"{r['ms']:.3f}",
        f"{r['gb_per_s']:.1f}", f"{r['percent_of_copy']:.0f}", harness.interval(r, "torch"), harness.interval(r, "copy"),
    ] for r in rows]))
    print("\nGB/s and % of copy: of the bytes that a kernel cannot avoid (floor_bytes), beside a copy in the same run")


def main(arguments=None):
    parser = harness.parser(__doc__, seconds=5, several_threads=True)
    parser.add_argument("--quick", action="store_true", help="two shapes only")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["fp32", "bf16"])
    parser.add_argument("--rounds", type=int, default=10, help="least number of rounds (default: %(default)s)")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave torch.compile out")
    parser.add_argument("--reuse", action="store_true", help="CPU: outputs into memory that the process already has")
    options = parser.parse_args(arguments)
    if options.reuse and any(os.environ.get(key) != value for key, value in KEEP_MEMORY.items()):
        # The allocator reads these when a process starts.
        command = [sys.executable, "-m", "bench.kernels", *(sys.argv[1:] if arguments is None else arguments)]
        os.execve(sys.executable, command, os.environ | KEEP_MEMORY)
    facts, folder = harness.begin(options)
    shapes = QUICK if options.quick else SHAPES + (CACHED if options.device == "cpu" else (LARGE,))
    rows, points = [], [(shape, DTYPES[dtype]) for shape in shapes for dtype in options.dtypes]
    counts = options.threads or [torch.get_num_threads()]
    with harness.Progress(len(points) * len(counts), "kernels") as progress:
        for threads, (shape, dtype) in itertools.product(counts, points):
            torch.set_num_threads(threads)
            size = 10 * shape[0] * shape[1] * max(dtype.itemsize, 2) + 2 * harness.cache_bytes(options.device)
            label = f"{shape[0]}x{shape[1]} {dtype}, {threads} threads"
            if harness.fits(size, options.device, label):
                rows += run(shape, dtype, options)
            progress.step(label)
    print(f"{facts['device']}, torch {facts['torch']}, commit {facts['commit']}\n")
    show(rows)
    for line in missed(rows):
        print(f"missed: {line}")
    name = "kernels_reuse" if options.reuse else "kernels"
    harness.write_csv(folder / f"{name}.csv", rows, facts)
    groups = {}
    for r in rows:
        if r["kernel"] not in ("copy", "add") and r["threads"] == max(counts):
            point = groups.setdefault(f"{r['rows']}x{r['length']} {r['dtype']}", {})
            # A short time is a high bandwidth: the ends of the interval change places.
            point[f"{r['kernel']} {r['provider']}"] = [
                r["percent_of_copy"] * r["ratio_copy"] / r[f"ratio_copy{end}"] for end in ("", "_high", "_low")]
    harness.plot_bars(folder / f"{name}.png", groups, ylabel="% of the bandwidth of a copy", title=facts["device"],
                      reference=100)
    print(f"\nwritten: {folder}/{name}.csv")


if __name__ == "__main__":
    main()
