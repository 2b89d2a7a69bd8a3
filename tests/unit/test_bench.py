"""Benchmarks of networks: turns on a fake clock, statistics of times, and the available runtimes."""

import ctypes
import gc
import json
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch import nn as tnn

import dsconv
from dsconv import Inputs, report
from dsconv.benchmarking import Bench, Timing, machine, measure, peers
from dsconv.benchmarking.mnn import quiet
from dsconv.data.inputs import call
from dsconv.errors import ConfigError, MissingExtraError, ModelError, import_extra

SHAPE = (3, 12, 12)
OURS = ["dsconv", "dsconv, not compiled"]


class FakeTime:
    """A clock that only calls and sleeping advance; threads that still spin use as much processor time."""

    def __init__(self) -> None:
        self.now, self.used, self.spinning = 0.0, 0.0, 0.0
        self.clock = measure.Clock(lambda: self.now, lambda: self.used, self.sleep)

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        spun = min(seconds, self.spinning)
        self.used += spun
        self.spinning -= spun

    def call(self, seconds: float | Iterator[float], calls: list[float], spins: float = 0.0) -> Callable[[], None]:
        def run() -> None:
            taken = seconds if isinstance(seconds, float) else next(seconds)
            self.now += taken
            self.used += taken
            self.spinning = spins
            calls.append(taken)

        return run


def test_a_turn_is_of_many_short_calls_or_of_one_long_one() -> None:
    fake, short, long = FakeTime(), [], []
    race = measure.Race([fake.call(0.0003, short), fake.call(0.5, long)], threads=1, clock=fake.clock)
    assert race.estimates == pytest.approx([0.0003, 0.5])
    warm = len(short), len(long)
    assert warm == (4, 4)
    assert list(race.rounds(turns=3)) == pytest.approx([1 / 3, 2 / 3, 1])
    assert race.times[0] == pytest.approx([0.0003] * 3) and race.times[1] == pytest.approx([0.5] * 3)
    # 7 calls of 0.3 ms are the fewest that fill 2 ms, after one for warm-up; a long call needs no more.
    assert (len(short) - warm[0], len(long) - warm[1]) == (3 * 8, 3)


def test_warming_up_is_not_timed() -> None:
    fake, calls = FakeTime(), []
    times = iter([9.0, 1.0, 3.0, 2.0, *[1.5, 2.5]])
    race = measure.Race([fake.call(times, calls)], threads=1, clock=fake.clock)
    assert race.estimates == [1.0]
    assert len(list(race.rounds(turns=2))) == 2 and race.times == [[1.5, 2.5]]


@pytest.mark.parametrize(("seconds", "rounds"), [(0.5, 5), (10.0, 10), (10.5, 11)])
def test_as_many_rounds_as_fit_into_the_time_and_at_least_five(seconds: float, rounds: int) -> None:
    fake = FakeTime()
    race = measure.Race([fake.call(0.25, []), fake.call(0.75, [])], threads=1, clock=fake.clock)
    parts = list(race.rounds(seconds=seconds))
    assert [len(times) for times in race.times] == [rounds, rounds]
    assert parts == sorted(parts) and 0 < parts[0] < 1 and parts[-1] == 1


def test_every_round_has_an_order_of_its_own() -> None:
    fake, order = FakeTime(), []
    names = ("a", "b", "c", "d")
    calls = [lambda name=name: (order.append(name), fake.sleep(0.5)) for name in names]
    race = measure.Race(calls, threads=1, clock=fake.clock)
    order.clear()
    list(race.rounds(turns=20))
    rounds = ["".join(order[i : i + 4]) for i in range(0, 80, 4)]
    assert all(sorted(turns) == list(names) for turns in rounds) and len(set(rounds)) > 10


@pytest.mark.parametrize(("spins", "unsettled"), [(0.03, 0), (0.3, 6)])
def test_a_turn_waits_for_the_threads_of_the_last_one(spins: float, unsettled: int) -> None:
    fake = FakeTime()
    race = measure.Race([fake.call(0.5, [], spins), fake.call(0.5, [], spins)], threads=2, clock=fake.clock)
    start = fake.now
    list(race.rounds(turns=3))
    waited = fake.now - start - 6 * 0.5
    assert race.unsettled == unsettled
    # Until they are idle, or for a tenth of a second, and at most a millisecond longer.
    assert 6 * min(spins, 0.1) <= waited + 1e-9 <= 6 * (min(spins, 0.1) + 0.0021)
    assert race.times == [pytest.approx([0.5] * 3)] * 2


