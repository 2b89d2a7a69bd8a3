"""Quantized layers of a network, paired with those of its float original."""

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dsconv.calibration.collect import count_places
from dsconv.conversion.fold import normalized_by
from dsconv.conversion.info import model_info
from dsconv.conversion.plain import plain_layer
from dsconv.data.inputs import Batch
from dsconv.data.inputs import tensors_of as inputs_in
from dsconv.errors import ModelError
from dsconv.evaluation.measures import Kinds, Output, tensors_of
from dsconv.evaluation.outputs import named_outputs, outputs_by_image
from dsconv.evaluation.running import forward
from dsconv.layers import Affine, DSLayer
from dsconv.layers.kinds import kind_of

# Maximum size of the covariance matrix of an output's input values.
_MOST_READ = 9216
_SHOWN = 5


@dataclass(eq=False)
class Pair:
    """Quantized layer and its float original.

    Attributes:
        name: name in both networks.
        layer, original: the two layers.
        watched: the module of the reference whose output ``layer`` should match: ``original``, or the BatchNorm that
            was folded into ``layer``, or the first module inside such a BatchNorm if it continues with others.
        weight: float32, the float weight of ``layer``, in the layout of VQK.
        outputs: number of output positions of one image, for each call.
        index: index among the layers to be calibrated, in the order of first calls.
        reason: why the layer is not calibrated, else None.
    """

    name: str
    layer: DSLayer
    original: nn.Module
    watched: nn.Module
    weight: Tensor
    outputs: list[int] = field(default_factory=list)
    index: int = 0
    reason: str | None = None


NAMES = "qmodel", "reference"


def pairs_of(qmodel: nn.Module, reference: nn.Module, names: tuple[str, str] = NAMES) -> list[Pair]:
    """Return every quantized layer with its namesake in ``reference``; ``names`` are those of the networks in errors.

    Raises:
        ModelError: there is none, or it is another layer.
    """
    info = model_info(qmodel)
    batchnorms = {layer: name for name, layer in info.folded.items()} if info is not None else {}
    modules = dict(reference.named_modules(remove_duplicate=False))
    pairs: list[Pair] = []
    wrong: list[str] = []
    for name, layer in qmodel.named_modules():
        if not isinstance(layer, DSLayer):
            continue
        original, watched = modules.get(name), modules.get(batchnorms.get(name, name))
        kind = kind_of(original)
        if original is None or kind is None or not isinstance(layer, kind):
            got = "none" if original is None else f"a {type(original).__name__}"
            wrong.append(f"layer {name!r} is a {type(layer).__name__}, and the reference has {got} there")
            continue
        if watched is None or (name in batchnorms and not isinstance(watched, _BatchNorm)):
            wrong.append(f"the reference has no BatchNorm {batchnorms[name]!r}, which is folded into layer {name!r}")
            continue
        plain = plain_layer(original, kind)
        shape = tuple(layer.vqk.shape)
        weight = None if plain.weight is None else layer.conv_layout(plain.weight).float()
        if weight is None or weight.shape != shape:
            found = plain.reason if weight is None else f"it is {tuple(weight.shape)} in the reference"
            wrong.append(f"layer {name!r} has a weight {shape}, but {found}")
            continue
        if isinstance(watched, _BatchNorm):
            weight = weight * Affine.from_batchnorm(watched).scale.float().view(-1, *[1] * (weight.dim() - 1))
            watched = normalized_by(watched)
        pairs.append(Pair(name, layer, original, watched, weight))
        if (reads := layer.vqk[:1].numel()) > _MOST_READ:
            pairs[-1].reason = f"each output reads {reads:,} values, more than {_MOST_READ:,}"
    if wrong:
        more = f"; and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise ModelError(
            f"{names[1]}: expected the float network that {names[0]} was made from, "
            f"but {'; '.join(wrong[:_SHOWN])}{more}"
        )
    return pairs


