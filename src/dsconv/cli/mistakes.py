"""Mistakes in the arguments of a command, which are reported together, before PyTorch is imported."""

import os
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import typer
from typer.core import TyperCommand

from dsconv.errors import DSConvError

P = ParamSpec("P")
T = TypeVar("T")


class Mistakes:
    """Collects mistakes in the arguments of a command, so that one error lists all of them.

    >>> mistakes = Mistakes()
    >>> number = mistakes.check(int, "7")
    >>> mistakes.end()
    >>> number
    7
    """

    def __init__(self) -> None:
        self._usage: list[typer.BadParameter] = []
        self._others: list[DSConvError | OSError] = []

    def check(self, check: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Return ``check(...)``, or record the mistake that it raises and return None; :meth:`end` then raises it."""
        try:
            return check(*args, **kwargs)
        except typer.BadParameter as error:
            self._usage.append(error)
        except (DSConvError, OSError) as error:
            self._others.append(error)
        return None  # type: ignore[return-value]

    def usage(self, wrong: bool, message: str) -> None:
        """Record ``message`` as a usage error if ``wrong``."""
        if wrong:
            self._usage.append(typer.BadParameter(message))

    def end(self) -> None:
        """Raise one error that lists all mistakes, if there are any: a usage error, if one of them is."""
        found = [*self._usage, *self._others]
        if len(found) == 1:
            raise found[0]
        said = [error.message if isinstance(error, typer.BadParameter) else one_paragraph(error) for error in found]
        text = numbered(list(dict.fromkeys(said)))
        if self._usage:
            raise typer.BadParameter(text)
        if self._others:
            raise DSConvError(text)


class Command(TyperCommand):
    """Command that reports all invalid values of its options at once, instead of only the first."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the arguments as the base class does; raise ``typer.BadParameter`` with all errors."""
        wrong: list[typer.BadParameter] = []

        def collecting(handle: Callable[..., Any]) -> Callable[..., Any]:
            def collect(ctx: Any, opts: Any, args: list[str]) -> tuple[Any, list[str]]:
                try:
                    found: tuple[Any, list[str]] = handle(ctx, opts, args)
                    return found
                except typer.BadParameter as error:
                    wrong.append(error)
                    return None, args

            return collect

        for parameter in self.params:
            parameter.handle_parse_result = collecting(type(parameter).handle_parse_result.__get__(parameter))  # type: ignore[method-assign]
        try:
            rest = super().parse_args(ctx, args)
        except Exception as error:
            option = getattr(error, "option_name", None)  # of an unknown option; typer does not export the class
            if isinstance(option, str) and (others := _commands_with(option, ctx)):
                error.message += f" (an option of {', '.join(others)})"  # type: ignore[attr-defined]
            raise
        if len(wrong) == 1:
            raise wrong[0]
        if wrong:
            raise typer.BadParameter(numbered([error.format_message() for error in wrong]), ctx)
        return rest


def _commands_with(option: str, ctx: Any) -> list[str]:
    """Return the names of the other commands that have ``option``."""
    commands = getattr(ctx.parent and ctx.parent.command, "commands", {})
    return [
        name
        for name, command in commands.items()
        if not command.hidden and any(option in [*one.opts, *one.secondary_opts] for one in command.params)
    ]


def numbered(errors: list[Any]) -> str:
    """Return errors as one paragraph.

    >>> numbered(["a: expected 1, got 2.", "no b"])
    '2 mistakes: (1) a: expected 1, got 2; (2) no b'
    """
    texts = [one_paragraph(error).rstrip(".") for error in errors]
    return f"{len(texts)} mistakes: " + "; ".join(f"({i}) {text}" for i, text in enumerate(texts, 1))


def one_paragraph(error: object) -> str:
    """Return the message of an error in one line."""
    if isinstance(error, OSError) and error.filename is not None:
        error = f"{os.fsdecode(error.filename)}: {error.strerror}"
    return " ".join(str(error).split())
