"""benchmarks/networks.py: the results of a network are a row of its page."""

import importlib.util
import math
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import dsconv
from dsconv.ops import native

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import networks

pytestmark = pytest.mark.skipif(native.extension() is None, reason="the extension dsconv._C is not built")


class Fails(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_exporting():
            raise OSError("in two\nlines")
        return x


@pytest.fixture(scope="module")
def results() -> Iterator[dict[str, dict]]:
    made = {
        "smp/alone": lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()),
        "smp/left@3x9x9": lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.CELU(), nn.CELU(), nn.Tanh()),
        "smp/fails": lambda: nn.Sequential(nn.Conv2d(3, 8, 3), Fails()),
        "smp/takes_lines": lambda: nn.Sequential(nn.Linear(7, 7), nn.Linear(7, 7)),
        "smp/absent": lambda: importlib.import_module("dsconv_no_such_package"),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(networks, "build", lambda library, name: made[_named(made, library, name)]().eval())
        patch.setattr(networks, "NETWORKS", {"smp": " ".join(name.partition("/")[2] for name in made)})
        patch.setattr(torch, "set_num_threads", lambda n: None)
        yield {name: list(networks.tried(name))[-1] for name in made}


def _named(made: dict[str, object], library: str, name: str) -> str:
    return next(key for key in made if key.partition("@")[0] == f"{library}/{name}")


def test_each_thing_that_a_network_does_is_told(results: dict[str, dict]) -> None:
    alone, left, fails, lines, absent = results.values()
    assert alone["input"] == "3x64x64" and alone["layers"] == 1 and alone["steps"] == 1
    assert alone["compiled_db"] == alone["folded_db"] == math.inf and networks.does_everything(alone)
    assert left["input"] == "3x9x9" and left["by_pytorch"] == {"celu": 2} and "folded_db" not in left
    assert 100 < left["compiled_db"] < math.inf == left["but_for_own_bits_db"]
    assert set(fails["failed"]) == {"compile", "onnx"} and fails["layers"] == 1
    assert "no input of the sizes tried" in lines["unusable"] and "dsconv_no_such_package" in absent["absent"]
    if importlib.util.find_spec("onnxruntime"):
        assert all(made[key] > 100 for made in (alone, left) for key in ("onnx_db", "onnx_by_layer_db"))


def test_the_page_has_a_row_for_each_network_and_totals_of_those_that_could_run(results: dict[str, dict]) -> None:
    lines = networks.page(results).splitlines()
    assert [line.split("|")[1].strip() for line in lines if line.startswith("| ") and "3x" in line] == [
        "alone",
        "left",
        "fails",
    ]
    assert "| of 3 networks | | |" in lines and "| quantized | 3 | 100.0 % |" in lines
    assert any(
        line.startswith("| compiled; bitwise equal to the quantized network, except own rounding | 2 |")
        for line in lines
    )
    assert "| celu | 2 | 1 |" in lines
    (row,) = (line for line in lines if line.startswith("| fails |"))
    assert row.count("**no**") == 2 and "in two" in row


@pytest.mark.parametrize(("of_file", "instead"), [("Relu", "Abs"), ("Conv", "")])
def test_what_goes_wrong_in_a_file_lowers_its_agreement_by_layer(of_file: str, instead: str, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx", reason="needs the extra 'onnx'")
    pytest.importorskip("onnxruntime", reason="needs the extra 'onnx'")
    net, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Tanh()).eval(), torch.randn(2, 3, 8, 8)
    qnet = dsconv.quantize(net, dsconv.QuantConfig.preset("w8a8"))
    with networks.exported_layers() as exported:
        path = dsconv.export_onnx(qnet, x, tmp_path / "net.onnx")
    with torch.inference_mode():
        assert networks.by_layer(qnet, path, exported, x) > 100
        file = onnx.load(path)
        node = next(node for node in file.graph.node if node.op_type == of_file and len(node.input) != 2)
        if instead:
            node.op_type = instead
        else:
            del node.input[2]  # the bias
        onnx.save(file, path)
        assert networks.by_layer(qnet, path, exported, x) < 60


def test_a_network_that_takes_too_long_has_a_result() -> None:
    result = networks.in_process("smp/unet", 0)
    assert result["failed"] == {"process": "took longer than 0 s"} and not networks.does_everything(result)


def test_the_largest_difference_of_several_outputs_counts() -> None:
    x, y = torch.ones(4), torch.full((2,), 2.0)
    assert networks.agreement([x, y], [x, y]) == math.inf
    assert networks.agreement([x, y], [x + 0.1, y + 0.1]) == 20.0
    with pytest.raises(AssertionError, match="expected outputs"):
        networks.agreement([x, y], [x])


def test_every_network_is_named_once() -> None:
    assert [name for name, n in Counter(networks.names()).items() if n > 1] == []
