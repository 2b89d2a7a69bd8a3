"""A model of timm, end to end: quantized, compared with float32 on a folder of images, saved and loaded again.

python examples/timm_model.py photos/                                 # in folders by class, or without labels
python examples/timm_model.py photos/ --model mobilenetv3_small_100
"""

import argparse
from pathlib import Path

import timm
import torch

import dsconv
from dsconv.data import Preprocess, batches

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("data", type=Path, help="folder of images")
parser.add_argument("--model", default="resnet18", help="name in timm (%(default)s)")
parser.add_argument("--weights", choices=["default", "random"], default="default", help="those of timm, or none")
parser.add_argument("--images", type=int, default=500, help="use so many of the images (%(default)s)")
parser.add_argument("--size", type=int, default=224, help="of an image in pixels (%(default)s)")
parser.add_argument("--out", type=Path, default=Path("timm_model.safetensors"), help="file to write (%(default)s)")
options = parser.parse_args()

net = timm.create_model(options.model, pretrained=options.weights == "default").eval()
preprocess = Preprocess.from_timm(net).model_copy(update={"resize": options.size, "crop": (options.size,) * 2})

# With `extra`, signed activations, as of SiLU and linear bottlenecks, have an additional sign bit, except at 8 bits.
qnet = dsconv.quantize(net, dsconv.QuantConfig.preset("w4a4", activation_sign="extra"))
print(dsconv.summary(qnet))

# On images without labels there is no top-1; agreement, KL divergence and SQNR need none.
for name, network in {"W4A4": qnet, "W4A8": dsconv.quantize(net)}.items():
    found = dsconv.compare(net, network, options.data, preprocess=preprocess, limit=options.images, per_layer=False)
    print(f"{name}: same class {found.agreement:.1f} %, KL {found.kl:.4f} nats, logits {found.logit_sqnr_db:.1f} dB")

# A model built with timm directly has no name for the file: it is loaded into another one of the same class.
dsconv.save(qnet, options.out)
again = dsconv.load(options.out, timm.create_model(options.model).eval())

x, _ = next(iter(batches(options.data, preprocess=preprocess, batch_size=4)))
fast = dsconv.compile(again, x[:1])
print(fast.plan)
assert torch.equal(fast(x), dsconv.compile(qnet, x[:1])(x))
