"""What this processor can do, and what dsconv uses of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class CpuInfo:
    """What :func:`cpu_info` found; ``print`` it for a table.

    Attributes:
        extension: ``None`` where the compiled part ``dsconv._C`` is loaded, otherwise why it is not.
        isa_found: instruction sets of this processor that the operating system allows, weakest first: of ``scalar``,
            ``avx2``, ``avxvnni``, ``avx512vnni`` and ``amx``, or ``scalar``, ``neon`` and ``neondotprod``. Empty
            without the extension, which does the asking.
        isa_used: the instruction set that the integer convolutions use, or ``None`` where they are simulated in
            float by PyTorch.
        torch_threads: threads that PyTorch uses within an operation.
    """

    extension: str | None
    isa_found: tuple[str, ...]
    isa_used: str | None
    torch_threads: int

    def __str__(self) -> str:
        rows = {
            "extension": "loaded" if self.extension is None else self.extension,
            "instruction sets found": ", ".join(self.isa_found) or "unknown without the extension",
            "instruction set used": self.isa_used or "none: convolutions run as a float simulation in PyTorch",
            "PyTorch threads": str(self.torch_threads),
        }
        width = max(map(len, rows))
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())


def cpu_info() -> CpuInfo:
    """Tell what this processor offers and what dsconv uses of it.

    Layers do not use the integer kernels yet (:mod:`dsconv.ops.cpu`), so ``isa_used`` is ``None`` on every machine.

    Example:
        >>> info = cpu_info()
        >>> info.isa_used is None
        True
    """
    missing: str | None = None
    found: tuple[str, ...] = ()
    try:
        import dsconv._C as extension  # `from dsconv import _C` could not tell an absent file from a broken one
    except ModuleNotFoundError:
        missing = "not built: no C++20 compiler or Python headers at installation, or DSCONV_NO_EXTENSION was set"
    except ImportError as error:
        missing = f"built, but cannot be loaded: {error}"
    else:
        found = tuple(extension.isa_found())
    return CpuInfo(extension=missing, isa_found=found, isa_used=None, torch_threads=torch.get_num_threads())
