"""Builds csrc/cuda/*.cu for the emulator with g++, and calls the kernels on CPU tensors."""
import concurrent.futures
import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
FORMULAS = ["row_norm", "row_scale", "forward", "backward", "radius_backward"]
KINDS = ["swn", "ewn"]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SOURCES = ["simt.cpp", "call.cpp", "faults.cpp"]
SANITIZERS = ["-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


def compiler():
    return shlex.split(os.environ.get("CXX", "")) or [shutil.which("g++") or shutil.which("c++")]


def build(extra_flags=(), program=None):
    """The shared library of the present sources, or a program with them; the same files and flags are built once."""
    flags = ["-std=c++17", "-O1", "-fPIC", "-U_FORTIFY_SOURCE",  # its checks take a change of stack for an error
             "-Wall", "-Wextra", "-Wno-unknown-pragmas", *extra_flags, f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests/simt'}"]
    sources = sorted([*ROOT.glob("csrc/cuda/*.cu"), *(ROOT / "tests/simt" / name for name in SOURCES)])
    sources += [program] if program else []
    headers = sorted([*ROOT.glob("csrc/*.h"), *ROOT.glob("csrc/cuda/*.*h"), *ROOT.glob("tests/simt/*.h")])
    content = hashlib.sha256(shlex.join([*compiler(), *flags]).encode())
    for path in [*sources, *headers]:
        content.update(path.name.encode() + path.read_bytes())
    folder = ROOT / "build" / "simt"
    library = folder / f"{content.hexdigest()[:16]}.so"
    if library.exists():
        return library
    parts = folder / f"{library.stem}.{os.getpid()}"
    parts.mkdir(parents=True)

    def compile_one(source):
        part = parts / f"{source.name}.o"
        subprocess.run([*compiler(), *flags, "-x", "c++", "-c", source, "-o", part], check=True)
        return part

    with concurrent.futures.ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count()))) as pool:
        objects = list(pool.map(compile_one, sources))
    kind = [] if program else ["-shared"]
    subprocess.run([*compiler(), *flags, *kind, *objects, "-o", parts / library.name], check=True)
    os.replace(parts / library.name, library)
    shutil.rmtree(parts)
    return library


class Call(ctypes.Structure):
    _fields_ = ([(name, ctypes.c_int32) for name in ["formula", "kind"]]
                + [(name, ctypes.c_int64) for name in ["outer", "rows", "inner"]]
                + [(name, ctypes.c_void_p) for name in ["v", "gradient", "out", "radius", "result"]]
                + [(f"{name}_type", ctypes.c_int32) for name in ["v", "gradient", "out", "radius", "result"]]
                + [("workspace", ctypes.c_int32)])


class Emulator:
    def __init__(self, library):
        self.library = ctypes.CDLL(str(library))
        self.library.simt_call.restype = ctypes.c_char_p
        self.library.simt_log.restype = ctypes.c_char_p
        self.library.simt_fault.restype = ctypes.c_char_p

    def device(self, multiprocessors=4, capability=90, shared_bytes=227 << 10, blocks=2**31 - 1):
        self.library.simt_device(multiprocessors, capability, ctypes.c_int64(shared_bytes), ctypes.c_int64(blocks))

    def seed(self, seed):
        self.library.simt_seed(ctypes.c_uint64(seed))

    def call(self, formula, layout, kind="swn", workspace=True, **tensors):
        """Runs a kernel on tensors v, gradient, out, radius, result; returns its launches, as dicts."""
        call = Call(FORMULAS.index(formula), KINDS.index(kind), *layout, workspace=workspace)
        for name, tensor in tensors.items():
            setattr(call, name, tensor.data_ptr())
            setattr(call, f"{name}_type", DTYPES.index(tensor.dtype))
        self.library.simt_log()
        if error := self.library.simt_call(ctypes.byref(call)).decode():
            raise RuntimeError(error)
        launches = []
        for line in self.library.simt_log().decode().splitlines():
            path, *numbers = line.split("; ")
            launches.append({"path": path} | {k: int(n) for k, n in (number.split() for number in numbers)})
        return launches

    def fault(self, number, out):
        return self.library.simt_fault(number, ctypes.c_void_p(out.data_ptr())).decode()
