"""Train the demo's network and write the two files that are shipped in ``dsconv.demo``.

    python scripts/train_demo.py               # about a minute on one core; replaces the shipped files
    python scripts/train_demo.py --out DIR     # the same files, somewhere else
    python scripts/train_demo.py --check       # evaluates the shipped weights on the shipped test digits

Data: the test part of "Optical Recognition of Handwritten Digits" (E. Alpaydin and C. Kaynak, UCI Machine Learning
Repository, doi 10.24432/C50P49, CC BY 4.0): 1,797 grey 8x8 images, as ``sklearn.datasets.load_digits`` ships them.
Split: stratified by class with a fixed seed, 540 test and 1,257 training digits, of which 256 also ship, unlabelled.
The network of the last epoch is kept and the test digits decide nothing. One thread, fixed seeds and deterministic
algorithms: the same versions on the same kind of CPU give the same files, byte for byte.

Needs ``torch``, ``safetensors`` and ``scikit-learn``, and ``dsconv`` installed or on ``PYTHONPATH``.
"""

import argparse
import sys
from importlib.resources import as_file, files
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F

from dsconv.demo import DigitsResNet, load_digits, load_network
from dsconv.files import replacing

SEED = 0
TEST_IMAGES, UNLABELLED_IMAGES = 540, 256
BATCH = 64
SOURCE = "E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI ML Repository, CC BY 4.0"


def split_digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return training images and labels, test images and labels: uint8 (N, 1, 8, 8) in 0..16 and int64 (N,)."""
    from sklearn import datasets, model_selection  # type: ignore[import-untyped]

    digits = datasets.load_digits()
    images = torch.from_numpy(digits.images).to(torch.uint8).unsqueeze(1)
    labels = torch.from_numpy(digits.target).long()
    train, test = model_selection.train_test_split(
        torch.arange(len(labels)).numpy(), test_size=TEST_IMAGES, stratify=digits.target, random_state=SEED
    )
    return images[train], labels[train], images[test], labels[test]


def augment(images: Tensor) -> Tensor:
    """Shift each image by at most one pixel in each direction and add a little noise."""
    count, side = images.shape[0], images.shape[-1]
    windows = F.pad(images, (1, 1, 1, 1)).unfold(2, side, 1).unfold(3, side, 1)
    shifted = windows[torch.arange(count), :, torch.randint(3, (count,)), torch.randint(3, (count,))]
    return shifted + 0.03 * torch.randn_like(shifted)


def train(images: Tensor, labels: Tensor, epochs: int) -> DigitsResNet:
    """Return a ``DigitsResNet`` trained on float32 images in 0..1."""
    network = DigitsResNet()
    steps = epochs * -(-len(images) // BATCH)
    optimizer = torch.optim.SGD(network.parameters(), momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=steps)
    for epoch in range(epochs):
        total = 0.0
        for batch in torch.split(torch.randperm(len(images)), BATCH):
            loss = F.cross_entropy(network(augment(images[batch])), labels[batch])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            total += loss.item() * len(batch)
        if (epoch + 1) % 10 == 0 or epoch + 1 == epochs:
            print(f"epoch {epoch + 1}/{epochs}: training loss {total / len(images):.4f}", flush=True)
    return network.eval()


@torch.inference_mode()
def correct(network: nn.Module, images: Tensor, labels: Tensor) -> int:
    """Return the number of images that the network classifies correctly."""
    return int((network(images).argmax(1) == labels).sum())


def report(right: int, count: int) -> str:
    return f"{right} of {count} test digits ({100 * right / count:.2f} %)"


def write(path: Path, tensors: dict[str, Tensor], key: str, value: str) -> None:
    # Only one metadata entry: safetensors writes several in no fixed order, and the file would not be reproducible.
    with replacing(path) as beside:
        beside.write_bytes(save({name: tensor.contiguous() for name, tensor in tensors.items()}, {key: value}))
    print(f"{path}: {path.stat().st_size:,} bytes")


def check(package: Path) -> int:
    """Return 0 if the shipped weights classify as many shipped test digits correctly as their file states, else 1."""
    with safe_open(package / "digits_resnet.safetensors", "pt") as file:
        claimed = int(file.metadata()["test_correct"])
    images, labels = load_digits("test")
    right = correct(load_network(), images, labels)
    print(f"measured {report(right, len(labels))}; the file claims {claimed}")
    return int(right != claimed)


def main() -> int:
    parser = argparse.ArgumentParser(description="Train the demo's network, or check the shipped one.")
    parser.add_argument("--check", action="store_true", help="evaluate the shipped weights instead of training")
    parser.add_argument("--epochs", type=int, default=60, help="default: %(default)s, as shipped")
    parser.add_argument("--out", type=Path, help="folder for the two files (default: the package's own)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(SEED)
    with as_file(files("dsconv.demo")) as package:
        if arguments.check:
            return check(package)
        out: Path = arguments.out or package
        out.mkdir(parents=True, exist_ok=True)
        train_images, train_labels, test_images, test_labels = split_digits()
        network = train(train_images.float() / 16, train_labels, arguments.epochs)
        right = correct(network, test_images.float() / 16, test_labels)
        print(report(right, len(test_labels)))
        write(out / "digits_resnet.safetensors", network.state_dict(), "test_correct", str(right))
        digits = {
            "test_images": test_images,
            "test_labels": test_labels,
            "unlabelled_images": train_images[:UNLABELLED_IMAGES],
        }
        write(out / "digits.safetensors", digits, "source", SOURCE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
