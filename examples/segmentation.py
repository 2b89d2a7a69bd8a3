"""A U-Net with 4-bit weights, measured by pixel against its float original, and compiled. Needs no labels.

python examples/segmentation.py photos/                                # a folder of images
python examples/segmentation.py photos/ --encoder mobilenet_v2 --checkpoint unet.pth --calibrate

Needs `pip install segmentation-models-pytorch`.
"""

import argparse
from pathlib import Path

import segmentation_models_pytorch as smp
import torch

import dsconv
from dsconv.data import Preprocess, batches

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("data", type=Path, help="folder of images")
parser.add_argument("--encoder", default="resnet18", help="of segmentation-models-pytorch (%(default)s)")
parser.add_argument("--classes", type=int, default=21, help="of a pixel (%(default)s)")
parser.add_argument("--checkpoint", type=Path, help="your state dict; none: random weights, whose figures mean nothing")
parser.add_argument("--images", type=int, default=64, help="use so many at most (%(default)s)")
parser.add_argument("--size", type=int, default=256, help="of an image in pixels, a multiple of 32 (%(default)s)")
parser.add_argument("--calibrate", action="store_true", help="round again on half of the images: takes minutes")
parser.add_argument("--out", type=Path, default=Path("unet.safetensors"), help="file to write (%(default)s)")
options = parser.parse_args()

torch.manual_seed(0)
net = smp.Unet(options.encoder, encoder_weights=None, classes=options.classes).eval()
if options.checkpoint:
    net.load_state_dict(torch.load(options.checkpoint, weights_only=True))

preprocess = Preprocess(resize=(options.size, options.size), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
images = torch.cat([x for x, _ in batches(options.data, preprocess=preprocess, limit=options.images)])
ours, held_out = images[::2], images[1::2]  # to calibrate on, and to measure

network = dsconv.quantize(net)
if options.calibrate:
    network = dsconv.calibrate(network, net, ours, progress=True)
found = dsconv.compare(net, network, held_out, per_layer=False)
print(found)
maps = found.outputs["output"]
print(f"same class at {maps.agreement:.1f} % of the pixels of {len(held_out)} images, mIoU {maps.miou:.1f} %")

fast = dsconv.compile(network, held_out[:1])
print(f"compiled: {len(fast.plan.steps)} steps, {len(fast.plan.in_pytorch)} of them by PyTorch")
dsconv.save(network, options.out)
print(f"wrote {options.out}")
