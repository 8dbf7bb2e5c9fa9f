"""The build's decisions and sentences, the source distribution, and `python -m wnkernels info`."""

import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

import pytest

import wnkernels
from wnkernels import _info

ROOT = Path(__file__).parents[1]
VARIABLES = ("WNKERNELS_CUDA", "TORCH_CUDA_ARCH_LIST", "MAX_JOBS", "CUDA_HOME", "CXX")


@pytest.fixture
def build(monkeypatch):
    """The names defined in setup.py, in an environment without the variables that it reads."""
    for name in VARIABLES:
        monkeypatch.setenv(name, "")  # so that what setup.py sets is undone, too
        monkeypatch.delenv(name)
    monkeypatch.setenv("PATH", os.environ["PATH"])  # setup.py changes it
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["setup.py", "--quiet", "--name"])
    return runpy.run_path("setup.py")


@pytest.fixture
def toolkit(tmp_path, monkeypatch, build):
    """A folder for CUDA_HOME whose nvcc, a shell script, knows the architectures it is given."""

    def make(*archs, libraries=True, works=True):
        lib = tmp_path / "lib"
        lib.mkdir()
        if libraries:
            (lib / "libcudart_static.a").touch()
        nvcc = tmp_path / "bin" / "nvcc"
        nvcc.parent.mkdir()
        known = " ".join(f"compute_{arch}" for arch in archs)
        nvcc.write_text(f"""#!/bin/sh
{'' if works else 'echo no license >&2; exit 1'}
case $1 in
  --version) echo "Cuda compilation tools, release 12.4, V12.4.99" ;;
  --list-gpu-arch) printf '%s\\n' {known} ;;
  --dryrun) echo '#$ LIBRARIES=  "-L{tmp_path}/stubs" "-L{lib}"' >&2 ;;
esac
""")
        nvcc.chmod(0o755)
        monkeypatch.setenv("CUDA_HOME", str(tmp_path))

    return make


def sentence(call):
    with pytest.raises(SystemExit) as stop:
        call()
    text = str(stop.value)
    assert text.startswith("wnkernels: ") and text.endswith(".") and "\n" not in text
    return text


