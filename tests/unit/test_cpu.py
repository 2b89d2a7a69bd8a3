import dataclasses
import importlib.util
import platform
import sys
import types
from pathlib import Path

import pytest
import torch

import dsconv
from dsconv import threads
from dsconv.cpu import cpu_info
from dsconv.errors import ModelError
from dsconv.ops import native

needs_extension = pytest.mark.skipif(
    importlib.util.find_spec("dsconv._C") is None, reason="dsconv was installed without its C++ extension"
)


def linux_flags() -> set[str]:
    """Return the processor's features from the Linux kernel, independent of our detection."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        pytest.skip("/proc/cpuinfo is Linux's own")
    return {flag for line in lines if line.startswith(("flags", "Features")) for flag in line.split(":")[1].split()}


@needs_extension
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="names of x86-64's instruction sets")
def test_instruction_sets_on_x86_agree_with_the_kernels_list() -> None:
    flags = linux_flags()
    expected = {
        "scalar": True,
        "avx2": {"avx2", "fma"} <= flags,
        "avxvnni": {"avx2", "fma", "avx_vnni"} <= flags,
        "avx512vnni": {"avx2", "fma", "avx512f", "avx512bw", "avx512vl", "avx512_vnni"} <= flags,
    }
    found = cpu_info().isa_found
    assert [name for name in found if name != "amx"] == [name for name, has in expected.items() if has]
    # The kernel may refuse tiles that the processor has, but not the other way round.
    assert "amx" not in found or {"amx_tile", "amx_int8"} <= flags


@needs_extension
@pytest.mark.skipif(platform.machine() not in ("aarch64", "arm64"), reason="names of AArch64's instruction sets")
def test_instruction_sets_on_aarch64_agree_with_the_kernels_list() -> None:
    dot_product = ("neondotprod",) if "asimddp" in linux_flags() else ()
    assert cpu_info().isa_found == ("scalar", "neon", *dot_product)


@needs_extension
def test_loaded_extension_is_reported() -> None:
    info = cpu_info()
    assert info.extension is None
    assert info.isa_found[0] == "scalar"
    assert f"instruction sets found  {', '.join(info.isa_found)}" in str(info)


def test_absent_extension_is_reported_and_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dsconv._C", None)  # makes `import dsconv._C` raise ModuleNotFoundError
    info = cpu_info()
    assert info.extension is not None
    assert "not built" in info.extension
    assert info.isa_found == ()
    assert "unknown without the extension" in str(info)
    assert info.isa_used is info.parallel is None
    assert "none: layers run as a float simulation in PyTorch" in str(info)


def test_compile_without_extension_says_that_it_needs_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dsconv._C", None)
    monkeypatch.setattr(native, "extension", lambda: None)
    qnet = dsconv.quantize(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3)).eval())
    with pytest.raises(ModelError, match=r"needs the extension dsconv._C, not built"):
        dsconv.compile(qnet, torch.zeros(1, 3, 8, 8))


def test_broken_extension_is_told_apart_from_an_absent_one(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def find_spec(self, name: str, path: object = None, target: types.ModuleType | None = None) -> None:
            if name == "dsconv._C":
                raise ImportError("undefined symbol: frobnicate")

    monkeypatch.delitem(sys.modules, "dsconv._C", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    extension = cpu_info().extension
    assert extension is not None
    assert "cannot be loaded: undefined symbol: frobnicate" in extension


@needs_extension
def test_instruction_set_in_use_is_reported_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DSCONV_MAX_ISA", raising=False)
    for cap in (None, "scalar"):
        if cap:
            monkeypatch.setenv("DSCONV_MAX_ISA", cap)
        native.isa.cache_clear()
        info = cpu_info()
        assert info.isa_used == (cap or native.extension().isa_with_kernels()[-1])
        capped = info.isa_used != native.extension().isa_with_kernels()[-1]
        assert ("DSCONV_MAX_ISA=scalar" in info.isa_reason) is capped
        assert f"instruction set used    {info.isa_used}: {info.isa_reason}" in str(info)
        assert info.parallel and info.parallel in str(info)
    native.isa.cache_clear()


@needs_extension
@pytest.mark.parametrize(("name", "shown"), [("pool", "their own thread pool"), ("serial", "serial")])
def test_kind_of_threads_in_use_is_reported(name: str, shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "parallel", lambda: name)
    assert cpu_info().parallel == shown and f"threads of the kernels  {shown}" in str(cpu_info())


def test_cpu_info_follows_torchs_threads() -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        info = cpu_info()
    finally:
        torch.set_num_threads(threads)
    assert info.torch_threads == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        info.torch_threads = 2  # type: ignore[misc]