def test_one_thread_waits_for_nothing() -> None:
    fake = FakeTime()
    race = measure.Race([fake.call(0.5, [], spins=1.0)], threads=1, clock=fake.clock)
    start = fake.now
    list(race.rounds(turns=3))
    assert fake.now - start == pytest.approx(3 * 0.5) and race.unsettled == 0


def test_quartiles_are_those_of_the_turns_measured() -> None:
    times = [5.0, 1.0, 4.0, 2.0, 3.0]
    found = measure.quartiles(times)
    assert found == (2.0, statistics.median(times), 4.0)
    assert measure.quartiles([1.0, 3.0]) == (1.5, 2.0, 2.5)


def timing(contestant: str, median_ms: float, batch_size: int = 1, threads: int = 1, **changes: Any) -> Timing:
    figures = {"turns": 7, "first_quartile_ms": 0.75 * median_ms, "third_quartile_ms": 1.5 * median_ms}
    what = {"executed": "3 Conv", "weight_bytes": 2_500_000}
    where = {"batch_size": batch_size, "threads": threads}
    return Timing(contestant=contestant, median_ms=median_ms, **{**figures, **what, **where, **changes})


def made_up(*timings: Timing, **changes: Any) -> Bench:
    facts: dict[str, Any] = {"network": "net[1]", "input_shape": (3, 8, 8), "config": None, "calibration": "4 images"}
    facts |= {"not_run": {}, "unsettled_turns": 0, "machine": machine.machine()}
    return Bench(timings=timings, **{**facts, **changes})


@pytest.fixture
def sweep() -> Bench:
    return made_up(
        timing("dsconv", 4.0),
        timing("OpenVINO int8", 8.0),
        timing("dsconv", 2.0, threads=2),
        timing("OpenVINO int8", 5.0, threads=2),
        timing("dsconv", 24.0, batch_size=8),
        timing("OpenVINO int8", 48.0, batch_size=8, turns=5),
    )


def test_ratio_speedup_and_time_per_image(sweep: Bench) -> None:
    assert [sweep.ratio(found) for found in sweep.timings] == [1, 0.5, 1, 0.4, 1, 0.5]
    assert [sweep.speedup(found) for found in sweep.timings] == [1, 1, 2, 1.6, 1, 1]
    assert [found.ms_per_image for found in sweep.timings] == [4, 8, 2, 5, 3, 6]


def test_no_speedup_without_one_thread_and_no_ratio_without_dsconv() -> None:
    found = made_up(timing("PyTorch float32", 3.0, threads=2))
    assert found.speedup(found.timings[0]) is None and found.ratio(found.timings[0]) is None
    assert found.to_dict()["timings"][0]["speedup_over_one_thread"] is None
    assert "up" not in str(found).split("Medians")[0]


def test_json_holds_what_is_derived_too(sweep: Bench) -> None:
    data = json.loads(sweep.to_json())
    assert data["machine"]["versions"]["torch"] == torch.__version__ and data["input_shape"] == [3, 8, 8]
    last = data["timings"][-1]
    assert (last["ms_per_image"], last["ours_over_this"], last["median_ms"], last["turns"]) == (6, 0.5, 48, 5)


def test_the_table_has_a_part_for_each_setting(sweep: Bench) -> None:
    lines = [" ".join(line.split()) for line in str(sweep).splitlines()]
    start = lines.index("batch 1, 2 threads")
    assert lines[start + 1] == "dsconv 2.00 1.50 .. 3.00 2.00 2.00 2.50"
    assert lines[start + 2] == "OpenVINO int8 5.00 3.75 .. 7.50 5.00 0.40 1.60 2.50"
    assert "Medians of 5 to 7 turns; speed-up over one thread." in lines
    assert any("onnxruntime.quantization, per channel, calibrated on 4 images" in line for line in lines)
    assert not any("MNN" in line for line in lines)
    assert lines[0].startswith("net[1], 3x8x8")


def test_a_single_setting_needs_no_columns_of_a_sweep() -> None:
    lines = [" ".join(line.split()) for line in str(made_up(timing("dsconv", 4.0))).splitlines()]
    assert "dsconv 4.00 3.00 .. 6.00 2.50" in lines and "Medians of 7 turns." in lines
    assert not any("calibrated" in line for line in lines)


