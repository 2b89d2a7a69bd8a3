"""``dsconv.compare``: compares quantized networks with their float original."""

import math
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dsconv.conversion.preparation import preprocess_for
from dsconv.conversion.wrappers import unwrapped
from dsconv.data.folder import Images, Labels, batches
from dsconv.data.inputs import Batch
from dsconv.data.preprocess import Preprocess
from dsconv.errors import ModelError
from dsconv.evaluation.measures import Kinds, Output, Teller, distances, divergence, logits_of, powers
from dsconv.evaluation.metric import Metric, check_metric, measured, name_of
from dsconv.evaluation.outputs import check_same
from dsconv.evaluation.results import Closeness, Comparison, Evaluation
from dsconv.evaluation.running import ImagePass, ready, timed_outputs
from dsconv.evaluation.scores import Sums, closeness, of_output, score, total_of
from dsconv.layers import DSLayer
from dsconv.modes import check_module
from dsconv.names import OnInterrupt, Task
from dsconv.numerics import sqnr_db

Each = Callable[[Batch, Tensor | None, Tensor, tuple[Tensor, Tensor] | None], object]


def compare(
    reference: nn.Module,
    qmodel: nn.Module,
    images: Images,
    *,
    preprocess: Preprocess | None = None,
    batch_size: int = 32,
    workers: int = 0,
    device: str | torch.device | None = None,
    limit: int | None = None,
    progress: bool = False,
    on_interrupt: OnInterrupt = "raise",
    per_layer: bool = True,
    each: Each | None = None,
    task: Task | None = None,
    data_range: float | None = None,
    metric: Metric | None = None,
) -> Comparison:
    """Measure how close a quantized network stays to its float original on the same images; labels are not needed.

    Args:
        reference: the float network.
        qmodel: its quantized copy.
        per_layer: also compare the outputs of every DSConv layer. This keeps the reference's outputs of one batch in
            memory and adds to the measured times.
        each: called with every batch whose outputs have a distance: images; labels or None; the distance of each image,
            ``(N,)``, as divergence of logits, or as squared error relative to the mean of the batch; and the logits of
            both classifiers, the reference's first, float64 ``(N, classes)`` on the CPU, or None for other networks.
        metric: a function ``metric(reference_outputs, outputs, labels)`` of the outputs of both networks for a batch,
            and labels or None. It returns a distance, which is smaller for the closer network: a number for the batch,
            a tensor ``(N,)`` with one per image, or a dictionary of names to such values, whose first one counts.
        images, preprocess, batch_size, workers, device, limit, progress, on_interrupt, task, data_range: as in
            `evaluate`; the task is determined from the outputs of the reference.

    Raises:
        ConfigError, DataError: as in `evaluate`.
        ModelError: as in `evaluate`; or the two networks differ in outputs or layers; or the metric raised an error or
            returned a value that is not a finite number.

    >>> torch.manual_seed(0)  # doctest: +ELLIPSIS
    <torch._C.Generator object at ...>
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    >>> result = compare(model, model, torch.randn(4, 3, 8, 8))
    >>> result.agreement, result.kl, result.logit_sqnr_db
    (100.0, 0.0, inf)
    """
    (result,) = compare_each(
        reference,
        {"quantized model": qmodel},
        images,
        preprocess=preprocess,
        batch_size=batch_size,
        workers=workers,
        device=device,
        limit=limit,
        progress=progress,
        on_interrupt=on_interrupt,
        per_layer=per_layer,
        each=each,
        task=task,
        data_range=data_range,
        metric=metric,
    ).values()
    return result


def compare_each(
    reference: nn.Module,
    qmodels: Mapping[str, nn.Module],
    images: Images,
    *,
    preprocess: Preprocess | None = None,
    batch_size: int = 32,
    workers: int = 0,
    device: str | torch.device | None = None,
    limit: int | None = None,
    progress: bool = False,
    on_interrupt: OnInterrupt = "raise",
    per_layer: bool = True,
    each: Each | None = None,
    task: Task | None = None,
    data_range: float | None = None,
    metric: Metric | None = None,
) -> dict[str, Comparison]:
    """Return the results of `compare` for several quantized networks, by name, from one pass over the images."""
    reference, qmodels = unwrapped(reference), {name: unwrapped(qmodel) for name, qmodel in qmodels.items()}
    for name, network in {"reference": reference, **qmodels}.items():
        check_module(name, network)
    preprocess = preprocess_for(images, preprocess, *qmodels.values(), reference)
    source = batches(images, preprocess=preprocess, batch_size=batch_size, workers=workers, limit=limit)
    run = ImagePass("compare", source, progress, on_interrupt)
    teller = Teller("reference", task, data_range)
    check_metric(metric)
    seen = 0

    def step(x: Batch, labels: Labels | None) -> tuple[Sums, Kinds, dict[str, _Sums]]:
        nonlocal seen
        count = len(x)
        f_returned, f, f_seconds = timed_outputs("reference", reference, x)
        kinds = teller.kinds(f, count)
        f_score = score(f, kinds, count, labels, f_seconds, source.folder, data_range)
        found = {}
        for name, qmodel in qmodels.items():
            q_returned, q, q_seconds = timed_outputs(name, qmodel, x)
            check_same(f, q, ("the reference", f"the {name}"))
            if kinds.task == "classification":
                _check_logits(f, q, kinds, name)
            if each is not None and kinds.counted:
                logits = None
                if kinds.task == "classification":
                    logits = _main_logits(f, kinds), _main_logits(q, kinds)
                    far = divergence(*logits)
                else:
                    power = {key: total / count for key, total in powers(f, kinds).items()}
                    far = distances(f, q, count, kinds, power)
                each(x, labels if isinstance(labels, Tensor) else None, far, logits)
            q_score = score(q, kinds, count, labels, q_seconds, None, data_range)
            found[name] = _Sums(
                q_score,
                {key: closeness(f[key], q[key], kinds.of.get(key), count, data_range) for key in f},
                measured(metric, f_returned, q_returned, labels, count, seen, finite=not q_score["nonfinite"]),
                take_layer_errors[name](),
            )
        seen += count
        return f_score, kinds, found

    with ExitStack() as stack:
        stack.enter_context(ready([reference, *qmodels.values()], device))
        take_layer_errors = {
            name: stack.enter_context(_layer_errors(reference, qmodel, per_layer)) for name, qmodel in qmodels.items()
        }
        f_scores, (kinds, *_), steps = zip(*run.over(step), strict=True)
    expected = Evaluation(task=kinds.task, **run.figures(f_scores))
    measure = kinds.measure if metric is None else name_of(metric)
    return {name: _comparison(run, expected, kinds, measure, [found[name] for found in steps]) for name in qmodels}


