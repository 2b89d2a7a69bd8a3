"""PaddleOCR's text recognizer, from its ONNX file to a compiled network with 4-bit weights.

python examples/read_text.py    # uses the file of the package rapidocr-onnxruntime
python examples/read_text.py --model ch_PP-OCRv4_rec_infer.onnx --lines 128
"""

import argparse
import importlib.util
import random
from pathlib import Path

import numpy as np
import onnx
import torch
from PIL import Image, ImageDraw, ImageFont

import dsconv


def packaged() -> Path | None:
    """Return the file of the recognizer in the package rapidocr-onnxruntime, if that is installed."""
    found = importlib.util.find_spec("rapidocr_onnxruntime")
    folder = None if found is None or found.origin is None else Path(found.origin).parent
    return None if folder is None else folder / "models" / "ch_PP-OCRv4_rec_infer.onnx"


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", type=Path, default=packaged(), help="ONNX file of the recognizer (%(default)s)")
parser.add_argument("--lines", type=int, default=64, help="lines of text to calibrate on, and to read (%(default)s)")
parser.add_argument("--out", type=Path, default=Path("read_text.safetensors"), help="file to write (%(default)s)")
options = parser.parse_args()
if options.model is None:
    parser.error("give --model, or pip install --no-deps rapidocr-onnxruntime")

WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "lazy", "dogs", "while", "bright", "cats", "2024", "No. 17")
WIDTH = 320


def line(chance: random.Random) -> str:
    """Return a line of two or three words."""
    return " ".join(chance.sample(WORDS, chance.choice((2, 3))))


def drawn(text: str, chance: random.Random) -> torch.Tensor:
    """Return the picture of a line as network input: (3, 48, WIDTH) in [-1, 1]."""
    picture = Image.new("RGB", (WIDTH, 48), tuple(chance.randrange(190, 256) for _ in range(3)))
    font = ImageFont.load_default(chance.randrange(20, 30))
    ImageDraw.Draw(picture).text((8, chance.randrange(4, 12)), text, fill=(20, 20, chance.randrange(90)), font=font)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).flip(0) / 127.5 - 1


def read(probabilities: torch.Tensor) -> list[str]:
    """Return the texts of (N, T, characters): the best at each position, without repetitions and blanks."""
    texts = []
    for places in probabilities.argmax(2).tolist():
        kept = [c for c, before in zip(places, [0, *places], strict=False) if c not in (0, before)]
        texts.append("".join(characters[c] for c in kept))
    return texts


chance = random.Random(0)
texts = [line(chance) for _ in range(2 * options.lines)]
pictures = torch.stack([drawn(text, chance) for text in texts])
seen, held_back = pictures[: options.lines], pictures[options.lines :]
# The file lists the characters that the network knows; the first is the blank, the last the space.
stated = {entry.key: entry.value for entry in onnx.load(options.model).metadata_props}
characters = ["", *stated["character"].splitlines(), " "]

net = dsconv.from_onnx(options.model)
networks = {"float": net, "quantized": dsconv.quantize(net)}
networks["calibrated"] = dsconv.calibrate(networks["quantized"], net, seen)
dsconv.save(networks["calibrated"], options.out)
# From here on the ONNX file is not needed.
networks["loaded, compiled"] = dsconv.compile(dsconv.load(options.out), held_back[:8])

right = texts[options.lines :]
with torch.inference_mode():
    for name, network in networks.items():
        found = [text for batch in held_back.split(8) for text in read(network(batch))]
        same = sum(a == b for a, b in zip(found, right, strict=True))
        print(f"{name}: {same} of {len(right)} lines read right, such as {found[0]!r}")
print(f"{options.model.name}: {options.model.stat().st_size / 1e6:.2f} MB, {options.out}: "
      f"{options.out.stat().st_size / 1e6:.2f} MB")  # fmt: skip