def run_setup(folder, *arguments, **variables):
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES} | variables
    return subprocess.run([sys.executable, "setup.py", *arguments], cwd=folder, env=environment,
                          capture_output=True, text=True)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the source tree, for commands that write into it."""
    copy = tmp_path_factory.mktemp("source") / "wnkernels"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(
        ".git", ".venv", "build", "dist", "*.egg-info", "*.so", "__pycache__", ".pytest_cache", ".hypothesis"))
    return copy


# What stops a build


def test_wrong_switch(build, monkeypatch):
    monkeypatch.setenv("WNKERNELS_CUDA", "maybe")
    assert "WNKERNELS_CUDA=maybe is not understood" in sentence(build["plan_cuda"])


def test_cuda_wanted_without_nvcc(build, monkeypatch, tmp_path):
    monkeypatch.setenv("WNKERNELS_CUDA", "1")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert f"there is no bin/nvcc in CUDA_HOME={tmp_path}" in sentence(build["plan_cuda"])


def test_named_compiler_missing(build, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "CXX=no-such-compiler cannot be found" in sentence(build["check_tools"])


def test_ninja_missing(build, monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", sys.executable)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "ninja is not installed" in sentence(build["check_tools"])


def test_wrong_max_jobs(build, monkeypatch):
    monkeypatch.setenv("CXX", sys.executable)
    monkeypatch.setenv("MAX_JOBS", "many")
    assert "MAX_JOBS=many is not a number" in sentence(build["check_tools"])


@pytest.mark.parametrize("archs, problem", [("Ampere", "takes numbers"), ("8.0;7.0", "7.0, which nvcc 12.4.99 cannot")])
def test_wrong_architecture(build, toolkit, monkeypatch, archs, problem):
    toolkit(80, 90)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", archs)
    assert problem in sentence(build["plan_cuda"])


def test_no_compiler_without_traceback(tree, tmp_path):
    if shutil.which("c++", path=sysconfig.get_path("scripts")):
        pytest.skip("the compiler lies beside this Python")
    result = run_setup(tree, "build_ext", PATH=str(tmp_path))
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("wnkernels: there is no C++ compiler")
    assert "Traceback" not in result.stderr


def test_old_torch_without_traceback(tree, tmp_path):
    (tmp_path / "torch.py").write_text("__version__ = '2.4.1+cpu'\n")
    result = run_setup(tree, "build_ext", PYTHONPATH=str(tmp_path))
    assert result.returncode == 1
    assert result.stderr == "wnkernels: torch 2.4.1+cpu is too old: wnkernels needs torch >= 2.11.\n"


# What a build decides


def test_cuda_off(build, monkeypatch):
    monkeypatch.setenv("WNKERNELS_CUDA", "0")
    assert build["plan_cuda"]() == (None, "WNKERNELS_CUDA=0")


def test_auto_without_nvcc_says_why(build, monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert build["plan_cuda"]() == (None, f"there is no bin/nvcc in CUDA_HOME={tmp_path}")


def test_auto_without_cudart(build, toolkit):
    toolkit(80, 90, libraries=False)
    cuda, reason = build["plan_cuda"]()
    assert cuda is None and "without libcudart_static.a" in reason


def test_auto_with_broken_nvcc(build, toolkit):
    toolkit(80, 90, works=False)
    cuda, reason = build["plan_cuda"]()
    assert cuda is None and reason.endswith("nvcc --version' fails: no license")


def test_default_architectures_as_nvcc_allows(build, toolkit, tmp_path):
    toolkit(70, 75, 80, 86, 87, 89, 90)
    cuda, reason = build["plan_cuda"]()
    assert cuda.version == "12.4.99" and cuda.libraries == str(tmp_path / "lib")
    assert cuda.archs == ["7.5", "8.0", "9.0+PTX"]
    assert reason == f"found {tmp_path}/bin/nvcc"


def test_chosen_architectures(build, toolkit, monkeypatch):
    toolkit(80, 90, 100)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;9.0a 10.0+PTX")
    assert build["plan_cuda"]()[0].archs == ["8.0", "9.0a", "10.0+PTX"]


def test_cuda_is_built_where_nvcc_is(build):
    if _info.BUILD["cuda_reason"] == "WNKERNELS_CUDA=0":
        pytest.skip("this extension was built with WNKERNELS_CUDA=0")
    cuda, reason = build["plan_cuda"]()
    assert _info.BUILD["cuda"] == (cuda.version if cuda else ""), reason


# What a build makes


def test_source_distribution_is_complete(tree, tmp_path):
    result = run_setup(tree, "--quiet", "sdist", "--dist-dir", str(tmp_path))
    assert result.returncode == 0, result.stderr
    [archive] = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        packed = {name.partition("/")[2] for name in tar.getnames()}
    folders = ("csrc", "tests", "bench", "wnkernels", ".ci")
    wanted = {str(path.relative_to(tree)) for folder in folders for path in (tree / folder).rglob("*")
              if path.is_file() and "__pycache__" not in path.parts}
    wanted |= {"setup.py", "pyproject.toml", "Makefile", "requirements-dev.txt", "README.md", "LICENSE"}
    assert sorted(wanted - packed) == []
    assert not [name for name in packed if name.endswith((".o", ".so", ".pyc"))]


def test_extension_is_parallel():
    # Without -fopenmp at::parallel_for compiles and runs, in one thread.
    binary = Path(wnkernels._C.__file__).read_bytes()
    assert b"GOMP_parallel" in binary or b"__kmpc_fork_call" in binary


def test_one_openmp_runtime():
    maps = subprocess.run([sys.executable, "-c", "import wnkernels; print(open('/proc/self/maps').read())"],
                          cwd=ROOT, capture_output=True, text=True, check=True).stdout
    runtimes = set(re.findall(r"/\S*lib(?:gomp|iomp5|omp)\b\S*\.so\S*", maps))
    assert len(runtimes) == 1, runtimes


def test_no_upper_bounds_and_one_pin():
    project = (ROOT / "pyproject.toml").read_text()
    requirements = re.findall(r'"([A-Za-z][\w-]*(?:[<>=!~]=?[^"]*)?)"', project)
    assert "torch>=2.11" in requirements
    assert not [r for r in requirements if re.search(r"==|<|~=", r)]
    assert re.findall(r"^.*==.*$", (ROOT / "requirements-dev.txt").read_text(), re.M) == ["torch==2.13.0"]


def test_make_test_starts_from_nothing(tmp_path):
    assert "make test" in (ROOT / ".ci/run").read_text().splitlines()
    assert os.access(ROOT / ".ci/run", os.X_OK)
    plan = subprocess.run(["make", "-n", "test", f"VENV={tmp_path}/none"], cwd=ROOT, capture_output=True, text=True,
                          env={name: value for name, value in os.environ.items() if name != "MAKEFLAGS"})
    assert plan.returncode == 0, plan.stderr
    steps = ["-m venv", "-r requirements-dev.txt", "--no-build-isolation", "-m pytest"]
    assert [step for line in plan.stdout.splitlines() for step in steps if step in line] == steps


# python -m wnkernels


def run_module(*arguments):
    return subprocess.run([sys.executable, "-m", "wnkernels", *arguments], cwd=ROOT, capture_output=True, text=True)


def test_info():
    result = run_module("info")
    assert result.returncode == 0, result.stderr
    for fact in (wnkernels.__version__, _info.BUILD["compiler"], _info.BUILD["cuda_reason"], "threads"):
        assert fact in result.stdout
    assert re.search(r"^  cpu +kernel", result.stdout, re.M)
    assert re.search(r"^  cuda(:0)? +(kernel|reference) \(.+\)$", result.stdout, re.M)


@pytest.mark.parametrize("arguments", [(), ("info", "more")])
def test_usage(arguments):
    result = run_module(*arguments)
    assert (result.returncode, result.stdout, result.stderr) == (2, "", "usage: python -m wnkernels info | papers [--help]\n")


@pytest.mark.parametrize("archs, capability, runs", [
    ("8.0 9.0", (8, 0), True),
    ("8.0 9.0", (8, 6), True),  # the same generation, later
    ("8.6", (8, 0), False),
    ("8.0 9.0", (10, 0), False),
    ("8.0 9.0+PTX", (12, 0), True),
    ("9.0a", (9, 0), True),
    ("10.0a", (10, 3), False),
    ("7.5 12.0+PTX", (9, 0), False),
])
def test_architectures_cover_a_device(archs, capability, runs):
    assert _info.covers(archs, capability) == runs


@pytest.mark.parametrize("built, driver, obstacle", [
    ("", (13, 0), "built without CUDA"),
    ("13.0.88", None, "no NVIDIA driver"),
    ("13.0.88", (12, 8), "the driver serves CUDA 12.8"),
    ("12.4.99", (13, 0), None),
    ("13.2.1", (13, 0), None),
])
def test_what_keeps_a_cuda_tensor_from_our_kernels(monkeypatch, built, driver, obstacle):
    monkeypatch.setitem(_info.BUILD, "cuda", built)
    monkeypatch.setitem(_info.BUILD, "cuda_archs", "9.0")
    monkeypatch.setattr(_info.torch.version, "cuda", "13.0")
    monkeypatch.setattr(_info, "driver_version", lambda: driver)
    monkeypatch.setattr(_info.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(_info.torch.cuda, "get_device_capability", lambda index: (9, 0))
    found = _info.cuda_obstacle()
    assert found is None if obstacle is None else obstacle in found
