"""Commands, used correctly."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import interrupts
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import dsconv
from dsconv import zoo
from dsconv.demo import load_digits, load_network
from dsconv.ops import native

NET = "dsconv/digits_resnet"
GREY = ("--resize", "8x8", "--channels", "gray")

COMMANDS = (
    "optimize",
    "quantize",
    "evaluate",
    "tradeoff",
    "bench",
    "profile",
    "compile",
    "report",
    "export",
    "inspect",
    "sensitivity",
    "search",
    "calibrate",
    "adapt",
    "demo",
)


def strict_json(text: str) -> Any:
    """Parse strict JSON, as most languages do: without NaN and Infinity."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_help_and_version_in_a_process_of_its_own(dsconv_cli: Callable[..., Any]) -> None:
    done = dsconv_cli("--help")
    assert done.returncode == 0 and not done.stderr
    assert all(command in done.stdout for command in COMMANDS)
    assert dsconv_cli("--version").stdout.strip() == f"dsconv {dsconv.__version__}"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command: str, cli: Callable[..., Any]) -> None:
    done = cli(command, "--help")
    assert done.code == 0
    assert "--json" in done.stdout
    assert f"dsconv {command}" in done.stdout.split("Examples:")[1]


def test_no_command_shows_the_help(cli: Callable[..., Any]) -> None:
    done = cli()
    assert "quantize" in done.stdout + done.stderr


def test_quantize_inspect_and_evaluate_in_processes_of_their_own(
    dsconv_cli: Callable[..., Any], tmp_path: Path, digits: Path
) -> None:
    file = tmp_path / "net.safetensors"
    done = dsconv_cli("quantize", "dsconv/digits_resnet", "--out", file, "--preset", "paper", "--json")
    assert done.returncode == 0, done.stderr
    made = strict_json(done.stdout)
    assert made["file_bytes"] == file.stat().st_size
    assert made["config"] == dsconv.QuantConfig.preset("paper").to_dict()
    assert os.listdir(tmp_path) == [file.name]

    done = dsconv_cli("inspect", file, "--json")
    assert done.returncode == 0, done.stderr
    seen = strict_json(done.stdout)
    assert seen["checksum_ok"] and seen["architecture"] == "dsconv/digits_resnet"
    for figure in (
        "effective_bits",
        "effective_bits_quantized",
        "bytes_before",
        "bytes_after",
        "other_bytes",
        "config",
    ):
        assert seen[figure] == made[figure], figure
    # The file does not store the class of a layer in float (here the last one); SQNR are rounded.
    assert [layer | {"kind": "", "weight_sqnr_db": 0} for layer in seen["layers"]] == [
        layer | {"kind": "", "weight_sqnr_db": 0} for layer in made["layers"]
    ]

    done = dsconv_cli("evaluate", file, "--data", digits, "--reference", "dsconv/digits_resnet", "--json")
    assert done.returncode == 0, done.stderr
    figures = strict_json(done.stdout)
    images, labels = load_digits("test")
    expected = dsconv.compare(load_network(), dsconv.load(file), [(images[:60], labels[:60])])
    assert figures["images"] == 60
    # The PNG files store the images in steps of 1/255.
    assert figures["quantized"]["top1"] == pytest.approx(expected.top1, abs=2)
    assert figures["agreement"] == pytest.approx(expected.agreement, abs=2)
    assert figures["logit_sqnr_db"] == pytest.approx(expected.logit_sqnr_db, abs=1)
    assert figures["layer_sqnr_db"]["conv1"] is None  # exact, hence infinite
    assert figures["quantization"]["activation_sign"] == "extra"
    assert figures["quantization"]["effective_bits"] == pytest.approx(made["effective_bits"], abs=1e-3)


