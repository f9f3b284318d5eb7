"""The Triton kernels, interpreted on the CPU in a process of their own, compiled where a GPU is."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("file", ("triton_cases.py", "triton_backward_cases.py"))
def test_triton_cases(file):
    # triton decides at import whether to interpret, and another test may have imported it already
    environment = dict(os.environ)
    if not torch.cuda.is_available():
        environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    cases = Path(__file__).with_name(file)
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", str(cases)]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and " skipped" not in done.stdout
