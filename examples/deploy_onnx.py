"""A quantized network as two ONNX files, run by ONNX Runtime alone: a small one, and a fast one.

python examples/deploy_onnx.py                                       # with the trained weights, which are downloaded
python examples/deploy_onnx.py --model dsconv/digits_resnet --size 8
"""

import argparse
from pathlib import Path

import onnxruntime
import torch

import dsconv
from dsconv import zoo
from dsconv.data import batches

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", default="torchvision/resnet18", help="as of the command line (%(default)s)")
parser.add_argument("--weights", default="default", help="default, random or a file of weights")
parser.add_argument("--data", type=Path, help="folder of images, which need no labels; none: noise")
parser.add_argument("--images", type=int, default=32, help="use so many of them (%(default)s)")
parser.add_argument("--size", type=int, default=224, help="of an image in pixels (%(default)s)")
parser.add_argument("--out", type=Path, default=Path(), help="folder to write to")
options = parser.parse_args()

net = zoo.build(options.model, weights=options.weights)
preprocess = zoo.preprocess_of(net).model_copy(update={"resize": options.size, "crop": (options.size, options.size)})
if options.data:
    images = torch.cat([x for x, _ in batches(options.data, preprocess=preprocess, limit=options.images)])
else:
    channels = 1 if preprocess.channels == "gray" else 3
    images = torch.randn(options.images, channels, options.size, options.size)

qnet = dsconv.quantize(net)
with torch.inference_mode():
    expected = qnet(images).argmax(1)

# qdq: 4-bit integers with a scale per block; the outputs match dsconv, slower than float32.
# int8: rounded again, one scale per tensor with ranges from the images; fast on common runtimes.
for style in ("qdq", "int8"):
    ranges = images if style == "int8" else None
    path = dsconv.export_onnx(qnet, images[:1], options.out / f"network.{style}.onnx", style, images=ranges)

    # From here on dsconv is not needed.
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"x": images.numpy()})
    same = (torch.from_numpy(logits).argmax(1) == expected).float().mean()
    print(f"{path}: {path.stat().st_size / 1e6:.2f} MB, same class as in dsconv {100 * same:.1f} %")
