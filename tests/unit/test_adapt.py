"""Adaptation: the trained parameters, the selected state, and resuming a stopped training."""

import csv
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch import nn as tnn

import dsconv
from dsconv.adaptation import Adaptation
from dsconv.adaptation.images import drawn
from dsconv.adaptation.shadow import LearnedWeight, RecomputedWeight
from dsconv.config import LayerConfig
from dsconv.conversion import fold_batchnorm, model_info
from dsconv.demo import load_digits
from dsconv.errors import ConfigError, DataError, FileFormatError, ModelError
from dsconv.nn import DSConv2d, DSConvTranspose2d, DSLayer, DSLinear

# Two bits, so that a few seconds bring an improvement.
CONFIG = dsconv.QuantConfig.preset("w4a4", weight_bits=2)
QUICK: dict[str, Any] = {"steps": 12, "every": 4, "batch_size": 16}
LAYERS: list[tuple[DSLayer, Tensor]] = [
    (make.from_float(layer, LayerConfig(**{"weight_bits": 3, **settings})), layer)
    for make, layer, settings in (
        (DSConv2d, tnn.Conv2d(40, 6, 3), {}),
        (DSConv2d, tnn.Conv2d(40, 6, 3), {"weight_shift": True, "block_size": 16, "kds_dtype": "float16"}),
        (DSConv2d, tnn.Conv2d(3, 6, 5), {"blocks": "flat"}),
        (DSConv2d, tnn.Conv2d(24, 12, 3, groups=3), {"block_size": 5, "weight_rule": "balanced"}),
        (DSConvTranspose2d, tnn.ConvTranspose2d(34, 6, 3), {}),
        (DSLinear, tnn.Linear(70, 5), {"weight_shift": True, "kds_dtype": "bfloat16"}),
    )
]
Case = tuple[DSLayer, Any]


@pytest.fixture(scope="module")
def teacher() -> tnn.Module:
    return dsconv.zoo.build("dsconv/digits_resnet")


@pytest.fixture(scope="module")
def student(teacher: tnn.Module) -> tnn.Module:
    return dsconv.quantize(teacher, CONFIG)


@pytest.fixture(scope="module")
def images() -> Tensor:
    return load_digits("unlabelled")[0][:128]


