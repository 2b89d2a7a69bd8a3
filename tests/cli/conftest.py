import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from PIL import Image

import dsconv
from dsconv import zoo
from dsconv.cli import main
from dsconv.demo import load_digits

IMAGES = 60


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with 60 of the held-out digits as PNG files, and their labels."""
    folder = tmp_path_factory.mktemp("digits")
    images, labels = load_digits("test")
    rows = ["file,class_index"]
    for i in range(IMAGES):
        grey = (images[i, 0] * 255).round().byte().numpy()
        Image.fromarray(grey).save(folder / f"{i}.png")
        rows.append(f"{i}.png,{labels[i]}")
    (folder / "labels.csv").write_text("\n".join(rows))
    return folder


@pytest.fixture(scope="session")
def quantized_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a file of the digits network with the preset ``paper``."""
    network = dsconv.quantize(zoo.build("dsconv/digits_resnet"), "paper")
    return dsconv.save(network, tmp_path_factory.mktemp("files") / "digits.safetensors")


@pytest.fixture(scope="session")
def factory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a user's file of models, valid and invalid ones."""
    file = tmp_path_factory.mktemp("factory") / "mine.py"
    file.write_text(
        "import sys, time\n"
        "from torch import nn\n"
        "def net(width=8):\n"
        "    return nn.Sequential(nn.Conv2d(1, width, 3), nn.ReLU(), nn.Conv2d(width, 10, 3),\n"
        "                         nn.AdaptiveAvgPool2d(1), nn.Flatten())\n"
        "def swish():\n"
        "    model = net()\n"
        "    model[1] = nn.SiLU()\n"
        "    return model\n"
        "def nan():\n"
        "    model = net()\n"
        "    nn.init.constant_(model[2].weight, float('nan'))\n"
        "    return model\n"
        "def no_layers(): return nn.ReLU()\n"
        "def fails_in_torchvision():\n"
        "    from torchvision.models import alexnet\n"
        "    model = alexnet()\n"
        "    del model.features\n"
        "    return model\n"
        "class Fails(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.net = net()\n"
        "    def forward(self, x):\n"
        "        return self.net(x).missing\n"
        "def fails(): raise KeyError('no such checkpoint')\n"
        "def not_a_model(): return 3\n"
        "class Slow(nn.Module):\n"
        "    def forward(self, x):\n"
        "        print('one batch', file=sys.stderr, flush=True)\n"
        "        time.sleep(0.2)\n"
        "        return x.flatten(1)[:, :10]\n"
        "def waits():\n"
        "    print('waiting', file=sys.stderr, flush=True)\n"
        "    time.sleep(60)\n"
    )
    return file


class Done(NamedTuple):
    code: int
    stdout: str
    stderr: str


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """Run the command line in this process, which is faster than ``dsconv_cli``."""

    def run(*arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["dsconv", *map(str, arguments)])
        monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
        monkeypatch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit) as stop:
            main()
        message = stop.value.code
        stdout, stderr = capsys.readouterr()
        return Done(message, stdout, stderr) if isinstance(message, int) else Done(1, stdout, f"{stderr}{message}\n")

    return run
