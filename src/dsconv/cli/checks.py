"""Checks of arguments that need no network, for ``Mistakes.check``."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

import dsconv
from dsconv.cli.mistakes import one_paragraph
from dsconv.errors import ConfigError, DataError, ModelError, check_extra, import_extra
from dsconv.files import check_place
from dsconv.names import check_model_name, check_not_compiled, is_onnx, is_registered

if TYPE_CHECKING:
    from dsconv.config import QuantConfig


def is_quantized_file(name: str) -> bool:
    """Return whether an argument is a file from ``dsconv quantize``, or a folder with one, rather than a model."""
    path = Path(name)
    if is_onnx(name):
        return False
    return path.suffix == ".safetensors" or path.is_file() or (path / "model.safetensors").is_file()


def check_there(path: Path) -> None:
    """Raise an error if there is no file of a quantized network, and no folder that may contain one."""
    if not path.is_file() and not path.is_dir():  # reading a pipe would block
        raise FileNotFoundError(f"{path}: expected a file written by dsconv, there is none")
    check_not_compiled(path)


def check_file(path: Path, *models: str | None) -> None:
    """Raise an error for an invalid quantized file, as far as its header shows; ``models`` are to load it into."""
    check_there(path)
    header = header_of(path)
    architecture = header.get("architecture")
    if header.get("described") and not any(models):
        return
    if header and not any(models) and not (architecture and is_registered(architecture)):
        raise ModelError(
            f"{path}: does not state how to build its float model, a {header['model_class']}: "
            "name it with --model, as path/to/file.py:factory or path/to/model.onnx"
        )
    for name in models if any(models) else [architecture]:
        if name:
            check_model_name(name)


def check_source(name: str, *models: str | None) -> None:
    """Raise an error for an invalid argument that is a quantized file or a float model."""
    check_file(Path(name), *models) if is_quantized_file(name) else check_model_name(name)


def check_goes_with_file(name: str, *models: str | None) -> None:
    """Raise a usage error if ``--reference`` or ``--model`` is given with a float model."""
    if any(models) and not is_quantized_file(name):
        raise typer.BadParameter("--reference and --model go with a quantized FILE, not with a float model.")


def check_own_settings(names: Iterable[str], preset: str, config: Path | None, weights: str | None = None) -> None:
    """Raise a usage error if settings, or weights, are given and ``names`` are all quantized files."""
    if (preset, config, weights or "default") != ("default", None, "default") and all(map(is_quantized_file, names)):
        options = "--preset and --config" if weights is None else "--preset, --config and --weights"
        raise typer.BadParameter(f"a quantized FILE has its own settings: {options} go with a float model.")


def check_own_weights(name: str, reference: str | None, weights: str) -> None:
    """Raise a usage error if weights are given for a quantized file without ``--reference``."""
    if weights != "default" and not reference and is_quantized_file(name):
        raise typer.BadParameter("a quantized FILE has its own weights: --weights are those of --reference.")


def check_data(path: Path | None) -> None:
    """Raise DataError if a folder of images does not exist."""
    if path is not None and not path.is_dir():
        what = "is a file, not a folder" if path.exists() else "does not exist"
        raise DataError(f"--data: the image folder {path} {what}")


def check_out(force: bool, **paths: Path | None) -> None:
    """Raise an error if a command cannot write its files, which are given by the names of their options."""
    wrong: list[str] = []
    seen: dict[Path, str] = {}
    for option, path in paths.items():
        if path is None:
            continue
        if (same := seen.setdefault(path.absolute(), option)) != option:
            wrong.append(f"{path}: --{same} and --{option} are one file: choose another for one of them")
            continue
        try:
            check_place(path)
        except OSError as error:
            wrong.append(one_paragraph(error))
            continue
        if path.exists() and not force:
            wrong.append(f"{path}: the file exists: add --force to replace it, or choose another")
    if wrong:
        raise OSError("; ".join(wrong))


def check_plot(plot: Path | None) -> None:
    """Raise an error for an unsupported format of a picture, or if the package for drawing it is missing."""
    if plot is None:
        return
    known = import_extra("report", "matplotlib.figure").Figure().canvas.get_supported_filetypes()
    if plot.suffix[1:] not in known:
        raise typer.BadParameter(
            f"--plot: expected a name that ends in one of .{', .'.join(known)}, got {plot.name!r}."
        )


def check_extras(extra: str, *packages: str) -> None:
    """Raise MissingExtraError if one of the packages that ``extra`` installs is missing."""
    for package in packages:
        check_extra(extra, package)


def state_beside(out: Path, resume: bool, work: str) -> Path:
    """Return the file for resuming ``work``; check that it exists if, and only if, ``resume`` is set."""
    state = out.with_name(f"{out.name}.state")
    if state.exists() != resume:
        there, todo = ("no", "leave out --resume") if resume else ("a", f"add --resume, or delete {state}")
        raise ConfigError(f"{state}: there is {there} {work} to resume: {todo}")
    return state


def read_classes(path: Path | None) -> list[str] | None:
    """Return the names in a file, one per line; None without a file."""
    if path is None:
        return None
    try:
        names = [line.strip() for line in path.read_text("utf-8-sig").splitlines()]
    except ValueError as error:
        raise DataError(f"{path}: expected names of classes as UTF-8 text: {error}") from None
    if not names:
        raise DataError(f"{path}: expected names of classes, one per line, got an empty file")
    first: dict[str, int] = {}
    for line, name in enumerate(names, 1):
        if not name:
            raise DataError(f"{path}, line {line}: expected the name of a class, got a blank line: delete it")
        if (other := first.setdefault(name, line)) != line:
            raise DataError(f"{path}, line {line}: {name!r} is already on line {other}: name each class once")
    return names


def read_config(preset: str, path: Path | None) -> "QuantConfig":
    """Return the settings of a preset, or of the file that replaces it."""
    if path is None:
        return dsconv.QuantConfig.preset(preset)
    if preset != "default":
        raise typer.BadParameter("choose one of --preset and --config.")
    return dsconv.QuantConfig.from_file(path)


def header_of(path: Path) -> dict[str, Any]:
    """Return the metadata of a quantized file; empty if it is damaged, which loading reports in detail."""
    from safetensors import safe_open

    from dsconv.data import Preprocess

    path = path / "model.safetensors" if path.is_dir() else path
    if not path.is_file():
        return {}
    try:
        with safe_open(path, framework="numpy") as file:
            entries = file.metadata() or {}
        said = {name: json.loads(entries[name]) for name in ("model_class", "architecture", "preprocess")}
        if said["preprocess"] is not None:
            said["preprocess"] = Preprocess(**said["preprocess"])
        said["described"] = "network" in entries
        return said if isinstance(said["architecture"], str | None) else {}
    except Exception:  # of many kinds, each of which loading converts to its own error
        return {}
