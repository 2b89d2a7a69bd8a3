"""Errors that a user can fix. Each message states what was expected, what was got and what to do."""

import importlib
import importlib.util
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any


def one_line(text: str, longest: int = 1500) -> str:
    r"""Return ``text`` with unprintable characters escaped, and shortened in the middle if it is too long.

    >>> one_line("layer '\x1b[2J'"), one_line("0123456789" * 10, longest=20)
    ("layer '\\x1b[2J'", '01234567 ... 3456789')
    """
    plain = text[: 2 * longest] + text[2 * longest :][-longest:]
    if not plain.isprintable():
        plain = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in plain)
    if len(plain) > longest:
        part = (longest - 5) // 2
        plain = f"{plain[: longest - 5 - part]} ... {plain[-part:]}"
    return plain


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its class if the message is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class DSConvError(Exception):
    """Base class of mistakes that the user can fix; the command line prints them without a traceback."""


class ConfigError(DSConvError, ValueError):
    """A quantization setting or an argument has an invalid value."""


class ModelError(DSConvError, ValueError):
    """A model cannot be built, converted or run as requested."""


class FileFormatError(DSConvError, ValueError):
    """A file is not a readable dsconv file, or does not match the model it is loaded into.

    The message quotes names from the untrusted file, and is one short line whatever these are.
    """

    def __init__(self, message: str):
        super().__init__(one_line(message))


class DataError(DSConvError, ValueError):
    """Images or labels cannot be used as given."""


class MissingExtraError(DSConvError, ImportError):
    """An optional part of the package is not installed.

    >>> raise MissingExtraError("zoo", "torchvision")
    Traceback (most recent call last):
    ...
    dsconv.errors.MissingExtraError: torchvision is not installed: pip install 'dsconv[zoo]'
    """

    def __init__(self, extra: str, package: str):
        super().__init__(f"{package} is not installed: pip install 'dsconv[{extra}]'")


def check_choice(name: str, value: object, choices: Collection[str]) -> None:
    """Raise ConfigError unless the argument ``name`` is one of ``choices``."""
    if not isinstance(value, str) or value not in choices:
        raise ConfigError(f"{name}: expected one of {', '.join(choices)}, got {one_line(repr(value), 200)}")


def check_whole(name: str, value: object, least: int) -> None:
    """Raise ConfigError unless the argument ``name`` is a whole number of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{name}: expected a whole number from {least}, got {value!r}")


@contextmanager
def usable_device(device: object) -> Iterator[None]:
    """Convert the errors that PyTorch raises for an unavailable ``device`` into ConfigError."""
    try:
        yield
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"The device {str(device)!r} cannot be used: {first_line(error)}") from error


def check_extra(extra: str, package: str) -> None:
    """Raise MissingExtraError unless a package that ``extra`` installs is available; the package is not imported.

    >>> check_extra("zoo", "no_such_package")
    Traceback (most recent call last):
    ...
    dsconv.errors.MissingExtraError: no_such_package is not installed: pip install 'dsconv[zoo]'
    """
    try:
        found = importlib.util.find_spec(package) is not None
    except ValueError:  # it is already imported, but not from a file
        found = True
    if not found:
        raise MissingExtraError(extra, package)


def import_extra(extra: str, module: str) -> Any:
    """Import and return a module of a package that ``extra`` installs.

    Raises:
        MissingExtraError: the package is not installed.
    """
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name not in (module, package):
            raise
        raise MissingExtraError(extra, package) from None
