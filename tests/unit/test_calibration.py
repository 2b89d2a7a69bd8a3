"""``dsconv.calibrate`` from end to end, on networks with every kind of layer."""

import copy
import importlib
import json
import math
import resource
import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch import nn as tnn
from torch.nn import functional as F

import dsconv
from dsconv.calibration import CalibratedLayer, Calibration
from dsconv.calibration.held_back import chance, split
from dsconv.conversion import model_info
from dsconv.data import Preprocess
from dsconv.errors import ConfigError, DataError, FileFormatError, ModelError
from dsconv.evaluation.measures import divergence
from dsconv.nn import DSLayer
from dsconv.numerics.rounding import Rounded

IMAGES = 20
# Memory of the largest activation of Varied, for all images or for several at a time.
ALL, SEVEN = 4 << 30, 4 * 7 * 16 * 12 * 12 * 4


class Varied(tnn.Module):
    """Layers with groups, depthwise, transposed, 1-D, linear, weight-normalized, called twice, and one never called."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = tnn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn = tnn.BatchNorm2d(16)
        self.groups = tnn.Conv2d(16, 16, 3, stride=2, groups=4)
        self.depthwise = tnn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False)
        self.after = tnn.BatchNorm2d(16)
        self.twice = tnn.Conv2d(16, 16, 1)
        self.again = self.twice  # under a second name
        self.transposed = tnn.ConvTranspose2d(16, 8, 3, stride=2)
        self.alone = tnn.BatchNorm2d(8)
        self.line = tnn.Conv1d(8, 12, 3)
        self.unused = tnn.Conv2d(4, 4, 1)
        self.normed = tnn.utils.parametrizations.weight_norm(tnn.Linear(12, 10))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.stem(x)))
        x = F.relu(self.after(self.depthwise(self.groups(x))))
        x = x + F.leaky_relu(self.twice(x), 0.1)
        x = F.relu(self.again(x))
        x = self.alone(F.relu(self.transposed(x)))
        return self.normed(F.relu(self.line(x.flatten(2))).mean(2))


def varied() -> tnn.Module:
    torch.manual_seed(1)
    net = Varied().eval()
    for module in net.modules():
        if isinstance(module, tnn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            module.weight.data.uniform_(0.5, 2)
            module.bias.data.normal_()
    return net


def pictures(count: int = IMAGES, side: int = 12, channels: int = 3, seed: int = 0) -> Tensor:
    """Return smooth noise, whose pixels and channels are correlated."""
    torch.manual_seed(seed)
    coarse = torch.randn(count, channels, side // 3, side // 3)
    x = F.interpolate(coarse, (side, side), mode="bilinear") + 0.2 * torch.randn(count, channels, side, side)
    return x + x.mean(1, keepdim=True)


def chain() -> tnn.Sequential:
    torch.manual_seed(2)
    convs = [tnn.Conv2d(a, b, 3, padding=1) for a, b in ((3, 16), (16, 24), (24, 24), (24, 8))]
    layers = [m for conv in convs for m in (conv, tnn.ReLU())]
    return tnn.Sequential(*layers, tnn.AdaptiveAvgPool2d(1), tnn.Flatten()).eval()


def decided() -> tnn.Sequential:
    """Return a chain whose logits separate classes."""
    net = chain()
    net[6].weight.data *= 100
    return net


def same(a: tnn.Module, b: tnn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(
        torch.equal(value, second[name]) for name, value in first.items() if torch.is_tensor(value)
    )


def calibration(model: tnn.Module) -> Calibration:
    info = model_info(model)
    assert info is not None and isinstance(info.calibration, Calibration)
    return info.calibration


def records(model: tnn.Module) -> dict[str, CalibratedLayer]:
    return {layer.name: layer for layer in calibration(model).layers}


def outputs(model: tnn.Module, names: dict[str, str], x: Tensor) -> dict[str, Tensor]:
    """Return the outputs of modules, channels first, with all calls concatenated; ``names`` by module."""
    found: dict[str, list[Tensor]] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda _, __, y: found.setdefault(name, []).append(y.transpose(0, 1).flatten(1))

    hooks = [model.get_submodule(module).register_forward_hook(keep(name)) for module, name in names.items()]
    with torch.inference_mode():
        model(x)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(parts, 1).double() for name, parts in found.items()}


@pytest.mark.parametrize("memory_bytes", [ALL, SEVEN], ids=["one batch", "several"])
@pytest.mark.parametrize("folded", [False, True], ids=["", "folded"])
@pytest.mark.parametrize(
    "preset", ["w4a4", "paper", {"activation_bits": None, "linear": "same", "first_layer": {"blocks": "flat"}}]
)
def test_errors_in_the_report_are_those_of_the_network(preset: Any, folded: bool, memory_bytes: int) -> None:
    """Check that a layer is fitted to the values that the network computes, for every kind of layer."""
    net, x = varied(), pictures()
    qnet = dsconv.quantize(
        net, preset if isinstance(preset, str) else {k: v if v != "same" else None for k, v in preset.items()}
    )
    qnet = dsconv.fold_batchnorm(qnet) if folded else qnet
    before, original = copy.deepcopy(qnet), copy.deepcopy(net)
    better = dsconv.calibrate(qnet, net, x, positions=10_000, memory_bytes=memory_bytes)
    assert same(qnet, before) and same(net, original)

    info, table = model_info(better), records(better)
    assert info is not None
    done = {name for name, layer in table.items() if layer.reason is None}
    assert {"groups", "depthwise", "twice", "transposed", "line"} <= done
    assert "does not call" in (table["unused"].reason or "")
    assert info.calibrated_on == info.calibration.images == IMAGES
    watched = {layer: batchnorm for batchnorm, layer in info.folded.items()}
    assert bool(watched) is folded
    fitted, held_back = split(IMAGES)
    assert info.calibration.held_back == len(held_back) == 4 and info.calibration.kept == "calibrated"
    x = x[fitted]
    # The input of its second call was computed by the first one before calibration.
    done.remove("twice")
    float_outputs = outputs(net, {watched.get(name, name): name for name in done}, x)
    got = outputs(better, {name: name for name in done}, x)
    for name in done:
        y = float_outputs[name]
        error = (got[name] - y).square().mean(1).sum() / y.var(1, correction=0).sum()
        assert table[name].samples == y.shape[1]
        # Integers and simulation differ in the last digits of float32.
        assert table[name].error_after == pytest.approx(float(error), rel=1e-2, abs=1e-6), name
        assert table[name].error_after <= table[name].error_before * 1.01, name
        torch.testing.assert_close(got[name].mean(1), y.mean(1), rtol=1e-3, atol=1e-3)
    assert better.again is better.twice
    held_out = pictures(seed=1)
    with torch.inference_mode():
        far, near = ((q(held_out) - net(held_out)).square().mean() for q in (qnet, better))
    assert near < far


def test_what_calibration_leaves_as_it_is() -> None:
    net = varied()
    qnet = dsconv.quantize(net, dsconv.QuantConfig.preset("w4a4", overrides={"line": "float"})).train()
    for parameter in net.parameters():
        parameter.requires_grad_(False)
    better = dsconv.calibrate(qnet, net.train(), pictures())
    assert better.training and net.training and all(m.training for m in better.modules())
    layers = {n: m for n, m in qnet.named_modules() if isinstance(m, DSLayer)}
    assert torch.equal(better.line.weight, net.line.weight) and "line" not in layers
    for name, layer in layers.items():
        after = better.get_submodule(name)
        assert type(after) is type(layer) and after.config == layer.config and after.vqk.dtype == torch.int8
        assert after.kds.dtype == layer.kds.dtype and after.kds.shape == layer.kds.shape
    assert same(better.bn, qnet.bn)
    assert better.stem.bias is not None and not better.stem.bias.requires_grad
    assert same(better.unused, qnet.unused)


def test_it_is_deterministic_and_the_seed_counts() -> None:
    net, x = varied(), pictures()
    qnet = dsconv.quantize(net, "w4a4")
    state = torch.get_rng_state()
    first = dsconv.calibrate(qnet, net, x, positions=5)
    assert torch.equal(state, torch.get_rng_state())
    torch.randn(3)
    with torch.inference_mode():
        assert same(dsconv.calibrate(qnet, net, x, positions=5), first)
    assert not same(dsconv.calibrate(qnet, net, x, positions=5, seed=1), first)


def test_a_calibrated_network_is_saved_loaded_compiled_and_calibrated_again(tmp_path: Path) -> None:
    net, x = varied(), pictures()
    better = dsconv.calibrate(dsconv.quantize(net, "w4a4"), net, x)
    info = model_info(better)
    assert info is not None and set(info.biases) == {"stem", "depthwise"}
    for model in (better, dsconv.fold_batchnorm(better)):
        file = dsconv.save(model, tmp_path / "net.safetensors")
        again = dsconv.load(file, varied())
        assert same(again, model)
        found = model_info(again)
        assert found is not None and found.calibrated_on == IMAGES and found.biases == info.biases
        assert found.calibration is None
        with torch.inference_mode():
            assert torch.equal(again(x), model(x))
    twice = dsconv.calibrate(again, net, x)
    assert model_info(twice).biases == info.biases

    sequence = chain()
    better = dsconv.calibrate(dsconv.quantize(sequence), sequence, x)
    with torch.inference_mode():
        assert torch.equal(dsconv.compile(better, x)(x), better(x))
    with pytest.raises(ModelError, match=r"qmodel: expected a network that is not compiled: pass its \.model"):
        dsconv.calibrate(dsconv.compile(better, x), sequence, x)


def test_scales_keep_their_size() -> None:
    """Use shifts with so fine steps that ``quantize`` would select float32."""
    torch.manual_seed(0)
    net = tnn.Sequential(tnn.Conv2d(3, 8, 12), tnn.Flatten()).eval()
    net[0].weight.data.mul_(1e-3).add_(1)
    config = {"weight_bits": 8, "weight_shift": True, "kds_dtype": "float16", "first_layer": None}
    qnet = dsconv.quantize(net, config)
    layer = qnet[0]
    assert layer.config.kds_dtype == "float32"
    layer.config = layer.config.model_copy(update={"kds_dtype": "float16"})
    layer.kds, layer.kds_shift = layer.kds.half(), layer.kds_shift.half()
    layer.bias.data += torch.randn(8)
    x = pictures()
    better = dsconv.calibrate(qnet, net, x)
    assert calibration(better).kept == "calibrated"
    assert better[0].config.kds_dtype == "float16" and better[0].kds_shift.dtype == torch.float16
    before, after = (dsconv.compare(net, q, x, per_layer=False).logit_sqnr_db for q in (qnet, better))
    assert after > before
    # Beyond the largest float16, float32 is the only choice.
    layer.store_(layer.vqk, layer.kds.float(), layer.kds_shift.float() + 1e5, net[0].weight, keep_size=True)
    assert layer.config.kds_dtype == "float32"


def test_a_file_with_a_bias_for_no_layer_is_refused(tmp_path: Path) -> None:
    net = chain()
    file = dsconv.save(dsconv.calibrate(dsconv.quantize(net), net, pictures()), tmp_path / "net.safetensors")
    with safe_open(file, framework="pt") as reader:
        entries = reader.metadata()
        tensors = {name: reader.get_tensor(name).clone() for name in reader.keys()}  # noqa: SIM118
    for name, value, expected in (("biases", ["9"], "layer '9'"), ("calibrated_on", -1, "header is not valid")):
        changed = entries | {name: json.dumps(value)}
        changed["checksum"] = dsconv.io.checkpoint.checksum(changed, tensors)
        save_file(tensors, file, changed)
        with pytest.raises(FileFormatError, match=expected):
            dsconv.load(file, chain())


def test_a_batchnorm_may_run_later_than_the_layer_it_is_folded_into() -> None:
    class Parallel(tnn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = (tnn.Conv2d(3, 8, 3, bias=False) for _ in range(2))
            self.bn_a, self.bn_b = (tnn.BatchNorm2d(8) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            a, b = self.a(x), self.b(x)
            b = self.bn_b(b)
            return (self.bn_a(a) + b).relu().mean((2, 3))

    torch.manual_seed(0)
    net = Parallel().eval()
    better = dsconv.calibrate(dsconv.fold_batchnorm(dsconv.quantize(net, "w4a4")), net, pictures())
    assert list(records(better)) == ["a", "b"]
    assert all(layer.reason is None for layer in records(better).values())


class Stopped(Exception):
    """Exception that replaces Ctrl-C."""


def stop_after(count: int) -> Callable[[CalibratedLayer], None]:
    seen: list[str] = []

    def stop(layer: CalibratedLayer) -> None:
        seen.append(layer.name)
        if len(seen) == count:
            raise Stopped

    return stop


@pytest.mark.parametrize("memory_bytes", [ALL, SEVEN], ids=["one batch", "several"])
@pytest.mark.parametrize("make", [varied, decided])
def test_what_is_resumed_ends_as_if_it_had_never_stopped(
    make: Callable[[], tnn.Module], memory_bytes: int, tmp_path: Path
) -> None:
    net, x, file = make(), pictures(), tmp_path / "state"
    qnet = dsconv.quantize(net, dsconv.QuantConfig.preset("w4a4", first_layer={"weight_bits": 3}))
    run: dict[str, Any] = {"positions": 30, "memory_bytes": memory_bytes, "state": file}
    whole = dsconv.calibrate(qnet, net, x, **run | {"state": None})
    assert calibration(whole).kept == "calibrated"
    layers = [layer for layer in records(whole).values() if layer.reason is None]
    # Stops at every layer in turn.
    for index in range(len(layers)):
        with pytest.raises(Stopped):
            dsconv.calibrate(qnet, net, x, **run, resume=index > 0, on_layer=stop_after(1))
    assert file.exists()
    result = dsconv.calibrate(qnet, net, x, **run, resume=True)
    assert same(result, whole)
    timeless = [replace(layer, seconds=None) for layer in records(result).values()]
    assert timeless == [replace(layer, seconds=None) for layer in records(whole).values()]
    assert model_info(result).biases == model_info(whole).biases


def test_what_cannot_be_resumed(tmp_path: Path) -> None:
    net, x, file = chain(), pictures(), tmp_path / "state"
    qnet = dsconv.quantize(net)

    def resume(**changes: Any) -> None:
        given: dict[str, Any] = {"qmodel": qnet, "reference": net, "images": x, "resume": True, "state": file}
        dsconv.calibrate(**given | changes)

    with pytest.raises(ConfigError, match="no state file"):
        resume()
    with pytest.raises(ConfigError, match="no state file"):
        resume(state=None)
    with pytest.raises(Stopped):
        resume(resume=False, on_layer=stop_after(2))
    with pytest.raises(ConfigError, match="resume=True"):
        resume(resume=False)
    other_net, other_config = copy.deepcopy(net), copy.deepcopy(qnet)
    other_net[2].bias.data += 1
    other_config[2].config = other_config[2].config.model_copy(update={"activation_bits": 5})
    for changes, named in (
        ({"seed": 1}, "other seed:"),
        ({"images": x + 1, "positions": 3}, "other images, positions:"),
        ({"memory_bytes": SEVEN}, "other images at a time:"),
        ({"reference": other_net}, "other reference:"),
        ({"qmodel": other_config}, "other settings:"),
        ({"qmodel": dsconv.quantize(net, {"weight_bits": 3})}, "other qmodel, settings:"),
    ):
        with pytest.raises(FileFormatError, match=named):
            resume(**changes)

    good = file.read_bytes()
    with safe_open(file, framework="pt") as reader:
        entries, tensors = reader.metadata(), {name: reader.get_tensor(name).clone() for name in reader.keys()}  # noqa: SIM118
    file.write_bytes(good[: len(good) // 2])
    with pytest.raises(FileFormatError, match="not a complete state file"):
        resume()
    save_file(tensors, file, entries | {"layers": "[]"})
    with pytest.raises(FileFormatError, match="were changed"):
        resume()
    dsconv.save(qnet, file)
    with pytest.raises(FileFormatError, match="a safetensors file of another kind"):
        resume()
    file.write_bytes(good)
    resume()


def test_a_state_that_cannot_be_written_is_told_before_the_work(tmp_path: Path) -> None:
    net, x = chain(), pictures()
    qnet = dsconv.quantize(net)
    (tmp_path / "file").touch()
    started: list[CalibratedLayer] = []
    for state in (tmp_path / "none" / "state", tmp_path, tmp_path / "file" / "state", Path("/proc/state")):
        with pytest.raises(OSError, match=r"state|folder"):
            dsconv.calibrate(qnet, net, x, state=state, on_layer=started.append)
    assert not started


def test_a_full_disk_leaves_what_was_done(tmp_path: Path) -> None:
    net, x, file = chain(), pictures(), tmp_path / "state"
    qnet = dsconv.quantize(net)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8_000, limits[1]))
    try:
        with pytest.raises(OSError, match="state"):
            dsconv.calibrate(qnet, net, x, state=file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["state"]
    done: list[CalibratedLayer] = []
    result = dsconv.calibrate(qnet, net, x, state=file, resume=True, on_layer=done.append)
    assert 0 < len(done) < 4 and same(result, dsconv.calibrate(qnet, net, x))


class Two(tnn.Module):
    def __init__(self, output: Callable[[Tensor], Any] = lambda y: y) -> None:
        super().__init__()
        self.conv, self.output = tnn.Conv2d(3, 4, 3), output

    def forward(self, x: Tensor, other: Tensor) -> Any:
        return self.conv(x) + other


class Dict(Two):
    def forward(self, x: Tensor, other: Tensor | None = None) -> Any:
        return {"logits": self.conv(x).mean((2, 3)), "rest": (x, None)}


class PerImage(Two):
    def forward(self, x: Tensor, other: Tensor | None = None) -> Any:
        return torch.stack([self.conv(image) for image in x])


class Unbatched(Two):
    def forward(self, x: Tensor, other: Tensor | None = None) -> Any:
        return self.conv(x[0]) + self.conv(x).mean()


def test_networks_of_other_inputs_and_outputs() -> None:
    x = pictures()
    with pytest.raises(ModelError, match=r"reference: it cannot run on images of shape \(1, 3, 12, 12\).*other"):
        dsconv.calibrate(dsconv.quantize(Two()), Two(), x)
    net = PerImage().eval()
    with pytest.raises(ModelError, match=r"'conv'.*as often for all images"):
        dsconv.calibrate(dsconv.quantize(net), net, x)
    for make in (Dict, Unbatched):
        net = make().eval()
        better = dsconv.calibrate(dsconv.quantize(net, "w4a4"), net, x)
        layer = records(better)["conv"]
        assert layer.error_after <= layer.error_before
    with pytest.raises(ModelError, match="shapes"):
        dsconv.calibrate(dsconv.quantize(PerImage()), Dict(), x)
    with pytest.raises(ModelError, match="cannot run on images"):
        dsconv.calibrate(dsconv.quantize(chain()), chain(), pictures(channels=1))


def test_networks_that_do_not_belong_together() -> None:
    net, x = chain(), pictures()
    qnet = dsconv.quantize(net)
    small = chain()
    small[2] = tnn.Conv2d(16, 24, 1)
    pruned = chain()
    tnn.utils.prune.random_unstructured(pruned[2], "weight", 0.5)
    for reference, expected in (
        (qnet, "layer '0' is a DSConv2d, and the reference has a DSConv2d there"),
        (tnn.ReLU(), "has none there; .*layer '2'"),
        (small, r"layer '2' has a weight \(24, 16, 3, 3\), but it is \(24, 16, 1, 1\)"),
    ):
        with pytest.raises(ModelError, match=expected):
            dsconv.calibrate(qnet, reference, x)
    with pytest.raises(ModelError, match="holds no quantized layer"):
        dsconv.calibrate(net, net, x)
    with pytest.raises(ModelError, match=r"reference: expected a torch\.nn\.Module, got str"):
        dsconv.calibrate(qnet, "torchvision/resnet18", x)
    folded = dsconv.fold_batchnorm(dsconv.quantize(varied()))
    without = varied()
    without.bn = tnn.Identity()
    with pytest.raises(ModelError, match="no BatchNorm 'bn'"):
        dsconv.calibrate(folded, without, x)
    once = varied()
    once.forward = lambda x: once.normed(
        once.line(once.transposed(once.twice(once.depthwise(once.groups(once.stem(x))))).flatten(2)).mean(2)
    )
    with pytest.raises(ModelError, match="'twice': it runs 2 times in qmodel, 1 times in reference"):
        dsconv.calibrate(dsconv.quantize(varied()), once, x)


def test_where_a_nan_begins_is_told() -> None:
    x = pictures()
    net = chain()
    net[2].weight.data[3] = torch.nan
    qnet = dsconv.quantize(net, {"overrides": {"2": "float"}})
    with pytest.raises(ModelError, match="reference: NaN or infinities first appear in layer '2'"):
        dsconv.calibrate(qnet, net, x)
    net = chain()
    qnet = dsconv.quantize(net)
    qnet[0].bias.data[:] = torch.nan
    for memory_bytes in (ALL, SEVEN):
        better = dsconv.calibrate(qnet, net, x, memory_bytes=memory_bytes)  # has its own bias now
        assert all(bool(value.isfinite().all()) for value in better.state_dict().values())
    qnet = dsconv.quantize(net, {"overrides": {"0": "float"}})
    qnet[0].bias.data[:] = torch.inf
    with pytest.raises(ModelError, match="qmodel: NaN or infinities first appear in layer '0'"):
        dsconv.calibrate(qnet, net, x)
    for layer in (net[0], qnet[0]):
        layer.bias.data[:] = 1e30
    with pytest.raises(ModelError, match="layer '2': the squares"):
        dsconv.calibrate(qnet, net, x)


def test_what_a_layer_reads_may_be_too_much() -> None:
    net = tnn.Sequential(tnn.Flatten(), tnn.Linear(3 * 56 * 56, 5), tnn.ReLU(), tnn.Linear(5, 3))
    table = records(dsconv.calibrate(dsconv.quantize(net), net, pictures(side=56)))
    assert table["1"].reason == "each output reads 9,408 values, more than 9,216"
    assert table["1"].error_after is None and table["3"].error_after is not None


def test_an_output_that_never_changes() -> None:
    net = chain()
    net[0].weight.data.zero_()
    better = dsconv.calibrate(dsconv.quantize(net), net, pictures())
    with torch.inference_mode():
        torch.testing.assert_close(better(pictures()), net(pictures()), rtol=1e-3, atol=1e-4)
    assert "nan" in str(model_info(better).calibration)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"positions": 0}, "positions: expected a whole number from 1, got 0"),
        ({"seed": -1}, "seed"),
        ({"seed": 0.5}, "seed"),
        ({"seed": True}, "seed"),
        ({"memory_bytes": 1.5}, "memory_bytes"),
        ({"limit": 0}, "limit"),
        ({"device": "nowhere"}, "nowhere"),
    ],
)
def test_arguments_out_of_range(changes: dict[str, Any], expected: str) -> None:
    net = chain()
    with pytest.raises(ConfigError, match=expected):
        dsconv.calibrate(dsconv.quantize(net), net, pictures(), **changes)


def test_unusable_images() -> None:
    net, x = chain(), pictures()
    qnet = dsconv.quantize(net)
    x[3, 1, 2] = torch.nan
    mixed = [pictures(6), pictures(6, side=15)]
    for images, expected in (
        (x, "image 3 contains NaN"),
        (x[:3], r"expected 16 or more \(at least 4\), got 3"),
        (mixed, r"all of one shape, got \(3, 12, 12\) and \(3, 15, 15\)"),
        (x[0], "expected|must be"),
    ):
        with pytest.raises(DataError, match=expected):
            dsconv.calibrate(qnet, net, images)
    with pytest.warns(UserWarning, match="^6 images are few"):
        dsconv.calibrate(qnet, net, pictures(6))


def test_a_folder_of_images_with_broken_files(tmp_path: Path) -> None:
    net = chain()
    qnet = dsconv.quantize(net)
    for i in range(24):
        Image.fromarray((pictures(1, seed=i)[0].permute(1, 2, 0) * 40 + 128).byte().numpy()).save(tmp_path / f"{i}.png")
    (tmp_path / "7.png").write_bytes(b"no image")
    with pytest.warns(UserWarning, match=r"1 files could not be read, the first .*7\.png: "):
        better = dsconv.calibrate(qnet, net, tmp_path, preprocess=Preprocess())
    assert model_info(better).calibrated_on == 23
    (tmp_path / "7.png").unlink()
    assert model_info(dsconv.calibrate(qnet, net, tmp_path, preprocess=Preprocess(), limit=18)).calibrated_on == 18
    with pytest.raises(DataError, match="preprocess"):
        dsconv.calibrate(qnet, net, tmp_path)
    shutil.rmtree(tmp_path)
    with pytest.raises(DataError, match="does not exist"):
        dsconv.calibrate(qnet, net, tmp_path, preprocess=Preprocess())


def test_images_of_another_preparation_are_told_with_their_figures() -> None:
    net = dsconv.zoo.build("dsconv/digits_resnet")
    qnet = dsconv.quantize(net)
    images, _ = dsconv.demo.load_digits("unlabelled")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dsconv.calibrate(qnet, net, images[:32])
    seen = images[:32] * 4
    with pytest.warns(UserWarning, match="prepare them as for evaluation") as told:
        dsconv.calibrate(qnet, net, seen)
    assert told[0].filename == __file__
    text = str(told[0].message)
    assert f"mean is {float(seen.mean()):.3g} and their deviation {float(seen.std()):.3g}" in text
    assert "preprocessed for this network have 0.45 and 0.25" in text and "first BatchNorm, 'bn1'" in text
    with pytest.warns(UserWarning, match=r"they are 16x16, the network's preparation makes them 8x8"):
        dsconv.calibrate(qnet, net, F.interpolate(images[:32], (16, 16)))


@pytest.mark.parametrize("change", [lambda x: x * 255, lambda x: x / 255, lambda x: x + 20])
def test_images_far_out_of_range_are_refused(change: Callable[[Tensor], Tensor]) -> None:
    net = dsconv.zoo.build("dsconv/digits_resnet")
    images, _ = dsconv.demo.load_digits("unlabelled")
    seen = change(images[:32])
    with pytest.raises(DataError, match=rf"deviation {float(seen.std()):.3g}, but .*any_range=True \(--any-range\)"):
        dsconv.calibrate(dsconv.quantize(net), net, seen)
    with pytest.warns(UserWarning, match="prepare them as for evaluation"):
        dsconv.calibrate(dsconv.quantize(net), net, seen, any_range=True)


def test_a_batchnorm_tells_the_range_of_a_network_that_says_nothing_of_images() -> None:
    trained = varied()
    trained.bn.running_mean[:] = 40
    with pytest.raises(DataError, match="first BatchNorm, 'bn', is"):
        dsconv.calibrate(dsconv.quantize(trained), trained, pictures())
    trained.bn.reset_running_stats()  # it was never trained and has no statistics
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dsconv.calibrate(dsconv.quantize(trained, "w4a4"), trained, pictures() * 100)


def worse(x: Tensor, qnet: tnn.Module, net: tnn.Module, monkeypatch: pytest.MonkeyPatch) -> tnn.Module:
    """Calibrate with wrong scales."""
    module = importlib.import_module("dsconv.calibration.calibrate")  # the package has a function with that name
    rounded = module.round_to

    def off(*args: Any, **given: Any) -> Rounded:
        found = rounded(*args, **given)
        return found._replace(scale=found.scale * 10)

    monkeypatch.setattr(module, "round_to", off)
    with pytest.warns(UserWarning, match="the given network is kept: on 4 held-back images"):
        return dsconv.calibrate(qnet, net, x)


@pytest.mark.parametrize(("positions", "samples"), [(4, 16 * 4), (64, 16 * 16)])
def test_the_ridge_is_the_numbers_that_are_fitted_for_each_sample(
    positions: int, samples: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Limit the samples to 16 positions per image."""
    module = importlib.import_module("dsconv.calibration.calibrate")
    regularized, ridges = module.regularized, []

    def noted(h: Tensor, ridge: float) -> Tensor:
        ridges.append((h.shape[-1], ridge))
        return regularized(h, ridge)

    monkeypatch.setattr(module, "regularized", noted)
    net, x = chain(), pictures()
    assert len(split(len(x))[0]) == 16
    dsconv.calibrate(dsconv.quantize(net, "w4a4"), net, x, positions=positions)
    assert ridges == [(reads, reads / samples) for reads in (3 * 9, 16 * 9, 24 * 9, 24 * 9)]