def state_of(model: tnn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def adaptation_of(model: tnn.Module) -> Adaptation:
    info = model_info(model)
    assert info is not None
    return info.adaptation


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


@pytest.mark.parametrize("shift_integers", [False, True], ids=["rounded", "calibrated"])
@pytest.mark.parametrize("case", LAYERS, ids=lambda case: str(case[0].config))
def test_learning_starts_from_the_integers_and_scales_of_the_layer(case: Case, shift_integers: bool) -> None:
    layer, original = case
    vqk = layer.vqk.clone()
    if shift_integers:
        # As after a calibration, they are not the nearest integers.
        vqk = (vqk + torch.randint_like(vqk, -1, 2)).clamp(-4, 3)
    weight = layer.conv_layout(original.weight.detach())
    moved = type(layer).from_float(original, layer.config)
    moved.vqk = vqk
    shadow = LearnedWeight(moved, weight)
    stored = shadow.stored()
    assert torch.equal(stored.vqk, vqk)
    assert torch.equal(stored.kds.to(layer.kds.dtype), layer.kds)
    assert (stored.kds_shift is None) == (layer.kds_shift is None)
    if stored.kds_shift is not None and layer.kds_shift is not None:
        assert torch.equal(stored.kds_shift.to(layer.kds.dtype), layer.kds_shift)
    assert torch.equal(shadow(), DSLayer.dequantized_weight(moved))


@pytest.mark.parametrize("case", LAYERS, ids=lambda case: str(case[0].config))
def test_gradients_pass_straight_through_the_rounding(case: Case) -> None:
    layer, original = case
    weight = layer.conv_layout(original.weight.detach())
    shadow = LearnedWeight(layer, weight)
    g = torch.randn(layer.vqk.shape)
    shadow().backward(g)
    expected_level = g * (DSLayer.dequantized_weight(layer) * 0 + _spread(layer, layer.kds.float()))
    torch.testing.assert_close(shadow.level.grad, layer.blockwise(expected_level))
    # The factors of a scale, summed over its block.
    gain = _sums(layer, g * layer.vqk) * layer.kds.float()
    torch.testing.assert_close(shadow.gain.grad, gain, rtol=1e-4, atol=1e-6)
    if shadow.offset is not None:
        torch.testing.assert_close(shadow.offset.grad, _sums(layer, g) * layer.kds.float(), rtol=1e-4, atol=1e-6)
    recomputed = RecomputedWeight(layer, weight)
    assert torch.equal(recomputed.stored().vqk, layer.vqk)
    value = recomputed()
    torch.testing.assert_close(value, DSLayer.dequantized_weight(layer))
    value.backward(g)
    assert torch.equal(recomputed.weight.grad, g)


def _blocks(layer: DSLayer, value: Tensor) -> list[Tensor]:
    return list(layer.blockwise(value).split(layer.config.block_size, dim=1))


def _sums(layer: DSLayer, value: Tensor) -> Tensor:
    return torch.stack([block.sum(1) for block in _blocks(layer, value)], dim=1).view(layer.kds.shape)


def _spread(layer: DSLayer, kds: Tensor) -> Tensor:
    parts = [kds[:, i : i + 1].expand_as(block) for i, block in enumerate(_blocks(layer, layer.vqk))]
    return torch.cat(parts, dim=1).reshape(layer.vqk.shape)


def test_levels_stay_within_the_integers() -> None:
    layer, original = LAYERS[0]
    shadow = LearnedWeight(layer, original.weight.detach())
    with torch.no_grad():
        shadow.level.add_(torch.randn_like(shadow.level) * 100)
    shadow.bound_()
    vqk = shadow.stored().vqk
    assert (int(vqk.min()), int(vqk.max())) == (-4, 3)


def test_images_are_drawn_evenly() -> None:
    seen = torch.cat([drawn(step, 6, 9, seed=1) for step in range(3)])
    assert torch.equal(seen.bincount(), torch.full((9,), 2))
    assert not torch.equal(seen[:9], seen[9:])


@pytest.mark.parametrize("calibrated", [False, True])
def test_it_comes_closer_to_the_teacher(
    teacher: tnn.Module, student: tnn.Module, images: Tensor, calibrated: bool, tmp_path: Path
) -> None:
    start = dsconv.calibrate(fold_batchnorm(student), teacher, images[:32]) if calibrated else student
    before, original = state_of(start), state_of(teacher)
    looks: list[Any] = []
    better = dsconv.adapt(start, teacher, images, recipe={"steps": 60, "every": 20}, on_look=looks.append)
    assert_same(before, state_of(start))
    assert_same(original, state_of(teacher))
    info = model_info(better)
    assert info is not None and info.adapted_on == 128 and info.adaptation.looks == tuple(looks)
    assert info.adaptation.best.held_back_kl == min(look.held_back_kl for look in looks)
    held_out, _ = load_digits("test")
    first, last = (dsconv.compare(teacher, model, held_out).kl for model in (start, better))
    assert last < first * (0.9 if calibrated else 0.5)
    flags = {name: p.requires_grad for name, p in start.named_parameters()}
    assert flags.items() <= {name: p.requires_grad for name, p in better.named_parameters()}.items()
    assert dsconv.summary(better).effective_bits == pytest.approx(dsconv.summary(start).effective_bits, abs=0.3)
    # The file contains all of it, and the integers give the trained outputs.
    again = dsconv.load(dsconv.save(better, tmp_path / "a.safetensors"))
    assert model_info(again).adapted_on == 128
    with torch.inference_mode():
        logits = again(held_out)
        with dsconv.ops.simulated():
            far = (logits - better(held_out)).abs().amax(1) > 0.1
    # Sums in another order change the rounding of a few mantissas.
    winograd = any(layer.algorithm == "winograd" for layer in dsconv.summary(again).layers)
    assert far.float().mean() < (0.03 if winograd else 0.01)
    assert "KL held back" in str(info.adaptation) and info.adaptation.to_dict()["recipe"]["steps"] == 60


def test_recomputed_weights_keep_to_the_rule(teacher: tnn.Module, images: Tensor) -> None:
    start = dsconv.quantize(teacher, dsconv.QuantConfig.preset("paper", weight_bits=2))
    recipe = dsconv.Recipe.preset("paper", steps=30, every=10, lr=3e-4)
    better = dsconv.adapt(start, teacher, images, recipe=recipe)
    adaptation = model_info(better).adaptation
    assert adaptation.best_step > 0 and adaptation.best.held_back_kl < adaptation.looks[0].held_back_kl
    for module in better.modules():
        if isinstance(module, DSLayer):
            # Rule `paper`: the largest value of each block gets the first level.
            assert all((block.amin(1) == -2).all() for block in _blocks(module, module.vqk))
    calibrated = dsconv.calibrate(start, teacher, images[:32])
    with pytest.raises(ModelError, match="recipe 'default'"):
        dsconv.adapt(calibrated, teacher, images, recipe="paper")


def test_a_state_no_better_is_not_kept(teacher: tnn.Module, images: Tensor) -> None:
    start = dsconv.quantize(teacher, "w8a8")
    # A far too large learning rate: the network diverges immediately.
    better = dsconv.adapt(start, teacher, images, recipe={**QUICK, "steps": 40, "lr": 0.3, "patience": 2})
    adaptation = model_info(better).adaptation
    assert adaptation.best_step == 0 and [look.step for look in adaptation.looks] == [0, 4, 8]
    assert adaptation.stopped == "no improvement for 2 looks"
    layers = [(a, b) for a, b in zip(start.modules(), better.modules(), strict=True) if isinstance(a, DSLayer)]
    assert all(torch.equal(a.vqk, b.vqk) and torch.equal(a.kds, b.kds) for a, b in layers)


def test_a_nan_ends_it_and_says_where(teacher: tnn.Module, student: tnn.Module, images: Tensor) -> None:
    with pytest.warns(
        UserWarning, match=r"at step \d+, NaN or infinities appeared in .*'.*: the state of step 0 is kept"
    ):
        better = dsconv.adapt(student, teacher, images, recipe={**QUICK, "lr": 1e30})
    assert model_info(better).adaptation.best_step == 0
    with torch.inference_mode():
        assert better(images).isfinite().all()


def test_autocast_trains(teacher: tnn.Module, student: tnn.Module, images: Tensor) -> None:
    better = dsconv.adapt(student, teacher, images, recipe={"steps": 40, "every": 20}, autocast=True)
    looks = model_info(better).adaptation.looks
    assert looks[-1].held_back_kl < 0.7 * looks[0].held_back_kl


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("autocast", [False, True])
def test_a_gpu_trains_as_a_cpu_does(teacher: tnn.Module, student: tnn.Module, images: Tensor, autocast: bool) -> None:
    settings: dict[str, Any] = {"recipe": QUICK, "autocast": autocast}
    found = [dsconv.adapt(student, teacher, images, device=device, **settings) for device in ("cpu", "cuda")]
    assert all(parameter.is_cpu for net in (*found, teacher) for parameter in net.parameters())
    before, after = zip(*[(a.looks[0], a.looks[-1]) for a in map(adaptation_of, found)], strict=True)
    for looks in (before, after):
        assert looks[0].held_back_kl == pytest.approx(looks[1].held_back_kl, rel=0.1)


SCRIPT = """
import os, resource, signal, sys, torch, dsconv
from dsconv.demo import load_digits
stop, state, out = sys.argv[1:]
def on_look(look):
    if stop == "kill" and look.step == 8:
        os.kill(os.getpid(), signal.SIGKILL)
    if stop == "full" and look.step == 0:
        # No file may become larger, as on a full disk: the next state, which has Adam's moments in it, is.
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (os.path.getsize(state) * 5 // 4,) * 2)
teacher, images = dsconv.zoo.build("dsconv/digits_resnet"), load_digits("unlabelled")[0][:128]
student = dsconv.quantize(teacher, dsconv.QuantConfig.preset("w4a4", weight_bits=2))
result = dsconv.adapt(
    student, teacher, images, recipe={"steps": 12, "every": 4, "batch_size": 16}, on_look=on_look,
    state=state, resume=os.path.exists(state), log=state + ".csv",
)
if os.environ.get("RANK", "0") == "0":
    torch.save((dict(result.state_dict()), [look.held_back_kl for look in result.dsconv_info.adaptation.looks]), out)
"""
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Return a function that runs a training in a new process."""
    file = tmp_path_factory.mktemp("script") / "script.py"
    file.write_text(SCRIPT)

    def run(*arguments: object, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *launcher, str(file), *map(str, arguments)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)

    return run


@pytest.fixture(scope="module")
def undisturbed(script: Run, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Tensor], list[float]]:
    """Return the state and the looks of a training without interruption."""
    folder = tmp_path_factory.mktemp("undisturbed")
    done = script("", folder / "state", folder / "out")
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "out")


def test_a_training_is_resumed_to_the_same_bits(script: Run, undisturbed: Any, tmp_path: Path) -> None:
    state, out = tmp_path / "state", tmp_path / "out"
    done = script("full", state, out)
    assert done.returncode == 1 and f"OSError: {state}: cannot be written" in done.stderr
    assert sorted(os.listdir(tmp_path)) == ["state", "state.csv"]
    assert script("kill", state, out).returncode == -signal.SIGKILL
    assert not out.exists()
    done = script("", state, out)
    assert done.returncode == 0, done.stderr
    (expected, kl), (got, again) = undisturbed, torch.load(out)
    assert_same(expected, got)
    assert kl == again
    rows = list(csv.DictReader((tmp_path / "state.csv").open()))
    assert [row["step"] for row in rows] == ["0", "4", "8", "12"]
    assert [float(row["held_back_kl"]) for row in rows] == kl


def test_two_processes_do_what_one_does(script: Run, undisturbed: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    done = script("", tmp_path / "state", out, launcher=launcher)
    assert done.returncode == 0, done.stderr
    (expected, kl), (got, again) = undisturbed, torch.load(out)
    # Sums are rounded in another order, which changes the rounding of a few mantissas or levels.
    assert again == pytest.approx(kl, rel=0.02)
    for name, value in expected.items():
        if name.endswith("vqk"):
            assert (value != got[name]).float().mean() < 0.01, name
        else:
            torch.testing.assert_close(got[name], value, rtol=0.01, atol=0.01)


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"recipe": "best"}, ConfigError, "expected one of default, paper, got 'best'"),
        ({"recipe": {"lr": 0}}, ConfigError, "lr: "),
        ({"recipe": {"rate": 1}}, ConfigError, "rate: unknown setting; known are weights, lr"),
        ({"recipe": 3}, ConfigError, "expected a Recipe"),
        ({"seed": -1}, ConfigError, "seed"),
        ({"resume": True}, ConfigError, "no state file to resume"),
        ({"images": torch.zeros(3, 1, 8, 8)}, DataError, "at least 4"),
        ({"images": torch.zeros(40, 1, 8, 8)}, DataError, "got 1 different ones"),
        ({"images": torch.randn(40, 2, 8, 8)}, ModelError, "teacher: it cannot run"),
        ({"student": tnn.ReLU()}, ModelError, "student: ReLU holds no quantized layer"),
        ({"teacher": "resnet"}, ModelError, "teacher: expected a torch.nn.Module"),
        ({"teacher": tnn.Conv2d(1, 10, 3)}, ModelError, "teacher: expected the float network that student was made"),
        ({"device": "cuda:99"}, ConfigError, "device"),
        ({"log": "/no/such/folder/a.csv"}, FileNotFoundError, "/no/such/folder"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_mistakes(
    changes: dict[str, Any], error: type[Exception], match: str, teacher: Any, student: Any, images: Tensor
) -> None:
    arguments = {"student": student, "teacher": teacher, "images": images, "recipe": QUICK} | changes
    with pytest.raises(error, match=match):
        dsconv.adapt(**arguments)


def test_networks_that_return_other_shapes(teacher: tnn.Module, student: tnn.Module, images: Tensor) -> None:
    class Cut(type(teacher)):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)[:, :7]

    other = dsconv.zoo.build("dsconv/digits_resnet")
    other.__class__ = Cut
    with pytest.raises(ModelError, match=r"teacher: for one image it returns tensors of shapes .*7.*, but student"):
        dsconv.adapt(student, other, images)


def test_a_teacher_of_nan(teacher: tnn.Module, student: tnn.Module, images: Tensor) -> None:
    broken = dsconv.zoo.build("dsconv/digits_resnet")
    with torch.no_grad():
        broken.layer2.conv1.weight[0, 0] = torch.nan
    with pytest.raises(ModelError, match=r"teacher: NaN or infinities first appear in layer 'layer2\.conv1'"):
        dsconv.adapt(student, broken, images)


def test_images_of_another_range_are_refused(teacher: tnn.Module, student: tnn.Module, images: Tensor) -> None:
    with pytest.raises(DataError, match=r"deviation .*any_range"):
        dsconv.adapt(student, teacher, images * 255, recipe={**QUICK, "steps": 1})
    with pytest.warns(UserWarning, match="deviation"):
        dsconv.adapt(student, teacher, images * 255, recipe={**QUICK, "steps": 1}, any_range=True)


def test_a_state_belongs_to_its_training(
    teacher: tnn.Module, student: tnn.Module, images: Tensor, tmp_path: Path
) -> None:
    state = tmp_path / "state"
    dsconv.adapt(student, teacher, images, recipe={**QUICK, "steps": 1}, state=state)
    with pytest.raises(ConfigError, match="there is a file"):
        dsconv.adapt(student, teacher, images, recipe=QUICK, state=state)
    with pytest.raises(FileFormatError, match="other recipe:"):
        dsconv.adapt(student, teacher, images, recipe=QUICK, state=state, resume=True)
    state.write_bytes(state.read_bytes()[:1000])
    with pytest.raises(FileFormatError, match="not a complete state file"):
        dsconv.adapt(student, teacher, images, recipe={**QUICK, "steps": 1}, state=state, resume=True)