def test_the_text_says_who_did_not_run_and_what_else_to_know(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    missing = {"PyTorch bf16": "no bf16", "OpenVINO bf16": "no bf16", "OpenVINO int8": "it is absent"}
    text = str(made_up(timing("dsconv", 4.0), not_run=missing, unsettled_turns=3, interrupted=True))
    assert "Not run: PyTorch bf16, OpenVINO bf16: no bf16." in text and "Not run: OpenVINO int8: it is absent." in text
    assert "3 turns began while" in text and "Interrupted" in text
    assert "ONEDNN_MAX_CPU_ISA=AVX2 (oneDNN in PyTorch and OpenVINO); ONNX Runtime and MNN have no cap" in text


def test_the_text_says_who_made_a_model_of_mnn() -> None:
    text = str(made_up(timing("dsconv", 4.0), timing("MNN int8 Winograd", 4.0)))
    assert "int8: models of MNN's converter, per channel, calibrated on 4 images." in text
    assert "onnxruntime.quantization" not in text


def test_a_picture_of_networks_that_do_not_have_all_contestants(sweep: Bench, tmp_path: Path) -> None:
    other = made_up(
        timing("dsconv", 4.0), timing("ONNX Runtime int8 model (3 int8, 1 float32)", 4.0), network="another"
    )
    other = replace(other, timings=(*other.timings, timing("MNN int8 Winograd", 3.0)))
    path = report.draw_benches(tmp_path / "bench.png", [sweep, other])
    assert path.read_bytes().startswith(b"\x89PNG") and os.listdir(tmp_path) == ["bench.png"]
    with pytest.raises(ValueError, match="nonsense"):
        report.draw_benches(tmp_path / "bench.nonsense", [sweep])
    assert os.listdir(tmp_path) == ["bench.png"]


@pytest.mark.parametrize(
    ("cap", "expected"),
    [(None, ""), ("avx512_core_amx", ""), ("AVX2", "ONEDNN_MAX_CPU_ISA=AVX2"), ("AVX512_CORE_VNNI", "leaves no bf16")],
)
def test_bf16_only_where_the_processor_and_its_cap_have_it(
    cap: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    if cap:
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", cap)
    monkeypatch.setattr(machine, "_cpuinfo", lambda field: {"fpu avx512_bf16 sse2"})
    assert expected in machine.why_no_bf16() and bool(expected) == bool(machine.why_no_bf16())
    monkeypatch.setattr(machine, "_cpuinfo", lambda field: {"fpu sse2"})
    assert machine.why_no_bf16() == "the processor has no bf16"


# Networks


def network() -> tnn.Sequential:
    torch.manual_seed(0)
    layers = [tnn.Conv2d(3, 16, 3), tnn.BatchNorm2d(16), tnn.ReLU(), tnn.Conv2d(16, 32, 3, stride=2), tnn.ReLU()]
    return tnn.Sequential(*layers, tnn.AdaptiveAvgPool2d(1), tnn.Flatten(), tnn.Linear(32, 10)).eval()


@pytest.fixture
def net() -> tnn.Sequential:
    return network()


@pytest.fixture
def qnet(net: tnn.Sequential) -> tnn.Module:
    return dsconv.quantize(net)


@pytest.mark.parametrize(("algorithm", "other"), [("direct", "winograd"), ("winograd", "direct")])
def test_a_network_whose_layers_have_two_algorithms_is_timed_by_both(algorithm: str, other: str) -> None:
    net = tnn.Sequential(tnn.Conv2d(3, 16, 3, 2), tnn.ReLU(), tnn.Conv2d(16, 16, 3, padding=1)).eval()
    made = {a: dsconv.quantize(net, {"overrides": {"2": {"algorithm": a}}}) for a in (algorithm, other)}
    x = torch.randn(2, *SHAPE)
    ours = peers.ours(made[algorithm], Inputs(x))
    assert [contestant.name for contestant in ours] == [*OURS, f"dsconv, {other}"]
    with torch.inference_mode():
        for contestant, name in ((ours[0], algorithm), (ours[2], other)):
            assert torch.equal(contestant.outputs()[0], dsconv.compile(made[name], x)(x))
    layers: list[Any] = [made[algorithm].get_submodule(name) for name in "02"]
    assert [layer.config.algorithm for layer in layers] == ["direct", algorithm]


def test_settings_are_measured_in_order_and_threads_are_put_back(net: tnn.Module, qnet: tnn.Module) -> None:
    threads = [1, 2] if machine.cores() > 1 else [1]
    before = torch.get_num_threads()
    images = torch.randn(3, *SHAPE)
    found = dsconv.bench(net, qnet, images, against=["torch"], batch_sizes=[1, 5], threads=threads, turns=2)
    assert torch.get_num_threads() == before
    ours = [timing for timing in found.timings if timing.contestant == "dsconv"]
    assert [(timing.batch_size, timing.threads) for timing in ours] == [(b, t) for b in (1, 5) for t in threads]
    theirs = [timing for timing in found.timings if timing.contestant == "PyTorch float32"]
    assert len(theirs) == len(ours) and [timing.contestant for timing in found.timings[:2]] == OURS
    assert all(timing.turns == 2 and timing.first_quartile_ms <= timing.median_ms for timing in found.timings)
    assert ours[0].weight_bytes == dsconv.summary(qnet).bytes_after
    assert theirs[0].weight_bytes == sum(4 * p.numel() for p in net.parameters()) + 2 * 4 * 16 + 8
    assert "W4A8" in ours[0].executed and dsconv.summary(qnet).backends[0] in ours[0].executed
    assert found.network == "Sequential" and found.calibration == "3 given images" and not found.interrupted
    assert found.config == dsconv.QuantConfig.preset("default").to_dict()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"against": ["tensorrt"]}, "'tensorrt'"),
        ({"batch_sizes": [0]}, "batch_sizes"),
        ({"batch_sizes": []}, "batch_sizes"),
        ({"threads": [1 + machine.cores()]}, "threads"),
        ({"turns": 1}, "turns"),
        ({"seconds": 0.0}, "seconds"),
        ({"on_interrupt": "stop"}, "on_interrupt"),
        ({"images": torch.zeros(0, *SHAPE)}, "images"),
        ({"images": torch.zeros(1, *SHAPE, dtype=torch.float64)}, "float64"),
    ],
)
def test_arguments_out_of_range(changes: dict[str, Any], expected: str, net: tnn.Module, qnet: tnn.Module) -> None:
    with pytest.raises(ConfigError, match=expected):
        dsconv.bench(net, qnet, **{"images": SHAPE, **changes})


