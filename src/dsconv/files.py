"""Atomic writing of files: a file is written completely or not at all."""

import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dsconv.errors import ConfigError

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe (FIFO)",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
# A file name may have 255 bytes; no format has a suffix longer than this.
_LONGEST_SUFFIX = 32


def as_path(path: object, name: str = "path") -> Path:
    """Return ``path``, which was given as the argument ``name``, as a Path.

    Raises:
        ConfigError: it is not a path.
    """
    try:
        return Path(path)  # type: ignore[arg-type]
    except TypeError:
        raise ConfigError(f"{name}: expected the name of a file, got {type(path).__name__}") from None


def check_place(path: Path) -> Path:
    """Return the file that writing to ``path`` creates or replaces: ``path``, or the target of a link.

    Raises:
        OSError: the file cannot be written, as far as this can be detected beforehand.
    """
    # `stat` fails for a loop of links; a link to a missing file names a file to be created.
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        found = None
    except ValueError as error:
        raise OSError(f"{str(path)!r}: expected the name of a file to write ({error})") from None
    place = path.resolve() if path.is_symlink() else path
    if found is not None and not stat.S_ISREG(found.st_mode):
        kind = _KINDS.get(stat.S_IFMT(found.st_mode), "something else")
        error_type = IsADirectoryError if stat.S_ISDIR(found.st_mode) else FileExistsError
        raise error_type(f"{path}: expected the name of a file to write, got {kind}: choose another name")
    if not place.parent.exists():
        raise FileNotFoundError(f"{path}: the folder {place.parent} does not exist: create it, or choose another")
    if not place.parent.is_dir() or not os.access(place.parent, os.W_OK):
        raise PermissionError(f"{path}: {place.parent} is not a folder that can be written to: choose another")
    if found is not None and not os.access(place, os.W_OK):
        raise PermissionError(f"{path}: the file is write-protected: choose another, or change its permissions")
    return place


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield an empty file next to ``path``, with the same suffix, to be written; it replaces ``path`` at the end.

    If the block raises, nothing changes. A link is kept, and its target is replaced. The new file gets the permissions
    of the file that it replaces.

    Raises:
        OSError: the file cannot be written; the message names ``path``.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder, "a.txt")
    ...     with replacing(path) as beside:
    ...         _ = beside.write_text("all of it")
    ...     path.read_text(), len(os.listdir(folder))
    ('all of it', 1)
    """
    place = check_place(path)
    suffix = path.suffix if len(os.fsencode(path.suffix)) <= _LONGEST_SUFFIX else ""
    # Neither two threads nor two machines draw the same name.
    beside = place.with_name(f".{secrets.token_hex(8)}.part{suffix}")
    try:
        os.close(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        created = beside.stat()
        yield beside
        _take_permissions(beside, place, created)
        os.replace(beside, place)
    except OSError as error:
        if error.errno is None or error.filename not in (None, str(beside), os.fsencode(beside), beside):
            raise
        raise type(error)(error.errno, error.strerror or os.strerror(error.errno), str(path)) from error
    finally:
        with suppress(OSError):
            beside.unlink()


def _take_permissions(beside: Path, place: Path, created: os.stat_result) -> None:
    """Give ``beside`` the permissions of the file that it replaces, or those of a new file if there is none."""
    try:
        wanted = place.stat()
    except FileNotFoundError:
        wanted = created
    # Only root may change the owner of a file.
    with suppress(OSError):
        if (wanted.st_uid, wanted.st_gid) != (created.st_uid, created.st_gid):
            os.chown(beside, wanted.st_uid, wanted.st_gid)
    # Some writers create a new file that only its owner can read.
    beside.chmod(stat.S_IMODE(wanted.st_mode))
