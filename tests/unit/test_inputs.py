"""Models with inputs and outputs of several tensors, lists, dictionaries and dataclasses."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import dsconv
from dsconv import Inputs
from dsconv.conversion import model_info
from dsconv.data import batches
from dsconv.data.inputs import Batch, as_inputs, by_sample, call, in_batches, joined, shape_of
from dsconv.errors import DataError, ModelError
from dsconv.ops import native
from dsconv.structures import mapped, paths_in, tensors_in

compiles = pytest.mark.skipif(native.extension() is None, reason="the extension dsconv._C is not built")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


X, Y, SOUND = random(16, 3, 8, 8), random(16, 3, 8, 8, seed=1), random(16, 60)
TOKENS = torch.randint(0, 9, (16, 6), generator=torch.Generator().manual_seed(0))


@dataclass
class Pair:
    image: Any
    extra: Any = None
    scale: float = 1.0


class Named(NamedTuple):
    first: Any
    second: Any


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 5, 1)

    def body(self, x: Tensor) -> Tensor:
        y: Tensor = self.b(torch.relu(self.a(x)))
        return y


class TwoTensors(Body):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.body(x + y)


class Optional(Body):
    def forward(self, x: Tensor, *, scale: float = 2.0, mask: Tensor | None = None) -> Tensor:
        y = self.body(x) * scale
        return y if mask is None else y + mask


class Dictionary(Body):
    def forward(self, given: dict[str, Tensor]) -> dict[str, Any]:
        y = self.body(given["x"])
        return {"out": y, "both": [y.amax((2, 3)), self.body(given["y"])], "count": 2}


class OfPair(Body):
    def forward(self, pair: Pair) -> Named:
        return Named(self.body(pair.image) * pair.scale, {"extra": self.body(pair.extra)})


class Shared(Body):
    """Network with one tensor that is not a batch."""

    def forward(self, x: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        return self.body(x) + table, table * 2


class List(Body):
    def forward(self, images: list[Tensor]) -> list[Tensor]:
        y = self.body(torch.stack(list(images)))
        return [image.amax((1, 2)) for image in y]


class Text(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.conv, self.head = nn.Embedding(9, 16), nn.Conv1d(16, 32, 3), nn.Linear(32, 5)

    def forward(self, tokens: Tensor, weights: Tensor) -> Tensor:
        y: Tensor = self.head(torch.relu(self.conv(self.embedding(tokens).transpose(1, 2))).amax(2) + weights)
        return y


class Sound(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.head = nn.Conv1d(1, 16, 9, 4), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(torch.relu(self.conv(x[:, None])).amax(2))
        return y


CASES: dict[str, tuple[Callable[[], nn.Module], Inputs]] = {
    "two tensors": (TwoTensors, Inputs(X, Y)),
    "a keyword": (Optional, Inputs(X, mask=random(16, 5, 8, 8))),
    "a number": (Optional, Inputs(X, scale=3.0)),
    "a dictionary": (Dictionary, Inputs({"x": X, "y": Y})),
    "a dataclass": (OfPair, Inputs(Pair(X, Y, 0.5))),
    "a table": (Shared, Inputs(X, random(5, 8, 8))),
    "tokens": (Text, Inputs(TOKENS, random(16, 32))),
    "sound": (Sound, Inputs(SOUND)),
}


def same(a: Any, b: Any) -> bool:
    """Return whether two outputs have the same structure and the same bits."""
    one, other = tensors_in(a), tensors_in(b)
    alike = mapped(lambda _: 0, a) == mapped(lambda _: 0, b) and type(a) is type(b)
    return alike and all(torch.equal(x, y) and x.dtype == y.dtype for x, y in zip(one, other, strict=True))


@compiles
@pytest.mark.parametrize("case", CASES)
def test_programs_take_and_return_what_the_model_does(case: str) -> None:
    make, inputs = CASES[case]
    model = dsconv.quantize(make().eval(), "w4a4")
    fast = dsconv.compile(model, inputs[:2])
    with torch.inference_mode():
        for count in (5, 1, 2, 16):
            part = inputs[:count]
            assert same(call(fast, part), call(model, part)), count


@compiles
def test_lists_of_images_are_compiled_by_their_length() -> None:
    model = dsconv.quantize(List().eval(), "w4a4")
    fast = dsconv.compile(model, [X[0], X[1]])
    with torch.inference_mode():
        for count in (2, 1, 3):
            assert same(fast(list(X[:count])), model(list(X[:count])))


@compiles
def test_other_arguments_are_captured_anew() -> None:
    model = dsconv.quantize(Optional().eval(), "w4a4")
    fast = dsconv.compile(model, X[:1])
    with torch.inference_mode():
        for arguments in ({}, {"scale": 5.0}, {"mask": Y[:, :1]}, {"mask": Y[:, :1], "scale": 1.0}):
            assert same(fast(X, **arguments), model(X, **arguments)), arguments


@compiles
def test_a_program_checks_all_of_its_inputs() -> None:
    fast = dsconv.compile(dsconv.quantize(TwoTensors().eval(), "w4a4"), (X[:1], Y[:1]))
    with pytest.raises(ValueError, match=r"expected float32 on the CPU, got torch\.float64"):
        fast(X, Y.double())
    with pytest.raises(ValueError, match=r"expected a batch of at least one, got Inputs\(float32 \(0, 3, 8, 8\)"):
        dsconv.compile(fast.model, (X[:0], Y[:0]))
    with pytest.raises(ModelError, match=r"cannot be captured .*missing 1 required positional argument: 'y'"):
        fast(X)


@pytest.mark.parametrize("case", [*CASES, "a list"])
def test_networks_are_calibrated_on_any_inputs(case: str) -> None:
    make, inputs = CASES[case] if case != "a list" else (List, Inputs(list(X)))
    reference = make().eval()
    model = dsconv.quantize(reference, "w4a4")
    with torch.inference_mode():
        better = dsconv.calibrate(model, reference, inputs)
        expected, before, after = (tensors_in(call(net, inputs)) for net in (reference, model, better))
    errors = [
        sum(float((f - q).square().sum()) for f, q in zip(expected, made, strict=True)) for made in (before, after)
    ]
    assert errors[1] <= errors[0]
    assert model_info(better).calibration.images == 16


class Detector(Body):
    """Network whose post-processing depends on its detections."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(self.a, nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1))
        self.heads = nn.ModuleList(nn.Sequential(nn.Conv2d(16, 16, 1), nn.ReLU(), nn.Conv2d(16, n, 1)) for n in (2, 4))
        self.heads[0].gain = 2.0

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        y = self.features(torch.stack(images))
        scores, boxes = (head(y).flatten(2) for head in self.heads)
        found = []
        for image in range(len(images)):
            kept = [i for i in range(scores.shape[2]) if scores[image, 0, i].item() * self.heads[0].gain > 0]
            found.append({"boxes": boxes[image][:, kept], "scores": scores[image][:, kept]})
        return found


