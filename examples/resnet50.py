"""ResNet-50 of torchvision: quantized, compiled, timed against PyTorch, and saved.

python examples/resnet50.py                                   # with the trained weights, which are downloaded
python examples/resnet50.py --weights random --size 64        # without any
"""

import argparse
from pathlib import Path

import torch

import dsconv

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--weights", default="default", help="default, random or a file of weights")
parser.add_argument("--images", type=int, default=8, help="number of random images (%(default)s)")
parser.add_argument("--size", type=int, default=224, help="of an image in pixels (%(default)s)")
parser.add_argument("--seconds", type=float, default=10, help="to measure for (%(default)s)")
parser.add_argument("--out", type=Path, default=Path("resnet50.safetensors"), help="file to write (%(default)s)")
options = parser.parse_args()

# By name, so that the file states how to build it. Any trained torch.nn.Module in eval mode works.
net = dsconv.zoo.build("torchvision/resnet50", weights=options.weights)

# 4-bit weights, 8-bit mantissas, blocks of 64. No data, and the network is not run.
qnet = dsconv.quantize(net)
print(dsconv.summary(qnet))

# One program: for inference on the CPU, with any number of images at once.
images = torch.randn(options.images, 3, options.size, options.size)
fast = dsconv.compile(qnet, images[:1])
print(fast.plan)
print("same class as float32:", dsconv.compare(net, fast, images, per_layer=False).agreement, "% (on noise)")

# The compiled network, the quantized one layer by layer, and PyTorch: in turns, in one process.
print(dsconv.bench(net, qnet, images[:1], against=["torch"], seconds=options.seconds))

dsconv.save(qnet, options.out)
again = dsconv.compile(dsconv.load(options.out), images[:1])
assert torch.equal(again(images), fast(images))
print(f"{options.out}: {options.out.stat().st_size / 1e6:.1f} MB")
