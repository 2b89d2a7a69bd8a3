"""``dsconv.evaluate``: accuracy and speed of one network."""

import torch
from torch import nn

from dsconv.conversion.preparation import preprocess_for
from dsconv.data.folder import Images, Labels, batches
from dsconv.data.inputs import Batch
from dsconv.data.preprocess import Preprocess
from dsconv.evaluation.measures import Teller
from dsconv.evaluation.results import Evaluation
from dsconv.evaluation.running import ImagePass, ready, timed_outputs
from dsconv.evaluation.scores import Sums, score
from dsconv.modes import check_module
from dsconv.names import OnInterrupt, Task


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
    task: Task | None = None,
    data_range: float | None = None,
) -> Evaluation:
    """Measure accuracy and speed of a network: top-1 and top-5 of a classifier.

    With maps of classes ``(N, H, W)`` as labels it is the mean intersection over union of a network that segments, with
    images ``(N, C, H, W)`` PSNR and SSIM of one that makes images. Of any other there is the speed, and whether its
    outputs are finite. The model runs in evaluation and inference mode and leaves with the training flags and the
    device it came with.

    Args:
        model: returns tensors. The main one is called ``logits``, in a dictionary or dataclass, or else is the first.
        images, batch_size, workers, limit: see `dsconv.data.batches`.
        preprocess: how to read a folder; None is what the model says of itself, as one of `dsconv.zoo` or timm does.
        device: where to run; None is where the model is.
        progress: show the progress, its rate and the time left on stderr: as a bar in a terminal, else as a line now
            and then.
        on_interrupt: what Ctrl-C does: ``"raise"`` KeyboardInterrupt, or end with the figures so far (``"partial"``),
            if there are any.
        task: kind of the outputs, ``classification``, ``segmentation``, ``images`` or ``other``; None is told by the
            shape of the main output: ``(N, classes)``; ``(N, classes, H, W)``; ``(N, 1, H, W)`` or ``(N, 3, H, W)``;
            any other.
        data_range: of the values of images, such as 1 or 255; None: of each image, from its least value to its largest.

    Raises:
        ConfigError: an argument out of range, or a device that is not there.
        DataError: no images, unusable ones, or labels that do not belong to the outputs.
        ModelError: the model cannot run on the images, returns no tensor, or other outputs from batch to batch.

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

    teller = Teller("model", task, data_range)

    def step(x: Batch, labels: Labels | None) -> Sums:
        _, outputs, seconds = timed_outputs("model", model, x)
        kinds = teller.kinds(outputs, len(x))
        return score(outputs, kinds, len(x), labels, seconds, source.folder, data_range)

    with ready([model], device):
        scores = run.over(step)
    return Evaluation(task=teller.task, **run.figures(scores))