def test_layer_options_reach_the_config(cli: Callable[..., Any], tmp_path: Path) -> None:
    options = (
        "--weight-bits 3 --activation-bits 5 --block-size 16 --weight-rule paper --weight-scale kl --no-weight-shift"
    )
    options += " --activation-sign included --kds-dtype bfloat16 --first-layer float --last-layer same"
    options += ' --depthwise {"weight_bits":7} --linear weight_bits:6,kds_dtype:float32'
    options += " --override layer3.*=weight_bits:2 --override fc=activation_bits:null"
    done = cli("quantize", "dsconv/digits_resnet", "--out", tmp_path / "a", "--json", *options.split())
    assert done.code == 0, done.stderr
    config = dsconv.QuantConfig(
        weight_bits=3,
        activation_bits=5,
        block_size=16,
        weight_rule="paper",
        weight_scale="kl",
        weight_shift=False,
        activation_sign="included",
        kds_dtype="bfloat16",
        first_layer="float",
        last_layer=None,
        depthwise={"weight_bits": 7},
        linear={"weight_bits": 6, "kds_dtype": "float32"},
        overrides={"layer3.*": {"weight_bits": 2}, "fc": {"activation_bits": None}},
        algorithm="auto",
        small_layers={"weight_bits": 8, "weight_shift": False},
    )
    made = strict_json(done.stdout)
    assert made["config"] == config.to_dict()
    layers = {layer["name"]: layer for layer in made["layers"]}
    assert layers["layer3.conv1"]["weight_bits"] == 2
    assert layers["conv1"]["reason"] == "the config leaves it in float"
    assert layers["fc"]["activation_bits"] is None

    (tmp_path / "config.json").write_text(json.dumps(made["config"]))
    more = ("--config", tmp_path / "config.json", "--weights-only", "--override", "fc=weight_bits:4")
    again = strict_json(cli("quantize", "dsconv/digits_resnet", "--out", tmp_path / "b", "--json", *more).stdout)
    overrides = config.overrides | {"fc": {"weight_bits": 4}}
    assert again["config"] == config.model_copy(update={"activation_bits": None, "overrides": overrides}).to_dict()


def test_quantize_shows_a_table_and_force_replaces(cli: Callable[..., Any], tmp_path: Path) -> None:
    file = tmp_path / "net.safetensors"
    file.write_text("something else")
    done = cli("quantize", "dsconv/digits_resnet", "--out", file, "--force", "--preset", "paper")
    assert done.code == 0, done.stderr
    assert "layer3.downsample.0" in done.stdout and "its input stays float: conv1" in done.stdout
    assert f"{file.stat().st_size:,} bytes" in done.stdout
    assert "layer3.downsample.0" in cli("inspect", file).stdout


def test_search_writes_settings_that_quantize_takes(cli: Callable[..., Any], tmp_path: Path, digits: Path) -> None:
    file, plot, net = tmp_path / "mixed.json", tmp_path / "pareto.png", tmp_path / "net.safetensors"
    options = ("--preset", "w4a4", "--effective-bits", "4.5", "--data", digits, "--limit", "8", "--plot", plot)
    done = cli("search", "dsconv/digits_resnet", "--out", file, *options, "--json")
    assert done.code == 0, done.stderr
    found = strict_json(done.stdout)
    assert found["point"]["effective_bits"] <= 4.5 and found["sensitivity"]["images"] == 8
    assert found["budget"] == {"effective_bits": 4.5} and len(found["pareto"]) > 5
    assert dsconv.QuantConfig.from_json(file.read_text()).to_dict() == found["config"]
    assert Image.open(plot).width > 400
    done = cli("quantize", "dsconv/digits_resnet", "--config", file, "--out", net, "--json")
    assert done.code == 0, done.stderr
    made = strict_json(done.stdout)
    assert made["bytes_after"] == found["point"]["bytes"]
    chosen = {trial["layer"]: trial["weight_bits"] for trial in found["chosen"]}
    assert {layer["name"]: layer["weight_bits"] for layer in made["layers"]} == chosen and len(set(chosen.values())) > 1
    assert sorted(os.listdir(tmp_path)) == ["mixed.json", "net.safetensors", "pareto.png"]


def test_search_shows_a_table(cli: Callable[..., Any], tmp_path: Path) -> None:
    file = tmp_path / "mixed.json"
    done = cli("search", "dsconv/digits_resnet", "--out", file, "--bytes", "2e5", "--ms", "1000", "--limit", "2")
    assert done.code == 0, done.stderr
    assert "layer3.downsample.0" in done.stdout and "ms" in done.stdout and "2 images of noise" in done.stdout
    assert f"dsconv quantize dsconv/digits_resnet --config {file}" in done.stdout


