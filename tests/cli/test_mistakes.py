"""A user's mistake gives one paragraph on stderr that states what to do, a non-zero exit code and no traceback."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

Cli = Callable[..., Any]
NET = "dsconv/digits_resnet"


def check_paragraph(stderr: str, *expected: str) -> None:
    errors = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and stderr.rstrip().endswith(errors[0]), stderr
    assert "Traceback" not in stderr
    for text in expected:
        assert text in errors[0], (text, errors[0])


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("torchvision/resnet5", ["no model 'resnet5'", "resnet50"]),
        ("timm/resnet5O", ["no model 'resnet5O'", "resnet50"]),
        ("dsconv/digits", ["digits_resnet"]),
        ("resnet50", ["torchvision/NAME", "path/to/file.py:factory"]),
        ("net.py", ["name the function of the file", "net.py:make"]),
        ("no/such/file.py:net", ["there is no file no/such/file.py"]),
        ("{factory}:ne", ["no model 'ne'", "net"]),
        ("{factory}:fails", ["fails() failed", "no such checkpoint"]),
        ("{factory}:not_a_model", ["not_a_model() returned a int"]),
        ("{factory}:net?wide=3", ["net() failed", "wide"]),
        ("{factory}:no_layers", ["no convolution"]),
        ("{factory}:nan", ["'2'", "NaN"]),
    ],
)
def test_models(model: str, expected: list[str], cli: Cli, tmp_path: Path, factory: Path) -> None:
    done = cli("quantize", model.format(factory=factory), "--out", tmp_path / "a", "--weights", "random")
    assert done.code == 1 and not done.stdout
    check_paragraph(done.stderr, *expected)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    "options",
    [
        "--weight-bits 9",
        "--weight-bits four",
        "--activation-bits 1",
        "--block-size 0",
        "--weight-rule best",
        "--preset paper --config x.json",
        "--no-such-option",
    ],
)
def test_wrong_usage_is_told_apart(options: str, cli: Cli, tmp_path: Path) -> None:
    done = cli("quantize", NET, "--out", tmp_path / "a", *options.split())
    assert done.code == 2 and not done.stdout
    assert options.split()[0] in done.stderr
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("--preset best", ["preset", "paper", "'best'"]),
        ("--override layer9.*=weight_bits:3", ["'layer9.*' matches no", "conv1"]),
        ("--override fc", ["PATTERN=SETTINGS", "'fc'"]),
        ("--override fc=weight_bits:11", ["overrides", "weight_bits", "11"]),
        ("--override fc=bits:3", ["unknown setting", "weight_bits"]),
        ("--first-layer {weight_bits:3}", ["first_layer", "JSON"]),
        ("--linear 8", ["linear", "weight_bits:8"]),
        ("--weight-scale kl", ["weight_shift"]),
        ("--config {here}/none.json", ["none.json", "No such file"]),
        ("--config {here}/binary.json", ["binary.json", "JSON"]),
        ("--config {here}/list.json", ["list.json", "names and values in JSON"]),
        ("--weights {here}/none.pt", ["there is no", "none.pt"]),
        ("--weights {here}/binary.json", ["binary.json", "state dictionary"]),
        ("--weights {here}/other.pt", ["do not fit DigitsResNet", "layer1.conv1.weight"]),
        ("--out {here}/list.json", ["list.json", "--force"]),
        ("--out {here}", ["got a folder"]),
        ("--out {here}/no/such/a", ["no/such", "does not exist: create it"]),
        # A folder cannot be below a file, even for root, who may write anywhere else.
        ("--out {here}/list.json/a", ["list.json", "written to"]),
    ],
)
def test_settings_weights_and_places(options: str, expected: list[str], cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "binary.json").write_bytes(b"\xff\x00\xff")
    (tmp_path / "list.json").write_text("[]")
    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "other.pt")
    before = sorted(os.listdir(tmp_path))
    arguments = [option.replace("{here}", str(tmp_path)) for option in options.split()]
    done = cli("quantize", NET, *([] if "--out" in arguments else ["--out", tmp_path / "a"]), *arguments)
    assert done.code == 1 and not done.stdout
    check_paragraph(done.stderr, *expected)
    assert sorted(os.listdir(tmp_path)) == before


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Return folders of images that are invalid in different ways."""
    for name in ("empty", "beyond", "all_broken"):
        (tmp_path / name).mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "beyond" / "1.png")
    (tmp_path / "beyond" / "labels.csv").write_text("file,class_index\n1.png,10\n")
    (tmp_path / "all_broken" / "1.png").write_text("no image")
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("{net} --data {here}/empty", ["holds no images", ".png"]),
        ("{net} --data {here}/none", ["does not exist"]),
        ("{net} --data {here}/beyond", ["1.png", "class index 10", "10 classes"]),
        ("{net} --data {here}/all_broken", ["no images", "1.png"]),
        ("{net} --data {here}/beyond --channels rgb", ["cannot run", "channels"]),
        ("{net} --data {here}/beyond --mean 1,2", ["mean must hold 1"]),
        ("{net} --data {here}/beyond --resize big", ["resize"]),
        ("{net} --data {here}/beyond --device nowhere", ["device", "nowhere"]),
        ("none.safetensors --data {here}/beyond", ["none.safetensors", "there is none"]),
        ("{here}/beyond/labels.csv --data {here}/beyond", ["not a complete safetensors file"]),
    ],
)
def test_evaluate(arguments: str, expected: list[str], cli: Cli, data: Path) -> None:
    done = cli("evaluate", *(part.format(net=NET, here=data) for part in arguments.split()))
    assert done.code == 1 and not done.stdout
    check_paragraph(done.stderr, *expected)


