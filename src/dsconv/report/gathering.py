"""Measurements for a report on a quantized network: see :func:`gather`."""

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dsconv.benchmarking.profiling import Profile, profile
from dsconv.benchmarking.results import Bench
from dsconv.compilation import compile
from dsconv.conversion import ModelInfo, model_info, summary
from dsconv.conversion.functional import as_layers
from dsconv.conversion.quantized import check_original, quantized_layers
from dsconv.conversion.wrappers import unwrapped
from dsconv.data import Images, Preprocess, batches
from dsconv.data.folder import Batches
from dsconv.data.inputs import Batch
from dsconv.errors import ConfigError, ModelError
from dsconv.evaluation import Evaluation, compare, evaluate
from dsconv.evaluation.metric import Metric
from dsconv.mixed import sensitivity
from dsconv.modes import check_module, evaluation_mode
from dsconv.names import Task
from dsconv.report.contents import Layer, Report
from dsconv.report.disagreements import Worst
from dsconv.report.distribution import differ, of_weights
from dsconv.report.inputs import facts_of, sampled
from dsconv.tables import Printed
from dsconv.zoo import preprocess_of


def gather(
    qmodel: nn.Module,
    *,
    name: str | None = None,
    reference: nn.Module | None = None,
    images: Images | None = None,
    preprocess: Preprocess | None = None,
    classes: Sequence[str] = (),
    limit: int | None = None,
    batch_size: int = 32,
    workers: int = 0,
    sensitivity_images: int = 16,
    input_shape: Sequence[int] | None = None,
    runs: int = 20,
    benches: Sequence[Bench] = (),
    progress: bool = False,
    task: Task | None = None,
    data_range: float | None = None,
    metric: Metric | None = None,
    optimization: Printed | None = None,
) -> Report:
    """Measure the contents of a report on a quantized network. Unknown parts are None, with a reason in ``missing``.

    Args:
        qmodel: from :func:`dsconv.quantize` or :func:`dsconv.load`, on the CPU.
        name: name of the network; None uses its name in :func:`dsconv.zoo.build`, or its class.
        reference: the float network it was made from.
        images, preprocess, limit, batch_size, workers: as in :func:`dsconv.evaluate`; iterated more than once.
        classes: names of the classes, by index; by default those of a folder's class folders.
        sensitivity_images: number of images on which each layer is quantized alone; 0 omits this.
        input_shape: ``(C, H, W)`` of the image used for timing steps; None is that of ``images``.
        runs: number of timed runs, at least 2; 0 omits them.
        benches: from :func:`dsconv.bench` or :func:`dsconv.benchmarking.results.read_benches`.
        progress: show the progress on stderr, as :func:`dsconv.evaluate` does.
        task, data_range, metric: as in :func:`dsconv.compare`.
        optimization: what :func:`dsconv.optimize` returned with this network: the page shows its table of attempts.

    Raises:
        ConfigError, DataError, ModelError: as :func:`dsconv.compare` and :func:`dsconv.sensitivity`; or ``qmodel`` was
            not made from ``reference``.

    >>> import dsconv
    >>> net = dsconv.zoo.build("dsconv/digits_resnet")
    >>> report = gather(dsconv.quantize(net), reference=net, runs=0)
    >>> [layer.summary.name for layer in report.layers][:2], report.missing["outputs"]
    (['conv1', 'layer1.conv1'], 'Pass `--data DIR` (in Python `images=`).')
    """
    qmodel, reference = unwrapped(qmodel), None if reference is None else as_layers(reference)[0]
    if reference is not None:
        check_module("reference", reference)
    layers = quantized_layers(qmodel)
    if sensitivity_images < 0 or (runs < 2 and runs != 0):
        raise ConfigError(
            f"sensitivity_images, runs: expected at least 0, and 0 or at least 2, got {sensitivity_images}, {runs}"
        )
    info, known = model_info(qmodel), summary(qmodel)
    if reference is not None:
        modules = dict(reference.named_modules(remove_duplicate=False))
        for path, module in layers.items():
            check_original(path, module, modules.get(path))
    preprocess = preprocess or preprocess_of(qmodel) or (preprocess_of(reference) if reference else None)
    source = None
    if images is not None:
        by_path = isinstance(images, str | os.PathLike)
        sizes: dict[str, Any] = {"batch_size": batch_size, "workers": workers, "limit": limit}
        source = batches(images, preprocess=preprocess if by_path else None, **sizes)
    folder = None if source is None else source.folder
    missing, warnings = _missing(reference, source, info), list[str]()
    measured: dict[str, dict[str, Any]] = {row.name: {"summary": row} for row in known.layers if row.name in layers}

    if reference is not None and "weights" not in missing:
        for layer in layers:
            measured[layer]["weights"] = of_weights(reference.get_submodule(layer), layers[layer])
        differing = [layer for layer in layers if differ(measured[layer]["weights"], layers[layer])]
        if differing:
            warnings.append(
                f"This network was not made from the weights of the reference: {len(differing)} of "
                f"{len(layers)} layers differ, {differing[0]} first. Comparisons of the two networks are meaningless."
            )
    accuracy: Evaluation | None = None
    worst = Worst()
    if source is not None:
        with sampled(layers, reference) as samples:
            if reference is None:
                accuracy = evaluate(qmodel, source, progress=progress, task=task, data_range=data_range)
            else:
                outputs = "outputs" not in missing
                found = compare(
                    reference,
                    qmodel,
                    source,
                    progress=progress,
                    per_layer=outputs,
                    each=worst.add,
                    task=task,
                    data_range=data_range,
                    metric=metric,
                )
                for layer, value in found.layer_sqnr_db.items():
                    measured[layer]["output_sqnr_db"] = value
                accuracy = found
        for layer, sample in samples.items():
            measured[layer] |= facts_of(layers[layer], sample)
    if folder is not None:
        preprocess = folder.preprocess
    disagreements = worst.found(source.files if source else [], folder.path if folder else None, preprocess)

    tried, measure = 0, "KL divergence"
    if not sensitivity_images:
        missing.setdefault("sensitivity", "Pass `--sensitivity-images 16` (in Python `sensitivity_images=16`).")
    if reference is not None and source is not None and "sensitivity" not in missing:
        trials = sensitivity(
            reference,
            qmodel,
            images=folder or images,
            limit=sensitivity_images,
            batch_size=min(batch_size, sensitivity_images),
            progress=progress,
            task=task,
            metric=metric,
        )
        tried, measure = trials.images, trials.measure
        for trial in trials.trials:
            measured[trial.layer] |= {"kl": trial.kl, "distance": trial.distance}

    example = _random(input_shape) if source is None else next((x[:1] for x, _ in source), None)
    times = _profile(qmodel, example, runs)
    if isinstance(times, str):
        missing["time"] = times
    if not benches:
        missing["benches"] = "Pass `--bench FILE.json`, written by `dsconv bench --out` (in Python `benches=`)."
    return Report(
        name=name or _name(qmodel, info),
        reference=None if reference is None else _name(reference, info),
        images=str(folder.path) if folder else None,
        summary=known,
        config=None if info is None else info.config,
        layers=[Layer(**facts) for facts in measured.values()],
        preprocess=preprocess,
        accuracy=accuracy,
        task=task,
        sensitivity_images=tried,
        sensitivity_measure=measure,
        disagreements=disagreements,
        classes=classes or (folder and folder.classes) or (),
        optimization=optimization,
        profile=None if isinstance(times, str) else times,
        benches=benches,
        missing=missing,
        warnings=warnings,
    )