@compiles
def test_detectors_are_compiled_as_far_as_they_go() -> None:
    images = list(X[:3])
    model = dsconv.quantize(Detector().eval(), "w4a4")
    with pytest.warns(UserWarning, match=r"Detector is compiled in parts \(features, heads\.0, heads\.1\), PyTorch"):
        fast = dsconv.compile(model, images)
    assert fast.parts == ("features", "heads.0", "heads.1")
    assert {step.name for step in fast.plan.steps} >= {"features.0", "heads.1.2", ""}
    assert [step.operator for step in fast.plan.in_pytorch] == ["Detector.forward, but for features, heads.0, heads.1"]
    with torch.inference_mode():
        for count in (3, 1, 2):
            assert same(fast(images[:count]), model(images[:count]))
        again = copy.deepcopy(fast)
        assert same(again(images), model(images))
    with pytest.raises(ModelError, match=r"compiled in parts: look at one of features, heads\.0"):
        dsconv.profile(fast, images)


@compiles
def test_a_capture_that_fails_leaves_no_mode_of_pytorch_behind() -> None:
    class ByValue(Body):
        def forward(self, x: Tensor) -> Tensor:
            return self.body(x) if float(x.sum()) > 0 else x

    before = torch._C._len_torch_function_stack()  # type: ignore[attr-defined]
    with pytest.raises(ModelError, match="cannot be captured"):
        dsconv.compile(dsconv.quantize(ByValue().eval()), X[:1])
    assert torch._C._len_torch_function_stack() == before  # type: ignore[attr-defined]


def test_a_model_that_misses_arguments_is_told_how_to_pass_them() -> None:
    model = TwoTensors().eval()
    with pytest.raises(ModelError, match=r"missing 1 required .*: several arguments go into dsconv\.Inputs\(x, y\)"):
        dsconv.calibrate(dsconv.quantize(model), model, X)


@pytest.mark.parametrize("case", ["two tensors", "a dictionary", "a dataclass", "a table", "tokens"])
def test_files_of_onnx_have_names_and_outputs_of_the_model(case: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="needs the extra dsconv[onnx]")
    pytest.importorskip("onnxruntime", reason="needs ONNX Runtime")
    from dsconv.onnx import OnnxNetwork

    make, inputs = CASES[case]
    model = dsconv.quantize(make().eval(), "w8a8")
    network = OnnxNetwork(dsconv.export_onnx(model, inputs[:1], tmp_path / "net.onnx"))
    expected_names = {
        "two tensors": (["x", "y"], ["y_out"]),
        "a dictionary": (["given_x", "given_y"], ["out", "both_0", "both_1"]),
        "a dataclass": (["pair_image", "pair_extra"], ["first", "second_extra"]),
        "a table": (["x", "table"], ["y_0", "y_1"]),
        "tokens": (["tokens", "weights"], ["y"]),
    }[case]
    found = [
        [value.name for value in values] for values in (network.session.get_inputs(), network.session.get_outputs())
    ]
    assert found == list(expected_names)
    with torch.inference_mode():
        made, expected = (tensors_in(call(net, inputs[:3])) for net in (network, model))
    for f, q in zip(expected, made, strict=True):
        assert f.shape == q.shape
        assert float((f - q).square().sum()) < 1e-4 * float(f.square().sum())
    with pytest.raises(ModelError, match=r"the file has the inputs \w+, \w+, but was called on 1 tensors"):
        network(X)


