"""Preprocessing of images, from options and networks, and the size of an image."""

import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import typer

from dsconv import strict_json
from dsconv.cli.checks import header_of, is_quantized_file
from dsconv.cli.output import say
from dsconv.errors import ConfigError, DataError
from dsconv.names import is_registered

if TYPE_CHECKING:
    from torch import nn

    from dsconv.data import Preprocess


def read_size(text: str | None) -> list[int]:
    """Return ``224``, ``224x320`` or ``1x28x28`` as ``[C, H, W]``, without values that are not given."""
    numbers = [int(number) for number in re.findall(r"\d+", text or "")]
    if text is not None and ("x".join(map(str, numbers)) != text or len(numbers) > 3 or 0 in numbers):
        raise typer.BadParameter(f"--size: expected PIXELS, HEIGHTxWIDTH or CHANNELSxHEIGHTxWIDTH, got {text!r}.")
    return numbers * 2 if len(numbers) == 1 else numbers


def check_one_size(size: str | None, *others: str | None) -> None:
    """Raise a usage error if ``--size`` is given together with ``--resize`` or ``--crop``."""
    if size and any(others):
        raise typer.BadParameter("choose one of --size and --resize, --crop.")


def read_preparation(options: Mapping[str, Any], *names: str | None, needed: bool = True) -> dict[str, Any]:
    """Return the preprocessing given by a command's options, as fields of :class:`Preprocess`.

    Args:
        options: options of the command, by name.
        names: quantized files and float models that may store a preprocessing; the first one that does is used.
        needed: whether images must be preprocessed.

    Raises:
        ConfigError: an option has an invalid value, or one that contradicts the first file.
        DataError: preprocessing is needed, and neither the options nor any of ``names`` state it.
    """
    from dsconv.data.preprocess import Preprocess, laid_over

    given = _given(options)
    sources = [name for name in names if name]
    known = next((said for name in sources if (said := _said(name)) is not None), None)
    if given:
        laid_over(known if isinstance(known, Preprocess) else None, given)
    elif needed and known is None and sources:
        raise unknown_preparation(sources[0])
    return given


def check_one_preparation(files: list[Path], given: dict[str, Any] | None) -> None:
    """Raise DataError if quantized files for the same images store different preprocessing."""
    from dsconv.data.preprocess import Preprocess, laid_over

    said = {str(file): known for file in files if isinstance(known := _said(str(file)), Preprocess)}
    prepared = {name: str(laid_over(known, given or {})) for name, known in said.items()}
    (first, expected), *others = prepared.items() if prepared else [("", "")]
    for name, got in others:
        if got != expected:
            raise DataError(
                f"{first} and {name} state different preprocessing of images ({expected}; {got}): give the options "
                "that apply to both, or evaluate each separately"
            )


def check_size(options: Mapping[str, Any], name: str, size: list[int] | None) -> None:
    """Raise DataError if neither the options nor a quantized file state the size of images."""
    from dsconv.data.preprocess import laid_over

    said, given = _said(name), _given(options)
    if said == "later" or size is None:
        return
    with suppress(ConfigError):  # which read_preparation raises
        image_shape(laid_over(said, given) if said or given else None, name, size)


def preparation_of(
    given: Mapping[str, Any], name: str, *networks: "nn.Module | None", size: list[int] | None = None
) -> "Preprocess":
    """Return the preprocessing of the first of ``networks`` that has one, overridden by what is ``given``.

    If ``size`` from :func:`read_size` is given, it replaces resize and crop.

    Raises:
        DataError: nothing is given, and no network has a preprocessing.
    """
    from dsconv import zoo
    from dsconv.data.preprocess import laid_over

    said = (zoo.preprocess_of(network) for network in networks if network is not None)
    own = next((found for found in said if found is not None), None)
    if own is None and not given:
        raise unknown_preparation(name)
    return laid_over(laid_over(own, given), {"resize": tuple(size[-2:]), "crop": None} if size else {})


def say_preparation(preprocess: "Preprocess", data: Path | None) -> None:
    """Print the preprocessing of images, or of the noise that replaces them."""
    say(f"{'noise' if data is None else f'images of {data}'}: {preprocess}")


def image_shape(preprocess: "Preprocess | None", name: str, size: list[int]) -> tuple[int, int, int]:
    """Return ``(C, H, W)`` of a network's input: from :func:`read_size`, otherwise from the preprocessing."""
    gray = size[:-2] == [1] or (preprocess is not None and preprocess.channels == "gray")
    pixels = size[-2:] or (preprocess and (preprocess.crop or preprocess.resize))
    if not isinstance(pixels, list | tuple):
        raise DataError(f"{name} does not state the size of its images: give --size")
    height, width = pixels
    return (size[:-2] or [1 if gray else 3])[0], height, width


def unknown_preparation(name: str) -> DataError:
    """Return the common error of all commands for a preprocessing that is needed but not stated."""
    return DataError(
        f"{name} does not state the preprocessing of its images: give --resize, --crop, --mean, --std, --scale or "
        "--channels as in its training; options left out keep their defaults"
    )


def _given(options: Mapping[str, Any]) -> dict[str, Any]:
    from dsconv.data import Preprocess

    return {n: _value(text) for n, text in options.items() if n in Preprocess.model_fields and text is not None}


def _said(name: str) -> "Preprocess | Literal['later'] | None":
    """Return the preprocessing stated by ``name``; ``later``: it is known once the network is built."""
    if not is_quantized_file(name) or not (header := header_of(Path(name))):
        return "later"
    if header["preprocess"] is not None:
        preprocess: Preprocess = header["preprocess"]
        return preprocess
    return "later" if header["architecture"] and is_registered(header["architecture"]) else None


def _value(text: str) -> Any:
    """Parse ``none``, a number, several as in ``0.5,0.5,0.5`` or ``224x320``, or a word; Preprocess validates it."""
    try:
        # A number may begin with a point, as in .5, which JSON does not allow.
        numbers = strict_json.loads(f"[{re.sub(r'(?<![0-9])[.](?=[0-9])', '0.', text).replace('x', ',')}]")
    except ValueError:
        return None if text == "none" else text
    return numbers[0] if len(numbers) == 1 else numbers
