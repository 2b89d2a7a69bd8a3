"""Choice of the tile of a convolution: a few are tried, and the fastest is kept for its sizes on this GPU.

Tiles are tried when a network is captured (:func:`trying`); elsewhere, a stored result or a guess is used. Results are
stored for the next process in ``tiles.json``, in the folder ``DSCONV_CACHE``, or in ``~/.cache/dsconv``.
"""

import json
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton

from dsconv.files import replacing


class Tile(NamedTuple):
    """Pixels and outputs of a program, its warps, loop stages, and maximum registers per thread (0: any)."""

    pixels: int
    outputs: int
    warps: int
    stages: int
    registers: int = 0


LARGE = (Tile(128, 64, 4, 3), Tile(64, 128, 4, 3), Tile(64, 64, 4, 3, 128), Tile(64, 64, 4, 3, 168))
SMALL = (Tile(16, 64, 2, 4), Tile(16, 64, 4, 3), Tile(32, 64, 2, 4), Tile(16, 64, 4, 5))
_FEW = 1 << 18  # number of outputs below which large tiles do not occupy a GPU


class Problem(NamedTuple):
    """Sizes of a convolution that determine its speed."""

    pixels: int
    outputs: int
    groups: int
    terms: int
    block: int
    quantized: int
    """Bytes of a block of the quantized result, 0 if there is none."""

    def tiles(self) -> list[Tile]:
        """Return the tiles to try, the most likely one first."""
        few = self.pixels * self.outputs * self.groups < _FEW * 4
        fit = [t for t in (SMALL if few else LARGE) if self.outputs % t.outputs == 0 and self.quantized <= t.outputs]
        if self.block > 128:  # whose tiles of inputs are large
            fit = [t._replace(stages=2) for t in fit if t.pixels <= 64] or fit
        return fit or [Tile(16, max(64, self.quantized), 4, 2)]


_found: dict[tuple[str, Problem], Tile] = {}


class _Mode(threading.local):
    """Mode of launches on this thread; other threads are not affected."""

    trying = False
    compiling = False


_mode = _Mode()


@contextmanager
def trying() -> Iterator[None]:
    """Try tiles for convolutions with new sizes within the block."""
    before, _mode.trying = _mode.trying, True
    known = len(_found)
    try:
        yield
    finally:
        _mode.trying = before
        if len(_found) > known:
            _save()


@contextmanager
def compiling() -> Iterator[None]:
    """Compile kernels in parallel within the block instead of launching them, with every tile that may be tried."""
    mode = getattr(triton, "AsyncCompileMode", None)
    if mode is None:  # an older Triton: kernels are compiled one by one when they are launched
        yield
        return
    _mode.compiling = True
    try:
        with ThreadPoolExecutor() as executor, mode(executor, ignore_errors=True):
            yield
    finally:
        _mode.compiling = False


def start(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Launch a kernel."""
    constants["enable_fp_fusion"] = False
    if _mode.compiling:
        kernel.warmup(*arguments, grid=grid, **constants)
    else:
        kernel[grid](*arguments, **constants)


def run(
    kernel: Any, problem: Problem, arguments: tuple[Any, ...], constants: dict[str, Any], live_outputs: int
) -> None:
    """Launch a convolution."""
    tiles = problem.tiles()
    tile = tiles[0]

    def launch(tile: Tile) -> None:
        registers = {"maxnreg": tile.registers} if tile.registers and torch.version.hip is None else {}
        grid = (triton.cdiv(problem.pixels, tile.pixels) * (problem.outputs * problem.groups // tile.outputs),)
        start(
            kernel, grid, *arguments, **constants, RAGGED=live_outputs % tile.outputs != 0, TILE_P=tile.pixels,
            TILE_O=tile.outputs, STAGES=tile.stages, num_warps=tile.warps, num_stages=tile.stages, **registers,
        )  # fmt: skip

    if arguments[0].is_cuda and len(tiles) > 1:
        key = (_device(arguments[0].device), problem)
        _load()
        if key not in _found and _mode.compiling:
            for each in tiles:
                launch(each)
            return
        if key not in _found and _mode.trying and not torch.cuda.is_current_stream_capturing():
            times = {each: _time(launch, each) for each in tiles}
            _found[key] = min(tiles, key=lambda t: times[t])
        tile = _found.get(key, tile)
    launch(tile)


def _time(launch: Callable[[Tile], None], tile: Tile) -> float:
    """Return the median time of a launch in milliseconds; infinite if it does not fit the GPU."""
    try:
        launch(tile)
    except triton.runtime.errors.OutOfResources:
        return float("inf")
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"):
        for _ in range(8):
            launch(tile)
    times = []
    for _ in range(5):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return float(sorted(times)[2])


@cache
def _device(device: torch.device) -> str:
    """Return the name of a GPU and the version of Triton, on which the speed of kernels depends."""
    return f"{torch.cuda.get_device_name(device)}, Triton {triton.__version__}"


def _path() -> Path:
    return Path(os.environ.get("DSCONV_CACHE") or Path.home() / ".cache" / "dsconv") / "tiles.json"


@cache
def _load() -> None:
    try:
        for device, problem, tile in json.loads(_path().read_text(encoding="utf-8")):
            _found.setdefault((device, Problem(*problem)), Tile(*tile))
    except (OSError, ValueError, TypeError):
        return  # missing, or of another version: tiles are tried again


def _save() -> None:
    _load.__wrapped__()  # results of other processes
    rows = [[device, list(problem), list(tile)] for (device, problem), tile in sorted(_found.items())]
    try:
        _path().parent.mkdir(parents=True, exist_ok=True)
        with replacing(_path()) as beside:
            beside.write_text(json.dumps(rows), encoding="utf-8")
    except OSError:
        return  # they are tried again in the next process
