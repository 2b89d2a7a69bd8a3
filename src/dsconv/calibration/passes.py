"""Forward passes of both networks over the images, as far as a layer needs them."""

from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dsconv.calibration.collect import Moments, as_rows, batched, count_places, inputs_at, outputs_at, places
from dsconv.calibration.layers import Pair, nonfinite_layer
from dsconv.data.inputs import Batch
from dsconv.errors import ModelError
from dsconv.evaluation.running import forward

Key = tuple[str, int, int]
"""Layer, batch and call."""


class Target(NamedTuple):
    """Target of a layer at some ``places``: float32 ``y (n, O)``; ``size`` is that of the whole output."""

    size: torch.Size
    places: Tensor
    y: Tensor


class _Stop(BaseException):
    """Ends a forward pass that has gone far enough. Not an Exception, so that no model handles it as an error."""


class Passes:
    """Both networks, and ``batches`` of images."""

    def __init__(self, qmodel: nn.Module, reference: nn.Module, batches: Sequence[Batch], positions: int, seed: int):
        self.qmodel, self.reference, self.batches = qmodel, reference, batches
        self.positions, self.seed = positions, seed

    def collect(self, pairs: Sequence[Pair], finish: Callable[[Pair, Moments], None], memory_bytes: int) -> None:
        """Collect the moments of each layer in turn; ``finish`` must calibrate it before the next one is collected.

        Outputs of the reference are kept for as many layers at a time as fit into ``memory_bytes``.
        """
        for group in self._groups(pairs, memory_bytes):
            self._collect(group, finish)

    def _groups(self, pairs: Sequence[Pair], memory_bytes: int) -> Iterator[list[Pair]]:
        group: list[Pair] = []
        used, images = 0, sum(map(len, self.batches))
        for pair in pairs:
            size = 4 * len(pair.layer.vqk) * images * sum(min(count, self.positions) for count in pair.outputs)
            if group and used + size > memory_bytes:
                yield group
                group, used = [], 0
            group.append(pair)
            used += size
        if group:
            yield group

    def _collect(self, group: list[Pair], finish: Callable[[Pair, Moments], None]) -> None:
        targets = self._targets(group)
        waiting = deque(group)
        calls: Counter[str] = Counter()
        moments: Moments | None = None
        seen = batch = 0
        failed: Pair | None = None

        def before(pair: Pair, x: Tensor) -> None:
            nonlocal moments, seen, failed
            if pair is not waiting[0]:
                return
            if batch != self._batch(pair, seen):
                raise _Stop
            moments = moments or Moments(as_rows(pair.layer, pair.weight))
            size, where, y = targets.pop((pair.name, batch, calls[pair.name]))
            calls[pair.name] += 1
            for read, part in inputs_at(pair.layer, batched(pair.layer, x), size, where):
                moments.add(read, y[part])
            if calls[pair.name] < len(pair.outputs):
                return
            seen += 1
            if seen < len(self.batches):
                raise _Stop
            if not moments.is_finite():
                failed = pair
                waiting.clear()
                raise _Stop
            finish(pair, moments)
            waiting.popleft()
            seen, moments = 0, None
            # The batch continues to the next layer, unless earlier calls of this layer ran with other weights.
            if not waiting or len(pair.outputs) > 1:
                raise _Stop

        def at(pair: Pair, x: Tensor) -> None:
            # The networks may run under autocast, but not the sums and solutions of a layer's moments.
            with torch.autocast(x.device.type, enabled=False):
                before(pair, x)

        with ExitStack() as hooks:
            for pair in group:
                hook = pair.layer.register_forward_pre_hook(lambda _, inputs, pair=pair: at(pair, inputs[0]))
                hooks.enter_context(hook)
            while waiting:
                batch = self._batch(waiting[0], seen)
                calls.clear()
                with suppress(_Stop):
                    forward("qmodel", self.qmodel, self.batches[batch])
                    raise ModelError(self._unsteady(waiting[0], "qmodel"))
        if failed is not None:
            raise ModelError(self._nonfinite(failed))

    def _batch(self, pair: Pair, seen: int) -> int:
        """Return the batch for ``pair`` after ``seen``: back and forth, so that the last one serves the next layer.

        The order depends on the layer only, wherever a calibration begins, because it affects the last digits of sums.
        """
        return seen if pair.index % 2 == 0 else len(self.batches) - 1 - seen

    def _targets(self, group: list[Pair]) -> dict[Key, Target]:
        found: dict[Key, Target] = {}
        # A seed per layer: the choice does not depend on which layers are already finished.
        seeds = {pair.name: (self.seed * 1_000_003 + pair.index) % 2**63 for pair in group}
        generators = {name: torch.Generator().manual_seed(seed) for name, seed in seeds.items()}
        calls: Counter[str] = Counter()
        batch = 0

        def after(pair: Pair, y: Tensor) -> None:
            y = batched(pair.layer, y)
            total = count_places(pair.layer, y)
            where = places(total, self.positions * len(self.batches[batch]), generators[pair.name]).to(y.device)
            found[pair.name, batch, calls[pair.name]] = Target(y.shape, where, outputs_at(pair.layer, y, where))
            calls[pair.name] += 1

        with ExitStack() as hooks:
            for pair in group:
                hook = pair.watched.register_forward_hook(lambda _, __, y, pair=pair: after(pair, y))
                hooks.enter_context(hook)
            for index, x in enumerate(self.batches):
                batch = index
                calls.clear()
                forward("reference", self.reference, x)
                for pair in group:
                    if calls[pair.name] != len(pair.outputs):
                        raise ModelError(self._unsteady(pair, "reference"))
        return found

    def _unsteady(self, pair: Pair, name: str) -> str:
        return f"layer {pair.name!r}: in {name}, it does not run as often for all images as for the first"

    def _nonfinite(self, pair: Pair) -> str:
        """Return where the NaN or infinities found at ``pair`` originate."""
        for name, model in (("reference", self.reference), ("qmodel", self.qmodel)):
            for x in self.batches:
                if (layer := nonfinite_layer(model, x)) is not None:
                    where = f"NaN or infinities first appear in layer {layer!r}"
                    return f"{name}: {where}: check its weights and the images"
        return f"layer {pair.name!r}: the squares of its inputs or outputs are too large for float32"
