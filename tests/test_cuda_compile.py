"""What nvcc makes of csrc/cuda: no spills, vector memory access, no header of torch. Needs nvcc, but no GPU."""
import functools
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CUDA = ROOT / "csrc" / "cuda"
SOURCES = sorted(CUDA.glob("*.cu"))
ARCHS = ["80", "90", "100"]
# The functions that are not inlined, for rows out of range and for the double arithmetic of one thread per row, may keep
# their caller's frame here, a step kernel's that of their arrays; __internal ones are the compiler's.
OUTLINED = ["redo_row", "prepare_row", "solve_row", "__internal", "pass_over"]
FRAME = 32

NVCC = next(filter(None, [
    os.environ.get("CUDA_HOME") and shutil.which("nvcc", path=str(Path(os.environ["CUDA_HOME"], "bin"))),
    shutil.which("nvcc"), shutil.which("nvcc", path="/usr/local/cuda/bin")]), None)
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")


def nvcc(*arguments):
    run = subprocess.run([NVCC, "-std=c++17", "-O3", f"-I{ROOT / 'csrc'}", *arguments], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stderr


def demangled(text):
    return subprocess.run(["c++filt"], input=text, capture_output=True, text=True, check=True).stdout


@functools.cache
def compiled(source, folder):
    """What ptxas says of every kernel and function, once per architecture, and the PTX for sm_90."""
    codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHS]
    threads = os.environ.get("MAX_JOBS", str(os.cpu_count()))
    messages = nvcc(*codes, f"--threads={threads}", "-Xptxas", "-v", "--keep", f"--keep-dir={folder}", "-c", source,
                    "-o", folder / f"{source.stem}.o")
    [ptx] = folder.glob(f"{source.stem}*compute_90*.ptx")
    return messages, ptx.read_text()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("nvcc")


@needs_nvcc
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_no_spills(source, folder):
    messages, _ = compiled(source, folder)
    properties = re.findall(r"Function properties for (\S+)\n\s*(\d+) bytes stack frame, (\d+) bytes spill stores, "
                            r"(\d+) bytes spill loads", messages)
    fewest = 3 * 2 if source.stem == "in_backward_rows" else 10  # three kernels of two types
    assert len(properties) >= fewest * len(ARCHS), f"too few kernels were found:\n{messages}"
    kernels = set(re.findall(r"Compiling entry function '(\S+)'", messages))
    for name, frame, *spills in properties:
        if name in kernels or "pass_over" in name:
            assert spills == ["0", "0"], f"{demangled(name)}: spills {spills}"
            assert int(frame) <= FRAME or "step_kernel" in name, f"{demangled(name)}: frame {frame}"
        else:
            assert any(outlined in name for outlined in OUTLINED), f"{demangled(name)} is not inlined"


def kernel_text(ptx, name, types):
    """The PTX of the kernel that is called `name` and instantiated for `types` (a regular expression)."""
    title = re.compile(rf"\.entry void wn::cuda::{name}<.*{types}")
    entries = re.split(r"(?=\.entry )", demangled(ptx))[1:]
    found = [entry for entry in entries if title.match(entry.split("\n", 1)[0]) and "ret;" in entry]
    assert len(found) == 1, f"{len(found)} kernels {name} of {types}"
    return found[0]


@needs_nvcc
@pytest.mark.parametrize("dtype", ["float", "wn::bf16"])
@pytest.mark.parametrize("source, inputs", [("forward", 1), ("backward", 2)])
def test_packs_move_as_vectors(source, inputs, dtype, folder):
    """16 bytes per instruction, in the kernels of whole tensors of fp32 and bf16."""
    _, ptx = compiled(CUDA / f"{source}.cu", folder)
    types = rf"Types<{', '.join([dtype] * inputs)}>, wn::cuda::Types<{dtype}>"
    for kernel, store in [("row_kernel", "Registers"), ("row_kernel", "Memory"), ("column_kernel", "")]:
        text = kernel_text(ptx, kernel, f"{types}.*{store}")
        for access in ["ld", "st"]:
            assert re.search(rf"{access}\.global(\.wb)?\.v4\.[ubf]32", text), f"no vector {access} in {kernel} {store}"


@needs_nvcc
@pytest.mark.parametrize("source, formula", [("sgd", "PolarSgd"), ("adam", "PolarAdam")])
def test_packs_of_steps_move_as_vectors(source, formula, folder):
    """16 bytes per instruction, and 8 of a 16-bit gradient and copy."""
    _, ptx = compiled(CUDA / f"{source}.cu", folder)
    functions = re.split(r"(?=\.func )", demangled(ptx))[1:]
    for option in ["true", "false"]:
        title = re.compile(rf"\.func .*pass_over<.*{formula}<{option}, true>, float>")
        [text] = [text for text in functions if title.match(text.split("\n", 1)[0]) and "ret;" in text]
        for access in [r"ld\.global\.v4", r"ld\.global\.v2", r"st\.global\.wb\.v4", r"st\.global\.wb\.v2",
                       r"ld\.shared\.v4", r"st\.shared\.v4"]:
            assert re.search(rf"{access}\.[ubf]32", text), f"no {access}"


@needs_nvcc
def test_clusters_only_from_sm_90_on(folder):
    _, ptx = compiled(CUDA / "forward.cu", folder)
    assert "mapa" in ptx and "barrier.cluster" in ptx


def included(path):
    """The file and all of csrc that it includes."""
    names = re.findall(r'#\s*include\s*"([^"]+)"', path.read_text())
    files = [folder / name for name in names for folder in (CUDA, ROOT / "csrc") if (folder / name).exists()]
    return {path}.union(*map(included, files))


@pytest.mark.parametrize("path", sorted(set().union(*map(included, SOURCES))), ids=lambda path: path.name)
def test_no_header_of_torch(path):
    includes = re.findall(r'#\s*include\s*[<"]([^>"]+)', path.read_text())
    assert not [name for name in includes if re.match(r"(ATen|c10|torch)/", name)]
