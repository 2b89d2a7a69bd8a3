"""The examples of examples/deploy/: programs in C and C++, and a service over HTTP."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from urllib.error import HTTPError

import numpy as np
import pytest
from PIL import Image

REPOSITORY = Path(__file__).resolve().parents[2]
EXAMPLES = REPOSITORY / "examples" / "deploy"


@pytest.fixture(scope="module")
def classify(installed: Path, compiler: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = tmp_path_factory.mktemp("classify") / "classify"
    (library,) = installed.glob("lib*/**/libdsconv.so")
    flags = ["-std=c11", "-O1", "-Wall", "-Wextra", "-Wpedantic", "-Werror", f"-I{installed / 'include'}"]
    linked = [f"-L{library.parent}", f"-Wl,-rpath,{library.parent}", "-ldsconv", "-lm"]
    subprocess.run([compiler, *flags, EXAMPLES / "classify.c", *linked, "-o", program], check=True)
    return program


@pytest.fixture
def digit(tmp_path: Path) -> tuple[Path, np.ndarray]:
    """Return a picture of the network's size, and its pixels."""
    pixels = np.random.default_rng(1).integers(0, 256, (8, 8), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "digit.pgm")
    return tmp_path / "digit.pgm", pixels


def test_the_program_in_c_prints_the_best_classes(classify: Path, digits: Path, digit: tuple[Path, np.ndarray]) -> None:
    runtime = pytest.importorskip("dsconv_runtime")
    picture, pixels = digit
    net = runtime.Network(digits)
    (logits,) = net(runtime.prepare(pixels, net.preprocess)[None])
    shares = np.exp(logits.astype(np.float64) - logits.max())
    shares /= shares.sum()
    best = np.argsort(-logits, kind="stable")[:5]
    printed = subprocess.run([classify, digits, picture], capture_output=True, text=True, check=True).stdout
    assert printed == "".join(f"{100 * shares[i]:5.1f} %  {i}  digit {i}\n" for i in best)


@pytest.mark.parametrize("content", [b"", b"P5\n8 8\n", b"P6\n8 8\n255\n" + bytes(5), b"P6\n8 8\n255\n" + bytes(192)])
def test_the_program_in_c_ends_with_an_error(classify: Path, digits: Path, tmp_path: Path, content: bytes) -> None:
    picture = tmp_path / "bad.pgm"
    picture.write_bytes(content)
    for arguments in ([digits, picture], [picture, picture], [digits, tmp_path / "none"], [digits]):
        done = subprocess.run([classify, *arguments], capture_output=True, text=True)
        assert done.returncode == 1 and done.stderr.startswith("classify: ") and not done.stdout, arguments


