"""``dsconv.compare``: how close quantized networks stay to their float original."""

import math
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from dsconv.conversion.preparation import preprocess_for
from dsconv.conversion.wrappers import unwrapped
from dsconv.data.folder import Images, batches
from dsconv.data.inputs import Batch
from dsconv.data.preprocess import Preprocess
from dsconv.errors import ModelError
from dsconv.evaluation.results import Comparison, Evaluation
from dsconv.evaluation.running import ImagePass, ready, timed_logits
from dsconv.evaluation.scores import Sums, closeness, score, total_of
from dsconv.layers import DSLayer
from dsconv.modes import check_module
from dsconv.names import OnInterrupt
from dsconv.numerics import sqnr_db


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
    each: Callable[[Batch, Tensor | None, Tensor, Tensor], object] | None = None,
) -> Comparison:
    """Measure how close a quantized network stays to its float original on the same images; labels are not needed.

    Args:
        reference: the float network.
        qmodel: its quantized copy.
        per_layer: compare the outputs of every DSConv layer as well. It keeps the reference's outputs of one batch in
            memory and adds to the measured times.
        each: called with every batch: images, labels or None, and the logits of both networks, the reference's first,
            float64 ``(N, classes)`` on the CPU.
        images, preprocess, batch_size, workers, device, limit, progress, on_interrupt: as in `evaluate`.

    Raises:
        ConfigError, DataError: as in `evaluate`.
        ModelError: as in `evaluate`; or the two networks differ in outputs or layers.

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
    each: Callable[[Batch, Tensor | None, Tensor, Tensor], object] | None = None,
) -> dict[str, Comparison]:
    """Return the results of `compare` for several quantized networks, by name, from one pass over the images."""
    reference, qmodels = unwrapped(reference), {name: unwrapped(qmodel) for name, qmodel in qmodels.items()}
    for name, network in {"reference": reference, **qmodels}.items():
        check_module(name, network)
    preprocess = preprocess_for(images, preprocess, *qmodels.values(), reference)
    source = batches(images, preprocess=preprocess, batch_size=batch_size, workers=workers, limit=limit)
    run = ImagePass("compare", source, progress, on_interrupt)

    def step(x: Batch, labels: Tensor | None) -> tuple[Sums, dict[str, tuple[Sums, Sums, dict[str, Tensor]]]]:
        f, f_seconds = timed_logits("reference", reference, x)
        f_score = score(f, labels, f_seconds, source.folder)
        found = {}
        for name, qmodel in qmodels.items():
            q, q_seconds = timed_logits(name, qmodel, x)
            if f.shape != q.shape:
                shapes = f"{tuple(f.shape)} from the reference, {tuple(q.shape)} from the {name}"
                raise ModelError(f"The two networks return logits of different shapes: {shapes}.")
            if each is not None:
                each(x, labels, f, q)
            found[name] = score(q, labels, q_seconds, None), closeness(f, q), take_layer_errors[name]()
        return f_score, found

    with ExitStack() as stack:
        stack.enter_context(ready([reference, *qmodels.values()], device))
        take_layer_errors = {
            name: stack.enter_context(_layer_errors(reference, qmodel, per_layer)) for name, qmodel in qmodels.items()
        }
        f_scores, steps = zip(*run.over(step), strict=True)
    expected = Evaluation(**run.figures(f_scores))
    return {name: _comparison(run, expected, [found[name] for found in steps]) for name in qmodels}


def _comparison(
    run: ImagePass, reference: Evaluation, steps: Iterable[tuple[Sums, Sums, dict[str, Tensor]]]
) -> Comparison:
    q_scores, closeness, layers = zip(*steps, strict=True)
    total = total_of(closeness)
    figures = run.figures(q_scores)
    return Comparison(
        **figures,
        reference=reference,
        agreement=100 * total["agreeing"] / figures["images"],
        kl=total["kl"] / total["finite"] if total["finite"] else math.nan,
        logit_sqnr_db=sqnr_db(total["signal"], total["noise"]) if total["finite"] else math.nan,
        layer_sqnr_db={name: sqnr_db(*sums.tolist()) for name, sums in total_of(layers).items()},
    )


@contextmanager
def _layer_errors(reference: nn.Module, qmodel: nn.Module, wanted: bool) -> Iterator[Callable[[], dict[str, Tensor]]]:
    """Hook every DSConv layer of ``qmodel`` and its namesake in ``reference``.

    Yields a function that returns, by layer, the float64 pair (sum f^2, sum (f - q)^2) since it was last called.
    """
    originals = dict(reference.named_modules(remove_duplicate=False))
    expected: defaultdict[str, deque[Tensor]] = defaultdict(deque)
    errors: dict[str, Tensor] = {}
    hooks = []

    def remember(name: str, output: Tensor) -> None:
        expected[name].append(output.clone())  # a ReLU in place would overwrite it before the quantized layer runs

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
                    raise ModelError(f"The reference has no layer {name!r}: give the network that was quantized.")
                hooks.append(originals[name].register_forward_hook(lambda _, __, out, name=name: remember(name, out)))
                hooks.append(layer.register_forward_hook(lambda _, __, out, name=name: compare_outputs(name, out)))
        yield take
    finally:
        for hook in hooks:
            hook.remove()