def test_networks_that_cannot_be_run(net: tnn.Sequential, qnet: tnn.Module) -> None:
    with pytest.raises(ModelError, match=r"cannot run on images of shape \(1, 1, 12, 12\)"):
        dsconv.bench(net, qnet, (1, 12, 12))
    with pytest.raises(ModelError, match=r"eval\(\)"):
        dsconv.bench(network().train(), qnet, SHAPE)
    with pytest.raises(ModelError, match=r"got torch\.float16: call float\(\)"):
        dsconv.bench(network().eval().half(), qnet, SHAPE)
    with pytest.raises(ModelError, match="as output, got str"):
        dsconv.bench(tnn.Sequential(net, Says()).eval(), qnet, SHAPE)


class Says(tnn.Module):
    def forward(self, x: Tensor) -> str:
        return "nothing"


def contestant(name: str, output: Callable[[], Tensor], call: Callable[[], object] = lambda: None) -> Any:
    return lambda case: peers.Contestant(name, "as told", 1, call, lambda: [output()])


def test_who_fails_is_told_and_the_others_go_on(
    net: tnn.Module, qnet: tnn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(1, *SHAPE)
    with torch.inference_mode():
        y = net(x)
    makers = {
        "good float32": contestant("good float32", lambda: y),
        "wrong float32": contestant("wrong float32", lambda: 1.02 * y),
        "coarse int8": contestant("coarse int8", lambda: 1.4 * y),
        "absurd int8": contestant("absurd int8", lambda: -y),
        "small int8": contestant("small int8", lambda: y[:, :1]),
        "broken int8": contestant("broken int8", lambda: torch.zeros(2) + torch.zeros(3)),
    }
    monkeypatch.setitem(peers.CONTESTANTS, "torch", makers)
    found = dsconv.bench(net, qnet, x, against=["torch"], turns=2)
    assert [timing.contestant for timing in found.timings] == [*OURS, "good float32", "coarse int8", "absurd int8"]
    assert found.timings[-1].executed == "as told; its output is 200.0 % off PyTorch's"
    assert found.not_run.keys() == {"wrong float32", "small int8", "broken int8"}
    assert found.not_run["wrong float32"] == "its output is 2.0 % off PyTorch's"
    assert found.not_run["small int8"] == "returns (1, 1) instead of (1, 10)"
    assert found.not_run["broken int8"].startswith("batch 1, 1 thread: RuntimeError: ")


@pytest.mark.parametrize(
    ("batch_size", "turns_before", "expected"),
    [(1, 1, None), (2, 0, {1: 4}), (2, 1, {1: 4}), (2, 3, {1: 4, 2: 3})],
)
def test_ctrl_c_leaves_the_times_so_far(
    batch_size: int,
    turns_before: int,
    expected: dict[int, int] | None,
    net: tnn.Module,
    qnet: tnn.Module,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def make(case: peers.Case) -> peers.Contestant:
        left = iter(range(4 + turns_before if len(case.x) == batch_size else 100))  # 4 to warm up

        def call() -> None:
            time.sleep(0.025)  # a turn is one call
            if next(left, None) is None:
                raise KeyboardInterrupt

        return peers.Contestant("other", "as told", 1, call, lambda: [torch.zeros_like(y) for y in case.outputs])

    monkeypatch.setitem(peers.CONTESTANTS, "torch", {"other": make})
    before = torch.get_num_threads()
    options: dict[str, Any] = {"against": ["torch"], "batch_sizes": [1, 2], "turns": 4}
    if expected is None:
        with pytest.raises(KeyboardInterrupt):
            dsconv.bench(net, qnet, SHAPE, **options, on_interrupt="partial")
    else:
        found = dsconv.bench(net, qnet, SHAPE, **options, on_interrupt="partial")
        theirs = {timing.batch_size: timing.turns for timing in found.timings if timing.contestant == "other"}
        assert found.interrupted and theirs == expected
        assert len(found.timings) == 3 * len(expected)
    with pytest.raises(KeyboardInterrupt):
        dsconv.bench(net, qnet, SHAPE, **options)
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("package", "runtime", "extra"),
    [
        ("onnxruntime", "onnxruntime", "bench"),
        ("openvino", "openvino", "bench"),
        ("onnx", "onnxruntime", "bench"),
        ("MNN", "mnn", "mnn"),
    ],
)
def test_a_runtime_that_is_not_installed_is_told_with_what_to_install(
    package: str, runtime: str, extra: str, net: tnn.Module, qnet: tnn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    if package == "onnx":
        pytest.importorskip(runtime, reason="needs the extra 'bench'")

    def missing(extra: str, module: str) -> Any:
        if module.partition(".")[0] == package:
            raise MissingExtraError(extra, package)
        return import_extra(extra, module)

    monkeypatch.setattr(peers, "import_extra", missing)
    monkeypatch.setattr(peers, "why_no_bf16", lambda: "")
    found = dsconv.bench(net, qnet, SHAPE, against=[runtime], turns=2)
    assert [timing.contestant for timing in found.timings] == OURS
    assert found.not_run.keys() == peers.CONTESTANTS[runtime].keys()
    assert set(found.not_run.values()) == {f"{package} is not installed: pip install 'dsconv[{extra}]'"}


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> peers.Case:
    pytest.importorskip("onnx", reason="needs the extra 'bench'")
    pytest.importorskip("onnxruntime", reason="needs the extra 'bench'")
    images = torch.randn((6, *SHAPE), generator=torch.Generator().manual_seed(0))
    models = peers.OnnxModels(network(), Inputs(images), tmp_path_factory.mktemp("onnx"))
    return made_case(models, Inputs(images[:5]))


def made_case(models: peers.OnnxModels, x: Inputs, threads: int = 1) -> peers.Case:
    with torch.inference_mode():
        return peers.Case(models.network, models, x, peers.tensors_of_output(call(models.network, x)), threads)


def relative_error(case: peers.Case, contestant: peers.Contestant) -> float:
    """Return the largest relative error of its floating-point outputs."""
    with torch.inference_mode():
        pairs = list(zip(contestant.outputs(), case.outputs, strict=True))
    assert all(found.shape == y.shape and found.dtype == y.dtype for found, y in pairs)
    return max(float((found - y).norm() / y.norm()) for found, y in pairs if y.is_floating_point())


@pytest.mark.parametrize(
    ("runtime", "name", "most_error"),
    [
        ("torch", "PyTorch float32", 0.0),
        ("torch", "PyTorch bf16", 0.03),
        ("onnxruntime", "ONNX Runtime float32", 1e-5),
        ("onnxruntime", "ONNX Runtime int8", 0.05),
        ("openvino", "OpenVINO float32", 1e-5),
        ("openvino", "OpenVINO bf16", 0.03),
        ("openvino", "OpenVINO int8", 0.05),
    ],
)
def test_a_runtime_computes_the_network_in_the_precision_it_is_named_after(
    runtime: str, name: str, most_error: float, case: peers.Case
) -> None:
    pytest.importorskip(runtime, reason="needs the extra 'bench'")
    if "bf16" in name and machine.why_no_bf16():
        pytest.skip(machine.why_no_bf16())
    if runtime == "openvino" and platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("what OpenVINO computes in which precision is known for x86-64")
    contestant = peers.CONTESTANTS[runtime][name](case)
    assert contestant.name == name
    contestant.call()
    assert relative_error(case, contestant) <= most_error
    # Two convolutions and a linear layer, as the runtime names them.
    counts = [int(number) for number in re.findall(r"(\d+) \w", contestant.executed)]
    assert contestant.executed == "eager" or sum(counts) == 3
    weights = 3 * 16 * 9 + 16 * 32 * 9 + 32 * 10
    width = {"float32": 4, "bf16": 2, "int8": 1}[name.split()[-1]]
    assert width * weights < contestant.weight_bytes < width * weights + 1500


def test_an_int8_model_that_runs_in_float_is_not_called_int8(
    case: peers.Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Between Q and DQ, but without operators that a runtime computes in integers.
    monkeypatch.setattr(case.onnx, "int8", case.onnx._quantized("relu.onnx", ["Relu"]), raising=False)
    assert peers.CONTESTANTS["onnxruntime"]["ONNX Runtime int8"](case).name == "ONNX Runtime int8 model (3 float32)"
    pytest.importorskip("openvino", reason="needs the extra 'bench'")
    assert peers.CONTESTANTS["openvino"]["OpenVINO int8"](case).name == "OpenVINO int8 model (3 float32)"
    monkeypatch.setattr(case.onnx, "int8", case.onnx._quantized("gemm.onnx", ["Gemm"]))
    mixed = peers.CONTESTANTS["onnxruntime"]["ONNX Runtime int8"](case)
    assert mixed.name == "ONNX Runtime int8 model (2 float32, 1 int8)" and mixed.executed == "2 Conv, 1 QGemm"


def test_layers_that_a_runtime_leaves_out_are_told(case: peers.Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(case.onnx, "layers", lambda path: 5)
    contestant = peers.CONTESTANTS["onnxruntime"]["ONNX Runtime int8"](case)
    assert contestant.executed == "1 QGemm, 2 QLinearConv (of 5 layers: the rest was left out or merged)"


def test_a_network_without_layers_to_look_at_does_not_run(case: peers.Case, tmp_path: Path) -> None:
    plain = tnn.Sequential(tnn.ReLU(), tnn.Flatten()).eval()
    models = peers.OnnxModels(plain, case.x, tmp_path)
    empty = made_case(models, case.x)
    with pytest.raises(peers.NotRun, match="no convolution or matrix product"):
        peers.CONTESTANTS["onnxruntime"]["ONNX Runtime float32"](empty)


@pytest.mark.skipif(os.name == "nt", reason="needs a shell script in the place of Python")
@pytest.mark.parametrize(("crashes_on", "runs"), [("*/int8.onnx", True), ("*int8*.onnx", False)])
def test_a_compiler_that_crashes_does_so_elsewhere(
    crashes_on: str, runs: bool, case: peers.Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openvino", reason="needs the extra 'bench'")
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\ncase "$3" in {crashes_on}) kill -SEGV $$;; esac\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    models = peers.OnnxModels(case.network, case.onnx.images, tmp_path)
    asked = made_case(models, case.x)
    make = peers.CONTESTANTS["openvino"]["OpenVINO int8"]
    if runs:
        contestant = make(asked)
        assert contestant.name == "OpenVINO int8" and relative_error(case, contestant) < 0.05
        assert "around its layers alone" in contestant.executed and "(exit code -11)" in contestant.executed
    else:
        with pytest.raises(peers.NotRun, match=r"crashes \(exit code -11\)"):
            make(asked)


def test_another_size_of_the_batch_is_of_the_same_file(case: peers.Case) -> None:
    one = made_case(case.onnx, case.x[:1])
    contestant = peers.CONTESTANTS["onnxruntime"]["ONNX Runtime float32"](one)
    assert contestant.outputs()[0].shape == (1, 10) and relative_error(one, contestant) < 1e-5


# Any inputs and outputs


@dataclass
class Found:
    logits: Tensor
    parts: list[Tensor]
    kind: str


class Captioned(tnn.Module):
    """Network of an image and tokens, with a table that all samples share."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.classes = tnn.Conv2d(3, 64, 3, padding=1), tnn.Linear(64, 10)
        self.words = tnn.Embedding(20, 64)

    def forward(self, image: Tensor, extra: dict[str, Any], scale: float = 1.0) -> Found:
        seen = self.body(image).relu().mean((2, 3))
        read = (self.words(extra["tokens"]) + extra["places"]).mean(1)
        logits = self.classes(seen + scale * read)
        return Found(logits, [seen, logits.argmax(1)], "caption")


def captioned(count: int) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 20, (count, 6), generator=generator)
    extra = {"tokens": tokens, "places": torch.randn(6, 64, generator=generator), "language": "en"}
    return Inputs(torch.randn(count, *SHAPE, generator=generator), extra, scale=0.5)


@pytest.mark.parametrize(
    ("runtime", "name", "most_error"),
    [
        ("torch", "PyTorch float32", 0.0),
        ("torch", "PyTorch bf16", 0.03),
        ("onnxruntime", "ONNX Runtime float32", 1e-5),
        ("onnxruntime", "ONNX Runtime int8", 0.05),
        ("openvino", "OpenVINO float32", 1e-5),
        ("openvino", "OpenVINO bf16", 0.03),
        ("openvino", "OpenVINO int8", 0.05),
    ],
)
def test_a_runtime_takes_any_arguments_and_returns_all_tensors(
    runtime: str, name: str, most_error: float, tmp_path: Path
) -> None:
    pytest.importorskip(runtime, reason="needs the extra 'bench'")
    pytest.importorskip("onnx", reason="needs the extra 'bench'")
    if "bf16" in name and machine.why_no_bf16():
        pytest.skip(machine.why_no_bf16())
    models = peers.OnnxModels(Captioned().eval(), captioned(4), tmp_path)
    assert models.inputs == ["image", "extra_tokens", "extra_places"]
    for count in (1, 3):
        asked = made_case(models, captioned(4)[:count])
        contestant = peers.CONTESTANTS[runtime][name](asked)
        assert contestant.name.startswith(name)
        assert relative_error(asked, contestant) <= most_error
        assert [y.shape for y in contestant.outputs()] == [(count, 10), (count, 64), (count,)]


class SignalStack(ctypes.Structure):
    _fields_ = (("address", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


def signal_stack() -> tuple[Any, ...]:
    """Return address, flags and size of the stack on which this thread handles signals."""
    found = SignalStack()
    assert ctypes.CDLL(None).sigaltstack(None, ctypes.byref(found)) == 0
    return found.address, found.flags, found.size


def test_runtimes_leave_the_stack_for_signals_as_it_is(tmp_path: Path) -> None:
    pytest.importorskip("openvino", reason="needs the extra 'bench'")
    pytest.importorskip("onnx", reason="needs the extra 'bench'")
    models, before = peers.OnnxModels(Captioned().eval(), captioned(4), tmp_path), signal_stack()
    both = [peers.CONTESTANTS["openvino"]["OpenVINO float32"](made_case(models, captioned(4))) for _ in range(2)]
    assert signal_stack() == before
    both.pop(0)
    gc.collect()
    both.clear()
    gc.collect()
    assert signal_stack() == before


def test_a_network_of_several_inputs_and_outputs_is_timed() -> None:
    net = Captioned().eval()
    found = dsconv.bench(net, dsconv.quantize(net), captioned(3), batch_sizes=[2, 4], turns=2)
    assert {timing.contestant for timing in found.timings} >= {*OURS, "PyTorch float32"}
    assert {timing.batch_size for timing in found.timings} == {2, 4}
    assert found.calibration == "3 given samples" and found.input_shape == SHAPE
    assert found.input_shapes == {"image": SHAPE, "extra_tokens": (6,), "extra_places": (6, 64)}
    assert str(found).startswith("Captioned, image 3x12x12, extra_tokens 6, extra_places 6x64")
    assert json.loads(found.to_json())["input_shapes"]["extra_tokens"] == [6]
    for name, reason in found.not_run.items():
        if name.startswith("MNN") and "not installed" not in reason:
            assert reason == "it runs networks with one float32 tensor as input and one as output only"
        else:
            assert "not installed" in reason or "bf16" in reason, (name, reason)


class Detector(tnn.Module):
    """Network that takes a list of images and returns a dictionary for each."""

    def __init__(self) -> None:
        super().__init__()
        self.body = tnn.Conv2d(3, 64, 3)

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        return [{"boxes": self.body(image[None]).mean((2, 3))} for image in images]


def test_a_list_of_images_is_no_onnx_file() -> None:
    pytest.importorskip("onnx", reason="needs the extra 'bench'")
    pytest.importorskip("onnxruntime", reason="needs the extra 'bench'")
    net = Detector().eval()
    images = Inputs([torch.randn(3, 8, 8), torch.randn(3, 9, 10)])
    found = dsconv.bench(net, dsconv.quantize(net), images, against=["torch", "onnxruntime"], batch_sizes=[3], turns=2)
    assert [timing.contestant for timing in found.timings][:2] == OURS
    assert "PyTorch float32" in {timing.contestant for timing in found.timings}
    reason = "an ONNX file has a fixed number of inputs, and the network takes a list of images"
    assert found.not_run["ONNX Runtime float32"] == found.not_run["ONNX Runtime int8"] == reason


class Unread(tnn.Module):
    """Network that ignores its second tensor and returns one that does not depend on the samples."""

    def __init__(self) -> None:
        super().__init__()
        self.body = tnn.Conv2d(3, 64, 3)

    def forward(self, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        made = self.body(image)
        return made, made[:, :0], torch.zeros(3, dtype=torch.float32)


def test_what_changes_nothing_and_what_is_empty_is_no_trouble() -> None:
    pytest.importorskip("onnx", reason="needs the extra 'bench'")
    pytest.importorskip("onnxruntime", reason="needs the extra 'bench'")
    net = Unread().eval()
    images = torch.randn(2, *SHAPE, dtype=torch.float32).to(memory_format=torch.channels_last)
    x = (images, torch.ones(2, 4, dtype=torch.bool))
    found = dsconv.bench(net, dsconv.quantize(net), x, against=["torch", "onnxruntime"], turns=2)
    assert not {name: why for name, why in found.not_run.items() if "bf16" not in name}


# MNN


@pytest.fixture(scope="module")
def mnn() -> Any:
    return pytest.importorskip("MNN", reason="needs the extra 'mnn'")


@pytest.mark.parametrize(
    ("name", "most_error"), [("MNN float32", 1e-4), ("MNN int8", 0.05), ("MNN int8 Winograd", 0.1)]
)
def test_mnn_computes_the_network_in_the_precision_it_is_named_after(
    name: str, most_error: float, case: peers.Case, mnn: Any
) -> None:
    contestant = peers.CONTESTANTS["mnn"][name](case)
    assert contestant.name == name and relative_error(case, contestant) <= most_error
    assert contestant.executed == ("3 Convolution [ DT_INT8 ]" if "int8" in name else "3 Convolution")
    weights = 3 * 16 * 9 + 16 * 32 * 9 + 32 * 10
    width = 1 if "int8" in name else 4
    assert width * weights < contestant.weight_bytes < width * weights + 10_000


def test_mnn_takes_the_batch_size_and_the_number_of_threads(
    case: peers.Case, mnn: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = []

    class Interpreter:
        def __init__(self, path: str):
            self.real = mnn.Interpreter(path)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.real, name)

        def createSession(self, given: dict[str, Any]) -> Any:
            settings.append(given)
            return self.real.createSession(given)

    class Runtime:
        def __getattr__(self, name: str) -> Any:
            return Interpreter if name == "Interpreter" else getattr(mnn, name)

    monkeypatch.setattr(
        peers, "import_extra", lambda extra, module: Runtime() if module == "MNN" else import_extra(extra, module)
    )
    for images, threads in ((1, 1), (3, 2)):
        asked = made_case(case.onnx, case.x[:images], threads)
        contestant = peers.CONTESTANTS["mnn"]["MNN int8"](asked)
        assert contestant.outputs()[0].shape == (images, 10) and relative_error(asked, contestant) < 0.05
    assert [given["numThread"] for given in settings] == [1, 2]


def test_what_mnn_cannot_convert_does_not_run(case: peers.Case, mnn: Any, tmp_path: Path) -> None:
    onnx = import_extra("bench", "onnx")
    network = onnx.load(case.onnx.float32)
    network.graph.node[0].op_type = "NoSuchOperator"
    models = peers.OnnxModels(case.network, case.onnx.images, tmp_path)
    models.float32 = tmp_path / "unknown.onnx"
    onnx.save(network, models.float32)
    unknown = made_case(models, case.x)
    for make in peers.CONTESTANTS["mnn"].values():
        with pytest.raises(peers.NotRun, match=r"^MNN fails to convert the network .*NoSuchOperator"):
            make(unknown)


@pytest.mark.skipif(os.name == "nt", reason="needs a shell script in the place of Python")
@pytest.mark.parametrize("function", ["convert", "quantize", "run"])
def test_mnn_crashes_elsewhere(
    function: str, case: peers.Case, mnn: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\n[ "$3" = {function} ] && kill -SEGV $$\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    models = peers.OnnxModels(case.network, case.onnx.images, tmp_path)
    asked = made_case(models, case.x)
    with pytest.raises(peers.NotRun, match=rf"^MNN fails to {function} the network \(exit code -11\)$"):
        peers.CONTESTANTS["mnn"]["MNN int8"](asked)


@pytest.mark.skipif(os.name == "nt", reason="asks the C library by its name on other systems")
def test_what_c_prints_is_kept_from_stdout(capfd: pytest.CaptureFixture[str]) -> None:
    c = ctypes.CDLL(None)
    print("before")
    c.puts(b"before, in C")
    with quiet():
        c.puts(b"within")
    print("after")
    c.puts(b"after, in C")
    c.fflush(None)
    assert sorted(capfd.readouterr().out.split("\n")) == ["", "after", "after, in C", "before", "before, in C"]


def test_the_extra_of_the_picture_is_named(sweep: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match=r"dsconv\[report\]"):
        report.draw_benches(tmp_path / "bench.png", [sweep])