def test_batches_of_inputs_are_cut_and_joined() -> None:
    table = random(5, 8, 8)
    inputs = Inputs(X, {"tokens": TOKENS, "table": table}, flag=True)
    assert len(inputs) == 16 and inputs.batched == [True, True, False]
    parts = in_batches(inputs, 5)
    assert [len(part) for part in parts] == [5, 5, 5, 1]
    again = joined(parts)
    assert isinstance(again, Inputs) and again.kwargs == {"flag": True}
    assert all(map(torch.equal, again.tensors, inputs.tensors))
    chosen = inputs[torch.tensor([3, 1])]
    assert torch.equal(chosen.tensors[1], TOKENS[[3, 1]]) and torch.equal(chosen.tensors[2], table)
    images = Inputs([X[0], Y[0], X[1, :, 1:]])
    assert len(images) == 3 and len(images[1:]) == 2 and by_sample(images).shape == (3, 168)
    kept = images[torch.tensor([True, False, True])]
    assert [tuple(image.shape) for image in kept.tensors] == [(3, 8, 8), (3, 7, 8)]
    assert len(joined([images[:1], images[1:]])) == 3


def test_numbers_of_a_sample_are_those_of_all_its_tensors() -> None:
    values = by_sample(Inputs(X, TOKENS, table=random(5)))
    assert torch.equal(values, torch.cat([X.flatten(1), TOKENS.float()], 1))


def test_inputs_without_a_batch_are_refused() -> None:
    for wrong in ((), (1, "a"), (torch.tensor(1.0),), ([],)):
        with pytest.raises(DataError, match=r"inputs: expected a tensor \(N, ...\) among the arguments"):
            Inputs(*wrong)
    with pytest.raises(DataError, match=r"got ndarray: pass torch\.from_numpy"):
        Inputs(X, np.zeros(3))


def test_a_tuple_is_all_arguments_and_anything_else_is_one() -> None:
    assert len(as_inputs((X, Y)).args) == 2
    assert as_inputs([X[0]]).of_images and as_inputs({"x": X}).args == ({"x": X},)
    given = Inputs(X)
    assert as_inputs(given) is given


@pytest.mark.parametrize(
    ("images", "count"),
    [(Inputs(X, Y), 16), (SOUND, 16), (TOKENS, 16), ([Inputs(X, Y)] * 2, 32), ([(Inputs(X), TOKENS[:, 0])], 16)],
)
def test_batches_of_anything_are_read(images: Any, count: int) -> None:
    source = batches(images, batch_size=6)
    assert source.total == count
    found: list[tuple[Batch, Tensor | None]] = list(source)
    assert sum(len(x) for x, _ in found) == count
    assert sum(len(x) for x, _ in batches(images, batch_size=6, limit=7)) == 7


def test_labels_may_be_maps_or_images() -> None:
    maps = torch.zeros(16, 8, 8, dtype=torch.int32)
    ((_, labels),) = batches([(X, maps)])
    assert labels is not None and labels.dtype == torch.int64 and labels.shape == (16, 8, 8)
    ((_, target),) = batches([(X, Y)])
    assert target is not None and torch.equal(target, Y)
    with pytest.raises(DataError, match="labels must be 16 integers"):
        list(batches([(X, maps[:3])]))


def test_shapes_tell_batches_that_can_be_joined() -> None:
    assert shape_of(Inputs(X, TOKENS)) == shape_of(Inputs(X[:3], TOKENS[:3])) != shape_of(Inputs(X, TOKENS, flag=True))
    assert shape_of(X) == (3, 8, 8)


def test_structures_keep_their_classes() -> None:
    tree = {"pair": Pair([X], (Y,)), "named": Named(X, 3), "none": None}
    again = mapped(lambda x: x + 1, tree)
    assert isinstance(again["pair"], Pair) and isinstance(again["named"], Named) and again["none"] is None
    assert torch.equal(again["pair"].image[0], X + 1) and tree["pair"].image[0] is X
    assert [way for way, _ in paths_in(tree)] == [("pair", "image", 0), ("pair", "extra", 0), ("named", "first")]