class _Sums(NamedTuple):
    """Sums over a batch, or tuples of the sums over all batches."""

    score: Any
    outputs: Any
    metrics: Any
    layers: Any


def _check_logits(f: Mapping[str, Output], q: Mapping[str, Output], kinds: Kinds, name: str) -> None:
    """Raise ModelError if the networks have different numbers of classes."""
    for key in kinds.counted:
        a, b = f[key], q[key]
        if isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape != b.shape:
            shapes = f"{tuple(a.shape)} from the reference, {tuple(b.shape)} from the {name}"
            raise ModelError(f"The two networks return logits of different shapes: {shapes}.")


def _main_logits(outputs: Mapping[str, Output], kinds: Kinds) -> Tensor:
    main = outputs[kinds.main or ""]
    return logits_of(main if isinstance(main, Tensor) else torch.stack(main), "classification").double()


def _comparison(
    run: ImagePass, reference: Evaluation, kinds: Kinds, measure: str, steps: Iterable[_Sums]
) -> Comparison:
    sums = _Sums(*zip(*steps, strict=True))
    outputs = {
        name: of_output(total_of(batch[name] for batch in sums.outputs), kinds.of.get(name)) for name in sums.outputs[0]
    }
    figures = run.figures(sums.score)
    metrics = {name: total / figures["images"] for name, total in total_of(sums.metrics).items()}
    main = outputs.get(kinds.main or "", Closeness(kind="other", images=0))
    distance = sum(outputs[name].distance for name in kinds.counted) if kinds.counted else math.nan
    return Comparison(
        task=kinds.task,
        **figures,
        reference=reference,
        agreement=main.agreement,
        kl=main.kl,
        logit_sqnr_db=math.nan if main.sqnr_db is None else main.sqnr_db,
        layer_sqnr_db={name: sqnr_db(*sums.tolist()) for name, sums in total_of(sums.layers).items()},
        outputs=outputs,
        main=kinds.main,
        counted=kinds.counted,
        measure=measure,
        distance=next(iter(metrics.values()), distance),
        metrics=metrics,
    )


@contextmanager
def _layer_errors(reference: nn.Module, qmodel: nn.Module, wanted: bool) -> Iterator[Callable[[], dict[str, Tensor]]]:
    """Hook every DSConv layer of ``qmodel`` and its namesake in ``reference``.

    Yields a function that returns, by layer, the float64 pair (sum f^2, sum (f - q)^2) since its last call.
    """
    originals = dict(reference.named_modules(remove_duplicate=False))
    expected: defaultdict[str, deque[Tensor]] = defaultdict(deque)
    errors: dict[str, Tensor] = {}
    hooks = []

    def remember(name: str, output: Tensor) -> None:
        expected[name].append(output.clone())  # an in-place ReLU would overwrite it before the quantized layer runs

    def compare_outputs(name: str, q: Tensor) -> None:
        f = expected[name].popleft().to(q.device).float() if expected[name] else None
        if f is None or f.shape != q.shape:
            got = "does not run as often" if f is None else f"returns {tuple(f.shape)} instead of {tuple(q.shape)}"
            raise ModelError(
                f"The layer {name!r} of the reference {got} as in the quantized model; per_layer=False skips it."
            )
        noise = (f - q.float()).square_().sum(dtype=torch.float64)
        pair = torch.stack([f.square_().sum(dtype=torch.float64), noise]).cpu()
        errors[name] = errors[name] + pair if name in errors else pair

    def take() -> dict[str, Tensor]:
        if left := [name for name, outputs in expected.items() if outputs]:
            raise ModelError(f"The layer {left[0]!r} runs more often in the reference than in the quantized model.")
        taken = dict(errors)
        errors.clear()
        return taken

    try:
        for name, layer in qmodel.named_modules() if wanted else ():
            if isinstance(layer, DSLayer):
                if name not in originals:
                    raise ModelError(f"The reference has no layer {name!r}: pass the network that was quantized.")
                hooks.append(originals[name].register_forward_hook(lambda _, __, out, name=name: remember(name, out)))
                hooks.append(layer.register_forward_hook(lambda _, __, out, name=name: compare_outputs(name, out)))
        yield take
    finally:
        for hook in hooks:
            hook.remove()
