"""The CPU engine under AddressSanitizer and UndefinedBehaviorSanitizer."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
def test_no_invalid_access(tmp_path):
    library = Path(torch.__file__).parent
    program = tmp_path / "engine_test"
    subprocess.run(
        ["g++", "-std=c++20", "-O1", "-DWN_ONE_VERSION", "-fopenmp", "-ffp-contract=off", "-fsanitize=address,undefined",
         "-fno-sanitize-recover=all", f"-I{ROOT / 'csrc'}", "-isystem", library / "include",
         ROOT / "tests/cpu/engine_test.cpp", "-o", program,
         f"-L{library / 'lib'}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{library / 'lib'}"],
        check=True,
    )
    # torch's own start-up leaks a few blocks on purpose.
    run = subprocess.run([program], capture_output=True, text=True, env={"ASAN_OPTIONS": "detect_leaks=0"})
    assert run.returncode == 0 and "values checked" in run.stdout, run.stdout + run.stderr