def test_sensitivity_of_a_model_and_of_a_file(cli: Callable[..., Any], tmp_path: Path, quantized_file: Path) -> None:
    plot = tmp_path / "layers.svg"
    done = cli("sensitivity", "dsconv/digits_resnet", "--preset", "paper", "--plot", plot, "--json")
    assert done.code == 0, done.stderr
    of_model = strict_json(done.stdout)
    assert of_model["synthetic"] and plot.stat().st_size > 1000
    assert all(trial["kl"] >= 0 for trial in of_model["trials"]) and len(of_model["trials"]) == 9
    done = cli("sensitivity", quantized_file, "--json")
    assert done.code == 0, done.stderr
    of_file = strict_json(done.stdout)
    assert of_file["trials"] == of_model["trials"] and of_file["reference_model"] == "dsconv/digits_resnet"
    assert "layer1.conv1" in cli("sensitivity", quantized_file, "--limit", "2").stdout


def test_weights_from_a_file(cli: Callable[..., Any], tmp_path: Path, factory: Path) -> None:
    network = zoo.build(f"{factory}:net?width=16")
    torch.save(network.state_dict(), tmp_path / "net.pt")
    model, file = f"{factory}:net?width=16", tmp_path / "net.safetensors"
    assert cli("quantize", model, "--weights", tmp_path / "net.pt", "--out", file).code == 0
    x = torch.rand(2, 1, 8, 8)
    assert torch.equal(dsconv.load(file, network)(x), dsconv.quantize(network)(x))


def test_a_file_of_a_users_own_model(cli: Callable[..., Any], tmp_path: Path, factory: Path, digits: Path) -> None:
    file, model = tmp_path / "net.safetensors", f"{factory}:net"
    assert cli("quantize", model, "--out", file).code == 0
    done = cli("evaluate", file, "--data", digits)
    assert done.code == 1 and "--model" in done.stderr
    done = cli("evaluate", file, "--data", digits, "--model", model)
    assert done.code == 1 and "--resize" in done.stderr
    done = cli("evaluate", file, "--data", digits, "--model", model, "--limit", 7, *GREY, "--json")
    assert done.code == 0, done.stderr
    assert strict_json(done.stdout)["images"] == 7
    # The file can be inspected without its model.
    assert cli("inspect", file).code == 0


def test_evaluate_a_float_model_in_words(cli: Callable[..., Any], digits: Path) -> None:
    done = cli("evaluate", "dsconv/digits_resnet", "--data", digits, "--weights", "random")
    assert done.code == 0, done.stderr
    assert "top-1" in done.stdout and "weights: float" in done.stdout


def test_preprocessing_flags_are_laid_over_the_models_own(cli: Callable[..., Any], digits: Path) -> None:
    flags = ("--resize", "none", "--crop", "8", "--mean", "0.5", "--std", "0.25", "--scale", "2")
    done = cli("evaluate", "dsconv/digits_resnet", "--data", digits, *flags, "--interpolation", "bicubic", "--json")
    assert done.code == 0, done.stderr
    expected = {"resize": None, "crop": [8, 8], "mean": [0.5], "std": [0.25], "scale": 2.0}
    assert strict_json(done.stdout)["preprocess"] == {**expected, "interpolation": "bicubic", "channels": "gray"}


def test_unlabelled_and_broken_images_are_told(cli: Callable[..., Any], quantized_file: Path, tmp_path: Path) -> None:
    for i in range(3):
        Image.new("L", (8, 8), 80 * i).save(tmp_path / f"{i}.png")
    (tmp_path / "bad.png").write_bytes(b"no image")
    done = cli("evaluate", quantized_file, "--data", tmp_path)
    assert done.code == 0, done.stderr
    assert "1 files could not be read" in done.stdout and "bad.png" in done.stdout
    figures = strict_json(cli("evaluate", quantized_file, "--data", tmp_path, "--json").stdout)
    assert figures["images"] == 3 and figures["top1"] is None and len(figures["broken"]) == 1


