"""dsconv_runtime has the bits of dsconv.compile, and refuses invalid inputs."""

import copy
import doctest
import importlib
import multiprocessing
import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import dsconv
from dsconv.compilation.compiled import CompiledModel
from dsconv.data import Preprocess

dsconv_runtime = pytest.importorskip("dsconv_runtime", reason="dsconv-runtime is not installed")
Network, DataError, FileFormatError = dsconv_runtime.Network, dsconv_runtime.DataError, dsconv_runtime.FileFormatError


def images(count: int) -> np.ndarray:
    return dsconv.demo.load_digits()[0][:count].numpy()


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Any:
    before = dsconv_runtime.threads()
    dsconv_runtime.set_threads(request.param)
    assert dsconv_runtime.threads() == request.param
    yield request.param
    dsconv_runtime.set_threads(before)


@pytest.mark.parametrize("count", [1, 2, 33])
@pytest.mark.usefixtures("threads")
def test_logits_have_the_bits_of_the_compiled_model(digits: Path, fast_digits: CompiledModel, count: int) -> None:
    logits = Network(digits)(images(count))
    assert logits.dtype == np.float32
    np.testing.assert_array_equal(logits, fast_digits(torch.from_numpy(images(count))).numpy())


def test_what_the_file_says_of_the_network_is_there(digits: Path, fast_digits: CompiledModel) -> None:
    net = Network(digits)
    assert [(x.dtype, x.shape) for x in net.inputs] == [(np.float32, (None, 1, 8, 8))]
    assert [(y.dtype, y.shape) for y in net.outputs] == [(np.float32, (None, 10))]
    assert [size.inputs for size in net.sizes] == [net.inputs]
    assert Preprocess(**net.preprocess) == fast_digits.preprocess
    assert net.classes[3] == "digit 3" and len(net.classes) == 10
    assert net.weight_bytes > 0 and net.run_bytes((8, 1, 8, 8)) >= net.run_bytes((1, 1, 8, 8)) > 0
    assert dsconv_runtime.__version__ == dsconv.__version__
    assert dsconv_runtime.isa() == dsconv.cpu_info().isa_used


def test_several_inputs_and_outputs_go_by_position_or_by_name(fork: Path, fast_fork: CompiledModel) -> None:
    net = Network(fork)
    first, second = (x.name for x in net.inputs)
    random = np.random.default_rng(0)
    image, mask = (random.standard_normal((5, channels, 6, 7), np.float32) for channels in (3, 2))
    expected = fast_fork(torch.from_numpy(image), torch.from_numpy(mask))
    for outputs in (net(image, mask), net(image, **{second: mask}), net(**{second: mask, first: image})):
        assert list(outputs) == [y.name for y in net.outputs]
        for got, wanted in zip(outputs.values(), expected.values(), strict=True):
            np.testing.assert_array_equal(got, wanted.numpy())
    assert net.preprocess is None and net.classes == ()


def test_a_file_of_several_sizes_says_which_and_takes_all(fast_fork: CompiledModel, tmp_path: Path) -> None:
    larger = dsconv.Inputs(*(torch.zeros(1, channels, 9, 5, dtype=torch.float32) for channels in (3, 2)))
    fast_fork.save(tmp_path / "fork.dsconv", sizes=[larger])
    net = Network(tmp_path / "fork.dsconv")
    assert [[x.shape for x in size.inputs] for size in net.sizes] == [
        [(None, 3, 6, 7), (None, 2, 6, 7)],
        [(None, 3, 9, 5), (None, 2, 9, 5)],
    ]
    assert [size.outputs[0].shape for size in net.sizes] == [(None, 4, 6, 7), (None, 4, 9, 5)]
    assert net.run_bytes((1, 3, 9, 5), (1, 2, 9, 5)) > 0
    random = np.random.default_rng(0)
    for size in net.sizes:
        given = [random.standard_normal((2, *x.shape[1:]), np.float32) for x in size.inputs]
        expected = fast_fork(*map(torch.from_numpy, given))
        for got, wanted in zip(net(*given).values(), expected.values(), strict=True):
            np.testing.assert_array_equal(got, wanted.numpy())
    with pytest.raises(DataError, match=r"expected .*6, 7.*, or .*9, 5.*, got .*\(2, 3, 6\)"):
        net(np.zeros((2, 3, 6), np.float32), np.zeros((2, 2, 6), np.float32))


