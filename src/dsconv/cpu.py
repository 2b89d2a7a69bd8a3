"""Capabilities of this processor, and which of them dsconv uses."""

from __future__ import annotations

import os
from dataclasses import dataclass

_PARALLEL = {"torch": "PyTorch's thread pool", "pool": "their own thread pool", "serial": "serial"}


@dataclass(frozen=True)
class CpuInfo:
    """Result of :func:`cpu_info`; ``print`` it for a table.

    Attributes:
        extension: ``None`` if the compiled extension ``dsconv._C`` is loaded, otherwise the reason why it is not.
        isa_found: instruction sets that the processor and the operating system support, weakest first: from ``scalar``,
            ``avx2``, ``avxvnni``, ``avx512vnni`` and ``amx``, or from ``scalar``, ``neon`` and ``neondotprod``. Empty
            without the extension, which detects them.
        isa_used: instruction set that the integer kernels use, or ``None`` without the extension: PyTorch then
            simulates the layers in float.
        isa_reason: reason for the choice of ``isa_used``.
        parallel: threading library of the integer kernels (``DSCONV_PARALLEL``), or ``None`` without the extension.
        torch_threads: number of threads that PyTorch uses within an operation.
    """

    extension: str | None
    isa_found: tuple[str, ...]
    isa_used: str | None
    isa_reason: str
    parallel: str | None
    torch_threads: int

    def __str__(self) -> str:
        rows = {
            "extension": "loaded" if self.extension is None else self.extension,
            "instruction sets found": ", ".join(self.isa_found) or "unknown without the extension",
            "instruction set used": f"{self.isa_used or 'none'}: {self.isa_reason}",
            "threads of the kernels": self.parallel or "none: there are no kernels",
            "PyTorch threads": str(self.torch_threads),
        }
        width = max(map(len, rows))
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())


def cores() -> int:
    """Return the number of logical processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_info() -> CpuInfo:
    """Return the capabilities of this processor and which of them dsconv uses.

    Raises:
        ConfigError: ``DSCONV_MAX_ISA`` or ``DSCONV_PARALLEL`` has an invalid value.

    Example:
        >>> info = cpu_info()
        >>> info.isa_used is None or info.isa_used in info.isa_found
        True
    """
    try:
        import dsconv._C as extension  # `from dsconv import _C` cannot distinguish an absent file from a broken one
    except ModuleNotFoundError:
        return _without_extension(
            "not built: no C++20 compiler or Python headers at installation, or DSCONV_NO_EXTENSION was set"
        )
    except ImportError as error:
        return _without_extension(f"built, but cannot be loaded: {error}")
    import torch

    from dsconv import ops, threads

    used, best = ops.isa(), extension.isa_with_kernels()[-1]
    return CpuInfo(
        extension=None,
        isa_found=tuple(extension.isa_found()),
        isa_used=used,
        isa_reason=(
            "the best of these that has kernels"
            if used == best
            else f"DSCONV_MAX_ISA={os.environ.get('DSCONV_MAX_ISA')} excludes {best}"
        ),
        parallel=_PARALLEL[threads.parallel()],
        torch_threads=torch.get_num_threads(),
    )


def _without_extension(why: str) -> CpuInfo:
    import torch

    reason = "layers run as a float simulation in PyTorch, slower than the float network"
    return CpuInfo(why, (), None, reason, None, torch.get_num_threads())