def choose_algorithms(pairs: Sequence[Pair], qmodel: nn.Module, images: Batch) -> None:
    """Let layers with the setting ``auto`` choose their algorithm again, based on ``images`` instead of noise."""
    info = model_info(qmodel)
    choosing: dict[nn.Module, Pair] = {}
    for pair in pairs:
        settings = info.config.layer(pair.name) if info is not None else None
        if settings is not None and settings.algorithm == "auto" and "winograd" in pair.layer.algorithms:
            choosing[pair.layer] = pair

    def choose(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if (pair := choosing.pop(layer, None)) is not None:
            x = inputs[0].float()
            pair.layer.choose_algorithm_(pair.weight, x if x.dim() == 4 else x.unsqueeze(0))

    with ExitStack() as hooks:
        for layer in choosing:
            hooks.enter_context(layer.register_forward_pre_hook(choose))
        forward(NAMES[0], qmodel, images)


def trace(
    pairs: Sequence[Pair], qmodel: nn.Module, reference: nn.Module, image: Batch, names: tuple[str, str] = NAMES
) -> tuple[list[Pair], int]:
    """Run both networks on one image.

    Returns:
        The pairs in the order in which their layers first run, with those that do not run last; and the size in bytes
        of the reference's largest activation.

    Raises:
        ModelError: they cannot run on the image, return different outputs, or call a layer a different number of times.
    """
    largest = [sum(tensor.nbytes for tensor in inputs_in(image))]
    # The order of qmodel, since a BatchNorm folded into a layer may run long after it in the reference.
    order: dict[str, Pair] = {}
    calls: Counter[str] = Counter()

    def note_sizes(output: Any) -> None:
        largest.extend(tensor.nbytes for tensor in named_outputs(output).values())

    def count(pair: Pair) -> None:
        order.setdefault(pair.name, pair)
        calls[pair.name] += 1

    with ExitStack() as hooks:
        for module in reference.modules():
            look = module.register_forward_hook(lambda _, __, y: note_sizes(y))
            hooks.enter_context(look)
        for pair in pairs:
            note = pair.watched.register_forward_hook(
                lambda _, __, y, pair=pair: pair.outputs.append(count_places(pair.layer, y))
            )
            hooks.enter_context(note)
            hooks.enter_context(pair.layer.register_forward_hook(lambda _, __, ___, pair=pair: count(pair)))
        f, q = (
            outputs_by_image(forward(name, model, image, Exception), len(image))
            for name, model in zip(reversed(names), (reference, qmodel), strict=True)
        )
    shapes = [[tuple(t.shape) for t in tensors_of(outputs)] for outputs in (f, q)]
    said = f"{names[1]}: for one image it returns tensors of shapes {shapes[0]}, but {names[0]} {shapes[1]}"
    if not _alike(f, q, len(image)):
        raise ModelError(said)
    if shapes[0] != shapes[1]:
        warnings.warn(
            f"{said}: networks are compared by their outputs, and an image whose shapes differ counts as wholly wrong: "
            "pass the part of the network before the step that selects a variable number of results",
            stacklevel=3,
        )
    for pair in pairs:
        if calls[pair.name] != len(pair.outputs):
            counts = f"{calls[pair.name]} times in {names[0]}, {len(pair.outputs)} times in {names[1]}"
            raise ModelError(f"layer {pair.name!r}: it runs {counts}: pass the float network that was quantized")
        if not pair.outputs:
            pair.reason = "forward does not call it"
    ordered = [*order.values(), *(pair for pair in pairs if pair.name not in order)]
    for index, pair in enumerate(pair for pair in ordered if pair.reason is None):
        pair.index = index
    return ordered, max(largest)


def _alike(f: Mapping[str, Output], q: Mapping[str, Output], images: int) -> bool:
    """Return whether two networks return the same shapes, or the same ranks if sizes may depend on the image."""
    if list(f) != list(q):
        return False
    compared = Tensor.dim if Kinds.told_by(f, images).task == "other" else Tensor.size
    return [compared(t) for t in tensors_of(f)] == [compared(t) for t in tensors_of(q)]


def nonfinite_layer(model: nn.Module, x: Batch) -> str | None:
    """Return the name of the first layer of ``model`` whose output for images ``x`` is not finite."""
    begun: list[str] = []

    def look(name: str, output: Any) -> None:
        if not begun and not all(bool(t.isfinite().all()) for t in named_outputs(output).values()):
            begun.append(name)

    with ExitStack() as hooks:
        for name, module in model.named_modules():
            if not list(module.children()):
                hooks.enter_context(module.register_forward_hook(lambda _, __, y, name=name: look(name, y)))
        forward("model", model, x)
    return begun[0] if begun else None
