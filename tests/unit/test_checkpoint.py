"""Files: a loaded network has the bits of the saved one, and damaged or crafted files are never loaded."""

import base64
import json
import os
import struct
import sys
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch import nn as tnn

import dsconv
from dsconv import nn, zoo
from dsconv.conversion import Summary, model_info
from dsconv.errors import DSConvError, FileFormatError, ModelError
from dsconv.io import checkpoint, describe, read_header
from dsconv.ops import native

X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


class Net(tnn.Module):
    """Small network with a shared layer, tied parameters, BatchNorm, odd sizes and an empty buffer."""

    def __init__(self, width: int = 9):
        super().__init__()
        self.conv = tnn.Conv2d(3, width, 3, padding=1)
        self.norm = tnn.BatchNorm2d(width)
        self.depthwise = tnn.Conv2d(width, width, 3, groups=width, bias=False)
        self.up = tnn.ConvTranspose2d(width, 6, 2)
        self.shared = tnn.Conv2d(6, 6, 1)
        self.again = self.shared
        self.scale = tnn.Parameter(torch.rand(6, 1, 1))
        self.tied = self.scale
        self.fc = tnn.Linear(6, 5)
        self.register_buffer("nothing", torch.zeros(0))

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(self.depthwise(self.norm(self.conv(x)).relu()))
        return self.fc((self.again(self.shared(x)) * self.scale + self.tied).mean((2, 3)))


def net(**options: Any) -> Net:
    torch.manual_seed(0)
    model = Net(**options)
    model(torch.randn(8, 3, 6, 6))
    return model.eval()


def other() -> Net:
    torch.manual_seed(99)
    return Net().eval()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return dsconv.save(dsconv.quantize(net(), dsconv.QuantConfig(block_size=4)), tmp_path / "net.safetensors")


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("bits", range(2, 9))
def test_a_loaded_model_computes_the_same_bits(bits: int, shift: bool, tmp_path: Path) -> None:
    config = dsconv.QuantConfig(
        weight_bits=bits, weight_shift=shift, block_size=4, overrides={"fc": {"weight_bits": 5}}
    )
    quantized = dsconv.quantize(net(), config)
    float_model = other()
    before = {name: value.clone() for name, value in float_model.state_dict().items()}
    loaded = dsconv.load(dsconv.save(quantized, tmp_path / "net.safetensors"), float_model)
    with torch.no_grad():
        assert torch.equal(loaded(X), quantized(X))
    assert_same_state(loaded, quantized)
    assert type(float_model.conv) is tnn.Conv2d
    assert all(torch.equal(value, before[name]) for name, value in float_model.state_dict().items())
    assert model_info(loaded).config == config
    rows, expected = (dsconv.summary(model).to_dict() for model in (loaded, quantized))
    for row in (*rows["layers"], *expected["layers"]):
        row["weight_sqnr_db"] = row["weight_sqnr_db"] and round(row["weight_sqnr_db"], 3)
    assert rows == expected


def assert_same_state(loaded: tnn.Module, expected: tnn.Module) -> None:
    states = loaded.state_dict(), expected.state_dict()
    assert list(states[0]) == list(states[1])
    for (name, a), b in zip(states[0].items(), states[1].values(), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b), name
    for name, layer in loaded.named_modules():
        if isinstance(layer, nn.DSLayer):
            assert layer.config == expected.get_submodule(name).config


