"""Extension ``dsconv._C``, the instruction set that its kernels use, and their threads."""

import os
from functools import cache
from types import ModuleType

import torch

from dsconv.errors import ConfigError
from dsconv.threads import parallel, threads, torch_parallel_for


@cache
def extension() -> ModuleType | None:
    """Return ``dsconv._C``, initialized; None if it is not built."""
    try:
        import dsconv._C as module
    except ImportError:
        return None
    module.use_parallel_for(torch_parallel_for() if parallel() == "torch" else 0)
    return module


def use_threads() -> None:
    """Let the next tasks run on as many threads as PyTorch has."""
    module = extension()
    if module is not None:
        module.expect_threads(threads())
        if parallel() == "pool":
            module.use_pool(threads())


class KernelThreads:
    """Lets kernels use all of PyTorch's threads inside a :class:`dsconv.threads.PyTorchOnOneThread`."""

    def __enter__(self) -> None:
        use_threads()
        before, wanted = torch.get_num_threads(), threads()
        # New threads use the number set last by any thread, so it is set only if it differs.
        self._before = before if parallel() == "torch" and wanted != before else None
        if self._before is not None:
            torch.set_num_threads(wanted)

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            torch.set_num_threads(self._before)


def peak_rate(seconds: float) -> float:
    """Return the multiply-adds per second of one thread in dot products with all data in the L1 cache."""
    module = extension()
    assert module is not None
    rate: float = module.peak_rate(isa(), seconds)
    return rate


@cache
def isa() -> str | None:
    """Return the instruction set of convolutions: the best one with kernels, but none above ``DSCONV_MAX_ISA``.

    Raises:
        ConfigError: ``DSCONV_MAX_ISA`` is not the name of an instruction set.
    """
    known = ("scalar", "avx2", "avxvnni", "avx512vnni", "amx", "neon", "neondotprod")
    cap = os.environ.get("DSCONV_MAX_ISA")
    if cap is not None and cap not in known:
        raise ConfigError(f"DSCONV_MAX_ISA: expected one of {', '.join(known)}, got {cap!r}")
    module = extension()
    if module is None:
        return None
    usable = [name for name in module.isa_with_kernels() if cap is None or known.index(name) <= known.index(cap)]
    return usable[-1] if usable else None