@pytest.mark.parametrize("options", ["--reference dsconv/digits_resnet", "--model dsconv/digits_resnet", "--limit 0"])
def test_evaluate_usage(options: str, cli: Cli, data: Path) -> None:
    assert cli("evaluate", NET, "--data", data / "beyond", *options.split()).code == 2


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("--threads 0", "--threads"),
        ("--threads 1,100000", "cores"),
        ("--batch-size 1;8", "--batch-size"),
        ("--against tensorrt", "openvino"),
        ("--size 8x", "--size"),
        ("--size 1x2x3x4", "--size"),
        ("--turns 2 --seconds 1", "--seconds"),
        ("--turns 1", "--turns"),
        ("--plot bench.jpgg", ".png"),
        ("--plot bench", ".png"),
        ("--preset paper --config x.json", "--config"),
    ],
)
def test_bench_usage(options: str, expected: str, cli: Cli) -> None:
    done = cli("bench", NET, *options.split())
    assert done.code == 2 and not done.stdout and expected in done.stderr


@pytest.mark.parametrize("options", ["--weights random", "--preset paper", "--config x.json"])
def test_bench_settings_beside_a_file_that_has_its_own(options: str, cli: Cli, quantized_file: Path) -> None:
    done = cli("bench", quantized_file, *options.split())
    assert done.code == 2 and "its own" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("{net} --data {here}/empty", ["holds no images"]),
        ("{net} --data {here}/all_broken", ["none of the", "all_broken"]),
        ("{net} --out {here}/beyond/labels.csv", ["labels.csv", "--force"]),
        ("{net} --plot {here}/no/such.png", ["does not exist: create it"]),
        ("{net} --size 3x8x8", ["cannot run on images of shape (1, 3, 8, 8)"]),
        ("none.safetensors", ["none.safetensors", "there is none"]),
    ],
)
def test_bench(arguments: str, expected: list[str], cli: Cli, data: Path) -> None:
    done = cli("bench", *(part.format(net=NET, here=data) for part in arguments.split()))
    assert done.code == 1 and not done.stdout
    check_paragraph(done.stderr, *expected)


def test_weights_beside_a_file_that_has_its_own(cli: Cli, data: Path, quantized_file: Path) -> None:
    assert cli("evaluate", quantized_file, "--data", data, "--weights", "random").code == 2


def test_class_folders_that_are_not_the_models(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "cat" / "1.png")
    done = cli("evaluate", NET, "--data", tmp_path)
    assert done.code == 0
    assert "warning: " in done.stderr and "1 class folders but the model 10" in done.stderr
    assert "UserWarning" not in done.stderr


def test_another_reference_than_the_original(cli: Cli, digits: Path, quantized_file: Path, factory: Path) -> None:
    done = cli("evaluate", quantized_file, "--data", digits, "--reference", f"{factory}:net")
    assert done.code == 1
    check_paragraph(done.stderr, "The reference has no layer 'conv1'")


def test_the_wrong_model_for_a_file(cli: Cli, digits: Path, quantized_file: Path, factory: Path) -> None:
    done = cli("evaluate", quantized_file, "--data", digits, "--model", f"{factory}:net")
    assert done.code == 1
    check_paragraph(done.stderr, "does not fit the model", "'conv1'")