@pytest.mark.parametrize("kds_dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("cast", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_every_tensor_keeps_its_dtype(kds_dtype: str, cast: torch.dtype, tmp_path: Path) -> None:
    config = dsconv.QuantConfig(kds_dtype=kds_dtype, weight_shift=True, linear="float")
    quantized = dsconv.quantize(net(), config).to(cast)
    loaded = dsconv.load(dsconv.save(quantized, tmp_path / "net.safetensors"), other())
    assert_same_state(loaded, quantized)
    assert loaded.shared.kds.dtype == config.torch_kds_dtype
    assert loaded.norm.running_mean.dtype == loaded.fc.weight.dtype == cast
    with torch.no_grad():
        assert torch.equal(loaded(X.to(cast)), quantized(X.to(cast)))


def test_a_file_loads_into_a_model_of_another_precision(saved: Path) -> None:
    assert torch.equal(dsconv.load(saved, other().half())(X), dsconv.load(saved, other())(X))


class AsksForVersion(torch.nn.Module):
    """Module that refuses tensors without the version of their module, as torchvision's MNASNet does."""

    _version = 2

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Conv2d(3, 8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)

    def _load_from_state_dict(self, state: dict, prefix: str, metadata: dict, *more: object) -> None:
        assert metadata.get("version") == 2, metadata
        super()._load_from_state_dict(state, prefix, metadata, *more)


def test_modules_are_told_their_version_when_a_file_is_loaded(tmp_path: Path) -> None:
    qmodel, x = dsconv.quantize(AsksForVersion()), torch.randn(1, 3, 8, 8)
    again = dsconv.load(dsconv.save(qmodel, tmp_path / "net.safetensors"), AsksForVersion())
    assert torch.equal(again(x), qmodel(x))


def test_shared_layers_and_tied_parameters_are_stored_once(saved: Path) -> None:
    loaded = dsconv.load(saved, other())
    assert loaded.shared is loaded.again and loaded.tied is loaded.scale
    with safe_open(saved, "pt") as file:
        assert "again.weight_packed" not in file.keys() and "tied" not in file.keys()  # noqa: SIM118
    assert read_header(saved).aliases == {
        "again.vqk": "shared.vqk",
        "again.kds": "shared.kds",
        "again.bias": "shared.bias",
        "tied": "scale",
    }


def test_views_of_one_memory_that_are_no_copies_are_stored_each(tmp_path: Path) -> None:
    class Views(tnn.Sequential):
        def __init__(self, table: Tensor):
            super().__init__(tnn.Conv2d(3, 4, 1))
            views = {"table": table, "turned": table.t(), "wide": table.view(2, 8), "part": table[:2]}
            for name, view in (views | {"words": table.view(torch.int32), "same": table.view(4, 4)}).items():
                self.register_buffer(name, view)

    path = dsconv.save(dsconv.quantize(Views(torch.randn(4, 4)).eval()), tmp_path / "net.safetensors")
    assert read_header(path).aliases == {"same": "table"}
    with safe_open(path, "pt") as file:
        table = file.get_tensor("table")
        expected = {"turned": table.t(), "wide": table.view(2, 8), "part": table[:2], "words": table.view(torch.int32)}
        assert all(torch.equal(file.get_tensor(name), value) for name, value in expected.items())


def test_a_model_that_ties_what_the_file_keeps_apart_is_refused(tmp_path: Path) -> None:
    apart = net()
    apart.again = tnn.Conv2d(6, 6, 1)
    path = dsconv.save(dsconv.quantize(apart), tmp_path / "layers.safetensors")
    with pytest.raises(FileFormatError, match="again"):
        dsconv.load(path, other())
    apart = net()
    apart.tied = tnn.Parameter(torch.rand(6, 1, 1))
    path = dsconv.save(dsconv.quantize(apart), tmp_path / "parameters.safetensors")
    with pytest.raises(FileFormatError, match="tied"):
        dsconv.load(path, other())
    loaded = dsconv.load(path, apart)
    assert not torch.equal(loaded.tied, loaded.scale)


def test_a_model_that_keeps_apart_what_the_file_ties_is_refused_or_equal(saved: Path) -> None:
    apart = other()
    apart.again = tnn.Conv2d(6, 6, 1)
    with pytest.raises(FileFormatError, match="again"):
        dsconv.load(saved, apart)
    apart = other()
    apart.tied = tnn.Parameter(torch.rand(6, 1, 1))
    assert torch.equal(dsconv.load(saved, apart)(X), dsconv.load(saved, other())(X))


def test_the_integers_take_their_true_width(tmp_path: Path) -> None:
    for bits in range(2, 9):
        quantized = dsconv.quantize(tnn.Linear(64, 33, bias=False), dsconv.QuantConfig(weight_bits=bits))
        with safe_open(dsconv.save(quantized, tmp_path / f"{bits}.safetensors"), "pt") as file:
            assert file.get_slice("weight_packed").get_shape() == [-(-64 * 33 * bits // 8)]


@pytest.mark.parametrize("preset", ["paper", "default"])
def test_the_size_is_the_header_the_shapes_and_what_the_summary_states(preset: str, tmp_path: Path) -> None:
    quantized = dsconv.quantize(net(), preset)
    path = dsconv.save(quantized, tmp_path / "net.safetensors")
    (header,) = struct.unpack("<Q", path.read_bytes()[:8])
    shapes = sum(8 * layer.vqk.dim() for layer in quantized.modules() if isinstance(layer, nn.DSLayer))
    assert path.stat().st_size == 8 + header + shapes + dsconv.summary(quantized).bytes_after


def test_tensors_have_the_names_of_the_fields_other_checkpoints(tmp_path: Path) -> None:
    quantized = dsconv.quantize(
        tnn.Sequential(tnn.Conv2d(8, 4, 3)), dsconv.QuantConfig(weight_shift=True, first_layer=None)
    )
    with safe_open(dsconv.save(quantized, tmp_path / "net.safetensors"), "pt") as file:
        parts = {"weight_packed", "weight_scale", "weight_shift", "weight_shape", "bias"}
        assert set(file.keys()) == {f"0.{part}" for part in parts}
        assert file.get_tensor("0.weight_shape").tolist() == [4, 8, 3, 3]


class Twice(tnn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.again = self.conv = tnn.Conv2d(4, 4, 1)
        self.last = tnn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.again(self.conv(x)))


# File of a Twice: 3-bit weights, one shift per block of 4.
OF_VERSION_1 = r"""
c-q}nJ#W)M7!C_!VrD|oEeOd(_Stcqw2g#7NEC^sR7k|Zob7XRs$-|VOG=3%2E+!46)GX|1Na4?`~X(|01G<<0|Nu^o!!Q*)$$>P1dfN?^Z0$<d)|BR?)j
OTdS=M;MpTfH2;zCDGee^^q_G#ogmctEE=s82jaxe`pe{lhB2mN=3QVsLBTj{2$v}SDo4II*vcXVzJ`>zUow}pdT|@%GrbMtbIgI;p8f<x-J)jaYvBZk_Y
!WNbMPo9inTtvs56C_l<HO95MM5$Wi8(!znzKQYM}gHbz%-BD3b_}G-Ekoq#VHYHp{r)d_Xz^pbFE%=X&&R!s=BoPoJo;Q{<KFy#$Zt{YfN@&CKnalk^x~
#7XB|qu5MgOlPL~!6+R?6(F2F@8u0cNQS^u8bOmfDnHTzU+{BGmyFHgEG@JP86!`cQ#*q}*X|zmdJ_k!tnvIA6OCb+H7Laj9$5|Rs)#u41j%9ae!H@|Wh)
G6EXv_$wMLlG6!v~-!wJc9Dmf00O-QFs*YIs1xa+FCmT+Yy&LgisKA(;VSFr=_PlMxI9#|eGY_Gx7MwvOAn9k#HKiDibm-VS`jx6Lr3x^Eby6<BtJ+a@-f
ZH%$s!~q61mUwFQr4yMluSF@Pi}Z%k(A7={Dq@4&^ncy*5{y{Jg{S(yXvDv9mQ_xyUp|gp6w<L6?l4aOv3biqzbv@iX$pnQg&aas=+2CVR4L4gy&Q)$%$s
<wmA0U~ztl8<yJpIcSH}kG^sGK~yS(GlD1s9MzU=9mVfPQh!NCd9no*56Y|X?{KsxzBdRz^MYFqk2_=)MUX2@Sv!_qa&DQo0Q^E*n8)+|*6POP%Xrc=^@s
#U_9w$@tK;-qM^8r;HKtJ$B=>+sxT>)msEFS<{jzFB<xa(D67+E^KyH{M=;|FUD=7c0@l*Ncy@PAzVK+FQGcPIm|I*1OKLaP8rT+S$eCquQO%wM(@N*B`I
0p8pQ7I@_K
"""


def test_a_file_of_version_1_is_read(tmp_path: Path) -> None:
    path = tmp_path / "old.safetensors"
    path.write_bytes(zlib.decompress(base64.b85decode("".join(OF_VERSION_1.split()))))
    loaded = dsconv.load(path, Twice())
    assert loaded.again is loaded.conv
    expected = torch.tensor([0.197984, 0.426347, -0.1065, 0.350226, -0.075191, 0.0558, 0.44877, -0.468161])
    torch.testing.assert_close(loaded.last.dequantized_weight().flatten(), expected, rtol=0, atol=1e-6)
    assert describe(path)[1].bytes_after == dsconv.summary(loaded).bytes_after
    again = dsconv.load(dsconv.save(loaded, tmp_path / "new.safetensors"), Twice())
    assert_same_state(again, loaded)


class Depthwise(tnn.Module):
    def __init__(self, groups: int = 8) -> None:
        super().__init__()
        self.first, self.body = tnn.Conv2d(1, 8, 3), tnn.Conv2d(groups, 8, 3, groups=groups)


IN_FLOAT = {"first_layer": {"activation_bits": None, "blocks": "flat"}}


def by_layer(summary: Summary) -> dict[str, tuple[str, str | None]]:
    return {row.name: (row.backend, row.backend_reason) for row in summary.layers}


def test_a_file_says_what_executes_depthwise_layers_in_float(tmp_path: Path) -> None:
    model = dsconv.quantize(Depthwise(), IN_FLOAT)
    path = dsconv.save(model, tmp_path / "net.safetensors")
    with safe_open(path, "pt") as file:
        entries = file.metadata()
    assert entries["format_version"] == "5"
    assert {name: r["groups"] for name, r in json.loads(entries["layers"]).items()} == {"first": 1, "body": 8}
    found = by_layer(describe(path)[1])
    assert found == by_layer(dsconv.summary(model))
    assert_same_state(dsconv.load(path, Depthwise()), model)
    if native.extension() is not None:
        assert found["body"][0].startswith("float32") and found["first"][0] == "float simulation"

    def older(header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        for record in header["layers"].values():
            del record["groups"]

    craft(path, older, {"format_version": "4"})
    assert_same_state(dsconv.load(path, Depthwise()), model)
    old = by_layer(describe(path)[1])
    if native.extension() is None:
        assert old == found  # no number of groups would change it
    else:
        assert {backend for backend, _ in old.values()} == {"unknown backend"}
        text = " ".join(str(describe(path)[1]).split())
        assert "By unknown backend, the file is of an older version, which did not record the groups of layers" in text


def test_files_without_such_layers_are_those_that_older_versions_read(tmp_path: Path) -> None:
    path = dsconv.save(dsconv.quantize(Depthwise(), {"depthwise": None}), tmp_path / "net.safetensors")
    with safe_open(path, "pt") as file:
        entries = file.metadata()
    assert entries["format_version"] == "2" and "groups" not in entries["layers"]


def test_a_file_says_that_the_signs_of_activations_were_chosen_and_which(tmp_path: Path) -> None:
    net = tnn.Sequential(tnn.Conv2d(3, 64, 3), tnn.ReLU(), tnn.Conv2d(64, 64, 1), tnn.SiLU(), tnn.Conv2d(64, 64, 1))
    path = dsconv.save(dsconv.quantize(net.eval(), "w4a4"), tmp_path / "net.safetensors")
    with safe_open(path, "pt") as file:
        entries = file.metadata()
    assert entries["format_version"] == "6" and json.loads(entries["config"])["activation_sign"] == "auto"
    loaded = dsconv.load(path, net)
    assert [loaded[i].config.activation_sign for i in (0, 2, 4)] == ["adaptive", "adaptive", "extra"]
    assert [row.activation_sign for row in describe(path)[1].layers] == ["adaptive", "adaptive", "extra"]

    def unchosen(header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        header["settings"][0]["activation_sign"] = "auto"

    craft(path, unchosen)
    with pytest.raises(FileFormatError, match="activation_sign is 'auto'"):
        dsconv.load(path, net)


@pytest.mark.parametrize(
    ("groups", "message"),
    [(4, "layer 'body': groups: 4 in the file, 8 in the model"), (0, "header is not valid"), ("8", "header is not")],
)
def test_groups_of_another_layer_are_refused(groups: Any, message: str, tmp_path: Path) -> None:
    model = dsconv.quantize(Depthwise(), IN_FLOAT)
    path = dsconv.save(model, tmp_path / "net.safetensors")
    craft(path, set_in("layers", "body", "groups", groups))
    with pytest.raises(FileFormatError, match=message):
        dsconv.load(path, Depthwise())


def test_a_folder_is_the_file_in_it(saved: Path) -> None:
    saved.rename(saved.with_name("model.safetensors"))
    assert torch.equal(
        dsconv.load(saved.parent, other())(X), dsconv.load(saved.parent / "model.safetensors", other())(X)
    )


def test_a_root_module_that_is_a_layer_itself(tmp_path: Path) -> None:
    layer = tnn.Conv2d(8, 4, 3)
    quantized = dsconv.quantize(layer)
    loaded = dsconv.load(dsconv.save(quantized, tmp_path / "layer.safetensors"), layer)
    assert isinstance(loaded, nn.DSConv2d) and torch.equal(loaded.vqk, quantized.vqk)


def test_a_model_built_of_quantized_layers_can_be_saved(tmp_path: Path) -> None:
    model = tnn.Sequential(nn.DSConv2d.from_float(tnn.Conv2d(3, 4, 3)))
    loaded = dsconv.load(dsconv.save(model, tmp_path / "net.safetensors"), tnn.Sequential(tnn.Conv2d(3, 4, 3)))
    assert torch.equal(loaded(X), model(X))


def test_saving_what_was_loaded_gives_the_same_contents(saved: Path, tmp_path: Path) -> None:
    again = dsconv.save(dsconv.load(saved, other()), tmp_path / "again.safetensors")
    with safe_open(saved, "pt") as one, safe_open(again, "pt") as two:
        assert one.metadata() == two.metadata()
    assert again.stat().st_size == saved.stat().st_size


# Damaged files


def refused(path: Path, model: tnn.Module | None = None, match: str | None = None) -> str:
    with pytest.raises(FileFormatError, match=match) as caught:
        dsconv.load(path, model or other())
    message = str(caught.value)
    assert str(path) in message and message.isprintable() and len(message) <= 1500
    return message


def test_a_truncated_file_is_refused_at_every_length(saved: Path) -> None:
    data = saved.read_bytes()
    (header,) = struct.unpack("<Q", data[:8])
    lengths = {*range(0, len(data), max(1, len(data) // 50)), 7, 8, 9, 8 + header, 9 + header, len(data) - 1}
    model = other()
    for length in sorted(lengths):
        saved.write_bytes(data[:length])
        refused(saved, model, "not a complete safetensors file")


def test_bytes_at_the_end_are_refused(saved: Path) -> None:
    data = saved.read_bytes()
    for extra in (b"\0", data):
        saved.write_bytes(data + extra)
        refused(saved)


def check_changed(path: Path, data: bytes, changed: bytes, model: tnn.Module) -> None:
    """Check that a changed file is refused, unless only blanks between the parts of its JSON have changed."""
    path.write_bytes(changed)
    (size,) = struct.unpack("<Q", data[:8])
    if changed[:8] == data[:8] and changed[8 + size :] == data[8 + size :]:
        try:
            if json.loads(changed[8 : 8 + size]) == json.loads(data[8 : 8 + size]):
                return
        except ValueError:
            pass
    refused(path, model)


def test_a_changed_byte_is_refused_anywhere(saved: Path) -> None:
    data, model = saved.read_bytes(), other()
    (header,) = struct.unpack("<Q", data[:8])
    positions = [*range(8), *range(8, 8 + header, header // 120), *range(8 + header, len(data), 7), len(data) - 1]
    for at in positions:
        for flip in (1, 0x80):
            changed = bytearray(data)
            changed[at] ^= flip
            check_changed(saved, data, bytes(changed), model)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_random_damage_is_refused(saved: Path, data: st.DataObject) -> None:
    original = SAVED.setdefault("bytes", saved.read_bytes())
    changed = bytearray(original)
    kind = data.draw(st.sampled_from(["replace", "insert", "delete", "repeat", "swap"]))
    at = data.draw(st.integers(0, len(original) - 1))
    count = data.draw(st.integers(1, 16))
    if kind == "replace":
        changed[at : at + count] = data.draw(st.binary(min_size=count, max_size=count))
    elif kind == "insert":
        changed[at:at] = data.draw(st.binary(min_size=1, max_size=16))
    elif kind == "delete":
        del changed[at : at + count]
    elif kind == "repeat":
        changed[at:at] = changed[at : at + count]
    else:
        to = data.draw(st.integers(0, len(original) - 1))
        changed[at], changed[to] = changed[to], changed[at]
    if bytes(changed) != original:
        check_changed(saved, original, bytes(changed), other())


SAVED: dict[str, bytes] = {}


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200))
def test_random_bytes_are_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "noise"
    path.write_bytes(data)
    refused(path)
    path.write_bytes(struct.pack("<Q", len(data)) + data)
    refused(path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file({"a": torch.zeros(3)}, path)
    refused(path, match="got a safetensors file of another kind")
    torch.save({"a": torch.zeros(3)}, path)
    refused(path, match="got a file of torch.save: pass weights with their float network")
    path.write_text("import os")
    refused(path)


def test_a_path_without_a_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    for path in (tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(OSError, match=str(path)):
            dsconv.load(path, other())


# Crafted files: a valid checksum over invalid contents


def craft(
    path: Path,
    change: Callable[[dict[str, Any], dict[str, Tensor]], None] = lambda header, tensors: None,
    entries: dict[str, str] | None = None,
) -> None:
    """Rewrite a file with a changed header and tensors, and a valid checksum."""
    with safe_open(path, "pt") as file:
        texts = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    plain = ("format", "format_version", "checksum")
    header = {name: json.loads(text) for name, text in texts.items() if name not in plain}
    change(header, tensors)
    texts = {name: texts[name] for name in plain} | {name: json.dumps(value) for name, value in header.items()}
    texts |= entries or {}
    tensors = {name: value.contiguous() for name, value in tensors.items()}
    texts["checksum"] = checkpoint.checksum(texts, tensors)
    save_file(tensors, path, texts)


def test_crafting_without_a_change_loads(saved: Path) -> None:
    expected = dsconv.load(saved, other())(X)
    craft(saved)
    assert torch.equal(dsconv.load(saved, other())(X), expected)


@pytest.mark.parametrize(
    ("version", "message"),
    [
        ("7", "format version '7', this dsconv reads up to 6: update dsconv"),
        ("999", "999"),
        ("x", "'x'"),
        ("", "''"),
        ("-1", "-1"),
        ("1.5", "1.5"),
        ("9" * 5000, None),
        ("٦", None),
    ],
)
def test_a_newer_version_is_refused(version: str, message: str | None, saved: Path) -> None:
    craft(saved, entries={"format_version": version})
    refused(saved, match=message)


def set_in(*path: Any) -> Callable[[dict[str, Any], dict[str, Tensor]], None]:
    *keys, last, value = path

    def change(header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        at: Any = header
        for key in keys:
            at = at[key]
        at[last] = value

    return change


def delete(*path: Any) -> Callable[[dict[str, Any], dict[str, Tensor]], None]:
    *keys, last = path

    def change(header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        at: Any = header
        for key in keys:
            at = at[key]
        del at[last]

    return change


def tensor(name: str, make: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Any], dict[str, Tensor]], None]:
    def change(header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        tensors[name] = make(tensors[name])

    return change


CRAFTED = {
    "weight bits": set_in("settings", 0, "weight_bits", 3),
    "weight bits out of range": set_in("settings", 0, "weight_bits", 99),
    "block size": set_in("settings", 1, "block_size", 2),
    "block size of zero": set_in("settings", 1, "block_size", 0),
    "huge block size": set_in("settings", 2, "block_size", 10**30),
    "a shift that is not there": set_in("settings", 1, "weight_shift", True),
    "blocks": set_in("settings", 0, "blocks", "tap"),
    "unknown setting": set_in("settings", 0, "colour", "red"),
    "setting called self": set_in("settings", 0, "self", 1),
    "settings of another type": set_in("settings", 0, [1]),
    "settings missing": delete("settings"),
    "settings empty": set_in("settings", []),
    "settings too far": set_in("layers", "conv", "settings", 99),
    "settings negative": set_in("layers", "conv", "settings", -1),
    "settings true": set_in("layers", "conv", "settings", True),
    "settings of another layer": set_in("layers", "conv", "settings", 1),
    "shape": tensor("conv.weight_shape", lambda t: t[1:]),
    "huge shape": tensor("conv.weight_shape", lambda t: t * 2**58),
    "shape of one dimension": tensor("conv.weight_shape", lambda t: t[:1]),
    "negative shape": tensor("conv.weight_shape", lambda t: -t),
    "shape of fractions": tensor("conv.weight_shape", lambda t: t.float()),
    "shape that is a number": tensor("conv.weight_shape", lambda t: t[0]),
    "shape of two rows": tensor("conv.weight_shape", lambda t: torch.stack([t, t])),
    "shape missing": lambda header, tensors: tensors.pop("conv.weight_shape"),
    "shape of no layer": lambda header, tensors: tensors.update({"norm.weight_shape": torch.tensor([9, 1])}),
    "integers under two names": lambda header, tensors: tensors.update(
        {"conv.vqk": tensors["conv.weight_packed"].clone()}
    ),
    "integers under the name of version 1": lambda header, tensors: tensors.update(
        {"conv.kds_shift": tensors["conv.weight_scale"].clone()}
    ),
    "type": set_in("layers", "conv", "type", "DSLinear"),
    "unknown type": set_in("layers", "conv", "type", "os.system"),
    "layer missing": delete("layers", "conv"),
    "no layers": set_in("layers", {}),
    "layer of another name": set_in("layers", "else", {"type": "DSConv2d", "shape": [1, 1], "settings": 0}),
    "layer that is not quantizable": set_in("layers", "norm", {"type": "DSConv2d", "shape": [9, 1], "settings": 0}),
    "layer that is a number": set_in("layers", "conv", 4),
    "layers that are a list": set_in("layers", ["conv"]),
    "sqnr": set_in("layers", "conv", "sqnr_db", "high"),
    "config": set_in("config", {"weight_bits": 77}),
    "config of another type": set_in("config", 4),
    "config with an unknown name": set_in("config", "colour", 4),
    "aliases to nowhere": set_in("aliases", "tied", "nowhere"),
    "aliases to an alias": set_in("aliases", "tied", "again.bias"),
    "aliases in a circle": set_in("aliases", "tied", "tied"),
    "alias of what is stored": set_in("aliases", "fc.bias", "shared.bias"),
    "alias of an unknown name": set_in("aliases", "unknown", "scale"),
    "alias of other shape": set_in("aliases", "tied", "fc.bias"),
    "alias of integers to floats": set_in("aliases", "again.weight_packed", "scale"),
    "alias of floats to integers": set_in("aliases", "tied", "conv.weight_packed"),
    "alias of a bias to integers": set_in("aliases", "again.bias", "shared.weight_packed"),
    "alias of integers to other integers": set_in("aliases", "again.weight_packed", "fc.weight_packed"),
    "alias of scales to other scales": set_in("aliases", "again.weight_scale", "fc.weight_scale"),
    "aliases missing": delete("aliases"),
    "folded": set_in("folded", {"norm": "conv"}),
    "folded without a layer": set_in("folded", {"norm": "nowhere"}),
    "folded into itself": set_in("folded", {"norm": "norm"}),
    "folded layer": set_in("folded", {"conv": "fc"}),
    "folded model": set_in("folded", {"": "conv"}),
    "folded of another type": set_in("folded", ["norm"]),
    "model class": set_in("model_class", 4),
    "in float": set_in("in_float", "fc", 4),
    "architecture of another type": set_in("architecture", ["timm", "resnet18"]),
    "KDS with a NaN": tensor("shared.weight_scale", lambda t: t * torch.nan),
    "KDS with an infinity": tensor("conv.weight_scale", lambda t: t / 0),
    "KDS of another dtype": tensor("shared.weight_scale", lambda t: t.half()),
    "KDS of wider dtype": tensor("shared.weight_scale", lambda t: t.double()),
    "KDS of whole numbers": tensor("shared.weight_scale", lambda t: t.int()),
    "KDS of another shape": tensor("shared.weight_scale", lambda t: t.flatten()),
    "KDS of one block less": tensor("shared.weight_scale", lambda t: t[:, :1]),
    "integers too short": tensor("conv.weight_packed", lambda t: t[:-1]),
    "integers too long": tensor("conv.weight_packed", lambda t: torch.cat([t, t[:1]])),
    "integers of another dtype": tensor("conv.weight_packed", lambda t: t.view(torch.int8)),
    "integers that are floats": tensor("conv.weight_packed", lambda t: t.float()),
    "bias of another shape": tensor("conv.bias", lambda t: t[:, None]),
    "bias of whole numbers": tensor("conv.bias", lambda t: t.long()),
    "bias that is complex": tensor("conv.bias", lambda t: t.to(torch.complex64)),
    "counter that is complex": tensor("norm.num_batches_tracked", lambda t: t.to(torch.complex64)),
    "counter that is a float": tensor("norm.num_batches_tracked", lambda t: t.float()),
    "tensor missing": lambda header, tensors: tensors.pop("fc.bias"),
    "tensor too many": lambda header, tensors: tensors.update(more=torch.zeros(1)),
    "no tensors": lambda header, tensors: tensors.clear(),
    "shape of a million dimensions": tensor("conv.weight_shape", lambda t: torch.ones(1_000_000, dtype=torch.int64)),
    "shape of six dimensions": tensor("conv.weight_shape", lambda t: torch.tensor([9, 3, 3, 3, 1, 1])),
    "tensor of a thousand dimensions": tensor("fc.bias", lambda t: torch.zeros([1] * 1000)),
    "statistics of another dtype": tensor("norm.running_mean", lambda t: t.half()),
    "statistics in 8 bits": tensor("norm.running_var", lambda t: t.to(torch.float8_e4m3fn)),
    "weight of another dtype than the bias": tensor("norm.weight", lambda t: t.bfloat16()),
    "counter of another width": tensor("norm.num_batches_tracked", lambda t: t.int()),
    "a layer's name of a million characters": lambda header, tensors: header["layers"].update(
        {"x" * 1_000_000: header["layers"]["conv"]}
    ),
    "a tensor's name of a million characters": lambda header, tensors: tensors.update({"x" * 1_000_000: torch.ones(1)}),
    "a tensor's name that moves the cursor": lambda header, tensors: tensors.update({"\x1b[2J\n": torch.ones(1)}),
    "a class's name that moves the cursor": lambda header, tensors: (
        header.update(model_class="\x1b[2J\n"),
        tensors.pop("fc.bias"),
    ),
    "half a character": set_in("in_float", "fc", "\ud800"),
    "deep nesting": set_in("config", "overrides", json.loads("[" * 90 + "]" * 90)),
    "images that were never seen": set_in("adapted_on", -1),
    "more images than there are": set_in("calibrated_on", 10**400),
    "an infinite SQNR": set_in("layers", "conv", "sqnr_db", float("inf")),
    "a preparation of nothing": set_in("preprocess", {"resize": "large"}),
    "a preparation that divides by zero": set_in("preprocess", {"std": [0.0]}),
    "a preparation of another type": set_in("preprocess", ["resize"]),
    "a preparation called self": set_in("preprocess", {"self": 1}),
    "overrides called self": set_in("config", {"self": 1}),
    "empty name": lambda header, tensors: tensors.update({"": torch.zeros(1)}),
    "names swapped": lambda header, tensors: tensors.update(
        {"norm.weight": tensors["fc.bias"], "fc.bias": tensors["norm.weight"]}
    ),
}


@pytest.mark.parametrize("name", CRAFTED)
def test_a_crafted_file_is_refused(name: str, saved: Path) -> None:
    craft(saved, CRAFTED[name])
    refused(saved)


@pytest.mark.parametrize("name", CRAFTED)
def test_a_crafted_file_is_described_or_refused(name: str, saved: Path) -> None:
    craft(saved, CRAFTED[name])
    with suppress(FileFormatError):
        str(describe(saved)[1])


@pytest.mark.parametrize(
    "text", ["", "{", "NaN", "[" * 100_000, '"' + "x" * 100, "1e999", "\ud7ff", '{"a": ' * 5000 + "1" + "}" * 5000]
)
@pytest.mark.parametrize("entry", ["layers", "settings", "config", "preprocess"])
def test_a_header_that_is_no_json_of_the_kind_is_refused(entry: str, text: str, saved: Path) -> None:
    craft(saved, entries={entry: text})
    refused(saved)


def test_a_name_that_is_there_twice_is_refused(saved: Path) -> None:
    craft(saved, entries={"folded": '{"norm": "conv", "norm": "fc"}'})
    refused(saved, match="'norm' occurs twice")
    craft(saved, entries={"folded": "{}"})
    data = saved.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    (more,) = (data[8 : 8 + size].rstrip()[:-1] + b',"fc.bias":{"dtype":"F32","shape":[5],"data_offsets":[0,20]}}',)
    saved.write_bytes(struct.pack("<Q", len(more)) + more + data[8 + size :])
    refused(saved, match="'fc.bias' occurs twice")


def test_preprocessing_that_makes_no_sense_never_loads_silently(saved: Path) -> None:
    craft(saved, set_in("preprocess", {"resize": "large", "unknown": 1}))
    with pytest.raises(DSConvError):
        zoo.preprocess_of(dsconv.load(saved, other()))


@pytest.mark.parametrize("name", ["wrong.py:factory", "torchvision/evil.py:factory", "timm/../evil.py:factory"])
def test_no_code_that_a_file_names_is_run(name: str, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(saved.parent)
    for folder in ("", "torchvision/", "timm/"):
        Path(folder or ".").mkdir(exist_ok=True)
        for file in ("wrong.py", "evil.py"):
            Path(folder, file).write_text("open('was-run', 'w')\ndef factory(): pass\n")
    craft(saved, set_in("architecture", name))
    with pytest.raises(ModelError, match=r"pass the float model \(.*Net.*\) to load it into"):
        dsconv.load(saved)
    assert not Path("was-run").exists()
    assert torch.equal(dsconv.load(saved, other())(X), dsconv.load(saved, other())(X))


class Trap:
    def __reduce__(self) -> Any:
        return open, ("was-run", "w")


def test_no_pickle_that_a_file_names_is_read(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("timm", reason="needs the extra dsconv[zoo]")
    monkeypatch.chdir(saved.parent)
    torch.save({"state_dict": Trap()}, "evil.pth")
    for name in (
        "timm/resnet18?checkpoint_path=evil.pth",
        'timm/resnet18?pretrained_cfg_overlay={"file":"evil.pth"}&pretrained=true',
        'timm/resnet18?pretrained_cfg={"file":"evil.pth"}&pretrained=true',
    ):
        craft(saved, set_in("architecture", name))
        with pytest.raises(DSConvError):
            dsconv.load(saved)
        assert not Path("was-run").exists(), name


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make downloading or reading weights an error."""

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were asked for")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fail)
    monkeypatch.setattr(torch, "load", fail)


REFUSED_ARCHITECTURES = (
    "dsconv/digits_resnet?pretrained=true",
    "dsconv/digits_resnet?self=1&[]=2",
    "dsconv/digits_resnet?a=" + "[" * 100_000,
    "dsconv/digits_resnet?" + "&".join(f"a{i}=1" for i in range(1000)),
    "torchvision/resnet18?weights=DEFAULT",
    "torchvision/resnet18?pretrained=true",
    "torchvision/resnet18?num_classes=999999999",
    "torchvision/resnet18?num_classes=1e300",
    "torchvision/resnet18?num_classes=NaN",
    "torchvision/resnet18?num_classes=4096",
    "torchvision/resnet18?width_per_group=4000",
    "torchvision/resnet18?layers=[4000,4000,4000,4000]",
    "torchvision/resnet18?norm_layer=os.system",
    "torchvision/vit_b_16?image_size=4096",
    "torchvision/mobilenet_v2?inverted_residual_setting=[[1,1,4000,1]]",
    "torchvision/mobilenet_v2?width_mult=4000",
    "torchvision/densenet121?block_config=[4000,4000]",
    "torchvision/fasterrcnn_resnet50_fpn",
    "torchvision/fasterrcnn_resnet50_fpn?weights_backbone=DEFAULT",
    "torchvision/deeplabv3_resnet50",
    "timm/resnet18?features_only=true",
    "timm/resnet18?pretrained_cfg=resnet50",
    "timm/resnet18?pretrained_cfg_overlay=a",
    "timm/resnet18?checkpoint_path=evil.pth",
    "timm/resnet18?cache_dir=evil",
    "timm/vit_tiny_patch16_224?depth=100000000",
    "timm/vit_tiny_patch16_224?depth=4096",
    "timm/vit_tiny_patch16_224?img_size=4096",
    "timm/efficientnet_b0?depth_multiplier=4096",
    "timm/efficientnet_b0?block_args=ds_r100000000_k3_s1_c16",
    "timm/vit_gigantic_patch14_224",
    "timm/hf-hub:someone/something",
    "timm/local-dir:evil",
)


@pytest.mark.parametrize("name", REFUSED_ARCHITECTURES, ids=lambda name: name[:60])
def test_a_name_in_a_file_builds_no_other_or_larger_network_and_fetches_nothing(
    name: str, saved: Path, offline: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for library in ("torchvision", "timm"):
        if name.startswith(library):
            pytest.importorskip(library, reason="needs the extra dsconv[zoo]")
    made: list[int] = []
    empty = torch.empty
    monkeypatch.setattr(
        torch, "empty", lambda *a, **k: (made.append((y := empty(*a, **k)).numel() * (not y.is_meta)), y)[1]
    )
    craft(saved, set_in("architecture", name))
    with pytest.raises((FileFormatError, ModelError)) as caught:
        dsconv.load(saved)
    assert len(str(caught.value)) < 2000 and str(caught.value).isprintable()
    assert sum(made) < 1 << 24


@pytest.mark.parametrize(
    "name", ["torchvision/shufflenet_v2_x0_5?num_classes=10", "timm/test_resnet?num_classes=7&drop_rate=0.1"]
)
def test_a_name_with_arguments_of_its_shape_is_built(name: str, tmp_path: Path, offline: None) -> None:
    pytest.importorskip(name.partition("/")[0], reason="needs the extra dsconv[zoo]")
    model = zoo.build(name, weights="random")
    quantized = dsconv.quantize(model, "paper")
    loaded = dsconv.load(dsconv.save(quantized, tmp_path / "net.safetensors"))
    assert_same_state(loaded, quantized)


@pytest.mark.parametrize("name", ["timm/test_vit", "timm/test_coatnet"])
def test_a_network_with_numbers_that_are_not_in_the_file_is_built_with_them(name: str, tmp_path: Path) -> None:
    pytest.importorskip("timm", reason="needs the extra dsconv[zoo]")
    quantized = dsconv.quantize(zoo.build(name, weights="random"), "paper")
    loaded = dsconv.load(dsconv.save(quantized, tmp_path / "net.safetensors"))
    for (name, a), b in zip(loaded.named_buffers(), quantized.buffers(), strict=True):
        assert torch.equal(a, b), name
    size = quantized.default_cfg["input_size"]
    with torch.inference_mode():
        assert torch.equal(loaded(torch.ones(1, *size)), quantized(torch.ones(1, *size)))


def test_a_file_without_an_architecture_asks_for_the_model(saved: Path) -> None:
    with pytest.raises(ModelError, match="pass the float model"):
        dsconv.load(saved)


def test_a_model_of_dsconv_is_built_from_the_file(tmp_path: Path) -> None:
    model = zoo.build("dsconv/digits_resnet")
    quantized = dsconv.quantize(model)
    loaded = dsconv.load(dsconv.save(quantized, tmp_path / "digits.safetensors"))
    x = torch.rand(2, 1, 8, 8)
    assert torch.equal(loaded(x), quantized(x))
    assert zoo.preprocess_of(loaded) == zoo.preprocess_of(model)
    assert model_info(loaded).architecture == "dsconv/digits_resnet"


# Models without memory


def on_meta(**options: Any) -> Net:
    with torch.device("meta"):
        return Net(**options).eval()


def test_a_model_on_meta_is_given_values_and_ties_stay(saved: Path) -> None:
    model = on_meta()
    model.fc.weight.requires_grad_(False)
    model.norm.weight.requires_grad_(False)
    loaded, expected = dsconv.load(saved, model), dsconv.load(saved, other())
    assert_same_state(loaded, expected)
    assert {value.device.type for value in loaded.state_dict().values()} == {"cpu"}
    assert loaded.shared is loaded.again and loaded.tied is loaded.scale
    assert loaded.scale.requires_grad and not loaded.norm.weight.requires_grad
    assert model.conv.weight.is_meta and model.scale.is_meta
    with torch.inference_mode():
        assert torch.equal(loaded(X), expected(X))


def test_a_part_of_a_model_may_be_on_meta(saved: Path) -> None:
    model = other()
    model.conv.to("meta"), model.norm.to("meta")
    with torch.inference_mode():
        assert torch.equal(dsconv.load(saved, model)(X), dsconv.load(saved, other())(X))


@pytest.mark.parametrize("kind", ["buffer", "attribute", "list"])
def test_what_a_file_cannot_give_a_model_on_meta_is_named(kind: str, saved: Path) -> None:
    def add(model: Net) -> Net:
        if kind == "buffer":
            model.norm.register_buffer("grid", torch.arange(3), persistent=False)
        else:
            model.norm.grid = torch.arange(3) if kind == "attribute" else [torch.arange(3)]
        return model

    with torch.device("meta"):
        model = add(Net())
    with pytest.raises(ModelError, match=r"meta device.*norm\.grid.*build the model on the CPU"):
        dsconv.load(saved, model)
    assert dsconv.load(saved, add(other()))


def test_a_model_on_meta_of_another_architecture_is_refused(saved: Path) -> None:
    refused(saved, on_meta(width=10), "layer 'conv'")


def test_the_default_device_does_not_matter(tmp_path: Path) -> None:
    quantized = dsconv.quantize(zoo.build("dsconv/digits_resnet"), "paper")
    path = dsconv.save(quantized, tmp_path / "net.safetensors")
    with torch.device("meta"):
        loaded = dsconv.load(path), dsconv.load(path, zoo.build("dsconv/digits_resnet", weights="random"))
        described = describe(path)[1]
    assert_same_state(loaded[0], quantized)
    assert_same_state(loaded[1], quantized)
    assert described.bytes_after == dsconv.summary(quantized).bytes_after


# The wrong model


def changed(**layers: tnn.Module) -> Net:
    model = other()
    for name, layer in layers.items():
        setattr(model, name, layer)
    return model


@pytest.mark.parametrize(
    ("model", "difference"),
    [
        (
            lambda: net(width=10),
            r"layer 'conv': the file has weights of shape \[9, 3, 3, 3\], the model \[10, 3, 3, 3\]",
        ),
        (lambda: changed(fc=tnn.Linear(6, 4)), r"layer 'fc': .*\[5, 6\], the model \[4, 6\]"),
        (lambda: changed(fc=tnn.Conv2d(6, 5, 1)), "layer 'fc': the file has a DSLinear, the model a Conv2d"),
        (lambda: changed(fc=tnn.ReLU()), "layer 'fc': the file has a DSLinear, the model has a ReLU there"),
        (lambda: changed(fc=tnn.Linear(6, 5, bias=False)), "tensor 'fc.bias': only in the file"),
        (lambda: changed(norm=tnn.BatchNorm2d(8)), r"tensor 'norm.bias': shape \[9\] in the file, \[8\] in the model"),
        (lambda: changed(more=tnn.Linear(2, 2)), "tensor 'more.bias': only in the model"),
        (
            lambda: tnn.Sequential(tnn.Conv2d(3, 4, 3)),
            "layer 'conv': the file has a DSConv2d, the model has none there",
        ),
        (lambda: dsconv.quantize(other()), "layer 'conv'"),
    ],
)
def test_a_wrong_architecture_is_refused_and_the_difference_named(
    model: Callable[[], tnn.Module], difference: str, saved: Path
) -> None:
    wrong = model()
    before = {name: value.clone() for name, value in wrong.state_dict().items()}
    message = refused(saved, wrong, difference)
    assert "Net" in message
    assert all(torch.equal(value, before[name]) for name, value in wrong.state_dict().items())


# Writing


def test_a_model_without_quantized_layers_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"holds no quantized layer: convert it with dsconv.quantize first"):
        dsconv.save(net(), tmp_path / "net.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [OSError("No space left on device"), KeyboardInterrupt(), RuntimeError("x")])
def test_a_failed_write_keeps_the_old_file_and_leaves_nothing_else(
    error: BaseException, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = saved.read_bytes()

    def fail(tensors: dict[str, Tensor], path: Path, *_: Any) -> None:
        Path(path).write_bytes(b"half of it")
        raise error

    monkeypatch.setattr(checkpoint, "save_file", fail)
    with pytest.raises(type(error)):
        dsconv.save(dsconv.quantize(other()), saved)
    assert saved.read_bytes() == before and list(saved.parent.iterdir()) == [saved]


def test_a_replaced_file_is_the_new_one(saved: Path) -> None:
    model = dsconv.quantize(other())
    dsconv.save(model, saved)
    assert torch.equal(dsconv.load(saved, net())(X), model(X))
    assert list(saved.parent.iterdir()) == [saved]


def test_a_path_that_cannot_be_written_is_an_error_that_names_it(tmp_path: Path) -> None:
    model = dsconv.quantize(net())
    for path in (tmp_path / "no" / "net.safetensors", tmp_path, tmp_path / ("x" * 300)):
        with pytest.raises(OSError, match=str(path)):
            dsconv.save(model, path)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written_keeps_its_file(saved: Path) -> None:
    before = saved.read_bytes()
    saved.parent.chmod(0o500)
    try:
        with pytest.raises(OSError, match=str(saved)):
            dsconv.save(dsconv.quantize(other()), saved)
    finally:
        saved.parent.chmod(0o700)
    assert saved.read_bytes() == before


def test_names_with_other_characters(tmp_path: Path) -> None:
    model = dsconv.quantize(net())
    path = dsconv.save(model, str(tmp_path / "Größe 4 bit.safetensors"))
    assert isinstance(path, Path) and torch.equal(dsconv.load(str(path), other())(X), model(X))


def test_layers_with_other_characters_in_their_names(tmp_path: Path) -> None:
    model = tnn.ModuleDict({'größe \n "{}"': tnn.Conv2d(3, 4, 3), "__metadata__": tnn.Conv2d(3, 4, 3)})
    quantized = dsconv.quantize(model)
    loaded = dsconv.load(dsconv.save(quantized, tmp_path / "net.safetensors"), model)
    assert_same_state(loaded, quantized)


def test_a_name_that_is_no_text_cannot_be_saved(tmp_path: Path) -> None:
    model = dsconv.quantize(tnn.ModuleDict({"\ud800": tnn.Conv2d(3, 4, 3)}))
    with pytest.raises(ModelError, match="half a character"):
        dsconv.save(model, tmp_path / "net.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_table_shows_names_that_a_terminal_would_obey_as_escapes(tmp_path: Path) -> None:
    model = dsconv.quantize(tnn.ModuleDict({"\x1b[2J": tnn.Conv2d(3, 4, 3)}))
    described = describe(dsconv.save(model, tmp_path / "net.safetensors"))[1]
    for table in (str(dsconv.summary(model)), str(described)):
        assert "\x1b[2J" not in table and r"\x1b[2J" in table
