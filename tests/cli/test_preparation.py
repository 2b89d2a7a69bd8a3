"""Preprocessing on the command line: stated once, stored in files, overridden, and an error if it is unknown."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import dsconv
from dsconv import zoo
from dsconv.data import Preprocess

Cli = Callable[..., Any]
# The digits are read as the demo network expects them: white is 1.
STATED = Preprocess(resize=(8, 8), channels="gray")
OPTIONS = ("--resize", "8x8", "--channels", "gray")
UNKNOWN = "does not state the preprocessing of its images: give --resize, --crop, --mean, --std, --scale or --channels"


@pytest.fixture(scope="module")
def mine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a user's file of models, one of which states its preprocessing."""
    file = tmp_path_factory.mktemp("mine") / "mine.py"
    file.write_text(
        "import dsconv\n"
        "def silent():\n"
        "    net = dsconv.demo.digits_resnet()\n"
        "    assert dsconv.zoo.preprocess_of(net) is None\n"
        "    return net\n"
        "def offering():\n"
        "    net = silent()\n"
        "    net.preprocess = dict(resize=(8, 8), channels='gray')\n"
        "    return net\n"
    )
    return file


@pytest.fixture(scope="module")
def unstated(tmp_path_factory: pytest.TempPathFactory, mine: Path) -> Path:
    """Return a quantized file that states no preprocessing."""
    qnet = dsconv.quantize(zoo.build(f"{mine}:silent"), "paper")
    return dsconv.save(qnet, tmp_path_factory.mktemp("files") / "unstated.safetensors")


def test_what_quantize_is_told_is_in_the_file_and_in_all_that_is_made_from_it(
    cli: Cli, mine: Path, digits: Path, tmp_path: Path
) -> None:
    model = ("--model", f"{mine}:silent")
    file, calibrated, adapted = (tmp_path / f"{name}.safetensors" for name in ("a", "b", "c"))
    done = cli("quantize", f"{mine}:silent", *OPTIONS, "--out", file, "--json")
    assert done.code == 0 and f"preprocessing of images: {STATED}" in done.stderr
    assert json.loads(done.stdout)["preprocess"] == STATED.model_dump(mode="json")
    assert f"preprocessing of images: {STATED}" in cli("inspect", file).stdout

    evaluated = cli("evaluate", file, *model, "--data", digits, "--json")
    assert evaluated.code == 0 and f"images of {digits}: {STATED}\n" in evaluated.stderr
    figures = json.loads(evaluated.stdout)
    assert figures["preprocess"] == STATED.model_dump(mode="json") and figures["top1"] > 95

    assert cli("calibrate", file, *model, "--data", digits, "--limit", 16, "--out", calibrated).code == 0
    short = ("--steps", 1, "--batch-size", 4)
    assert cli("adapt", calibrated, *model, "--data", digits, "--limit", 16, *short, "--out", adapted).code == 0
    for path in (calibrated, adapted):
        assert json.loads(cli("inspect", path, "--json").stdout)["preprocess"] == STATED.model_dump(mode="json")


def test_what_calibrate_is_told_goes_into_its_file(
    cli: Cli, mine: Path, unstated: Path, digits: Path, tmp_path: Path
) -> None:
    out = tmp_path / "a.safetensors"
    for source in ((f"{mine}:silent",), (unstated, "--model", f"{mine}:silent")):
        done = cli("calibrate", *source, "--data", digits, "--limit", 16, *OPTIONS, "--out", out, "--force")
        assert done.code == 0, done.stderr
        assert json.loads(cli("inspect", out, "--json").stdout)["preprocess"] == STATED.model_dump(mode="json")


def test_the_file_wins_over_its_original_and_an_option_over_single_fields_of_it(
    cli: Cli, digits: Path, tmp_path: Path
) -> None:
    file = tmp_path / "a.safetensors"
    assert cli("quantize", "dsconv/digits_resnet", "--mean", ".25", "--preset", "paper", "--out", file).code == 0
    own = Preprocess(resize=(8, 8), channels="gray", mean=0.25).model_dump(mode="json")
    commands = {
        "evaluate": ("evaluate", file, "--reference", "dsconv/digits_resnet"),
        "sensitivity": ("sensitivity", file, "--limit", 2),
        "calibrate": ("calibrate", file, "--out", tmp_path / "b", "--force", "--limit", 16),
    }
    for name, command in commands.items():
        found = json.loads(cli(*command, "--data", digits, "--json").stdout)
        assert found["preprocess"] == own, name
        found = json.loads(cli(*command, "--data", digits, "--json", "--std", "0.5").stdout)
        assert found["preprocess"] == own | {"std": [0.5]}, name


