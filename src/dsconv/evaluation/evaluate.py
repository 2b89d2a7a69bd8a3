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
    """Measure accuracy and speed of a network: top-1 and top-5 accuracy of a classifier.

    If labels are class maps ``(N, H, W)``, the accuracy is the mean intersection over union of a segmentation network;
    if they are images ``(N, C, H, W)``, PSNR and SSIM of a network that produces images. For any other network, only
    the speed is measured, and whether the outputs are finite. The model runs in evaluation and inference mode; its
    training flags and device are restored.

    Args:
        model: returns tensors. The main output is the one called ``logits`` in a dictionary or dataclass, otherwise the
            first.
        images, batch_size, workers, limit: see `dsconv.data.batches`.
        preprocess: preprocessing of a folder; None uses the one stored with the model, as for models of `dsconv.zoo` or
            timm.
        device: device on which to run; None is the device of the model.
        progress: show the progress, its rate and the remaining time on stderr: as a bar in a terminal, otherwise as
            occasional lines.
        on_interrupt: effect of Ctrl-C: ``"raise"`` raises KeyboardInterrupt, ``"partial"`` returns the figures so far,
            if there are any.
        task: kind of the outputs, ``classification``, ``segmentation``, ``images`` or ``other``; None determines it
            from the shape of the main output: ``(N, classes)``; ``(N, classes, H, W)``; ``(N, 1, H, W)`` or
            ``(N, 3, H, W)``; any other.
        data_range: range of the pixel values, such as 1 or 255; None uses the range of each image, from minimum to
            maximum.

    Raises:
        ConfigError: an argument is out of range, or a device does not exist.
        DataError: there are no images, unusable ones, or labels that do not match the outputs.
        ModelError: the model cannot run on the images, returns no tensor, or returns different outputs from batch to
            batch.

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
