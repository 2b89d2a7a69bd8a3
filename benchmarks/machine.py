"""Description of the machine, which every benchmark prints."""

import platform
from importlib.metadata import version
from pathlib import Path

import torch

from dsconv.benchmarking.machine import processor


def kilobytes(field: str) -> int:
    """Return a size from ``/proc/self/status``: ``VmRSS``, or ``VmHWM``, the peak since :func:`reset_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def reset_peak() -> None:
    """Reset the peak of memory. Linux only."""
    Path("/proc/self/clear_refs").write_text("5")


def describe() -> str:
    """Return one line: processor, threads and versions."""
    return (
        f"{processor()}, {torch.get_num_threads()} threads, Python {platform.python_version()}, "
        f"PyTorch {torch.__version__}, dsconv {version('dsconv')}"
    )