def _name(model: nn.Module, info: ModelInfo | None) -> str:
    known = getattr(model, "dsconv_architecture", None) or (info and info.architecture)
    return str(known or type(model).__name__)


def _missing(reference: nn.Module | None, source: Batches | None, info: ModelInfo | None) -> dict[str, str]:
    """Return, for each part without data, the argument needed to get it."""
    made_from = (info and info.architecture) or "MODEL"
    calls = {
        "reference": f"`--reference {made_from}` (in Python `reference=`)",
        "images": "`--data DIR` (in Python `images=`)",
    }
    have = {"reference": reference is not None, "images": source is not None}
    both = ("reference", "images")
    needs = {
        "weights": both[:1],
        "inputs": both[1:],
        "accuracy": both[1:],
        **dict.fromkeys(("closeness", "outputs", "sensitivity", "disagreements"), both),
    }
    missing = {}
    for part, wanted in needs.items():
        if lacking := [calls[name] for name in wanted if not have[name]]:
            missing[part] = f"Pass {' and '.join(lacking)}."
    if info is not None and (info.folded or info.affine):
        for part in ("weights", "outputs", "sensitivity"):
            missing[part] = (
                "BatchNorm is folded into the layers of this network, so that they compute something else than those "
                "of the float network: report on the network as dsconv quantize wrote it."
            )
    return missing


def _random(shape: Sequence[int] | None) -> Tensor | None:
    generator = torch.Generator().manual_seed(0)
    return None if shape is None else torch.randn(1, *shape, generator=generator, dtype=torch.float32, device="cpu")


def _profile(qmodel: nn.Module, example: Batch | None, runs: int) -> Profile | str:
    """Return the times of the steps, or why there are none."""
    if not runs:
        return "Pass `--runs 20` (in Python `runs=20`)."
    if example is None:
        return "The image size is unknown: pass `--size` or `--data DIR` (in Python `input_shape=` or `images=`)."
    try:
        with evaluation_mode([qmodel]):
            return profile(compile(qmodel, example), example, runs=runs)
    except ModelError as error:
        return f"The network cannot be compiled: {error}".replace("`", "'")