def test_arrays_are_read_whatever_their_strides(digits: Path) -> None:
    net, x = Network(digits), images(6)
    expected = net(x)
    wide = np.zeros((6, 1, 16, 24), np.float32)
    wide[:, :, ::2, ::3] = x
    unaligned = np.frombuffer(b"\0" + x.tobytes(), np.uint8)[1:].view(np.float32).reshape(x.shape)
    assert not unaligned.flags.aligned
    in_columns = np.asfortranarray(x)
    for view in (wide[:, :, ::2, ::3], x[::-1].copy()[::-1], in_columns, unaligned):
        np.testing.assert_array_equal(net(view), expected)
    np.testing.assert_array_equal(net(np.broadcast_to(x[:1], x.shape)), net(np.repeat(x[:1], 6, 0)))
    np.testing.assert_array_equal(net(x[::2]), expected[::2])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda net, x: net(), TypeError, "'x': expected an array, got none"),
        (lambda net, x: net(x, x), TypeError, "expected 1"),
        (lambda net, x: net(x, x=x), TypeError, "by position and by name"),
        (lambda net, x: net(y=x), TypeError, "'y' is unknown; the inputs are x"),
        (lambda net, x: net(x, z=x), TypeError, "'z' is unknown"),
        (lambda net, x: net(x.tolist()), TypeError, "'x': expected a NumPy array of float32, got list"),
        (lambda net, x: net(torch.from_numpy(x)), TypeError, "got Tensor"),
        (lambda net, x: net(x.astype(np.float64)), TypeError, "'x': expected float32, got float64"),
        (lambda net, x: net(x.astype(">f4")), TypeError, "'x': expected float32, got >f4"),
        (lambda net, x: net(x[0]), DataError, r"expected \(N, 1, 8, 8\), or other heights and widths, got \(1, 8, 8\)"),
        (lambda net, x: net(x[:, :, :0]), DataError, r"expected \(N, 1, 8, 8\), or other .*, got \(2, 1, 0, 8\)"),
        (lambda net, x: net(np.zeros((), np.float32)), DataError, "'x': expected"),
        (lambda net, x: net(x.reshape(2, 1, 8, 8, *[1] * 5)), DataError, "'x': expected at most 8 dimensions"),
        (
            lambda net, x: net.run_bytes(),
            DataError,
            "shapes: expected a shape of at most 8 sizes for input 'x', got None",
        ),
        (lambda net, x: net.run_bytes((1 << 63, 1, 8, 8)), DataError, "shapes: expected a shape of at most 8 sizes"),
        (lambda net, x: net.run_bytes((1, 2, 8, 8)), DataError, r"expected \(N, 1, 8, 8\), .* got \(1, 2, 8, 8\)"),
        (lambda net, x: net.run_bytes((1, 1, 8, 8), (1, 1, 8, 8)), DataError, "expected 1 input, got 2"),
        (lambda net, x: pickle.dumps(net), TypeError, "cannot be pickled"),
        (lambda net, x: copy.copy(net), TypeError, "cannot be pickled or copied"),
    ],
)
def test_what_a_network_does_not_take_is_refused(digits: Path, call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(Network(digits), images(2))


def test_inputs_of_unequal_numbers_of_samples_are_refused(fork: Path) -> None:
    image, mask = (np.zeros((count, channels, 6, 7), np.float32) for count, channels in ((2, 3), (3, 2)))
    with pytest.raises(DataError, match=r"'mask': expected"):
        Network(fork)(image, mask)


def test_no_samples_give_no_outputs(digits: Path) -> None:
    assert Network(digits)(images(0)).shape == (0, 10)


@pytest.mark.parametrize("number", [0, -1, 1025, 10**12])
def test_a_number_of_threads_out_of_range_is_refused(number: int) -> None:
    with pytest.raises(DataError, match=f"expected a whole number from 1 to 1024, got {number}"):
        dsconv_runtime.set_threads(number)


@pytest.mark.parametrize("number", [True, 2.0, "2", None])
def test_a_number_of_threads_that_is_no_whole_number_is_refused(number: Any) -> None:
    with pytest.raises(TypeError, match="expected a whole number"):
        dsconv_runtime.set_threads(number)


def test_files_that_cannot_be_opened_are_told_from_damaged_ones(digits: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.dsconv"):
        Network(tmp_path / "nowhere.dsconv")
    with pytest.raises(OSError, match=str(tmp_path)):
        Network(tmp_path)
    with pytest.raises(TypeError):
        Network(None)
    with pytest.raises(ValueError, match="null character"):
        Network("a\0b")
    content = digits.read_bytes()
    damaged = {
        "empty": b"",
        "text": b"no network",
        "half": content[: len(content) // 2],
        "short": content[:-1],
        "long": content + b"\0",
        "changed": content[:5000] + bytes([content[5000] ^ 1]) + content[5001:],
    }
    for name, data in damaged.items():
        file = tmp_path / f"{name}.dsconv"
        file.write_bytes(data)
        with pytest.raises(FileFormatError, match=rf"{name}\.dsconv"):
            Network(file)
        with pytest.raises(FileFormatError):
            Network.from_bytes(data)


def test_a_network_from_bytes_is_that_of_the_file(digits: Path) -> None:
    data = bytearray(digits.read_bytes())
    net = Network.from_bytes(data)
    data[:] = bytes(len(data))
    np.testing.assert_array_equal(net(images(3)), Network(digits)(images(3)))


def test_a_closed_network_says_so(digits: Path) -> None:
    with Network(digits) as net:
        net(images(1))
    assert repr(net).endswith("closed)")
    net.close()
    for use in (lambda: net(images(1)), lambda: net.weight_bytes, net.__enter__):
        with pytest.raises(ValueError, match="closed: open it again"):
            use()


def test_threads_share_a_network_which_may_be_closed_meanwhile(digits: Path) -> None:
    net, x = Network(digits), images(64)
    expected = net(x)

    def run(i: int) -> bool:
        try:
            return bool((net(x[i : i + 8]) == expected[i : i + 8]).all())
        except ValueError as error:
            return "closed" in str(error)

    with ThreadPoolExecutor(4) as pool:
        results = [pool.submit(run, i % 56) for i in range(200)]
        assert results[100].result()
        net.close()
        assert all(result.result() for result in results)


def _in_child(net: Any, x: np.ndarray, expected: np.ndarray) -> None:
    os._exit(0 if (net(x) == expected).all() else 1)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_process_runs_the_network_of_its_parent(digits: Path) -> None:
    net, x = Network(digits), images(32)
    expected = net(x)
    child = multiprocessing.get_context("fork").Process(target=_in_child, args=(net, x, expected))
    child.start()
    child.join(60)
    assert child.exitcode == 0
    np.testing.assert_array_equal(net(x), expected)


def test_pytorch_is_not_imported(digits: Path) -> None:
    code = (
        "import sys, numpy, dsconv_runtime\n"
        "print(dsconv_runtime.Network(sys.argv[1])(numpy.zeros((1, 1, 8, 8), numpy.float32)).shape)\n"
        "assert not {'torch', 'dsconv', 'PIL'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, digits], capture_output=True, text=True, check=True)
    assert done.stdout == "(1, 10)\n"


SIDES = st.integers(1, 40)


@given(
    st.one_of(st.none(), SIDES, st.tuples(SIDES, SIDES)),
    st.one_of(st.none(), st.tuples(SIDES, SIDES)),
    st.sampled_from(["nearest", "bilinear", "bicubic"]),
    st.sampled_from(["rgb", "bgr", "gray"]),
    st.sampled_from([1.0, 255.0, 0.3]),
    st.tuples(SIDES, SIDES),
    st.integers(0, 99),
)
def test_images_are_prepared_as_by_dsconv(
    resize: Any, crop: Any, interpolation: str, channels: str, scale: float, size: tuple[int, int], seed: int
) -> None:
    random = np.random.default_rng(seed)
    numbers = 1 if channels == "gray" else 3
    pixels = random.integers(0, 256, size if channels == "gray" else (*size, 3), np.uint8)
    mean, std = (tuple(random.uniform(0.1, 0.9, numbers).tolist()) for _ in range(2))
    preprocess = Preprocess(
        resize=resize, crop=crop, mean=mean, std=std, interpolation=interpolation, scale=scale, channels=channels
    )
    try:
        expected = preprocess(Image.fromarray(pixels)).numpy()
    except ValueError:  # a very long picture would get a side of 0 pixels
        return
    prepared = dsconv_runtime.prepare(pixels, preprocess.model_dump(mode="json"))
    assert prepared.dtype == np.float32 and prepared.flags.c_contiguous
    np.testing.assert_array_equal(prepared, expected)


@pytest.mark.parametrize(
    ("image", "error"),
    [
        (np.zeros((4, 4, 3), np.float32), TypeError),
        ([[0]], TypeError),
        (np.zeros((4, 4), np.uint8), DataError),
        (np.zeros((4, 4, 4), np.uint8), DataError),
        (np.zeros((0, 4, 3), np.uint8), DataError),
        (np.zeros((1, 4, 4, 3), np.uint8), DataError),
    ],
)
def test_what_is_no_picture_is_refused(image: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="image: expected"):
        dsconv_runtime.prepare(image, {"channels": "rgb"})


@pytest.mark.parametrize("module", ["dsconv_runtime", "dsconv_runtime.network", "dsconv_runtime.images"])
def test_examples_of_docstrings_hold(digits: Path, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(digits.parent)
    options = doctest.ELLIPSIS | doctest.IGNORE_EXCEPTION_DETAIL
    results = doctest.testmod(importlib.import_module(module), optionflags=options)
    assert results.attempted > 0 and results.failed == 0