def test_a_file_of_models_offers_it(cli: Cli, mine: Path, digits: Path, tmp_path: Path) -> None:
    done = cli("evaluate", f"{mine}:offering", "--data", digits, "--json")
    assert done.code == 0, done.stderr
    assert json.loads(done.stdout)["preprocess"] == STATED.model_dump(mode="json")
    assert cli("quantize", f"{mine}:offering", "--out", tmp_path / "a.safetensors").code == 0
    header = json.loads(cli("inspect", tmp_path / "a.safetensors", "--json").stdout)
    assert header["preprocess"] == STATED.model_dump(mode="json")


def test_quantize_says_what_later_commands_will_miss(cli: Cli, mine: Path, tmp_path: Path) -> None:
    done = cli("quantize", f"{mine}:silent", "--out", tmp_path / "a.safetensors")
    assert done.code == 0 and f"note: {mine}:silent {UNKNOWN}" in done.stderr


COMMANDS = {
    "evaluate": "evaluate {source} --data {data}",
    "tradeoff": "tradeoff {file} --model {model} --data {data}",
    "bench": "bench {source} --data {data} --size 1x8x8 --against torch --turns 2",
    "report": "report {file} --model {model} --data {data} --out {tmp}/a",
    "export": "export {file} --model {model} --data {data} --size 1x8x8 --out {tmp}/a",
    "export int8": "export {file} --model {model} --style int8 --size 1x8x8 --out {tmp}/a",
    "sensitivity": "sensitivity {source} --data {data}",
    "sensitivity to noise": "sensitivity {source}",
    "optimize": "optimize {model} --data {data} --out {tmp}/a",
    "optimize on noise": "optimize {model} --out {tmp}/a",
    "search": "search {model} --data {data} --effective-bits 4 --out {tmp}/a",
    "search with noise": "search {model} --effective-bits 4 --out {tmp}/a",
    "calibrate": "calibrate {source} --data {data} --out {tmp}/a",
    "adapt": "adapt {file} --model {model} --data {data} --out {tmp}/a",
}


@pytest.mark.parametrize("source", ["{model}", "{file} --model {model}"])
@pytest.mark.parametrize("command", COMMANDS)
def test_where_it_is_unknown_every_command_refuses_in_the_same_words(
    command: str, source: str, cli: Cli, mine: Path, unstated: Path, digits: Path, tmp_path: Path
) -> None:
    places = {"model": f"{mine}:silent", "file": unstated, "data": digits, "tmp": tmp_path}
    words = COMMANDS[command].replace("{source}", source).format(**places).split()
    if "onnx" in command or command.startswith("export"):
        pytest.importorskip("onnxruntime", reason="needs the extra 'onnx'")
    done = cli(*words)
    assert done.code == 1 and not done.stdout
    (error,) = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    name = words[1]
    assert error == (f"error: {name} {UNKNOWN} as in its training; options left out keep their defaults"), error
    assert not list(tmp_path.iterdir())


def test_a_file_that_cannot_know_is_refused_before_anything_is_loaded(
    cli: Cli, unstated: Path, digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "dsconv.io", None)
    done = cli("evaluate", unstated, "--data", digits)
    assert done.code == 1 and UNKNOWN in done.stderr and "loading" not in done.stderr


def test_any_option_states_it_with_defaults_for_the_rest(cli: Cli, mine: Path, digits: Path) -> None:
    done = cli("evaluate", f"{mine}:silent", "--data", digits, "--channels", "gray", "--json")
    assert done.code == 0, done.stderr
    assert json.loads(done.stdout)["preprocess"] == Preprocess(channels="gray").model_dump(mode="json")


def test_export_and_bench_prepare_images_as_they_are_told(
    cli: Cli, mine: Path, unstated: Path, digits: Path, tmp_path: Path
) -> None:
    for package in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(package, reason="needs the extra 'onnx'")
    import onnx

    model, out = ("--model", f"{mine}:silent"), tmp_path / "a.onnx"
    options = ("--channels", "gray", "--scale", "255", "--mean", "64", "--std", "64")
    done = cli("export", unstated, *model, "--data", digits, *options, "--size", "8", "--out", out, "--json")
    assert done.code == 0, done.stderr
    stated = Preprocess(resize=(8, 8), channels="gray", scale=255, mean=64, std=64)
    assert f"images of {digits}: {stated}\n" in done.stderr
    found = json.loads(done.stdout)
    assert found["preprocess"] == stated.model_dump(mode="json") and found["comparison"]["images"] == 32
    (entry,) = (prop for prop in onnx.load(out).metadata_props if prop.key == "dsconv.preprocess")
    assert Preprocess(**json.loads(entry.value)) == stated

    short = ("--against", "torch", "--turns", 2, "--limit", 3, "--json")
    done = cli("bench", unstated, *model, "--data", digits, *options, "--resize", "8x8", *short)
    assert done.code == 0, done.stderr
    assert f"images of {digits}: {stated}\n" in done.stderr
    assert json.loads(done.stdout)["networks"][0]["calibration"] == "3 given images"


