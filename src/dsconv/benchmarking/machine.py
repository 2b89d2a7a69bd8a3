"""Description of the machine on which a measurement was made."""

import os
import platform
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from dsconv import ops
from dsconv.cpu import cores

_PACKAGES = ("dsconv", "torch", "onnx", "onnxruntime", "openvino", "mnn")
_CAPS = ("DSCONV_MAX_ISA", "ONEDNN_MAX_CPU_ISA")


def machine() -> dict[str, Any]:
    """Return processor, versions (None for packages that are not installed) and instruction sets, as plain data.

    ``caps`` are limits from the environment: ``DSCONV_MAX_ISA`` for dsconv, ``ONEDNN_MAX_CPU_ISA`` for oneDNN in
    PyTorch and OpenVINO. ONNX Runtime and MNN have none. ``load_average`` is the number of threads, of all processes,
    that were running or ready in the last minute; None if the system does not report it.

    >>> sorted(machine())
    ['caps', 'cores', 'isa', 'load_average', 'processor', 'python', 'system', 'versions']
    """
    return {
        "processor": processor(),
        "cores": cores(),
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {package: _version(package) for package in _PACKAGES},
        "isa": ops.isa(),
        "caps": {name: os.environ.get(name) for name in _CAPS},
    }


def machine_notes(machine: dict[str, Any]) -> Iterator[str]:
    """Yield the lines that describe the result of :func:`machine`."""
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items() if number)
    yield f"{machine['processor']}, {machine['cores']} cores, {machine['isa'] or 'no extension'}; {versions}."
    if machine["load_average"] is not None:
        yield f"Load average over the minute before: {machine['load_average']:.2f}."
    caps = {name: value for name, value in machine["caps"].items() if value}
    if caps:
        binds = {"DSCONV_MAX_ISA": "dsconv", "ONEDNN_MAX_CPU_ISA": "oneDNN in PyTorch and OpenVINO"}
        limits = ", ".join(f"{name}={value} ({binds[name]})" for name, value in caps.items())
        yield f"Capped: {limits}; ONNX Runtime and MNN have no cap."


def processor() -> str:
    """Return the name of the processor."""
    return ", ".join(sorted(_cpuinfo("model name"))) or platform.processor() or platform.machine()


def why_no_bf16() -> str:
    """Return why nothing is measured in bf16; an empty string if the processor supports it."""
    flags = {flag for line in _cpuinfo("flags") | _cpuinfo("Features") for flag in line.split()}
    if not {"avx512_bf16", "amx_bf16", "bf16"} & flags:
        return "the processor has no bf16"
    cap = os.environ.get("ONEDNN_MAX_CPU_ISA", "ALL").upper()
    with_bf16 = ("ALL", "DEFAULT", "AVX512_CORE_BF16", "AVX512_CORE_FP16", "AVX512_CORE_AMX", "AVX10")
    return "" if cap.startswith(with_bf16) else f"ONEDNN_MAX_CPU_ISA={cap} leaves no bf16"


def _cpuinfo(field: str) -> set[str]:
    """Return the values of a field of ``/proc/cpuinfo``, without duplicates."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return {line.partition(":")[2].strip() for line in lines if line.startswith(field)}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
