"""A process of its own for Triton kernels: triton decides at its import whether to interpret."""

import os
import subprocess
import sys
from pathlib import Path

import torch


def run_apart(program: str) -> subprocess.CompletedProcess[str]:
    """Run a program, its kernels interpreted, or compiled where a GPU is."""
    environment = {**os.environ, "PYTHONPATH": "."}
    if not torch.cuda.is_available():
        environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-c", program], env=environment, text=True,
                          cwd=Path(__file__).parents[2], capture_output=True)
