"""CUDA graphs of a network, one for each size of its input."""

import threading
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dsconv.backends.cuda import tuning

_KEPT = 8
# Otherwise tiles would be timed during another capture, and its memory counted twice.
_capturing = threading.Lock()


class _Captured(NamedTuple):
    graph: torch.cuda.CUDAGraph
    xs: list[Tensor]
    outputs: list[Any]
    done: torch.cuda.Event


class Graphs:
    """Runs a function of tensors repeatedly; its outputs belong to the caller.

    The first call for a size tries tiles and captures a graph, which the next calls replay; the 8 used last are kept. A
    function that cannot be captured, because PyTorch waits for the GPU in it or memory is short, is run directly. Calls
    from several threads wait for one another.
    """

    def __init__(self, run: Callable[[Sequence[Tensor]], list[Any]], alone: bool):
        self._run, self._alone = run, alone
        self._captured: dict[Any, _Captured | None] = {}
        self._lock = threading.Lock()

    def __call__(self, xs: Sequence[Tensor]) -> list[Any]:
        everywhere = all(x.is_cuda and x.numel() for x in xs)
        if not everywhere or torch.cuda.is_current_stream_capturing():
            return self._run(xs)
        key = tuple((x.device, x.shape, x.stride(), x.dtype) for x in xs)
        with self._lock, torch.cuda.device(xs[0].device):
            if key not in self._captured:
                with _capturing:
                    found = self._capture(xs)
                while len(self._captured) >= _KEPT:  # the capture has waited until none of them is being replayed
                    del self._captured[next(iter(self._captured))]
                self._captured[key] = found
            found = self._captured[key] = self._captured.pop(key)
            if found is None:
                return self._run(xs)
            stream = torch.cuda.current_stream()
            stream.wait_event(found.done)
            for held, x in zip(found.xs, xs, strict=True):
                held.copy_(x)
            found.graph.replay()
            outputs = [y.clone() if isinstance(y, Tensor) else y for y in found.outputs]
            found.done.record(stream)
        return outputs

    def _capture(self, xs: Sequence[Tensor]) -> _Captured | None:
        """Capture a graph; return None if that is not possible."""
        held = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(x) for x in xs]
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            if self._alone:  # PyTorch would use memory that no kernel has written
                with tuning.compiling():
                    self._run(held)
            with tuning.trying():
                self._run(held)
            self._run(held)  # all kernels are loaded then
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads may allocate memory meanwhile.
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                outputs = self._run(held)
        except RuntimeError as error:
            warnings.warn(
                f"a network cannot be captured as a CUDA graph for {tuple(xs[0].shape)}, and runs step by step, "
                f"which is slower: {str(error).splitlines()[0]}",
                stacklevel=2,
            )
            return None
        return _Captured(graph, held, outputs, torch.cuda.Event())  # type: ignore[no-untyped-call]
