"""A YOLO detector with 4-bit weights: its raw predictions compared with the float network's, and exported.

python examples/detector.py photos/                                    # yolov8n with random weights
python examples/detector.py photos/ --model yolo11s.pt --size 640      # your own weights

Needs `pip install ultralytics onnx onnxscript`. Non-maximum suppression, which turns predictions into boxes, stays in
float, in the runtime of your deployment.
"""

import argparse
from pathlib import Path

import torch
from ultralytics import YOLO

import dsconv
from dsconv.data import Preprocess, batches

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("data", type=Path, help="folder of images")
parser.add_argument("--model", default="yolov8n.yaml", help="of Ultralytics; .yaml: random weights (%(default)s)")
parser.add_argument("--images", type=int, default=64, help="use so many at most (%(default)s)")
parser.add_argument("--size", type=int, default=320, help="of an image in pixels, a multiple of 32 (%(default)s)")
parser.add_argument("--calibrate", action="store_true", help="round again on half of the images: takes minutes")
parser.add_argument("--out", type=Path, default=Path("detector.onnx"), help="file to write (%(default)s)")
options = parser.parse_args()


class Detector(torch.nn.Module):
    """The network without its post-processing: predictions (N, 4 + classes, positions)."""

    def __init__(self, network: torch.nn.Module):
        super().__init__()
        self.network = network

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.network(images)[0]


torch.manual_seed(0)
net = Detector(YOLO(options.model).model.float()).eval()

preprocess = Preprocess(resize=(options.size, options.size), mean=0.0, std=1.0)
images = torch.cat([x for x, _ in batches(options.data, preprocess=preprocess, limit=options.images)])
ours, held_out = images[::2], images[1::2]  # to calibrate on, and to measure


def lost(f: torch.Tensor, q: torch.Tensor, labels: object) -> torch.Tensor:
    """Return the mean change of the 100 highest scores of the float network, (N,)."""
    scores, others = f[:, 4:].amax(1), q[:, 4:].amax(1)
    surest = scores.topk(min(100, scores.shape[1])).indices
    return (scores.gather(1, surest) - others.gather(1, surest)).abs().mean(1)


network = dsconv.quantize(net)
if options.calibrate:
    network = dsconv.calibrate(network, net, ours, progress=True)
found = dsconv.compare(net, network, held_out, per_layer=False, metric=lost)
print(found)
print(f"SQNR {found.outputs['output'].sqnr_db:.1f} dB, scores change by {found.metrics['lost']:.4f}")

fast = dsconv.compile(network, held_out[:1])
print(f"compiled: {len(fast.plan.steps)} steps, {len(fast.plan.in_pytorch)} of them by PyTorch")
print(f"wrote {dsconv.export_onnx(network, held_out[:1], options.out)}")