def test_a_folder_of_the_hub_is_a_file_to_every_command(cli: Cli, digits: Path, tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub", reason="needs the extra 'hub'")
    qnet = dsconv.quantize(zoo.build("dsconv/digits_resnet"), preprocess={"mean": 0.125})
    dsconv.nn.DSConvModel(qnet).save_pretrained(tmp_path / "hub")
    assert "mean 0.125" in cli("inspect", tmp_path / "hub").stdout
    done = cli("evaluate", tmp_path / "hub", "--data", digits, "--json")
    assert done.code == 0, done.stderr
    assert json.loads(done.stdout)["preprocess"]["mean"] == [0.125]


def test_noise_is_prepared_as_the_network_says(cli: Cli) -> None:
    done = cli("sensitivity", "dsconv/digits_resnet", "--limit", "2", "--preset", "paper")
    assert done.code == 0 and f"noise: {STATED}\n" in done.stderr


def test_the_report_says_how_images_were_prepared(cli: Cli, quantized_file: Path, digits: Path, tmp_path: Path) -> None:
    pytest.importorskip("jinja2", reason="needs the extra 'report'")
    options = ("--data", digits, "--mean", "0.125", "--runs", 0, "--sensitivity-images", 0)
    assert cli("report", quantized_file, *options, "--out", tmp_path / "a.html").code == 0
    assert (
        f"Preprocessing of images: {Preprocess(**{**STATED.model_dump(), 'mean': 0.125})}."
        in (tmp_path / "a.html").read_text()
    )


def test_two_options_of_one_size_are_refused(cli: Cli, quantized_file: Path, tmp_path: Path) -> None:
    done = cli("export", quantized_file, "--size", "8", "--crop", "8", "--out", tmp_path / "a.onnx")
    assert done.code == 2 and "--size" in done.stderr and "--crop" in done.stderr


def test_files_that_say_different_things_are_not_compared_on_the_same_images(
    cli: Cli, quantized_file: Path, digits: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.safetensors"
    assert cli("quantize", "dsconv/digits_resnet", "--preset", "paper", "--mean", "0.5", "--out", other).code == 0
    tradeoff = ("tradeoff", quantized_file, other, "--data", digits, "--limit", 2)
    done = cli(*tradeoff)
    assert done.code == 1 and str(other) in done.stderr and "different preprocessing" in done.stderr
    assert "mean 0, " in done.stderr and "mean 0.5, " in done.stderr
    assert cli(*tradeoff, "--mean", "0.5").code == 0


@pytest.mark.slow
def test_an_int8_file_of_a_real_network_keeps_its_accuracy(cli: Cli, shared: Path, nets: Any, tmp_path: Path) -> None:
    """Check SqueezeNet of Caffe, which reads BGR of 0 to 255: with plain RGB, its int8 file would have no accuracy."""
    for package in ("onnx", "onnxruntime", "onnxscript", "torchvision"):
        pytest.importorskip(package, reason="needs the extras 'onnx' and 'zoo'")
    from dsconv.onnx import OnnxNetwork

    (tmp_path / "net.py").write_text(
        f"import sys\nsys.path.insert(0, {str(shared)!r})\nimport nets\n"
        "def squeezenet(): return nets.load('squeezenet1_1')\n"
    )
    model, file, out = f"{tmp_path}/net.py:squeezenet", tmp_path / "a.safetensors", tmp_path / "a.onnx"
    caffe = ("--crop", "224", "--channels", "bgr", "--scale", "255", "--mean", "104,117,123")
    assert cli("quantize", model, "--out", file, *caffe).code == 0
    data = shared / "data" / "imagenet_unlabelled"
    export = ("export", file, "--model", model, "--style", "int8", "--data", data, "--limit", "16", "--out", out)
    assert cli(*export).code == 0
    validation = tmp_path / "validation"
    validation.mkdir()
    rows = (shared / "data" / "imagenet_val" / "labels.csv").read_text().splitlines()
    for row in rows[1:129]:
        name = row.rpartition(",")[0]
        (validation / name).symlink_to(shared / "data" / "imagenet_val" / name)
    (validation / "labels.csv").write_text("\n".join(rows[:129]))
    exported = OnnxNetwork(out)
    assert exported.preprocess is not None and exported.preprocess.channels == "bgr"
    top1 = dsconv.evaluate(exported, validation).top1
    original = dsconv.evaluate(nets.load("squeezenet1_1"), validation, preprocess=exported.preprocess).top1
    assert top1 is not None and original is not None
    assert original > 60 and top1 > original - 6