def test_a_network_that_calibration_makes_worse_is_returned_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = varied(), pictures()
    qnet = dsconv.quantize(net, "w4a4")
    kept = worse(x, qnet, net, monkeypatch)
    assert same(kept, qnet) and kept is not qnet
    info, table = model_info(kept), calibration(kept)
    assert info is not None and info.calibrated_on == 0 and info.biases == ()
    assert table.kept == "given" and table.after > table.before and table.measure == "KL divergence"
    held_out = x[split(len(x))[1]]
    with torch.inference_mode():
        f, q = net(held_out).double(), qnet(held_out).double()
    assert table.before == pytest.approx(float(divergence(f, q, 4.0).mean()), rel=1e-2)
    assert "The given network is kept" in str(table) and f"{table.before:.4g} before" in " ".join(str(table).split())
    made = table.to_dict()
    assert (made["kept"], made["held_back"], made["before"]) == ("given", 4, table.before)


def test_outputs_that_are_no_logits_are_compared_by_their_relative_error(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = tnn.Sequential(tnn.Conv2d(3, 16, 3), tnn.ReLU(), tnn.Conv2d(16, 3, 3)).eval(), pictures()
    qnet = dsconv.quantize(net, "w4a4")
    table = calibration(dsconv.calibrate(qnet, net, x))
    held_out = x[split(len(x))[1]]
    with torch.inference_mode():
        f, q = net(held_out), qnet(held_out)
    assert (table.kept, table.measure) == ("calibrated", "relative error")
    assert table.before == pytest.approx(float((f - q).square().sum() / f.square().sum()), rel=1e-3)
    assert same(worse(x, qnet, net, monkeypatch), qnet)


def test_a_network_of_nan_is_further_than_any_other() -> None:
    net, x = chain(), pictures()
    qnet = dsconv.quantize(net)
    qnet[0].bias.data[:] = torch.nan
    table = calibration(dsconv.calibrate(qnet, net, x))
    assert table.before == math.inf and table.kept == "calibrated" and table.to_dict()["before"] is None


def test_a_difference_within_chance_is_no_reason_to_drop_a_calibration() -> None:
    table = Calibration((), 128, 0, 16, "KL divergence", before=0.02, after=0.021, chance=0.002)
    assert table.kept == "calibrated" and replace(table, after=0.0221).kept == "given"
    assert replace(table, after=math.inf).kept == "given" and replace(table, chance=0.0).kept == "given"
    assert "0.02 before and 0.021 after calibration (standard error 0.002)" in table.verdict
    before, after = torch.rand(2, 16, dtype=torch.float64)
    expected = float((after - before).std()) / 4
    assert chance(before, after) == pytest.approx(expected)
    after[3] = torch.inf
    assert chance(before, after) == chance(before[:1], after[:1]) == 0


def test_copies_of_an_image_count_once() -> None:
    net, x = chain(), pictures()
    qnet = dsconv.quantize(net)
    noisy = x[:1] + 0.01 * torch.randn(20, *x.shape[1:])
    for images in (x[:1].expand(64, -1, -1, -1), noisy, torch.cat([noisy, x[:3]])):
        with pytest.raises(DataError, match=r"at least 4\), got [13] different ones, the other \d+ are copies"):
            dsconv.calibrate(qnet, net, images)
    with pytest.warns(UserWarning, match="^20 of 40 images are copies of others and are left out$"):
        twice = dsconv.calibrate(qnet, net, torch.cat([x, x]))
    assert same(twice, dsconv.calibrate(qnet, net, x)) and calibration(twice).images == IMAGES
