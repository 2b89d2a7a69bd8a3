"""``dsconv.calibrate``: rounds the layers of a quantized network again, in execution order."""

import os
import time
import warnings
from collections.abc import Callable
from importlib import metadata

import torch
from torch import Tensor, nn

from dsconv.calibration.collect import Moments, as_rows, blocks_of, from_rows
from dsconv.calibration.held_back import Distance, chance, split
from dsconv.calibration.images import check_images, prepared_as, read_images
from dsconv.calibration.layers import NAMES, Pair, choose_algorithms, pairs_of, trace
from dsconv.calibration.passes import Passes
from dsconv.calibration.report import CalibratedLayer, Calibration
from dsconv.calibration.state import State
from dsconv.compilation import CompiledModel
from dsconv.conversion.copying import copied
from dsconv.conversion.functional import as_layers
from dsconv.conversion.info import info_of, note
from dsconv.conversion.preparation import set_preprocess
from dsconv.conversion.quantized import add_bias, quantized_layers
from dsconv.conversion.wrappers import unwrapped
from dsconv.data import Images, Preprocess
from dsconv.data.inputs import Inputs, in_batches
from dsconv.errors import ModelError, check_whole
from dsconv.evaluation.running import ready
from dsconv.files import as_path
from dsconv.modes import check_module
from dsconv.names import Task, check_task
from dsconv.numerics.rounding import regression_target, regularized, round_to
from dsconv.progress import progress_bar

# Number of positions per image that count as independent samples, since neighbouring pixels are similar.
_INDEPENDENT = 16
# Number of images used to choose the algorithm of layers.
_CHOOSING = 4
# Estimated number of copies of its largest activation that a network holds at a time.
_COPIES = 4


