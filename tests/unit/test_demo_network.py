"""The demo's assets: small, with the stated accuracy and disjoint data splits, made by the script in the repository."""

import hashlib
import importlib.util
import os
import subprocess
import sys
from importlib.resources import files
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors import safe_open

from dsconv.demo import DigitsResNet, digits_resnet, load_digits, load_network
from dsconv.errors import DataError

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "train_demo.py"
PACKAGE = Path(str(files("dsconv.demo")))
ASSETS = ["digits.safetensors", "digits_resnet.safetensors"]


def run(*arguments: str, script: bool = True) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *([str(SCRIPT)] if script else []), *arguments]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


@pytest.fixture(scope="module")
def training() -> ModuleType:
    pytest.importorskip("sklearn", reason="scikit-learn is not installed: the digits cannot be compared with its own")
    spec = importlib.util.spec_from_file_location("train_demo", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def claimed_correct(path: Path) -> int:
    with safe_open(path, "pt") as file:
        return int(file.metadata()["test_correct"])


def test_shipped_weights_reach_the_accuracy_their_file_claims() -> None:
    images, labels = load_digits("test")
    with torch.inference_mode():
        right = int((load_network()(images).argmax(1) == labels).sum())
    assert right == claimed_correct(PACKAGE / "digits_resnet.safetensors")
    assert right / len(labels) >= 0.985


def test_check_confirms_the_shipped_files() -> None:
    result = run("--check")
    assert result.returncode == 0, result.stderr
    assert str(claimed_correct(PACKAGE / "digits_resnet.safetensors")) in result.stdout


def test_check_rejects_a_wrong_claim(training: ModuleType, tmp_path: Path) -> None:
    wrong = {"x": torch.zeros(1)}
    training.write(tmp_path / "digits_resnet.safetensors", wrong, "test_correct", "540")
    assert training.check(tmp_path) == 1


def test_assets_take_at_most_one_megabyte() -> None:
    assert sum((PACKAGE / name).stat().st_size for name in ASSETS) <= 1_000_000


def test_digits_have_the_documented_shape_range_and_classes() -> None:
    images, labels = load_digits("test")
    unlabelled, nothing = load_digits("unlabelled")
    assert nothing is None
    assert images.shape == (540, 1, 8, 8) and unlabelled.shape == (256, 1, 8, 8)
    assert labels.dtype == torch.int64 and labels.bincount(minlength=10).min() >= 50
    for part in (images, unlabelled):
        assert part.dtype == torch.float32
        assert part.min() == 0 and part.max() == 1
        assert torch.equal(part * 16, (part * 16).round())


def test_no_image_is_in_both_splits() -> None:
    test, unlabelled = ({image.numpy().tobytes() for image in load_digits(s)[0]} for s in ("test", "unlabelled"))
    assert len(test) == 540 and len(unlabelled) == 256
    assert not test & unlabelled


def test_test_digits_are_scikit_learns_and_none_was_trained_on(training: ModuleType) -> None:
    train_images, train_labels, test_images, test_labels = training.split_digits()
    assert len(train_labels) == 1257
    images, labels = load_digits("test")
    assert torch.equal(images * 16, test_images.float()) and torch.equal(labels, test_labels)
    trained = {image.numpy().tobytes() for image in train_images}
    assert not trained & {image.numpy().tobytes() for image in test_images}
    assert {image.numpy().tobytes() for image in (load_digits("unlabelled")[0] * 16).to(torch.uint8)} <= trained


def test_augmentation_moves_an_image_by_at_most_one_pixel(training: ModuleType) -> None:
    torch.manual_seed(0)
    images = torch.zeros(64, 1, 8, 8)
    images[:, :, 4, 4] = 10
    where = training.augment(images).flatten(1).argmax(1)
    offsets = {(int(i) // 8 - 4, int(i) % 8 - 4) for i in where}
    assert offsets == {(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)}


def test_loading_needs_no_scikit_learn() -> None:
    code = (
        "import sys; sys.modules['sklearn'] = None\n"
        "from dsconv.demo import load_digits, load_network\n"
        "print(tuple(load_network()(load_digits('unlabelled')[0][:2]).shape))"
    )
    result = run("-c", code, script=False)
    assert (result.returncode, result.stdout.strip()) == (0, "(2, 10)"), result.stderr


def test_training_twice_gives_the_same_bytes(training: ModuleType, tmp_path: Path) -> None:
    digests = []
    for name in ("first", "second"):
        result = run("--epochs", "1", "--out", str(tmp_path / name))
        assert result.returncode == 0, result.stderr
        assert sorted(path.name for path in (tmp_path / name).iterdir()) == ASSETS
        digests.append([hashlib.sha256((tmp_path / name / asset).read_bytes()).hexdigest() for asset in ASSETS])
    assert digests[0] == digests[1]


def test_the_factory_gives_trained_or_random_weights_in_eval_mode() -> None:
    trained, random = digits_resnet(), digits_resnet(pretrained=False)
    assert isinstance(trained, DigitsResNet) and not trained.training and not random.training
    assert not torch.equal(trained.conv1.weight, random.conv1.weight)
    assert all(torch.equal(a, b) for a, b in zip(trained.parameters(), load_network().parameters(), strict=True))


def test_an_unknown_split_is_an_error_that_names_the_splits() -> None:
    with pytest.raises(DataError, match='expected "test" or "unlabelled", got \'train\''):
        load_digits("train")  # type: ignore[call-overload]
