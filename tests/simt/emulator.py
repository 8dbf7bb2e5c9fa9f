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
STEPS = ["sgd", "sgd_momentum", "adam", "adam_amsgrad"]
STEP_KINDS = ["swn", "ewn", "unit"]
RETRACTIONS = ["project", "renormalize", "geodesic"]
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


def describe(formula, layout, kind, workspace, tensors):
    call = Call(FORMULAS.index(formula), KINDS.index(kind), *layout, workspace=workspace)
    for name, tensor in tensors.items():
        setattr(call, name, tensor.data_ptr())
        setattr(call, f"{name}_type", DTYPES.index(tensor.dtype))
    return call


class StepValue(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("value", ctypes.c_double), ("type", ctypes.c_int32), ("stride", ctypes.c_int32)]


class StepWeight(ctypes.Structure):
    _fields_ = ([(name, ctypes.c_int64) for name in ["outer", "rows", "inner"]]
                + [("inputs", ctypes.c_void_p * 5)]
                + [(name, ctypes.c_void_p) for name in ["copy", "radius", "norm", "telemetry"]]
                + [("row_state", ctypes.c_void_p * 3)])


class StepCall(ctypes.Structure):
    _fields_ = ([(name, ctypes.c_int32) for name in ["formula", "kind", "retraction", "weight_type", "gradient_type",
                                                     "count", "workspace", "maximize", "nesterov", "decoupled"]]
                + [(name, StepValue) for name in ["grad_scale", "lr", "radius_lr", "weight_decay", "radius_weight_decay",
                                                  "momentum", "gradient_weight", "beta1", "beta2", "eps", "step"]]
                + [("skip", ctypes.c_void_p), ("weights", ctypes.POINTER(StepWeight))])


IN_BACKWARD_STAGES = ["prepare", "fold", "finish"]


class InBackwardCall(ctypes.Structure):
    _fields_ = ([(name, ctypes.c_int32) for name in ["stage", "type", "kind", "keep_norm", "one_column", "known", "measured"]]
                + [(name, ctypes.c_int64) for name in ["batch", "rows", "width"]]
                + [(name, ctypes.c_double) for name in ["lr", "radius_lr", "weight_decay", "radius_weight_decay", "bias_lr",
                                                        "bias_weight_decay", "sign"]]
                + [(name, ctypes.c_void_p) for name in ["rho", "radius", "norm", "telemetry", "dy", "z", "of_x", "of_weight",
                                                        "weight", "scale", "bias", "scratch"]])


class Emulator:
    def __init__(self, library):
        self.library = ctypes.CDLL(str(library))
        self.library.simt_call.restype = ctypes.c_char_p
        self.library.simt_list.restype = ctypes.c_char_p
        self.library.simt_steps.restype = ctypes.c_char_p
        self.library.simt_in_backward.restype = ctypes.c_char_p
        self.library.simt_in_backward_scratch.restype = ctypes.c_int64
        self.library.simt_log.restype = ctypes.c_char_p
        self.library.simt_fault.restype = ctypes.c_char_p

    def device(self, multiprocessors=4, capability=90, shared_bytes=227 << 10, blocks=2**31 - 1):
        self.library.simt_device(multiprocessors, capability, ctypes.c_int64(shared_bytes), ctypes.c_int64(blocks))

    def seed(self, seed):
        self.library.simt_seed(ctypes.c_uint64(seed))

    def call(self, formula, layout, kind="swn", workspace=True, **tensors):
        """Runs a kernel on tensors v, gradient, out, radius, result; returns its launches, as dicts."""
        return self._run(self.library.simt_call, ctypes.byref(describe(formula, layout, kind, workspace, tensors)))

    def list(self, formula, problems):
        """Runs "forward" or "backward" of a list of (layout, kind, tensors) of the same types."""
        calls = [describe(formula, layout, kind, True, tensors) for layout, kind, tensors in problems]
        return self._run(self.library.simt_list, (Call * len(calls))(*calls), len(calls))

    def steps(self, formula, weights, gradient_type, kind="swn", retraction="project", skip=None, workspace=True,
              maximize=False, nesterov=False, decoupled=True, **values):
        """Runs polar steps on weights, dicts of layout, inputs, row_state (lists), radius, norm, telemetry, copy.

        Values are numbers, or tensors that the kernels read: of one element, or one for each row.
        """
        call = StepCall(STEPS.index(formula), STEP_KINDS.index(kind), RETRACTIONS.index(retraction),
                        DTYPES.index(weights[0]["inputs"][0].dtype), DTYPES.index(gradient_type), len(weights), workspace,
                        maximize, nesterov, decoupled)
        for name, value in {"grad_scale": 1.0, **values}.items():
            if isinstance(value, torch.Tensor):
                value = StepValue(value.data_ptr(), 0.0, DTYPES.index(value.dtype), int(value.numel() > 1))
            else:
                value = StepValue(None, value, 0, 0)
            setattr(call, name, value)
        call.skip = skip.data_ptr() if skip is not None else None
        table = (StepWeight * len(weights))()
        for entry, weight in zip(table, weights):
            entry.outer, entry.rows, entry.inner = weight["layout"]
            for target, name in [(entry.inputs, "inputs"), (entry.row_state, "row_state")]:
                for i, tensor in enumerate(weight.get(name, [])):
                    target[i] = tensor.data_ptr()
            for name in ["copy", "radius", "norm", "telemetry"]:
                if weight.get(name) is not None:
                    setattr(entry, name, weight[name].data_ptr())
        call.weights = table
        return self._run(self.library.simt_steps, ctypes.byref(call))

    def in_backward_scratch(self, batch, rows):
        """Bytes of scratch memory of a step inside the backward."""
        return self.library.simt_in_backward_scratch(ctypes.c_int64(batch), ctypes.c_int64(rows))

    def in_backward(self, stage, dy, weight, kind="swn", **values):
        """Runs a stage of a step inside the backward: numbers, flags and tensors by their names in call.h."""
        call = InBackwardCall(IN_BACKWARD_STAGES.index(stage), DTYPES.index(weight.dtype), STEP_KINDS.index(kind),
                              batch=len(dy), rows=len(weight), width=weight.shape[1], one_column=weight.shape[1] == 1)
        for name, value in {"dy": dy, "weight": weight, **values}.items():
            setattr(call, name, value.data_ptr() if isinstance(value, torch.Tensor) else value)
        return self._run(self.library.simt_in_backward, ctypes.byref(call))

    def _run(self, function, *arguments):
        self.library.simt_log()
        if error := function(*arguments).decode():
            raise RuntimeError(error)
        launches = []
        for line in self.library.simt_log().decode().splitlines():
            path, *numbers = line.split("; ")
            launches.append({"path": path} | {k: int(n) for k, n in (number.split() for number in numbers)})
        return launches

    def fault(self, number, out):
        return self.library.simt_fault(number, ctypes.c_void_p(out.data_ptr())).decode()