@pytest.mark.skipif(os.name == "nt", reason="Ctrl-C is no POSIX signal here")
def test_ctrl_c_prints_the_figures_so_far(digits: Path, factory: Path) -> None:
    command = [sys.executable, "-m", "dsconv", "evaluate", f"{factory}:Slow", "--data", str(digits), *GREY]
    process = subprocess.Popen(
        [*command, "--batch-size", "1", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # If the tests run in the background, the shell makes their processes ignore it.
        preexec_fn=interrupts.heeded,
    )
    assert process.stderr is not None
    seen = 0
    while seen < 3:
        line = process.stderr.readline()
        assert line, "ended before it was interrupted"
        seen += "one batch" in line
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in stderr
    figures = strict_json(stdout)
    assert figures["interrupted"] and 2 <= figures["images"] < 60


def test_ctrl_c_ends_a_search_without_a_file(
    cli: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("dsconv.mixed.measure.compare", stop)
    done = cli("search", "dsconv/digits_resnet", "--effective-bits", "4.5", "--out", tmp_path / "mixed.json")
    assert done.code == 130 and not done.stdout and "Traceback" not in done.stderr
    assert not os.listdir(tmp_path)


def test_ctrl_c_in_a_search_which_is_then_resumed(
    cli: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, state = tmp_path / "mixed.json", tmp_path / "mixed.json.state"
    search = ("search", NET, "--limit", "2", "--out", out)
    compare, calls = dsconv.mixed.measure.compare, 0

    def stop(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return compare(*arguments, **options)

    monkeypatch.setattr("dsconv.mixed.measure.compare", stop)
    done = cli(*search, "--effective-bits", "4.5")
    assert done.code == 130 and not done.stdout and "Traceback" not in done.stderr
    assert f"progress is saved in {state}; run the same command with --resume" in done.stderr
    assert os.listdir(tmp_path) == [state.name]
    done = cli(*search, "--effective-bits", "4.5")
    assert done.code == 1 and f"error: {state}: there is a search to resume: add --resume" in done.stderr

    # An infeasible budget does not lose the finished trials.
    done = cli(*search, "--effective-bits", "1", "--resume")
    assert done.code == 1 and "error: budget: effective_bits of 1 is less" in done.stderr and state.exists()
    trials = calls - 1
    done = cli(*search, "--effective-bits", "4.5", "--resume", "--json")
    assert done.code == 0, done.stderr
    assert calls - 1 == trials and os.listdir(tmp_path) == [out.name]
    whole = cli("search", NET, "--limit", "2", "--out", tmp_path / "whole.json", "--effective-bits", "4.5", "--json")
    resumed, expected = strict_json(done.stdout), strict_json(whole.stdout)
    assert (tmp_path / "whole.json").read_text() == out.read_text()
    assert resumed | {"file": ""} == expected | {"file": ""}


def test_calibrate_a_model_and_a_file(
    cli: Callable[..., Any], tmp_path: Path, tmp_path_factory: Any, digits: Path, quantized_file: Path
) -> None:
    file = tmp_path / "better.safetensors"
    config = dsconv.QuantConfig.preset("w4a4", algorithm="direct")
    settings = tmp_path_factory.mktemp("settings") / "config.json"
    settings.write_text(config.to_json())
    given = ("--config", settings, "--data", digits, "--limit", "32")
    done = cli("calibrate", NET, *given, "--out", file, "--json")
    assert done.code == 0, done.stderr
    made = strict_json(done.stdout)
    assert os.listdir(tmp_path) == [file.name]
    assert made["images"] == 32 and made["file_bytes"] == file.stat().st_size
    assert made["layers"][0]["name"] == "conv1" and made["layers"][0]["error_after"] < 0.01
    assert (made["kept"], made["held_back"], made["measure"]) == ("calibrated", 4, "KL divergence")
    assert made["after"] < made["before"]
    network, folder = zoo.build(NET), dsconv.data.ImageFolder(digits, zoo.preprocess_of(zoo.build(NET)))
    expected = dsconv.calibrate(dsconv.quantize(network, config), network, folder, limit=32).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in dsconv.load(file).state_dict().items())

    assert strict_json(cli("inspect", file, "--json").stdout)["calibrated_on"] == 32
    assert "calibrated on: 32 images" in cli("inspect", file).stdout
    assert "calibrated on: no images; adapted on: no images" in cli("inspect", quantized_file).stdout
    figures = strict_json(cli("evaluate", file, "--data", digits, "--json").stdout)
    assert figures["quantization"]["calibrated_on"] == 32

    done = cli("calibrate", quantized_file, "--data", digits, "--out", file, "--force", "--seed", "3")
    assert done.code == 0, done.stderr
    assert "Calibrated on 60 images, seed 3." in done.stdout and f"Wrote {file}: " in done.stdout
    assert "7 held-back images" in " ".join(done.stdout.split())
    assert os.listdir(tmp_path) == [file.name]
    done = cli("calibrate", file, "--reference", NET, "--data", digits, "--out", tmp_path / "twice", "--memory", "0.01")
    assert done.code == 0, done.stderr


@pytest.mark.parametrize("command", ["calibrate", "adapt"])
def test_images_far_out_of_range_are_refused_unless_asked_for(
    command: str, cli: Callable[..., Any], tmp_path: Path, digits: Path, quantized_file: Path
) -> None:
    out = tmp_path / "better.safetensors"
    given = (command, quantized_file, "--data", digits, "--out", out, "--scale", "255")
    given += ("--steps", "1") if command == "adapt" else ("--limit", "16")
    done = cli(*given)
    assert done.code == 1 and "pass any_range=True (--any-range)" in " ".join(done.stderr.split())
    assert not os.listdir(tmp_path)
    done = cli(*given, "--any-range")
    assert done.code == 0 and out.exists(), done.stderr


@pytest.mark.skipif(os.name == "nt", reason="Ctrl-C is no POSIX signal here")
def test_ctrl_c_in_a_calibration_which_is_then_resumed(cli: Callable[..., Any], tmp_path: Path, digits: Path) -> None:
    (tmp_path / "slow.py").write_text(
        "import time, torch\n"
        "from torch import nn\n"
        "class Slow(nn.Module):\n"
        "    def forward(self, x):\n"
        "        time.sleep(1.5 if len(x) > 1 else 0)\n"
        "        return x\n"
        "def net():\n"
        "    torch.manual_seed(0)\n"
        "    head = nn.AdaptiveAvgPool2d(1), nn.Flatten()\n"
        "    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), Slow(), nn.Conv2d(8, 10, 3), *head).eval()\n"
    )
    out = tmp_path / "out.safetensors"
    state = tmp_path / "out.safetensors.state"
    arguments = ["calibrate", f"{tmp_path}/slow.py:net", "--data", digits, "--out", out, *GREY]
    process = subprocess.Popen(
        [sys.executable, "-m", "dsconv", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=interrupts.heeded,
    )
    while not state.exists():
        assert process.poll() is None, "ended before it was interrupted"
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130 and not stdout and "Traceback" not in stderr
    assert f"progress is saved in {state}; run the same command with --resume" in " ".join(stderr.split())
    assert sorted(os.listdir(tmp_path)) == [state.name, "slow.py"]

    done = cli(*arguments)
    assert done.code == 1 and f"error: {state}: there is a calibration to resume: add --resume" in done.stderr
    done = cli(*arguments, "--resume", "--json")
    assert done.code == 0, done.stderr
    assert not state.exists() and strict_json(done.stdout)["layers"][1]["samples"] > 0
    whole = cli(*arguments[:5], tmp_path / "whole", *GREY)
    assert whole.code == 0, whole.stderr
    tensors, expected = load_file(out), load_file(tmp_path / "whole")
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in tensors.items())


def test_adapt_a_file(cli: Callable[..., Any], tmp_path: Path, digits: Path, quantized_file: Path) -> None:
    out, log = tmp_path / "better.safetensors", tmp_path / "log.csv"
    short = "--data", digits, "--steps", "3", "--batch-size", "8", "--lr", "0.001"
    done = cli("adapt", quantized_file, *short, "--limit", "40", "--out", out, "--log", log, "--json")
    assert done.code == 0, done.stderr
    assert sorted(os.listdir(tmp_path)) == [out.name, log.name]
    made = strict_json(done.stdout)
    assert (made["images"], made["held_back"], made["recipe"]["lr"]) == (35, 5, 0.001)
    assert made["effective_bits"] > 4 and made["file_bytes"] == out.stat().st_size
    assert [look["step"] for look in made["looks"]] == [0, 3] and len(log.read_text().splitlines()) == 3
    student, teacher = dsconv.load(quantized_file), zoo.build(NET)
    folder = dsconv.data.ImageFolder(digits, zoo.preprocess_of(teacher))
    recipe = {"steps": 3, "batch_size": 8, "lr": 0.001}
    expected = dsconv.adapt(student, teacher, folder, limit=40, recipe=recipe).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in dsconv.load(out).state_dict().items())
    assert "adapted on: 40 images" in cli("inspect", out).stdout
    figures = strict_json(cli("evaluate", out, "--data", digits, "--json").stdout)
    assert figures["quantization"]["adapted_on"] == 40
    done = cli("adapt", quantized_file, *short, "--recipe", "paper", "--seed", "2", "--out", out, "--force")
    assert done.code == 0 and "images, seed 2" in done.stdout and f"Wrote {out}: " in done.stdout


def test_bench_a_model_and_its_file_side_by_side(
    dsconv_cli: Callable[..., Any], tmp_path: Path, quantized_file: Path
) -> None:
    out, plot = tmp_path / "bench.json", tmp_path / "bench.png"
    options = ("--against", "torch", "--batch-size", "1,3", "--threads", "1", "--turns", "2")
    networks = ("dsconv/digits_resnet", quantized_file)
    done = dsconv_cli("bench", *networks, *options, "--json", "--preset", "w8a8", "--out", out, "--plot", plot)
    assert done.returncode == 0, done.stderr
    figures = strict_json(done.stdout)
    assert strict_json(out.read_text()) == figures
    assert plot.read_bytes().startswith(b"\x89PNG") and sorted(os.listdir(tmp_path)) == [out.name, plot.name]
    built, loaded = figures["networks"]
    assert built["network"] == "dsconv/digits_resnet" and loaded["network"] == str(quantized_file)
    assert built["config"] == dsconv.QuantConfig.preset("w8a8").to_dict()
    assert loaded["config"] == dsconv.QuantConfig.preset("paper").to_dict()
    for network in (built, loaded):
        assert network["input_shape"] == [1, 8, 8] and network["calibration"] == "8 random images"
        ours = [timing for timing in network["timings"] if timing["contestant"] == "dsconv"]
        assert [(timing["batch_size"], timing["threads"], timing["turns"]) for timing in ours] == [(1, 1, 2), (3, 1, 2)]
        theirs = [timing for timing in network["timings"] if timing["contestant"] == "PyTorch float32"]
        for a, b in zip(ours, theirs, strict=True):
            assert b["ours_over_this"] == pytest.approx(a["median_ms"] / b["median_ms"])
        assert len(theirs) == 2 and theirs[0]["weight_bytes"] > ours[0]["weight_bytes"]


def test_bench_beside_every_runtime_in_words(cli: Callable[..., Any]) -> None:
    for package in ("onnx", "onnxruntime", "openvino"):
        pytest.importorskip(package, reason="needs the extra 'bench'")
    done = cli("bench", "dsconv/digits_resnet", "--turns", "2", "--weights", "random")
    assert done.code == 0, done.stderr
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert "batch 1, 1 thread" in lines
    for name in ("dsconv", "PyTorch float32", "ONNX Runtime float32", "ONNX Runtime int8", "OpenVINO float32"):
        assert any(line.startswith(f"{name} ") for line in lines), name
    assert "onnxruntime.quantization, per channel, calibrated on 8 random images" in done.stdout


def test_bench_beside_mnn_prints_json_alone(dsconv_cli: Callable[..., Any]) -> None:
    pytest.importorskip("MNN", reason="needs the extra 'mnn'")
    pytest.importorskip("onnx", reason="needs the extra 'mnn'")
    done = dsconv_cli("bench", "dsconv/digits_resnet", "--against", "mnn", "--turns", "2", "--json")
    assert done.returncode == 0, done.stderr
    (network,) = strict_json(done.stdout)["networks"]
    assert network["not_run"] == {} and "MNN" not in done.stderr.replace("preparing MNN", "")
    theirs = [timing["contestant"] for timing in network["timings"][2:]]
    assert theirs == ["MNN float32", "MNN int8", "MNN int8 Winograd"]


def test_bench_images_of_a_folder_or_of_a_size(cli: Callable[..., Any], digits: Path, factory: Path) -> None:
    options = ("--against", "torch", "--turns", "2", "--json")
    figures = strict_json(cli("bench", "dsconv/digits_resnet", "--data", digits, *options).stdout)
    assert figures["networks"][0]["calibration"] == "8 given images"
    figures = strict_json(cli("bench", "dsconv/digits_resnet", "--data", digits, "--size", "12x10", *options).stdout)
    assert figures["networks"][0]["input_shape"] == [1, 12, 10]
    done = cli("bench", f"{factory}:net", *options)
    assert done.code == 1 and "--size" in done.stderr
    done = cli("bench", f"{factory}:net", "--size", "1x9x9", *options)
    assert strict_json(done.stdout)["networks"][0]["input_shape"] == [1, 9, 9], done.stderr


def test_bench_a_file_of_a_users_own_model(cli: Callable[..., Any], tmp_path: Path, factory: Path) -> None:
    file, model = tmp_path / "net.safetensors", f"{factory}:net"
    assert cli("quantize", model, "--out", file).code == 0
    options = ("--against", "torch", "--turns", "2", "--size", "1x9x9")
    done = cli("bench", file, *options)
    assert done.code == 1 and "--model" in done.stderr
    done = cli("bench", file, "--model", model, *options)
    assert done.code == 0 and "PyTorch float32" in done.stdout, done.stderr


def test_bench_runs_a_file_elsewhere_as_what_it_stands_for(
    cli: Callable[..., Any], quantized_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def bench(reference: torch.nn.Module, qmodel: torch.nn.Module, images: Any, **options: Any) -> None:
        seen.append((reference, qmodel))
        raise KeyboardInterrupt

    monkeypatch.setattr(dsconv, "bench", bench)
    assert cli("bench", quantized_file).code == 130
    ((reference, qmodel),) = seen
    assert torch.equal(reference.layer2.conv1.weight, qmodel.layer2.conv1.dequantized_weight())
    assert torch.equal(reference.bn1.running_var, qmodel.bn1.running_var)
    images, labels = load_digits("test")
    with torch.inference_mode():
        assert (reference(images).argmax(1) == labels).float().mean() > 0.95


def test_bench_keeps_what_was_measured_before_an_error(cli: Callable[..., Any], tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    networks = ("dsconv/digits_resnet", "dsconv/no_such")
    done = cli("bench", *networks, "--against", "torch", "--turns", "2", "--out", out)
    assert done.code == 1 and "no_such" in done.stderr and "PyTorch float32" in done.stdout
    assert [network["network"] for network in strict_json(out.read_text())["networks"]] == ["dsconv/digits_resnet"]


@pytest.mark.skipif(os.name == "nt", reason="Ctrl-C is no POSIX signal here")
def test_ctrl_c_in_bench_prints_the_figures_so_far(factory: Path) -> None:
    command = [sys.executable, "-m", "dsconv", "bench", "dsconv/digits_resnet", f"{factory}:waits"]
    process = subprocess.Popen(
        [*command, "--against", "torch", "--turns", "2", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=interrupts.heeded,
    )
    assert process.stderr is not None
    while "waiting" not in (line := process.stderr.readline()):
        assert line, "ended before it was interrupted"
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=50)
    assert process.returncode == 130
    assert "Traceback" not in stderr
    assert [network["network"] for network in strict_json(stdout)["networks"]] == ["dsconv/digits_resnet"]


def test_ctrl_c_while_writing_leaves_the_old_file_and_no_part(
    cli: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    file = tmp_path / "net.safetensors"
    file.write_text("old")
    monkeypatch.setattr("dsconv.io.checkpoint.save_file", half)
    assert cli("quantize", "dsconv/digits_resnet", "--preset", "paper", "--out", file, "--force").code == 130
    assert [(entry.name, entry.read_text()) for entry in tmp_path.iterdir()] == [(file.name, "old")]


@pytest.mark.skipif(os.name == "nt", reason="files have no modes here")
def test_a_written_file_has_the_permissions_of_any_new_file(cli: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    assert cli("quantize", "dsconv/digits_resnet", "--preset", "paper", "--out", tmp_path / "net").code == 0
    assert (tmp_path / "net").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.skipif(native.extension() is None, reason="the extension dsconv._C is not built")
def test_profile_says_what_executes_each_step(cli: Callable[..., Any], factory: Path) -> None:
    model = (f"{factory}:swish", "--size", "1x12x12", "--weights", "random")
    found = strict_json(cli("profile", *model, "--runs", "2", "--json").stdout)
    backends = {step["operator"]: step["backend"] for step in found["steps"]}
    assert "PyTorch" not in backends.values() and backends["dsconv.average"].startswith("float32")
