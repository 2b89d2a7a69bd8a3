"""The order of class folders is printed, can be given, and is the same for every command that evaluates."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dsconv.demo import load_digits

Cli = Callable[..., Any]
NET = "dsconv/digits_resnet"
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COMMANDS = {
    "evaluate": (),
    "tradeoff": (),
    "report": ("--sensitivity-images", "0", "--runs", "0", "--out", "a.html"),
    "export": ("--out", "a.onnx"),
}


def folders(path: Path, names: list[str] | tuple[str, ...]) -> Path:
    """Write held-out digits to folders with these names."""
    images, labels = load_digits("test")
    for label, name in enumerate(names):
        (path / name).mkdir(parents=True)
        for i in (labels == label).nonzero()[:4].flatten().tolist():
            Image.fromarray((images[i, 0] * 255).round().byte().numpy()).save(path / name / f"{i}.png")
    return path


@pytest.fixture
def words(tmp_path: Path) -> Path:
    return folders(tmp_path / "words", NAMES)


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    file = tmp_path / "classes.txt"
    file.write_text("\n".join(NAMES) + "\n")
    return file


@pytest.mark.parametrize("first", [0, 1, 5])
def test_numbered_class_folders_are_in_the_order_of_the_numbers(first: int, cli: Cli, tmp_path: Path) -> None:
    data = folders(tmp_path, [str(first + i) for i in range(10)])
    done = cli("evaluate", NET, "--data", data, "--json")
    assert done.code == 0 and json.loads(done.stdout)["top1"] >= 90
    assert f"class folders by their numbers: {first}, {first + 1}, {first + 2}, ..., {first + 9}\n" in done.stderr


def test_class_folders_with_other_names_are_sorted_as_text(cli: Cli, words: Path) -> None:
    done = cli("evaluate", NET, "--data", words, "--json")
    assert done.code == 0 and json.loads(done.stdout)["top1"] < 50
    assert "class folders by their names as text: eight, five, four, ..., zero\n" in done.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_a_file_of_classes_gives_the_order(
    command: str, cli: Cli, words: Path, classes: Path, quantized_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if command == "export":
        pytest.importorskip("onnxscript")
    monkeypatch.chdir(words.parent)
    done = cli(command, quantized_file, "--data", words, "--classes", classes, "--json", *COMMANDS[command])
    assert done.code == 0, done.stderr
    found = json.loads(done.stdout)
    figures = {
        "evaluate": lambda: found["top1"],
        "tradeoff": lambda: found["networks"][0]["top1"],
        "report": lambda: found["accuracy"]["top1"],
        "export": lambda: found["comparison"]["reference"]["top1"],
    }[command]
    assert figures() >= 90
    assert "class folders as given: zero, one, two, ..., nine\n" in done.stderr


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "classes.txt: expected names of classes, one per line, got an empty file"),
        ("zero\n\none\n", "classes.txt, line 2: expected the name of a class, got a blank line"),
        ("zero\none\n\n", "classes.txt, line 3: expected the name of a class, got a blank line"),
        ("zero\none\n zero\n", "classes.txt, line 3: 'zero' is already on line 1"),
        ("\n".join(NAMES[:9]), "sub-folder nine of"),
        ("\udcff", "expected names of classes as UTF-8 text"),
    ],
)
def test_mistakes_in_a_file_of_classes(
    command: str,
    text: str,
    expected: str,
    cli: Cli,
    words: Path,
    classes: Path,
    quantized_file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(words.parent)
    classes.write_bytes(text.encode("utf-8", "surrogateescape"))
    done = cli(command, quantized_file, "--data", words, "--classes", classes, *COMMANDS[command])
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.code == 1 and not done.stdout and len(errors) == 1 and expected in errors[0]


@pytest.mark.parametrize("command", ["evaluate", "tradeoff", "report"])
def test_more_names_than_outputs_are_a_mistake(
    command: str, cli: Cli, words: Path, classes: Path, quantized_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(words.parent)
    classes.write_text("\n".join([*NAMES, "ten"]))
    done = cli(command, quantized_file, "--data", words, "--classes", classes, *COMMANDS[command])
    assert done.code == 1 and not done.stdout
    assert "error: classes: expected 10 names, one for each output of the model in their order, got 11" in done.stderr


def test_a_file_of_classes_may_come_from_another_system(cli: Cli, words: Path, classes: Path) -> None:
    classes.write_bytes(("\ufeff" + "\r\n".join(NAMES) + "\r\n").encode())
    assert json.loads(cli("evaluate", NET, "--data", words, "--classes", classes, "--json").stdout)["top1"] >= 90


@pytest.mark.parametrize("command", ["tradeoff", "export"])
def test_classes_without_images_are_wrong_usage(command: str, cli: Cli, classes: Path, quantized_file: Path) -> None:
    done = cli(command, quantized_file, "--classes", classes, *COMMANDS[command])
    assert done.code == 2 and "--classes" in done.stderr and "--data" in done.stderr


def test_links_that_lead_nowhere_are_told(cli: Cli, tmp_path: Path) -> None:
    data = folders(tmp_path, [str(i) for i in range(10)])
    (data / "3" / "gone.png").symlink_to("nowhere")
    (data / "3" / "up").symlink_to("..")
    done = cli("evaluate", NET, "--data", data, "--json")
    found = json.loads(done.stdout)
    assert found["images"] == 40 and found["top1"] >= 90
    assert [Path(entry["path"]).name for entry in found["broken"]] == ["gone.png"]
