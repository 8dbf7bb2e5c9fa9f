"""What was built, what this machine offers, and so which path a tensor takes: `python -m wnkernels info`."""

import ctypes
import platform
import re

import torch

from . import _C, __version__

BUILD = _C.build_info  # torch, compiler, cuda (nvcc's version or ""), cuda_reason, cuda_archs; all strings


def driver_version():
    """(major, minor) of the newest CUDA that the installed driver serves, None without a driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    number = ctypes.c_int()
    if driver.cuDriverGetVersion(ctypes.byref(number)) != 0:
        return None
    return number.value // 1000, number.value % 1000 // 10


def covers(archs, capability):
    """Does code compiled for `archs` ("8.0 9.0a 12.0+PTX") run on a device of this (major, minor) capability?"""
    for major, minor, specific, ptx in re.findall(r"(\d+)\.(\d)([af]?)(\+PTX)?", archs):
        compiled = int(major), int(minor)
        if capability == compiled:
            return True
        # Machine code runs on later minor versions of its generation, PTX on all later devices, 'a' nowhere else.
        if not specific and capability > compiled and (ptx or capability[0] == compiled[0]):
            return True
    return False


def cuda_obstacle(index=0):
    """Why our kernels cannot run on CUDA device `index`; None if they can."""
    if not BUILD["cuda"]:
        return f"built without CUDA: {BUILD['cuda_reason']}"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} has no CUDA"
    driver = driver_version()
    if driver is None:
        return "no NVIDIA driver"
    # The runtime linked into the extension runs on every driver of its generation or a later one.
    if driver[0] < int(BUILD["cuda"].split(".")[0]):
        return (f"built by nvcc {BUILD['cuda']}, but the driver serves CUDA {driver[0]}.{driver[1]}: "
                "update the driver, or rebuild with an nvcc of its generation")
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    if not covers(BUILD["cuda_archs"], torch.cuda.get_device_capability(index)):
        return "compiled for other architectures; set TORCH_CUDA_ARCH_LIST and rebuild"
    return None


def paths():
    """(device, path) of every kind of tensor that this process can hold."""
    yield "cpu", "kernel (needs nothing but the extension)"
    devices = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    for index, device in enumerate(devices or ["cuda"]):
        obstacle = cuda_obstacle(index)
        yield device, f"reference ({obstacle})" if obstacle else f"kernel ({torch.cuda.get_device_name(index)})"
    yield "others", "reference (there are kernels for cpu and cuda only)"


def facts():
    driver = driver_version()
    yield "wnkernels", __version__
    yield "python", platform.python_version()
    yield "torch", f"{torch.__version__} ({'CUDA ' + torch.version.cuda if torch.version.cuda else 'no CUDA'})"
    yield "built with", f"C++ compiler {BUILD['compiler']}, torch {BUILD['torch']}"
    yield "built CUDA", (f"by nvcc {BUILD['cuda']} for {BUILD['cuda_archs']} ({BUILD['cuda_reason']})"
                         if BUILD["cuda"] else f"no ({BUILD['cuda_reason']})")
    yield "driver", "none" if driver is None else f"serves CUDA {driver[0]}.{driver[1]}"
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        yield f"cuda:{index}", f"{torch.cuda.get_device_name(index)}, architecture {major}.{minor}"
    yield "cpu", f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"


def report():
    def table(rows):
        return [f"  {name:<11}{text}" for name, text in rows]

    return "\n".join([*table(facts()), "path of a tensor by device:", *table(paths())])
