"""Effect of unlabelled images and of training on them: tables of docs/calibrate.md, docs/onnx.md and docs/adapt.md.

    python benchmarks/images.py calibrate   # SqueezeNet, calibrated on 16 to 256 images
    python benchmarks/images.py int8        # int8 ONNX files with ranges from images, or from BatchNorms alone
    python benchmarks/images.py lr          # digits, adapted with several learning rates; needs no other networks

The networks and images are those of ``benchmarks/accuracy.py``.
"""

import argparse
import itertools
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import accuracy
import dsconv
from dsconv.errors import ModelError
from dsconv.onnx import OnnxNetwork

INT8_IMAGES = 500


def evaluated(nets: Any, name: str, limit: int | None = None) -> list[tuple[Tensor, Tensor]]:
    """Return batches of test images and labels."""
    pictures, labels = nets.images(nets.NETS[name][1])
    x, y = nets.preprocess(name, pictures[:limit]), torch.from_numpy(labels[:limit])
    return list(zip(x.split(accuracy.BATCH), y.split(accuracy.BATCH), strict=True))


def calibrate() -> Iterator[str]:
    """Yield KL and agreement of SqueezeNet over the number of images."""
    nets, name = accuracy.shared_nets(), "squeezenet1_1"
    work, batches = accuracy.Work(nets, name, nets.load(name)), evaluated(nets, name)
    reference = accuracy.Remembered(work.network)
    config = dsconv.QuantConfig.preset("w4a4", activation_sign="extra", block_size=32, weight_shift=False)
    qmodel = dsconv.quantize(work.network, config)
    for count in (0, 16, 32, 64, 128, 256):
        start = time.process_time()
        better = dsconv.calibrate(qmodel, work.network, work.unlabelled(count)) if count else qmodel
        seconds = time.process_time() - start
        found = dsconv.compare(reference, better, batches, per_layer=False)
        yield f"{count} images: KL {found.kl:.3f}, agreement {found.agreement:.1f}, {seconds:.1f} s of processor time"


def int8() -> Iterator[str]:
    """Yield the agreement of int8 files with the dsconv networks from which they were made."""
    nets = accuracy.shared_nets()
    for name in ("cifar_resnet20", "resnet18_tiny", "squeezenet1_1", "tiny_darknet"):
        work, batches = accuracy.Work(nets, name, nets.load(name)), evaluated(nets, name, INT8_IMAGES)
        qmodel = dsconv.quantize(work.network)
        for count, full_range in itertools.product((32, 64, 0), (False, True)):
            with tempfile.TemporaryDirectory() as folder:
                options: dict[str, Any] = {"images": work.unlabelled(count) if count else None}
                options["full_range"] = full_range
                try:
                    path = dsconv.export_onnx(qmodel, batches[0][0][:1], Path(folder) / "a.onnx", "int8", **options)
                except ModelError as error:
                    yield f"{name}, {count} images: {error}"
                    continue
                found = dsconv.compare(qmodel, OnnxNetwork(path), batches, per_layer=False)
            yield (
                f"{name}, {count} images{', full range' * full_range}: top-1 {found.reference.top1:.1f} -> "
                f"{found.top1:.1f}, agreement {found.agreement:.1f}, KL {found.kl:.4f}"
            )


def lr() -> Iterator[str]:
    """Yield the KL of the digits network, with 2-bit weights, calibrated and then adapted."""
    net: nn.Module = dsconv.zoo.build("dsconv/digits_resnet")
    images, _ = dsconv.demo.load_digits("unlabelled")
    held_out, _ = dsconv.demo.load_digits("test")
    student = dsconv.quantize(net, dsconv.QuantConfig.preset("w4a4", weight_bits=2))
    student = dsconv.calibrate(student, net, images[:128])
    yield f"calibrated: KL {dsconv.compare(net, student, held_out).kl:.5f}"
    for rate in (0.001, 0.003, 0.01, 0.03):
        better = dsconv.adapt(student, net, images[128:640], recipe={"lr": rate, "steps": 150})
        yield f"lr {rate}: KL {dsconv.compare(net, better, held_out).kl:.5f}"


TABLES = {"calibrate": calibrate, "int8": int8, "lr": lr}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=TABLES)
    for line in TABLES[parser.parse_args().table]():
        print(line, flush=True)


if __name__ == "__main__":
    main()
