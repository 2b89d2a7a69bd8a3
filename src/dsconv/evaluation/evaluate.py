"""``dsconv.evaluate``: accuracy and speed of one network."""

import torch
from torch import Tensor, nn

from dsconv.conversion.preparation import preprocess_for
from dsconv.data.folder import Images, batches
from dsconv.data.inputs import Batch
from dsconv.data.preprocess import Preprocess
from dsconv.evaluation.results import Evaluation
from dsconv.evaluation.running import ImagePass, ready, timed_logits
from dsconv.evaluation.scores import Sums, score
from dsconv.modes import check_module
from dsconv.names import OnInterrupt


def evaluate(
    model: nn.Module,
    images: Images,
    *,
    preprocess: Preprocess | None = None,
    batch_size: int = 32,
    workers: int = 0,
    device: str | torch.device | None = None,
    limit: int | None = None,
    progress: bool = False,
    on_interrupt: OnInterrupt = "raise",
) -> Evaluation:
    """Measure top-1, top-5 and speed of a classifier.

    The model runs in evaluation and inference mode and leaves with the training flags and the device it came with.

    Args:
        model: returns logits ``(N, classes)``: as a tensor, or as the field ``logits`` or the first one of its output.
        images, batch_size, workers, limit: see `dsconv.data.batches`.
        preprocess: how to read a folder; None is what the model says of itself, as one of `dsconv.zoo` or timm does.
        device: where to run; None is where the model is.
        progress: show the progress, its rate and the time left on stderr: as a bar in a terminal, else as a line now
            and then.
        on_interrupt: what Ctrl-C does: ``"raise"`` KeyboardInterrupt, or end with the figures so far (``"partial"``),
            if there are any.

    Raises:
        ConfigError: an argument out of range, or a device that is not there.
        DataError: no images, unusable ones, or labels that are not classes of the model.
        ModelError: the model cannot run on the images or does not return logits.

    >>> model = nn.Sequential(nn.Flatten(), nn.Identity())
    >>> images = torch.eye(8)[:, :, None, None]
    >>> result = evaluate(model, [(images, [0, 1, 2, 3, 4, 5, 6, 0])])
    >>> result.images, result.top1
    (8, 87.5)
    """
    check_module("model", model)
    preprocess = preprocess_for(images, preprocess, model)
    source = batches(images, preprocess=preprocess, batch_size=batch_size, workers=workers, limit=limit)
    run = ImagePass("evaluate", source, progress, on_interrupt)

    def step(x: Batch, labels: Tensor | None) -> Sums:
        logits, seconds = timed_logits("model", model, x)
        return score(logits, labels, seconds, source.folder)

    with ready([model], device):
        scores = run.over(step)
    return Evaluation(**run.figures(scores))
