"""Image folders, and the single place that interprets the ``images`` argument of all functions."""

import csv
import os
import re
import stat
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dsconv.data.inputs import Batch, Inputs, in_batches
from dsconv.data.preprocess import Preprocess
from dsconv.errors import ConfigError, DataError, check_whole

EXTENSIONS = frozenset({".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})


_NOT_READ = frozenset({".avif", ".gif", ".heic", ".heif", ".jfif", ".jp2", ".jpe"})
"""Extensions of other image formats, which are left out and reported."""


class BrokenImage(NamedTuple):
    """File that could not be read as an image or was left out, and the reason."""

    path: str
    reason: str


class ImageFolder(Dataset[Tensor | tuple[Tensor, int]]):
    """Dataset of the images of a folder, preprocessed one by one; a torch ``Dataset``.

    Three layouts are recognised, in this order:

    * ``labels.csv`` (header ``file,class_index``): only the files that it lists, relative to the folder;
    * class folders: every image below ``CLASS/``; the class index is the index of ``CLASS`` in ``classes``. Without
      ``classes``, it is the index among the names of all class folders, including empty ones: in numerical order if all
      names are integers (``2`` before ``10``, unlike torchvision's ``ImageFolder``), otherwise sorted as text (``c10``
      before ``c2``);
    * images without class folders: unlabelled.

    Images are the files whose name ends, in any case, in one of ``EXTENSIONS``; hidden files and folders are skipped.
    Symbolic links are followed, except to folders that contain the image folder. Each file counts once, under its own
    path rather than that of a link to it.

    Args:
        path: the folder.
        preprocess: applied to every image.
        classes: names of the classes in the order of the network's outputs; a class need not have a folder. With a
            ``labels.csv``, and for unlabelled images, they only name the outputs.

    Attributes:
        files, labels: every image in a fixed order; int64 class indices ``(len(files),)`` or None.
        classes: the names of the classes in the order of their indices, or None.
        order: how the class folders were ordered: ``"given"``, ``"numbers"`` or ``"text"``; None without class folders.
        left_out: images that are not in ``files``, with the reason: broken links, a file in two classes, unsupported
            formats. Evaluations report them among ``broken``.

    Raises:
        DataError: the folder does not exist or has no images, or labels or classes cannot be used.

    >>> import tempfile
    >>> from PIL import Image
    >>> folder = Path(tempfile.mkdtemp())
    >>> for name in ("cat", "dog"):
    ...     (folder / name).mkdir()
    ...     Image.new("RGB", (48, 32)).save(folder / name / "1.png")
    >>> dataset = ImageFolder(folder, Preprocess(crop=32))
    >>> image, label = dataset[1]
    >>> image.shape, label, dataset.classes
    (torch.Size([3, 32, 32]), 1, ['cat', 'dog'])
    """

    def __init__(self, path: str | os.PathLike[str], preprocess: Preprocess, classes: Sequence[str] | None = None):
        if not isinstance(preprocess, Preprocess):
            raise ConfigError(
                f"preprocess must be a dsconv.data.Preprocess, got {type(preprocess).__name__}; "
                "Preprocess.from_torchvision and Preprocess.from_timm make one."
            )
        self.path, self.preprocess = Path(path), preprocess
        self.classes = None if classes is None else _checked(classes)
        self.order: Literal["given", "numbers", "text"] | None = None
        self.labels: Tensor | None = None
        self.left_out: list[BrokenImage] = []
        if not self.path.is_dir():
            what = "is a file, not a folder" if self.path.exists() else "does not exist"
            raise DataError(f"The image folder {self.path} {what}.")
        if (self.path / "labels.csv").is_file():
            self.files, labels = _read_labels(self.path / "labels.csv", self.classes)
            self.labels = torch.tensor(labels, dtype=torch.int64, device="cpu")
            return
        try:
            tree = _Tree(self.path)
        except OSError as error:
            raise DataError(f"The image folder {self.path} cannot be read: {error}.") from error
        self.files, self.left_out = tree.beside, tree.left_out
        if any(tree.folders.values()):
            self._use_class_folders(tree)
        elif not self.files:
            left_out = "".join(f" Left out: {path}: {reason}." for path, reason in self.left_out[:1])
            raise DataError(
                f"The folder {self.path} holds no images: looked for {', '.join(sorted(EXTENSIONS))} in it and in "
                f"sub-folders (one per class), and for a labels.csv.{left_out}"
            )

    def _use_class_folders(self, tree: "_Tree") -> None:
        folders = tree.folders
        if self.files:
            raise DataError(
                f"The folder {self.path} holds images ({self.files[0].name}, ...) beside sub-folders with images "
                f"({', '.join(list(folders)[:3])}, ...): move them apart, or list them in labels.csv."
            )
        if tree.lost:
            raise DataError(
                f"The link {tree.lost[0]} beside the class folders is broken: restore its target or, if it is not a "
                "class, delete it. Leaving it out could change the class indices of the other folders."
            )
        self.left_out += tree.twice
        if self.classes is None:
            self.order, folders = _ordered(self.path, folders)
            self.classes = list(folders)
        else:
            self.order = "given"
        index = {name: place for place, name in enumerate(self.classes)}
        if unknown := [name for name in folders if name not in index]:
            raise DataError(
                f"The sub-folder {unknown[0]} of {self.path} is not one of the {len(self.classes)} classes."
            )
        self.files = [file for files in folders.values() for file in files]
        self.labels = torch.tensor(
            [index[name] for name in folders for _ in folders[name]], dtype=torch.int64, device="cpu"
        )

    @cached_property
    def order_in_words(self) -> str:
        """Describe the order of the class folders, and the first and last of them; empty without class folders."""
        if self.order is None or self.classes is None:
            return ""
        how = {"given": "as given", "numbers": "by their numbers", "text": "by their names as text"}[self.order]
        names = self.classes if len(self.classes) < 6 else [*self.classes[:3], "...", self.classes[-1]]
        return f"{how}: {', '.join(names)}"

    @cached_property
    def is_doubtful(self) -> bool:
        """Whether the class folders, sorted as text, are not in the order of the numbers in their names."""

        def by_numbers(name: str) -> list[str | int]:
            return [int(part) if i % 2 else part for i, part in enumerate(re.split("([0-9]+)", name))]

        return self.order == "text" and sorted(self.classes or (), key=by_numbers) != self.classes

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor | tuple[Tensor, int]:
        image = self.read(index)
        if isinstance(image, BrokenImage):
            raise DataError(f"The image {image.path} cannot be read: {image.reason}.")
        return image if self.labels is None else (image, int(self.labels[index]))

    def read(self, index: int) -> Tensor | BrokenImage:
        """Return image ``index``, float32 ``(C, H, W)``, or the problem with its file."""
        path = self.files[index]
        from PIL import Image

        try:
            with Image.open(path) as image:
                return self.preprocess(image)
        except Exception as error:  # decoders raise almost any error on damaged files
            return BrokenImage(str(path), " ".join(str(error).split()) or type(error).__name__)


def _checked(classes: Sequence[str]) -> list[str]:
    names = list(classes)
    if isinstance(classes, str) or not names or not all(isinstance(name, str) and name for name in names):
        raise DataError(f"classes: expected one or more names, none of them empty, got {classes!r}")
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise DataError(f"classes: expected each name once, got {twice[0]!r} more than once")
    return names


def _ordered(path: Path, folders: dict[str, list[Path]]) -> tuple[Literal["numbers", "text"], dict[str, list[Path]]]:
    """Return class folders in the order of the classes, and the kind of that order."""
    if not all(re.fullmatch("-?[0-9]+", name) for name in folders):
        return "text", dict(sorted(folders.items()))
    numbers: dict[int, str] = {}
    for name in folders:
        if (other := numbers.setdefault(int(name), name)) != name:
            raise DataError(
                f"The class folders {other} and {name} of {path} are the same number: rename one of them, or give the "
                "names of all classes in the order of the network's outputs (classes=, or --classes FILE)."
            )
    return "numbers", {numbers[number]: folders[numbers[number]] for number in sorted(numbers)}


class _Tree:
    """Images in a folder and below it, each real file once. Files and folders are read before links.

    Attributes:
        folders: maps the name of each sub-folder to the images below it, sorted.
        beside: the images that are in no sub-folder, sorted.
        left_out: broken links, and images in unsupported formats.
        lost: those of the broken links that are in no sub-folder and do not have an image name.
        twice: files and folders that are in two of the sub-folders: they count for the first one only.

    Raises:
        OSError: a folder cannot be read.
    """

    def __init__(self, path: Path):
        self.left_out: list[BrokenImage] = []
        self.twice: list[BrokenImage] = []
        self.lost: list[Path] = []
        self._path = path
        self._links: list[tuple[Path, Path]] = []
        real = path.resolve()
        # A link to a folder that contains this one would lead back to it, and out of it.
        holding = {_identity(folder, folder.stat()) for folder in (real, *real.parents)}
        self._seen: dict[_Identity, tuple[Path, Path] | None] = dict.fromkeys(holding)
        pending: list[tuple[Path, Path]] = []
        for entry in sorted(path.iterdir()):
            if entry.name.startswith(".") or (entry.is_dir() and _identity(entry, entry.stat()) in holding):
                continue
            pending.append((entry, entry if entry.is_dir() else path))
        self._found: dict[Path, list[Path]] = {top: [] for _, top in [(path, path), *pending]}
        # A linked folder is also a class: it precedes the links within the others.
        for is_link in (False, True):
            self._read([(entry, top) for entry, top in pending if entry.is_symlink() == is_link])
        while self._links:
            pending, self._links = sorted(self._links), []
            self._read(pending)
        self.beside = sorted(self._found.pop(path))
        self.folders = {top.name: sorted(files) for top, files in self._found.items()}

    def _read(self, pending: list[tuple[Path, Path]]) -> None:
        """Read files and folders, each with the sub-folder it counts for; links in the folders are kept for later."""
        pending = pending[::-1]
        while pending:
            path, top = pending.pop()
            try:
                status = path.stat()
            except OSError as error:
                if not path.is_symlink():
                    raise
                self.left_out.append(BrokenImage(str(path), f"the link cannot be followed: {error.strerror}"))
                if path.parent == self._path and path.suffix.lower() not in EXTENSIONS | _NOT_READ:
                    self.lost.append(path)
                continue
            if stat.S_ISDIR(status.st_mode):
                if self._is_new(path, top, status):
                    for entry in sorted(path.iterdir()):
                        if not entry.name.startswith("."):
                            (self._links if entry.is_symlink() else pending).append((entry, top))
            elif path.suffix.lower() in _NOT_READ:
                self.left_out.append(BrokenImage(str(path), "this format is not supported: convert it to PNG or JPEG"))
            elif _named_as_image(path) and not stat.S_ISREG(status.st_mode):
                self.left_out.append(BrokenImage(str(path), "it is not a regular file"))
            elif _named_as_image(path) and self._is_new(path, top, status):
                self._found[top].append(path)

    def _is_new(self, path: Path, top: Path, status: os.stat_result) -> bool:
        identity = _identity(path, status)
        if identity not in self._seen:
            self._seen[identity] = path, top
            return True
        first = self._seen[identity]
        if first is not None and first[1] != top:
            self.twice.append(BrokenImage(str(path), f"it is the same as {first[0]} and counts as part of it"))
        return False


_Identity: TypeAlias = tuple[int, int] | str


def _identity(path: Path, status: os.stat_result) -> _Identity:
    # Some file systems have no inodes.
    return (status.st_dev, status.st_ino) if status.st_ino else os.path.realpath(path)


def _named_as_image(path: Path) -> bool:
    return path.suffix.lower() in EXTENSIONS


def _read_labels(path: Path, classes: Sequence[str] | None) -> tuple[list[Path], list[int]]:
    labels: dict[Path, int] = {}
    line = 1
    try:
        with path.open(newline="", encoding="utf-8-sig") as lines:
            rows = csv.DictReader(lines, skipinitialspace=True)
            if not {"file", "class_index"} <= set(rows.fieldnames or ()):
                raise DataError(f"{path}, line 1: expected the header file,class_index, got {rows.fieldnames}.")
            for row in rows:
                line = rows.line_num
                file = path.parent / (row["file"] or "")
                if not file.is_file():
                    raise DataError(f"{path}, line {line}: there is no file {row['file']!r} in {path.parent}.")
                if file in labels:
                    raise DataError(f"{path}, line {line}: the file {row['file']!r} is listed a second time.")
                if not re.fullmatch(r"\s*[0-9]{1,9}\s*", row["class_index"] or ""):
                    raise DataError(
                        f"{path}, line {line}: class_index must be a whole number from 0, got {row['class_index']!r}."
                    )
                labels[file] = int(row["class_index"])
                if classes is not None and labels[file] >= len(classes):
                    raise DataError(
                        f"{path}, line {line}: class_index must be below {len(classes)}, the number of names in "
                        f"classes, got {labels[file]}."
                    )
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read after line {line}: {error}.") from error
    if not labels:
        raise DataError(f"{path} lists no images.")
    return list(labels), list(labels.values())


Labels: TypeAlias = Tensor | list[Mapping[str, Any]]
Labelled: TypeAlias = tuple[Batch, Labels | None]
Images: TypeAlias = Tensor | Inputs | str | os.PathLike[str] | ImageFolder | Iterable[Any]


class Batches:
    """Batches ``(images, labels)`` of any kind of ``images``: see `batches`.

    Attributes:
        total: number of images, including broken ones, or None if it is not known in advance.
        broken: files that the folder left out, followed by those that the latest pass could not read.
        folder: the `ImageFolder` that the images come from, or None.
        files: images of the folder that the latest pass has read so far, in order.
    """

    def __init__(self, images: Images, batch_size: int, workers: int, limit: int | None):
        self._images, self._batch_size, self._workers, self._limit = images, batch_size, workers, limit
        self.folder = images if isinstance(images, ImageFolder) else None
        self.broken: list[BrokenImage] = []
        self.files: list[Path] = []
        known = _count(images)
        self.total = min(known, limit) if known is not None and limit is not None else known

    def warn_of_broken(self, stacklevel: int) -> None:
        """Warn if files could not be read; ``stacklevel`` as in ``warnings.warn``, relative to the caller."""
        if self.broken:
            path, reason = self.broken[0]
            text = f"{len(self.broken)} files could not be read, the first {path}: {reason}"
            warnings.warn(text, stacklevel=stacklevel + 1)

    def __iter__(self) -> Iterator[Labelled]:
        self.broken, self.files = [] if self.folder is None else list(self.folder.left_out), []
        seen, labelled = 0, None
        for item in self._items():
            images, labels = _check(item)
            if self._limit is not None:
                images = images[: self._limit - seen]
                labels = None if labels is None else labels[: len(images)]
            if labelled not in (None, labels is not None):
                raise DataError("Some batches have labels and others have none: give labels for all or for none.")
            labelled = labels is not None
            seen += len(images)
            if len(images):
                yield images, labels
            if seen == self._limit:
                return

    def _items(self) -> Iterable[Any]:
        if isinstance(self._images, Tensor | Inputs):
            return in_batches(self._images, self._batch_size)
        if self.folder is not None:
            return self._read(self.folder)
        return self._images  # type: ignore[return-value]  # a path has become a folder in `batches`

    def _read(self, folder: ImageFolder) -> Iterator[Labelled]:
        count = self.total or 0
        # Folders and label files are usually sorted by class: spread a limit over all of them.
        chosen = [i * len(folder) // count for i in range(count)]
        loader: DataLoader[Any] = DataLoader(
            chosen,  # type: ignore[arg-type]  # the data set is the list of indices, read by the collating worker
            self._batch_size,
            num_workers=self._workers,
            collate_fn=partial(_load, folder),
            generator=torch.Generator(),  # the user's random state is unchanged
        )
        first: tuple[int, torch.Size] | None = None
        for images, indices, broken in loader:
            self.broken += broken
            self.files += [folder.files[index] for index in indices]
            for index, image in zip(indices, images, strict=True):
                first = first or (index, image.shape)
                if image.shape != first[1] and self._batch_size > 1:
                    raise DataError(
                        f"After preprocessing, {folder.files[index]} has the shape {tuple(image.shape)}, but "
                        f"{folder.files[first[0]]} {tuple(first[1])}: add a crop, as in "
                        "Preprocess(resize=256, crop=224), or use batch_size=1."
                    )
            if isinstance(images, Tensor):
                yield images, None if folder.labels is None else folder.labels[indices]


def _load(folder: ImageFolder, indices: list[int]) -> tuple[Tensor | list[Tensor], list[int], list[BrokenImage]]:
    entries = [(index, folder.read(index)) for index in indices]
    images = [entry for _, entry in entries if isinstance(entry, Tensor)]
    broken = [entry for _, entry in entries if isinstance(entry, BrokenImage)]
    # Stacked here, a batch crosses from a worker process as one tensor.
    same_size = len({image.shape for image in images}) == 1
    good = [index for index, entry in entries if isinstance(entry, Tensor)]
    return torch.stack(images) if same_size else images, good, broken


def _count(images: Images) -> int | None:
    try:
        if isinstance(images, Tensor | Inputs | ImageFolder):
            return len(images)
        if isinstance(images, DataLoader):
            return len(images.sampler)  # type: ignore[arg-type]
        if isinstance(images, list | tuple):
            return sum(len(item if isinstance(item, Tensor | Inputs) else item[0]) for item in images)
    except (TypeError, IndexError, KeyError):
        pass  # unsized, or not batches at all, which the pass itself reports
    return None


def _check(item: Any) -> Labelled:
    images, labels = item if isinstance(item, tuple | list) and len(item) == 2 else (item, None)
    usable = isinstance(images, Tensor) and images.dim() > 1 and not images.is_complex() and images.dtype != torch.uint8
    if not isinstance(images, Inputs) and not usable:
        got = f"a {images.dtype} tensor {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
        raise DataError(
            "images must be preprocessed batches (N, ...), such as (N, C, H, W), or dsconv.Inputs, alone or as pairs "
            f"(batch, labels); got {got}. A NumPy array needs torch.from_numpy, a single image .unsqueeze(0), one pair "
            "a list around it, a Dataset a DataLoader; a list or a dictionary that a model takes as one input "
            "needs dsconv.Inputs around it."
        )
    if labels is None:
        return images, None
    of_each = isinstance(labels, list | tuple) and all(isinstance(one, Mapping) for one in labels)
    if of_each and len(labels) == len(images):
        return images, list(labels)
    try:
        if not isinstance(labels, Tensor):
            labels = torch.as_tensor(labels, dtype=None, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"labels must be integers, one per image, got {type(labels).__name__}: {error}.") from error
    classes_in_float = labels.dim() == 1 and labels.is_floating_point()
    if not labels.dim() or len(labels) != len(images) or labels.is_complex() or classes_in_float:
        raise DataError(
            f"labels must be {len(images)} integers, one per image of the batch, or as many maps or images; got a "
            f"{labels.dtype} tensor {tuple(labels.shape)}."
        )
    return images, labels if labels.is_floating_point() else labels.long()


def batches(
    images: Images,
    *,
    preprocess: Preprocess | None = None,
    batch_size: int = 32,
    workers: int = 0,
    limit: int | None = None,
) -> Batches:
    """Return batches of any ``images`` argument that the library accepts.

    Args:
        images: a preprocessed tensor ``(N, ...)``, such as images ``(N, C, H, W)``, sound ``(N, T)`` or tokens; the
            arguments of a call as `Inputs`; an iterable of such batches or of ``(batch, labels)``, whose batches are
            used unchanged; the path of a folder (see `ImageFolder`), or an `ImageFolder`; or `Batches`, which are
            returned unchanged.
        preprocess: preprocessing of a folder given by its path; needed only there.
        batch_size: images per batch, for a tensor or a folder.
        workers: number of processes that read a folder; 0 reads in the current process.
        limit: maximum number of images: the first ones, or, from a folder, evenly spaced ones.

    Returns:
        Pairs ``(images, labels)``; labels are classes int64 ``(N,)``, or ``(N, ...)``, such as maps of classes int64 or
        images in float; or a list with a dictionary per image, such as boxes, for a metric; or None. It can be iterated
        repeatedly whenever ``images`` can.

    Raises:
        ConfigError: a number is out of range.
        DataError: ``images`` is none of the above; a path is given without ``preprocess``; during iteration, a batch
            has another shape, or images of a folder differ in size. Broken files are skipped and recorded in
            ``.broken``.

    >>> [(tuple(x.shape), labels) for x, labels in batches(torch.zeros(5, 3, 8, 8), batch_size=4)]
    [((4, 3, 8, 8), None), ((1, 3, 8, 8), None)]
    """
    if isinstance(images, Batches):
        return images
    for name, value, least in (("batch_size", batch_size, 1), ("workers", workers, 0), ("limit", limit, 1)):
        if value is not None:
            check_whole(name, value, least)
    if isinstance(images, str | os.PathLike):
        if preprocess is None:
            raise DataError(
                f"images is a folder ({os.fspath(images)}), so preprocess must say how to read it: "
                "pass dsconv.data.Preprocess(resize=..., crop=..., mean=..., std=..., channels=...), or one of its "
                "from_torchvision(...), from_timm(...) and imagenet()"
            )
        images = ImageFolder(images, preprocess)
    elif preprocess is not None:
        raise DataError(
            "preprocess applies to a folder given by its path only; these images are "
            f"{'an ImageFolder with a preprocess' if isinstance(images, ImageFolder) else 'preprocessed already'}."
        )
    elif isinstance(images, Tensor | Inputs):
        _check(images)
    elif not isinstance(images, Iterable | ImageFolder):
        raise DataError(
            "images must be a tensor (N, ...), dsconv.Inputs, an iterable of these or of (batch, labels), or the path "
            f"of a folder; got {type(images).__name__}."
        )
    return Batches(images, batch_size, workers, limit)
