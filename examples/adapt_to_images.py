"""3-bit weights, rounded and then trained on a folder of images without labels to match the float network.

python examples/adapt_to_images.py photos/                     # several hundred images or more; takes a while
python examples/adapt_to_images.py photos/ --model torchvision/resnet18 --steps 2000
"""

import argparse
from pathlib import Path

import torch

import dsconv
from dsconv import zoo
from dsconv.conversion import model_info
from dsconv.data import batches

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("data", type=Path, help="folder of images")
parser.add_argument("--model", default="torchvision/squeezenet1_1", help="as of the command line (%(default)s)")
parser.add_argument("--weights", default="default", help="default, random or a file of weights")
parser.add_argument("--images", type=int, default=1000, help="use so many at most (%(default)s)")
parser.add_argument("--size", type=int, help="of an image in pixels, in place of the model's own")
parser.add_argument("--steps", type=int, default=600, help="of training, of 32 images each (%(default)s)")
parser.add_argument("--out", type=Path, default=Path("adapted.safetensors"), help="file to write (%(default)s)")
options = parser.parse_args()

net = zoo.build(options.model, weights=options.weights)
preprocess = zoo.preprocess_of(net)
if options.size:
    preprocess = preprocess.model_copy(update={"resize": options.size, "crop": (options.size, options.size)})

# A quarter of the images is held back to check that improvements generalize.
images = torch.cat([x for x, _ in batches(options.data, preprocess=preprocess, limit=options.images)])
images = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))]
held_out, ours = images[: len(images) // 4], images[len(images) // 4 :]

quantized = dsconv.quantize(net, dsconv.QuantConfig.preset("w4a4", weight_bits=3, activation_sign="extra"))
calibrated = dsconv.calibrate(quantized, net, ours[:128])  # seconds: weights are rounded again, layer by layer
adapted = dsconv.adapt(calibrated, net, ours, recipe={"steps": options.steps}, progress=True)
print(model_info(adapted).adaptation)

for name, network in {"quantized": quantized, "calibrated": calibrated, "adapted": adapted}.items():
    found = dsconv.compare(net, network, held_out, per_layer=False)
    print(f"{name}: same class {found.agreement:.1f} %, KL {found.kl:.4f} nats, on {len(held_out)} other images")

dsconv.save(adapted, options.out)
