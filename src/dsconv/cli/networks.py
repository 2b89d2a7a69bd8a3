"""Work on networks and images, which imports PyTorch."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import dsconv
from dsconv.cli.checks import is_quantized_file
from dsconv.cli.output import say, warn
from dsconv.errors import ConfigError, DataError, MissingExtraError, ModelError, usable_device
from dsconv.names import is_onnx

if TYPE_CHECKING:
    from torch import Tensor, nn

    from dsconv.config import QuantConfig
    from dsconv.data import ImageFolder, Preprocess
    from dsconv.data.inputs import Inputs
    from dsconv.evaluation.metric import Metric


def begin(threads: int | None = None, device: str = "cpu") -> None:
    """Import PyTorch, and let it use ``threads`` threads.

    Raises:
        ConfigError: the device does not exist.
    """
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    with usable_device(device):
        torch.empty(0, dtype=torch.float32, device=device)


def load_file(path: Path, model: str | None, reference: str | None = None) -> "nn.Module":
    """Return the quantized network of a file: loaded into ``model``, else as the file states, else ``reference``."""
    from dsconv import zoo

    if model:
        return dsconv.load(path, zoo.build(model, weights="random"))
    try:
        return dsconv.load(path)
    except (ModelError, MissingExtraError) as error:
        if reference:
            return dsconv.load(path, zoo.build(reference, weights="random"))
        if isinstance(error, MissingExtraError):
            raise
        raise ModelError(f"{error}; here, name it with --model") from None


def build(name: str, weights: str) -> "nn.Module":
    """Build the float model called ``name``, and print a message."""
    from dsconv import zoo

    say(f"building {name} with weights {weights}")
    return zoo.build(name, weights=weights)


def load_or_quantize(name: str, config: "QuantConfig", *, weights: str, model: str | None) -> "nn.Module":
    """Return the quantized network of a file, or of a float model of that name; print a message."""
    if is_quantized_file(name):
        say(f"loading {name}")
        return load_file(Path(name), model)
    made = build(name, weights)
    say("quantizing")
    return dsconv.quantize(made, config)


def metric_of(name: str | None) -> "Metric | None":
    """Return the function given by ``--metric``."""
    from dsconv import zoo

    return None if name is None else zoo.function_of("metric", name)[1]


def original_of(qmodel: "nn.Module", file: str) -> str:
    """Return the name of the float model from which a file's network was made, as stated in the file."""
    from dsconv.conversion import model_info

    info = model_info(qmodel)
    if info is None or info.architecture is None:
        raise ModelError(f"{file} does not name the float model it was made from: name it with --reference")
    if is_onnx(info.architecture) and not Path(info.architecture).is_file():
        raise ModelError(f"{file} was made from {info.architecture}, which does not exist: name it with --reference")
    return info.architecture


def read_images(data: Path, preprocess: "Preprocess", limit: int) -> "Tensor":
    """Return ``limit`` images of a folder, evenly spaced."""
    import torch

    from dsconv.data import batches

    source = batches(data, preprocess=preprocess, batch_size=limit, limit=limit)
    images = [images for images, _ in source if isinstance(images, torch.Tensor)]
    for broken in source.broken:
        warn(f"left out: {broken.path}: {broken.reason}")
    if not images:
        raise DataError(f"none of the first images of {data} can be read")
    return torch.cat(images)


def random_inputs(path: Path, size: list[int], count: int) -> "Inputs":
    """Return ``count`` random samples of an ONNX file's inputs: normally distributed floats, ones for integers.

    ``size``, from :func:`read_size`, sets the last free sizes of each tensor.

    Raises:
        DataError: a size is free and not set by ``size``; or PyTorch has no random numbers of the dtype of a tensor.
    """
    import numpy as np
    import torch

    from dsconv.data.inputs import Inputs
    from dsconv.onnx.importing.reading import input_types

    generator = torch.Generator().manual_seed(0)
    types = input_types(path)
    batch = next((shape[0] for _, shape in types.values() if shape), None)

    def tensor(name: str) -> torch.Tensor:
        dtype, shape = types[name]
        own = bool(shape) and shape[0] in ("", batch)  # a row for each sample
        remaining = list(size)
        sizes: list[int] = []
        for place, number in reversed(list(enumerate(shape))[own:]):
            if isinstance(number, str) and not remaining:
                raise DataError(
                    f"{path}: dimension {place} of its input {name!r} is free: give --size, or, if that cannot set "
                    "it, call dsconv.bench in Python on dsconv.Inputs"
                )
            sizes.insert(0, remaining.pop() if isinstance(number, str) else number)
        made = torch.randn([count] * own + sizes, generator=generator, dtype=torch.float32, device="cpu")
        try:
            kind = torch.from_numpy(np.empty(0, dtype)).dtype
        except TypeError:
            raise DataError(f"{path}: its input {name!r} has dtype {dtype}, which PyTorch does not support") from None
        return made if kind.is_floating_point else torch.ones_like(made, dtype=kind)

    return Inputs(*map(tensor, types))


def image_folder(data: Path, preprocess: "Preprocess", classes: list[str] | None) -> "ImageFolder":
    """Return the images of ``--data``, and print the order of its class folders."""
    from dsconv.data import ImageFolder

    folder = ImageFolder(data, preprocess, classes)
    if folder.order is not None:
        say(f"class folders {folder.order_in_words}")
    return folder


@contextmanager
def resumable(state: Path) -> Iterator[None]:
    """Print a message that the work can be resumed from ``state`` if the block is stopped."""
    try:
        yield
    except (KeyboardInterrupt, OSError, ConfigError):
        if state.exists():
            warn(f"stopped: progress is saved in {state}; run the same command with --resume to continue")
        raise