def test_cmake_finds_the_package(installed: Path, digits: Path, fork: Path, tmp_path: Path) -> None:
    cmake = shutil.which("cmake")
    for call in (
        [cmake, "-S", EXAMPLES / "cpp", "-B", tmp_path, f"-DCMAKE_PREFIX_PATH={installed}", "-DCMAKE_BUILD_TYPE=Debug"],
        [cmake, "--build", tmp_path],
    ):
        subprocess.run(call, check=True, capture_output=True)
    for network, threads in ((digits, 3), (fork, 1)):
        call = [tmp_path / "latency", network, str(threads), "5"]
        printed = subprocess.run(call, capture_output=True, text=True, check=True).stdout
        assert "first result after" in printed
        assert f"\n{5 * threads} runs by {threads} threads: median " in printed
    done = subprocess.run([tmp_path / "latency", tmp_path / "none"], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("latency: ")


class Running:
    """A running service."""

    def __init__(self, process: subprocess.Popen[str], url: str):
        self.process, self.url = process, url

    def get(self, path: str, data: bytes | None = None) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(self.url + path, data, timeout=60) as answer:
                return answer.status, answer.read().decode()
        except HTTPError as error:
            return error.code, error.read().decode()

    def health(self) -> dict[str, int]:
        return json.loads(self.get("/health")[1])


Start = Callable[..., AbstractContextManager[Running]]


@pytest.fixture
def service(digits: Path) -> Start:
    """Return a function that starts the service with options; it is killed at the end if it still runs."""
    for package in ("dsconv_runtime", "starlette", "uvicorn"):
        pytest.importorskip(package)

    @contextmanager
    def start(*options: object) -> Iterator[Running]:
        call = [sys.executable, EXAMPLES / "service" / "service.py", digits, "--port", 0, *options]
        with subprocess.Popen(list(map(str, call)), stderr=subprocess.PIPE, text=True) as process:
            try:
                lines = iter(process.stderr.readline, "")
                started = next(found for line in lines if (found := re.search(r"running on (http://\S+)", line)))
                yield Running(process, started[1])
            finally:
                process.kill()

    return start


def png(tmp_path: Path, size: int = 20) -> bytes:
    Image.fromarray(np.random.default_rng(size).integers(0, 256, (size, size), np.uint8)).save(tmp_path / "x.png")
    return (tmp_path / "x.png").read_bytes()


def test_under_load_no_answer_of_the_service_is_lost_or_wrong(service: Start, digits: Path) -> None:
    with service("--queue", 6, "--batch", 4) as running:
        call = [sys.executable, EXAMPLES / "service" / "load_test.py", digits, running.url, "--clients", 12]
        done = subprocess.run([*map(str, call), "--requests", "300"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        counted = re.match(r"(\d+) answers, all right; (\d+) refused and sent again", done.stdout)
        health = running.health()
    assert counted and counted[1] == "300"
    assert health["answered"] == health["samples"] == 300 and health["in_work"] == 0
    assert health["refused"] == int(counted[2])
    assert health["runs"] < 300, "no requests were computed together"


def test_the_service_refuses_what_is_no_image_or_too_much(service: Start, tmp_path: Path) -> None:
    with service("--queue", 2, "--batch", 3, "--wait", 3000) as running:
        for body in (b"", b"no image", png(tmp_path)[:60]):
            status, text = running.get("/classify", body)
            assert status == 400 and text.startswith("expected an image")
        assert running.get("/classify", bytes(20_000_001))[0] == 413
        with ThreadPoolExecutor(2) as pool:
            answers = [pool.submit(running.get, "/classify", png(tmp_path)) for _ in range(2)]
            wait_for(lambda: running.health()["in_work"] == 2)
            assert running.get("/classify", png(tmp_path))[0] == 503
            running.process.send_signal(signal.SIGTERM)
            assert [answer.result()[0] for answer in answers] == [200, 200]


def test_a_service_that_is_stopped_answers_what_it_accepted(service: Start, digits: Path, tmp_path: Path) -> None:
    runtime = pytest.importorskip("dsconv_runtime")
    net = runtime.Network(digits)
    with service("--batch", 64, "--wait", 2000) as running, ThreadPoolExecutor(6) as pool:
        bodies = [png(tmp_path, size) for size in range(10, 16)]
        answers = [pool.submit(running.get, "/classify", body) for body in bodies]
        wait_for(lambda: running.health()["in_work"] == 6)
        running.process.send_signal(signal.SIGTERM)
        for size, answer in zip(range(10, 16), answers, strict=True):
            status, text = answer.result()
            pixels = np.random.default_rng(size).integers(0, 256, (size, size), np.uint8)
            (logits,) = net(runtime.prepare(pixels, net.preprocess)[None])
            best = json.loads(text)["best"]
            assert status == 200
            assert [one["logit"] for one in best] == sorted(logits.tolist(), reverse=True)[:5]
            assert best[0]["name"] == f"digit {best[0]['class']}"
        assert running.process.wait(30) in (0, -signal.SIGTERM)


def wait_for(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_the_container_has_all_files_that_it_copies() -> None:
    text = (EXAMPLES / "service" / "Dockerfile").read_text("utf-8")
    copied = [name for line in re.findall(r"^COPY (?!--from)(.+) \S+$", text, re.M) for name in line.split()]
    assert copied
    assert all((REPOSITORY / name).exists() for name in copied), copied
