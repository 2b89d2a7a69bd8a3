"""Execution of the tasks of the integer kernels, by ``DSCONV_PARALLEL``. Each test starts its own process."""

import os
import subprocess
import sys
from functools import cache

import pytest

from dsconv import threads
from dsconv.ops import native

pytestmark = pytest.mark.skipif(native.extension() is None, reason="the extension dsconv._C is not built")

LAYERS = """
import hashlib, multiprocessing, os, signal, threading, traceback
import torch
import dsconv
from dsconv import nn
from dsconv.config import LayerConfig
import dsconv.threads

torch.set_num_threads(3)
torch.manual_seed(0)
layers = [
    nn.DSConv2d.from_float(torch.nn.Conv2d(40, 70, 3, padding=1), LayerConfig(block_size=16)),
    nn.DSConv2d.from_float(torch.nn.Conv2d(70, 70, 3, groups=70), LayerConfig(block_size=16, blocks="flat")),
    nn.DSConv2d.from_float(torch.nn.Conv2d(70, 33, 1), LayerConfig(block_size=32)),
]
x = torch.randn(3, 40, 20, 17)

@torch.inference_mode()
def digest():
    y = x
    for layer in layers:
        y = layer(y)
    return hashlib.sha256(y.numpy().tobytes()).hexdigest()

expected = digest()

def eight_at_once(work):
    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
"""


@cache
def outcome(script: str = "", parallel: str = "pool") -> str:
    """Return the output of a script that begins with LAYERS, and the digest of the network's output."""
    done = subprocess.run(
        [sys.executable, "-c", f"{LAYERS}{script}\nprint(dsconv.threads.parallel(), expected)"],
        capture_output=True,
        text=True,
        env=os.environ | {"DSCONV_PARALLEL": parallel},
        timeout=60,
    )
    return done.stdout if done.returncode == 0 else done.stderr


def test_whatever_runs_the_tasks_the_bits_are_the_same() -> None:
    ways = ["pool", "serial"] + (["torch"] if threads.torch_parallel_for() else [])
    printed = [outcome(parallel=way).split() for way in ways]
    assert [way for way, _ in printed] == ways
    assert len({digest for _, digest in printed}) == 1


def test_an_unknown_way_is_an_error() -> None:
    error = outcome(parallel="openmp")
    assert "ConfigError: DSCONV_PARALLEL: expected torch, pool or serial, got 'openmp'" in error


FORKS = {
    "a fork of a process that has used its threads": """
for _ in range(3):
    child = os.fork()
    if not child:
        os._exit(0 if digest() == expected and digest() == expected else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert digest() == expected
""",
    "processes that multiprocessing forks": """
with multiprocessing.get_context("fork").Pool(2) as processes:
    assert processes.starmap(digest, [()] * 6) == [expected] * 6
assert digest() == expected
""",
    "workers of a DataLoader": """
loader = torch.utils.data.DataLoader(range(4), num_workers=2, collate_fn=lambda _: digest(), timeout=40)
assert list(loader) == [expected] * 4
""",
    "compiled networks, children of children, and threads that these start": """
net = torch.nn.Sequential(
    *(torch.nn.Conv2d(3, 64, 3, padding=1), torch.nn.BatchNorm2d(64), torch.nn.SiLU()),
    *(torch.nn.Conv2d(64, 64, 3), torch.nn.GroupNorm(8, 64), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()),
)
model = dsconv.quantize(net.eval(), {"weight_rule": "paper"})
images = torch.randn(4, 3, 48, 64).transpose(2, 3)
fast = dsconv.compile(model, images[:1])

@torch.inference_mode()
def outputs():
    return [run(each).numpy().tobytes() for run, each in ((fast, images), (model[0], images), (fast, images[..., :40]))]

outputs()
torch.set_num_threads(1)  # of which the last bits of what PyTorch computes depend
wanted = outputs()
torch.set_num_threads(3)
torch.mm(torch.randn(600, 600), torch.randn(600, 600))  # on threads of PyTorch

def child(generations):
    signal.alarm(50)  # a hang ends
    for count in (2, 3, 1, 2):
        torch.set_num_threads(count)
        assert outputs() == wanted and digest() == expected and torch.get_num_threads() == count
        assert dsconv.cpu_info().parallel == "their own thread pool"
    if os.path.exists("/proc/self/task"):
        assert len(os.listdir("/proc/self/task")) > 1
    found = []
    eight_at_once(lambda _: found.append(outputs()))
    assert found == [wanted] * 8
    if generations:
        fork(generations)

def fork(generations):
    pid = os.fork()
    if not pid:
        status = 1
        try:
            child(generations - 1)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    assert os.waitpid(pid, 0)[1] == 0

fork(3)
torch.set_num_threads(1)
assert outputs() == wanted and digest() == expected
""",
}

POOL = {
    "eight threads at once": """
start, digests = threading.Barrier(8), []
def work(_):
    start.wait()
    for _ in range(20):
        digests.append(digest())
eight_at_once(work)
assert digests == [expected] * 160
""",
    "eight threads at once that change how many threads there are": """
start, digests = threading.Barrier(8), []
def work(count):
    start.wait()
    for i in range(10):
        torch.set_num_threads(1 + (count + i) % 4)
        digests.append(digest())
eight_at_once(work)
assert digests == [expected] * 80
""",
    "as many threads as PyTorch is told to have": """
def workers():
    return len(os.listdir("/proc/self/task")) if os.path.exists("/proc/self/task") else None
for count in (1, 5, 2, 16, 1, 3):
    torch.set_num_threads(count)
    assert digest() == expected
torch.set_num_threads(2)
digest()
two = workers()
torch.set_num_threads(7)
digest()
assert two is None or workers() == two + 5, (two, workers())
""",
}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.parametrize("way", ["pool", "torch"])
@pytest.mark.parametrize("script", FORKS.values(), ids=FORKS)
def test_what_is_forked_computes(script: str, way: str) -> None:
    if way == "torch" and not threads.torch_parallel_for():
        pytest.skip("this PyTorch does not offer its threads")
    assert outcome(script, way) == outcome(parallel=way)


@pytest.mark.parametrize("script", POOL.values(), ids=POOL)
def test_the_pool_serves(script: str) -> None:
    assert outcome(script) == outcome()
