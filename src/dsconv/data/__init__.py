"""Images for calibration and evaluation: preprocessing, folders, and the library's one reading of ``images``."""

from dsconv.data.folder import EXTENSIONS, Batches, BrokenImage, ImageFolder, Images, batches
from dsconv.data.preprocess import Preprocess
from dsconv.data.synthetic import synthetic_images

__all__ = ["EXTENSIONS", "Batches", "BrokenImage", "ImageFolder", "Images", "Preprocess", "batches", "synthetic_images"]
