"""Builds wnkernels._C: the C++ files by torch's BuildExtension, csrc/cuda/*.cu by nvcc without torch.

torch's own CUDAExtension wants a CUDA build of torch, of nvcc's version. No file here includes a CUDA header of torch,
so any nvcc goes with any torch, the CPU build included.

Environment: WNKERNELS_CUDA=auto|0|1, TORCH_CUDA_ARCH_LIST, MAX_JOBS, CUDA_HOME, CXX; NVCC_APPEND_FLAGS and NVCC_CCBIN
are read by nvcc itself.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

from setuptools import setup

ROOT = Path(__file__).resolve().parent
MIN_TORCH = (2, 11)  # native_handle() of a device-generic stream
DEFAULT_ARCHS = ("7.5", "8.0", "9.0", "10.0", "12.0")  # code for 8.0 runs on 8.6 and 8.9 too

# pip of a virtual environment that is not activated does not see the programs beside it; ninja is one.
os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", os.defpath), sysconfig.get_path("scripts")])


def stop(sentence):
    raise SystemExit(f"wnkernels: {sentence}")


try:
    import torch
except ImportError:
    stop("torch is not installed in this environment: install torch >= 2.11, then build with --no-build-isolation.")
if tuple(map(int, torch.__version__.split(".")[:2])) < MIN_TORCH:
    stop(f"torch {torch.__version__} is too old: wnkernels needs torch >= {'.'.join(map(str, MIN_TORCH))}.")

from torch.utils.cpp_extension import BuildExtension, CppExtension  # noqa: E402


class Cuda(NamedTuple):
    nvcc: str
    version: str
    libraries: str  # the folder of libcudart_static.a
    archs: list  # "9.0" or "9.0+PTX"


def find_nvcc():
    if home := os.environ.get("CUDA_HOME"):
        if nvcc := shutil.which("nvcc", path=Path(home, "bin")):
            return nvcc
        raise LookupError(f"there is no bin/nvcc in CUDA_HOME={home}")
    if nvcc := shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin"):
        return nvcc
    raise LookupError("nvcc is neither on the PATH nor in /usr/local/cuda/bin, and CUDA_HOME is not set")


def find_cuda():
    """The CUDA compiler to use; LookupError says what is missing."""
    nvcc = find_nvcc()

    def ask(*arguments):
        answer = subprocess.run([nvcc, *arguments], capture_output=True, text=True)
        if answer.returncode:
            raise LookupError(f"'{nvcc} {shlex.join(arguments)}' fails: {answer.stderr.strip()}")
        return answer.stdout + answer.stderr

    version = re.search(r"\bV([\d.]+)", ask("--version"))[1]
    known = re.findall(r"compute_(\d+)(\d)\b", ask("--list-gpu-arch"))
    # nvcc may be a wrapper far from its toolkit: its own link line knows where the libraries are.
    folders = [lib for lib in re.findall(r'"-L([^"]+)"', ask("--dryrun", "-x", "cu", os.devnull))
               if Path(lib, "libcudart_static.a").exists()]
    if not folders:
        raise LookupError(f"nvcc {version} ({nvcc}) comes without libcudart_static.a")
    return Cuda(nvcc, version, os.path.realpath(folders[0]), choose_archs(version, {".".join(arch) for arch in known}))


def choose_archs(nvcc_version, known):
    if not (wanted := re.split(r"[;,\s]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip())) or wanted == [""]:
        archs = [arch for arch in DEFAULT_ARCHS if arch in known]
        return archs[:-1] + [archs[-1] + "+PTX"]  # PTX of the newest, for what comes after it
    for arch in wanted:
        form = re.fullmatch(r"(\d+\.\d)[af]?(\+PTX)?", arch)
        if not form:
            stop(f"TORCH_CUDA_ARCH_LIST has '{arch}'; wnkernels takes numbers, as in '8.0 9.0a 10.0+PTX'.")
        if form[1] not in known:
            stop(f"TORCH_CUDA_ARCH_LIST has {arch}, which nvcc {nvcc_version} cannot compile for.")
    return wanted


def plan_cuda():
    """(Cuda or None, the reason): what WNKERNELS_CUDA and this machine lead to."""
    choice = os.environ.get("WNKERNELS_CUDA") or "auto"
    if choice not in ("auto", "0", "1"):
        stop(f"WNKERNELS_CUDA={choice} is not understood: it is auto (CUDA if nvcc is found), 0 or 1.")
    if choice == "0":
        return None, "WNKERNELS_CUDA=0"
    try:
        cuda = find_cuda()
    except LookupError as missing:
        if choice == "1":
            stop(f"WNKERNELS_CUDA=1, but {missing}.")
        return None, str(missing)
    return cuda, f"found {cuda.nvcc}" if choice == "auto" else "WNKERNELS_CUDA=1"


def check_tools():
    """What every compilation needs; afterwards CXX names the compiler for torch and setuptools alike."""
    cxx = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    if not cxx:
        stop("there is no C++ compiler: none of c++, g++, clang++ is on the PATH, and CXX is not set.")
    if not shutil.which(shlex.split(cxx)[0]):
        stop(f"there is no C++ compiler: CXX={cxx} cannot be found.")
    os.environ["CXX"] = cxx
    if not os.environ.setdefault("MAX_JOBS", str(len(os.sched_getaffinity(0)))).isdigit():
        stop(f"MAX_JOBS={os.environ['MAX_JOBS']} is not a number.")
    if not shutil.which("ninja"):
        stop("ninja is not installed: pip install ninja.")


def compile_cuda(cuda, folder):
    """Objects of csrc/cuda/*.cu, by ninja: parallel, and only what a changed file or command touches."""
    flags = ["-O3", "-std=c++17", f"-I{ROOT / 'csrc'}", "-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall"]
    for arch in cuda.archs:
        number = arch.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if arch.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    # nvcc reads the variable anyway; here it makes a change of it a changed command.
    appended = f"NVCC_APPEND_FLAGS={shlex.quote(os.environ.get('NVCC_APPEND_FLAGS', ''))}"
    command = f"{appended} {shlex.join([cuda.nvcc, *flags])}".replace("$", "$$")
    sources = sorted(ROOT.glob("csrc/cuda/*.cu"))
    objects = [folder / f"{source.stem}.o" for source in sources]

    def path(file):
        return re.sub(r"([$ :])", r"$\1", str(file))

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "build.ninja").write_text("\n".join([
        "rule nvcc",
        f"  command = {command} -MD -MF $out.d -c $in -o $out",
        "  description = nvcc $in",
        "  depfile = $out.d",
        "  deps = gcc",
        *(f"build {path(o)}: nvcc {path(s)}" for s, o in zip(sources, objects)),
        "",
    ]))
    # The files are few and unequal, so the architectures of a file share the jobs first. By the environment, because
    # another number of jobs is no reason to compile again.
    jobs = max(1, int(os.environ["MAX_JOBS"]))
    threads = min(jobs, len(cuda.archs))
    environment = os.environ | {"NVCC_PREPEND_FLAGS": f"--threads={threads} {os.environ.get('NVCC_PREPEND_FLAGS', '')}"}
    if subprocess.run(["ninja", "-C", folder, "-j", str(jobs // threads)], env=environment).returncode:
        stop("nvcc failed, its messages are above; WNKERNELS_CUDA=0 builds without CUDA.")
    return [str(o) for o in objects]


class Build(BuildExtension):
    def finalize_options(self):
        super().finalize_options()
        # An editable install would compile into a fresh temporary folder, everything, every time.
        self.build_temp = str(ROOT / "build" / f"temp.{sysconfig.get_platform()}-{sys.implementation.cache_tag}")

    def run(self):
        check_tools()
        super().run()

    def build_extensions(self):
        cuda, reason = plan_cuda()
        archs = " ".join(cuda.archs) if cuda else ""
        print(f"wnkernels: torch {torch.__version__}; "
              + (f"CUDA by nvcc {cuda.version} for {archs}" if cuda else "CPU only") + f" ({reason})", flush=True)
        [extension] = self.extensions
        for name, text in {
            "WN_BUILD_CUDA": cuda.version if cuda else "",
            "WN_BUILD_CUDA_REASON": reason,
            "WN_BUILD_CUDA_ARCHS": archs,
        }.items():
            extension.define_macros.append((name, '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'))
        if cuda:
            extension.define_macros.append(("WN_WITH_CUDA", "1"))
            extension.extra_objects += compile_cuda(cuda, Path(self.build_temp, "cuda"))
            extension.extra_link_args += [f"-L{cuda.libraries}", "-lcudart_static", "-ldl", "-lrt", "-lpthread",
                                          "-Wl,--exclude-libs,ALL"]
        super().build_extensions()


def relative(*patterns):
    return [str(path.relative_to(ROOT)) for pattern in patterns for path in sorted(ROOT.glob(pattern))]


setup(
    ext_modules=[CppExtension(
        "wnkernels._C",
        relative("csrc/*.cpp", "csrc/cpu/*.cpp"),
        include_dirs=[str(ROOT / "csrc")],
        depends=relative("csrc/**/*.h", "csrc/cuda/*.cu*"),
        # Without -fopenmp at::parallel_for is silently serial; contracted multiply-adds would make a result depend
        # on the instruction set, and on whether a step writes a rounded copy; errno keeps square roots from being
        # vectorized; -g0 undoes the -g that many Pythons pass, half of the compile time with torch's headers.
        extra_compile_args=["-O3", "-g0", "-fopenmp", "-ffp-contract=off", "-fno-math-errno", "-fvisibility=hidden",
                            "-Wall", "-Wextra"],
        extra_link_args=["-fopenmp"],
    )],
    cmdclass={"build_ext": Build},
)
