"""State files: work resumes from exactly the written state, or gives an error in one short line."""

import json
import random
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import dsconv
from dsconv.errors import FileFormatError
from dsconv.io.checkpoint import checksum

X = torch.randn(64, 3, 6, 6, generator=torch.Generator().manual_seed(0))
RECIPE = {"steps": 2, "every": 1, "batch_size": 8}


def networks() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    return net, dsconv.quantize(net, dsconv.QuantConfig(weight_shift=True))


def calibrate(state: Path, resume: bool) -> nn.Module:
    net, qnet = networks()
    return dsconv.calibrate(qnet, net, X[:8], state=state, resume=resume)


def adapt(state: Path, resume: bool) -> nn.Module:
    net, qnet = networks()
    return dsconv.adapt(qnet, net, X, recipe=RECIPE, state=state, resume=resume)


WORK: dict[str, Callable[[Path, bool], nn.Module]] = {"calibrate": calibrate, "adapt": adapt}


@pytest.fixture(scope="module", params=WORK)
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """Return a kind of work, and its final state."""
    path = tmp_path_factory.mktemp("state") / "state"
    WORK[request.param](path, False)
    return request.param, path


def crafted(finished: Path, path: Path, change: Callable[[dict[str, Any], dict[str, Tensor]], Any]) -> Path:
    """Write a state with changed contents and a valid checksum."""
    with safe_open(finished, "pt") as file:
        entries, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    parts = {"data": json.loads(entries["data"]), "made_of": json.loads(entries["made_of"])}
    change(parts, tensors)
    entries |= {name: value if isinstance(value, str) else json.dumps(value) for name, value in parts.items()}
    tensors = {name: value.contiguous() for name, value in tensors.items()}
    save_file(tensors, path, entries | {"checksum": checksum(entries, tensors)})
    return path


def refused(work: str, path: Path) -> None:
    with pytest.raises(FileFormatError) as caught:
        WORK[work](path, True)
    message = str(caught.value)
    assert message.isprintable() and len(message) < 1000 and "delete it" in message


def test_a_state_that_is_as_it_was_written_is_resumed(finished: tuple[str, Path], tmp_path: Path) -> None:
    work, path = finished
    path = crafted(path, tmp_path / "state", lambda parts, tensors: None)
    expected = WORK[work](tmp_path / "other", False).state_dict()
    for name, value in WORK[work](path, True).state_dict().items():
        assert torch.equal(value, expected[name])


CHANGES: dict[str, Callable[[dict[str, Any], dict[str, Tensor]], Any]] = {
    "no records": lambda parts, tensors: parts.update(data=[]),
    "a record less": lambda parts, tensors: parts["data"].pop(0),
    "a record twice": lambda parts, tensors: parts["data"].append(parts["data"][-1]),
    "no list": lambda parts, tensors: parts.update(data={"name": "0"}),
    "nothing": lambda parts, tensors: parts.update(data=None),
    "no JSON": lambda parts, tensors: parts.update(data="[{"),
    "deep nesting": lambda parts, tensors: parts.update(data="[" * 100_000),
    "numbers": lambda parts, tensors: parts.update(data=[1, 2]),
    "another record": lambda parts, tensors: parts.update(data=[{"self": 1}]),
    "a field more": lambda parts, tensors: parts["data"][0].update(more=1),
    "a field less": lambda parts, tensors: parts["data"][0].popitem(),
    "fields of another type": lambda parts, tensors: parts["data"][0].update({k: [[1]] for k in parts["data"][0]}),
    "a long text": lambda parts, tensors: parts["data"][0].update(seconds="x" * 1_000_000),
    "made of nothing": lambda parts, tensors: parts.update(made_of=None),
    "made of a list": lambda parts, tensors: parts.update(made_of=[1]),
    "made of something else": lambda parts, tensors: parts["made_of"].update(images="x"),
    "a tensor less": lambda parts, tensors: tensors.pop(min(tensors)),
    "a tensor more": lambda parts, tensors: tensors.update({"x" * 100_000: torch.ones(1)}),
    "no tensors": lambda parts, tensors: tensors.clear(),
    "another shape": lambda parts, tensors: tensors.update({min(tensors): torch.ones(7)}),
    "another dtype": lambda parts, tensors: tensors.update({name: t.bool() for name, t in tensors.items()}),
    "complex numbers": lambda parts, tensors: tensors.update({k: t.to(torch.complex64) for k, t in tensors.items()}),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_crafted_state_is_refused(name: str, finished: tuple[str, Path], tmp_path: Path) -> None:
    work, path = finished
    refused(work, crafted(path, tmp_path / "state", CHANGES[name]))


CALIBRATED: dict[str, Callable[[dict[str, Any], dict[str, Tensor]], Any]] = {
    "integers too large": lambda parts, tensors: tensors["2.vqk"].fill_(100),
    "scales that are none": lambda parts, tensors: tensors["2.kds"].fill_(torch.nan),
    "another layer": lambda parts, tensors: parts["data"][0].update(name="nowhere"),
}


@pytest.mark.parametrize("name", CALIBRATED)
def test_a_crafted_state_of_a_calibration_is_refused(name: str, tmp_path: Path) -> None:
    calibrate(tmp_path / "finished", False)
    refused("calibrate", crafted(tmp_path / "finished", tmp_path / "state", CALIBRATED[name]))


def without_records(parts: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    parts.update(data=[])
    tensors.clear()


def test_a_training_without_records_is_refused(tmp_path: Path) -> None:
    adapt(tmp_path / "finished", False)
    refused("adapt", crafted(tmp_path / "finished", tmp_path / "state", without_records))


def test_a_calibration_that_was_stopped_before_its_first_layer_is_resumed(tmp_path: Path) -> None:
    whole = calibrate(tmp_path / "finished", False)
    resumed = calibrate(crafted(tmp_path / "finished", tmp_path / "state", without_records), True)
    for (name, value), other in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(value, other), name


@pytest.mark.parametrize("step", [-1, 0, 99])
def test_a_training_at_impossible_steps_is_refused(step: int, tmp_path: Path) -> None:
    adapt(tmp_path / "finished", False)
    path = crafted(tmp_path / "finished", tmp_path / "state", lambda parts, _: parts["data"][-1].update(step=step))
    refused("adapt", path)


def test_random_contents_end_in_a_file_format_error_or_are_resumed(finished: tuple[str, Path], tmp_path: Path) -> None:
    work, path = finished
    draw = random.Random(0)
    values = [None, True, -1, 10**400, 0.5, "", "x", [], {}, [[]], {"name": 1}, float("nan"), float("inf")]

    def change(parts: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        record = draw.choice(parts["data"])
        record[draw.choice(list(record))] = draw.choice(values)
        if draw.random() < 0.3:
            parts["made_of"][draw.choice(list(parts["made_of"]))] = draw.choice(values)
        name = draw.choice(list(tensors))
        if draw.random() < 0.3:
            tensors[name] = draw.choice(
                [tensors[name].flatten(), tensors[name].double(), torch.zeros(0), torch.ones(2, 2)]
            )

    for _ in range(20):
        with suppress(FileFormatError):
            WORK[work](crafted(path, tmp_path / "state", change), True)