def calibrate(
    qmodel: nn.Module,
    reference: nn.Module,
    images: Images,
    *,
    preprocess: Preprocess | None = None,
    limit: int | None = 256,
    positions: int = 256,
    seed: int = 0,
    state: str | os.PathLike[str] | None = None,
    resume: bool = False,
    device: str | torch.device | None = None,
    memory_bytes: int = 4 << 30,
    any_range: bool = False,
    task: Task | None = None,
    progress: bool = False,
    on_layer: Callable[[CalibratedLayer], None] = lambda layer: None,
) -> nn.Module:
    """Return a copy of a quantized network with weights rounded so that its layer outputs match the float model.

    Layers are calibrated one after the other: the inputs of a layer are computed by the calibrated layers before it,
    and its outputs should match those of the float network. The weights that minimise the squared error are computed
    and rounded (:mod:`dsconv.numerics.rounding`), so that errors of earlier layers are corrected and do not accumulate.
    The bias corrects the mean output; layers without a bias get one. No labels are needed and there is no training. The
    settings of all layers are unchanged, as are layers in float; but if the config leaves the choice of the algorithm
    to the layers (``auto``), they choose again, based on their inputs for some images.

    An eighth of the images is held back, or more if there are few. If the calibrated network is further from the
    reference on these than the given one, by more than chance, the given network is returned, with a warning.

    Args:
        qmodel: from :func:`dsconv.quantize` or :func:`dsconv.load`, with BatchNorm folded or not. It is unchanged.
        reference: the float network that it was made from.
        images: 16 to 256 unlabelled images that are representative of the application, as in :func:`dsconv.evaluate`;
            they are kept in memory. Copies of an image are omitted, with a warning.
        preprocess: preprocessing of a folder; None uses the one stored with the networks. The result stores it.
        limit: maximum number of images: the first ones, or, from a folder, evenly spaced ones; None uses all.
        positions: mean number of positions per image at which the output of a layer is sampled.
        seed: seed of the choice of positions. The same arguments give the same result on the same machine.
        state: file written after each layer, so that a stopped calibration can be resumed.
        resume: continue from ``state``; the result is that of an uninterrupted calibration.
        device: device on which to run; None is the device of the networks.
        memory_bytes: approximate limit for the memory of the networks' activations. Images that exceed it pass through
            the network in several batches, again for each layer.
        any_range: accept images far outside the range that the network expects, with a warning.
        task: kind of the outputs, which selects the measure for comparing the networks, as in :func:`dsconv.evaluate`.
        progress: show the progress on stderr, as :func:`dsconv.evaluate` does.
        on_layer: called with the result for each layer as soon as it is finished.

    Returns:
        A model with the same classes, in the same training mode. ``model_info(result).calibration`` is the table of its
        layers, a :class:`Calibration`, which also states which network was kept.

    Raises:
        ConfigError: an argument is out of range; or ``state`` exists and ``resume`` is False, or the other way round.
        DataError: there are fewer than 4 different images, unusable ones, or images far outside the network's range.
        ModelError: the networks do not match, cannot run on the images, or compute a NaN.
        FileFormatError: ``state`` is damaged, or belongs to other networks, images or arguments.
        OSError: ``state`` cannot be written.

    >>> import dsconv
    >>> from dsconv.conversion import model_info
    >>> net, (images, _) = dsconv.zoo.build("dsconv/digits_resnet"), dsconv.demo.load_digits("unlabelled")
    >>> qnet = dsconv.quantize(net, dsconv.QuantConfig.preset("w4a4", weight_bits=3))
    >>> better = dsconv.calibrate(qnet, net, images[:128])
    >>> held_out, _ = dsconv.demo.load_digits("test")
    >>> plain, calibrated = (dsconv.compare(net, q, held_out).kl for q in (qnet, better))
    >>> calibrated < plain, model_info(better).calibration.images
    (True, 128)
    """
    for name, value, least in (("positions", positions, 1), ("seed", seed, 0), ("memory_bytes", memory_bytes, 1)):
        check_whole(name, value, least)
    qmodel, reference = unwrapped(qmodel), as_layers(reference)[0]
    check_models(qmodel, reference)
    check_task(task)
    saved = State(None if state is None else as_path(state, "state"), resume)
    x = read_images(images, preprocess, limit, qmodel, reference, progress=progress)
    with torch.inference_mode(False):
        result = copied(qmodel)
        if (prepared := prepared_as(images, preprocess, qmodel, reference)) is not None:
            set_preprocess(result, prepared)
        given = copied(result)
    fitted, held_back = split(len(x))
    with ready([result, reference], device), torch.inference_mode(False), torch.no_grad():
        pairs, largest = trace(pairs_of(result, reference), result, reference, x[:1])
        check_images(x, reference, result, any_range=any_range)
        choose_algorithms(pairs, result, x[fitted][:_CHOOSING])
        batch_size = min(len(x), max(1, memory_bytes // (_COPIES * largest)))
        if isinstance(x, Inputs) and x.of_images:
            batch_size = 1  # a model may call its layers once for each
        settings = [(pair.name, pair.layer.config.model_dump_json()) for pair in pairs]
        arguments = {"positions": positions, "seed": seed, "images at a time": batch_size, "settings": settings}
        arguments["dsconv version"] = metadata.version("dsconv")
        saved.open({"qmodel": qmodel, "reference": reference}, x, arguments)
        saved.check({pair.name: pair.layer for pair in pairs if pair.reason is None})
        distance = Distance(reference, in_batches(x[held_back], batch_size), task)
        before = distance.of(result)
        pending = [pair for pair in pairs if pair.name not in saved.done and pair.reason is None]
        done = len(pairs) - len(pending)
        with progress_bar(progress, "calibrate", len(pairs), "layers", done=done) as advance:

            def finish(pair: Pair, moments: Moments) -> None:
                record = _round(pair, moments, len(fitted))
                layer = pair.layer
                saved.add(record, vqk=layer.vqk, kds=layer.kds, kds_shift=layer.kds_shift, bias=layer.bias)
                advance(1)
                on_layer(record)

            for pair in pairs:
                if pair.name in saved.done:
                    _store(pair, **saved.tensors_of(pair.name))
            passes = Passes(result, reference, in_batches(x[fitted], batch_size), positions, seed)
            passes.collect(pending, finish, memory_bytes // 4)
        after = distance.of(result)
    records = [saved.done.get(pair.name, CalibratedLayer(pair.name, reason=pair.reason)) for pair in pairs]
    compared = float(before.mean()), float(after.mean()), chance(before, after)
    table = Calibration(tuple(records), len(x), seed, len(held_back), distance.measure, *compared)
    if table.kept == "given":
        warnings.warn(f"{table.verdict}: calibrate on more images that resemble those of the application", stacklevel=2)
        note(given, calibration=table)
        return given
    added = (p.name for p in pairs if p.reason is None and qmodel.get_submodule(p.name).bias is None)
    note(result, calibrated_on=len(x), biases=(*info_of(result).biases, *added), calibration=table)
    return result


def check_models(qmodel: nn.Module, reference: nn.Module, names: tuple[str, str] = NAMES) -> None:
    """Raise ModelError unless one is a quantized network that can be changed, and the other a network."""
    check_module(names[1], reference)
    if isinstance(qmodel, CompiledModel):
        raise ModelError(
            f"{names[0]}: expected a network that is not compiled: pass its .model, and compile the result"
        )
    quantized_layers(qmodel, names[0])


def _round(pair: Pair, moments: Moments, images: int) -> CalibratedLayer:
    """Set the integers, scales and bias of a layer according to its moments."""
    since = time.perf_counter()
    layer = pair.layer
    moments.finish()

    def error() -> float:
        bias = torch.zeros_like(moments.mean_r) if layer.bias is None else layer.bias.float().view_as(moments.mean_r)
        return moments.error(as_rows(layer, layer.conv_weight()), bias)

    before = error()
    # With one sample per unknown, the ridge equals the variance of the inputs.
    ridge = moments.w.shape[2] / min(moments.count, _INDEPENDENT * images)
    h = regularized(moments.h, ridge)
    target = regression_target(moments.w, h, moments.g)
    q, scale, shift = round_to(target, h, blocks_of(layer), layer.config.weight_bits, shift=layer.config.weight_shift)
    vqk = from_rows(layer, q, layer.vqk.shape).to(torch.int8)
    kds_shift = None if shift is None else from_rows(layer, shift, layer.kds.shape)
    _store(pair, vqk, from_rows(layer, scale, layer.kds.shape), kds_shift)
    assert layer.bias is not None
    layer.bias.copy_(moments.bias(as_rows(layer, layer.conv_weight())).flatten())
    return CalibratedLayer(pair.name, moments.count, before, error(), time.perf_counter() - since)


def _store(pair: Pair, vqk: Tensor, kds: Tensor, kds_shift: Tensor | None = None, bias: Tensor | None = None) -> None:
    layer, home = pair.layer, pair.layer.vqk.device
    shift = None if kds_shift is None else kds_shift.to(home, torch.float32)
    # The rounding error of a shift in float16 multiplies the sum of a block; the bias corrects its mean.
    layer.store_(vqk.to(home), kds.to(home, torch.float32), shift, pair.weight, keep_size=True)
    add_bias(layer, getattr(pair.original, "weight", None))
    if bias is not None:
        assert layer.bias is not None
        layer.bias.copy_(bias)
