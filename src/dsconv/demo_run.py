"""Computation of the demo: the embedded network under several settings, on unseen digits."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import safetensors.torch
import torch
from torch import nn

from dsconv import zoo
from dsconv.config import QuantConfig
from dsconv.conversion import quantize, summary
from dsconv.demo.network import load_digits
from dsconv.evaluation import compare
from dsconv.files import check_place
from dsconv.io import load, save

_WRITTEN = "default W4A8"
SETTINGS = {
    "paper W4A4": QuantConfig.preset("paper"),
    _WRITTEN: QuantConfig.preset("default"),
    "default W3A8": QuantConfig.preset("default", weight_bits=3),
    "default W2A8": QuantConfig.preset("default", weight_bits=2),
}
FILE_NAME = "digits_resnet-w4a8.safetensors"
_STATED = {"weight_bits", "activation_bits", "activation_sign", "block_size", "weight_shift"}


@dataclass(frozen=True)
class Demo:
    """Float network, quantized networks by name of the setting, and all figures as plain data."""

    network: nn.Module
    quantized: dict[str, nn.Module]
    figures: dict[str, Any]


def run(folder: Path, on_step: Callable[[str], None] = lambda name: None) -> Demo:
    """Quantize the embedded network under all ``SETTINGS``, measure each, and write the preset ``default`` to a file.

    Args:
        folder: folder for ``FILE_NAME``; created if it does not exist.
        on_step: called with the name of each setting before it is processed.

    Raises:
        OSError: ``folder`` cannot be created or written to.
    """
    written = folder / FILE_NAME
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"{folder}: not a folder that can be written to ({error.strerror}): choose another") from None
    check_place(written)
    network = zoo.build("dsconv/digits_resnet")
    images, labels = load_digits("test")
    quantized: dict[str, nn.Module] = {}
    settings: dict[str, dict[str, Any]] = {}
    with TemporaryDirectory(prefix=".dsconv-", dir=folder) as scratch:
        for name, config in SETTINGS.items():
            on_step(name)
            start = time.perf_counter()
            quantized[name] = quantize(network, config)
            seconds = time.perf_counter() - start
            file = save(quantized[name], Path(scratch, name))
            result = compare(network, quantized[name], [(images, labels)])
            found = summary(quantized[name])
            settings[name] = {
                **{field: getattr(result, field) for field in ("top1", "agreement", "kl", "logit_sqnr_db")},
                "layer_sqnr_db": result.layer_sqnr_db,
                "effective_bits": found.effective_bits,
                "backend": ", ".join(found.backends),
                **config.model_dump(include=_STATED),
                "file_bytes": file.stat().st_size,
                "quantize_seconds": seconds,
            }
    save(quantized[_WRITTEN], written)
    with torch.inference_mode():
        equal = torch.equal(load(written)(images), quantized[_WRITTEN](images))
    float_bytes = len(safetensors.torch.save(network.state_dict()))
    figures = {
        "images": len(images),
        "backend": settings[_WRITTEN]["backend"],
        "float32": {"top1": result.reference.top1, "effective_bits": 32.0, "file_bytes": float_bytes},
        "settings": settings,
        "file": str(written),
        "reloaded_equal": equal,
    }
    return Demo(network, quantized, figures)