@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
@pytest.mark.parametrize("command", ["inspect", "evaluate"])
def test_damaged_files(command: str, damage: str, cli: Cli, tmp_path: Path, quantized_file: Path, digits: Path) -> None:
    content = bytearray(quantized_file.read_bytes())
    content[-100] ^= 1
    file = tmp_path / "damaged.safetensors"
    file.write_bytes({"flip": content, "cut": content[:-100], "empty": b""}[damage])
    done = cli(command, file, *(["--data", digits] if command == "evaluate" else []))
    assert done.code == 1 and not done.stdout
    check_paragraph(done.stderr, "damaged.safetensors", "checksum" if damage == "flip" else "not a complete")


def test_in_a_process_of_its_own(dsconv_cli: Cli, tmp_path: Path) -> None:
    done = dsconv_cli("quantize", "torchvision/resnet5", "--out", tmp_path / "a")
    assert done.returncode == 1 and not done.stdout
    check_paragraph(done.stderr, "did you mean")


def test_a_missing_extra_is_named(dsconv_cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torchvision.py").write_text("raise ModuleNotFoundError(name='torchvision')")
    monkeypatch.delenv("PYTHONPATH", raising=False)
    done = dsconv_cli("quantize", "torchvision/resnet18", "--out", tmp_path / "a", env={"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 1
    check_paragraph(done.stderr, "pip install 'dsconv[zoo]'")


def test_a_bug_still_shows_where_it_is(dsconv_cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import dsconv.io\ndsconv.io.describe = lambda path: 1 / 0\n")
    done = dsconv_cli("inspect", tmp_path / "sitecustomize.py", env={"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 1
    assert "Traceback" in done.stderr and "ZeroDivisionError" in done.stderr


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("search {net} --out {tmp}/a", "expected a budget, got none"),
        ("search {net} --out {tmp}/a --effective-bits few", "--effective-bits"),
        (
            "search {net} --out {tmp}/a --effective-bits 4 --preset paper --config x.json",
            "one of --preset and --config",
        ),
        ("search {net} --out {tmp}/a --effective-bits 4 --plot {tmp}/b.foo", "expected a name that ends in one of"),
        ("sensitivity {net} --plot {tmp}/b.foo", "expected a name that ends in one of"),
        ("sensitivity {net} --reference {net}", "go with a quantized FILE"),
        ("sensitivity {file} --preset paper", "has its own settings"),
    ],
)
def test_wrong_usage_of_sensitivity_and_search(
    options: str, expected: str, cli: Cli, tmp_path: Path, quantized_file: Path
) -> None:
    done = cli(*options.format(net=NET, tmp=tmp_path, file=quantized_file).split())
    assert done.code == 2 and not done.stdout
    assert expected in " ".join(done.stderr.replace("│", " ").split())


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("search {net} --out {tmp}/a --effective-bits 1", ["effective_bits of 1 is less than the", "allow more"]),
        ("search {net} --out {tmp}/a --bytes 0", ["budget: bytes", "greater than 0"]),
        ("search {net} --out {tmp} --effective-bits 4", ["expected the name of a file"]),
        (
            "search {net} --out {tmp}/a --effective-bits 4 --plot {tmp}/no/b.png",
            ["no does not exist: create it"],
        ),
        ("search {net} --out {tmp}/a --effective-bits 4 --data {tmp}/none", ["does not exist"]),
        ("search {net} --out {tmp}/a --effective-bits 4 --config {tmp}/none.json", ["none.json"]),
        (
            "search {factory}:net --out {tmp}/a --effective-bits 4",
            ["does not state the preprocessing of its images", "--crop"],
        ),
        ("search {factory}:net --out {tmp}/a --effective-bits 4 --crop 8", ["cannot run on images", "3, 8, 8"]),
        ("sensitivity {factory}:net --channels gray", ["a crop or a size to resize to"]),
        ("sensitivity {factory}:no_layers --crop 8", ["no convolution"]),
        ("sensitivity {tmp}/none.safetensors", ["none.safetensors"]),
    ],
)
def test_mistakes_with_sensitivity_and_search(
    options: str, expected: list[str], cli: Cli, tmp_path: Path, factory: Path
) -> None:
    done = cli(*options.format(net=NET, tmp=tmp_path, factory=factory).split())
    assert done.code == 1 and not done.stdout
    check_paragraph(done.stderr, *expected)
    # The measurements for an impossible budget can be reused for another one, as the message states.
    assert os.listdir(tmp_path) == (["a.state"] if "a.state; run the same command with --resume" in done.stderr else [])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("{net} --out {tmp}/a", "--data"),
        ("{net} --data {digits}", "--out"),
        ("{net} --data {digits} --out {tmp}/a --memory 0", "--memory"),
        ("{net} --data {digits} --out {tmp}/a --seed -1", "--seed"),
        ("{net} --data {digits} --out {tmp}/a --reference {net}", "go with a quantized FILE"),
        ("{file} --data {digits} --out {tmp}/a --preset paper", "has its own settings"),
    ],
)
def test_wrong_usage_of_calibrate(
    options: str, expected: str, cli: Cli, tmp_path: Path, digits: Path, quantized_file: Path
) -> None:
    done = cli("calibrate", *options.format(net=NET, tmp=tmp_path, file=quantized_file, digits=digits).split())
    assert done.code == 2 and not done.stdout
    assert expected in " ".join(done.stderr.replace("│", " ").split())


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("{net} --data {tmp}/none", ["none", "does not exist"]),
        ("{net} --data {digits} --limit 3", ["at least 4", "got 3"]),
        ("{net} --data {digits} --resume", ["there is no calibration to resume", "leave out --resume"]),
        ("{net} --data {digits} --out {tmp}/there", ["there", "--force"]),
        ("{net} --data {digits} --out {tmp}/no/such/a", ["no/such", "does not exist: create it"]),
        ("{net} --data {digits} --channels rgb", ["cannot run on images", "3, 8, 8"]),
        ("{net} --data {digits} --device tpu9", ["'tpu9'"]),
        ("{factory}:net --data {digits}", ["does not state the preprocessing of its images", "--crop"]),
        ("{factory}:no_layers --data {digits} --crop 8", ["no convolution"]),
        ("{tmp}/there --data {digits}", ["there", "safetensors"]),
        (
            "{file} --data {digits} --reference {factory}:net --channels gray",
            ["reference: expected the float network", "'conv1'"],
        ),
        ("{net} --data {digits} --weights random --config {tmp}/none.json", ["none.json"]),
    ],
)
def test_mistakes_with_calibrate(
    options: str, expected: list[str], cli: Cli, tmp_path: Path, digits: Path, factory: Path, quantized_file: Path
) -> None:
    (tmp_path / "there").touch()
    places = {"net": NET, "tmp": tmp_path, "file": quantized_file, "digits": digits, "factory": factory}
    out = [] if "--out" in options else ["--out", tmp_path / "a"]
    done = cli("calibrate", *options.format(**places).split(), *out)
    assert done.code == 1 and not done.stdout
    check_paragraph(done.stderr, *expected)
    assert os.listdir(tmp_path) == ["there"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("{file} --data {tmp}/none", ["none", "does not exist"]),
        ("{file} --data {digits} --limit 3", ["at least 4", "got 3"]),
        ("{file} --data {digits} --resume", ["there is no training to resume", "leave out --resume"]),
        ("{file} --data {digits} --out {tmp}/there", ["there", "--force"]),
        ("{file} --data {digits} --recipe best", ["recipe: expected one of default, paper"]),
        ("{file} --data {digits} --lr -1", ["lr: "]),
        ("{file} --data {digits} --log {tmp}/no/a.csv", ["no", "does not exist"]),
        ("{file} --data {digits} --device tpu9", ["tpu9"]),
        ("{file} --data {digits} --reference {factory}:net --channels gray", ["teacher: expected", "'conv1'"]),
        ("{tmp}/there --data {digits}", ["there", "safetensors"]),
    ],
)
def test_mistakes_with_adapt(
    options: str, expected: list[str], cli: Cli, tmp_path: Path, digits: Path, factory: Path, quantized_file: Path
) -> None:
    (tmp_path / "there").touch()
    places = {"tmp": tmp_path, "file": quantized_file, "digits": digits, "factory": factory}
    out = [] if "--out" in options else ["--out", tmp_path / "a"]
    done = cli("adapt", *options.format(**places).split(), *out)
    assert done.code == 1 and not done.stdout
    check_paragraph(done.stderr, *expected)
    assert os.listdir(tmp_path) == ["there"]


def test_an_option_of_other_commands_names_them(cli: Cli, tmp_path: Path) -> None:
    done = cli("quantize", NET, "--data", "photos", "--out", tmp_path / "a")
    said = " ".join(done.stderr.replace("│", " ").split())
    assert done.code == 2
    assert "No such option: --data (an option of" in said
    assert "calibrate" in said
