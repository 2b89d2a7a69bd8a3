"""Images for calibration and evaluation: preprocessing, folders, inputs, and reading of ``images`` arguments."""

from typing import TYPE_CHECKING

from dsconv.lazy import lazily

if TYPE_CHECKING:
    from dsconv.data.folder import EXTENSIONS, Batches, BrokenImage, ImageFolder, Images, batches
    from dsconv.data.inputs import Inputs
    from dsconv.data.preprocess import Preprocess
    from dsconv.data.synthetic import synthetic_images

__all__ = [
    "EXTENSIONS",
    "Batches",
    "BrokenImage",
    "ImageFolder",
    "Images",
    "Inputs",
    "Preprocess",
    "batches",
    "synthetic_images",
]

__getattr__, __dir__ = lazily(
    __name__,
    {
        "dsconv.data.folder": ("EXTENSIONS", "Batches", "BrokenImage", "ImageFolder", "Images", "batches"),
        "dsconv.data.inputs": ("Inputs",),
        "dsconv.data.preprocess": ("Preprocess",),
        "dsconv.data.synthetic": ("synthetic_images",),
    },
)
