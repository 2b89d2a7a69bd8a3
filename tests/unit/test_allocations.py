"""Every tensor that the package allocates states its dtype and device, independent of the process's defaults."""

import ast
from collections.abc import Iterator
from pathlib import Path

import dsconv

SOURCES = Path(dsconv.__file__).parent
# Functions of torch and torch.fft that use the default dtype or device if none is given.
FACTORIES = {
    *("arange", "as_tensor", "asarray", "empty", "empty_strided", "eye", "full", "linspace", "logspace", "normal"),
    *("ones", "rand", "randint", "randn", "randperm", "range", "scalar_tensor", "tensor", "tril_indices"),
    *("triu_indices", "zeros", "fftfreq", "rfftfreq", "hann_window", "hamming_window"),
}


def incomplete(source: str) -> Iterator[tuple[int, str]]:
    """Yield line and text of calls of factories without a dtype or a device."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        owner = ast.unparse(node.func.value)
        if owner in ("torch", "torch.fft") and node.func.attr in FACTORIES:
            given = {keyword.arg for keyword in node.keywords}
            if not {"dtype", "device"} <= given:
                yield node.lineno, ast.unparse(node)


def test_every_allocation_states_its_dtype_and_device() -> None:
    found = [
        f"{path.relative_to(SOURCES)}:{line}: {call}"
        for path in sorted(SOURCES.rglob("*.py"))
        for line, call in incomplete(path.read_text(encoding="utf-8"))
    ]
    assert not found, "state dtype= and device= in:\n" + "\n".join(found)


def test_an_incomplete_allocation_is_found() -> None:
    calls = (
        "torch.empty(3)",
        "torch.zeros(3, dtype=torch.int8)",
        "torch.fft.rfftfreq(3, device='cpu')",
        "f(torch.tensor(v) for v in x)",
        "torch.ones(3, dtype=torch.int8, device=x.device)",
        "x.new_empty(3)",
        "torch.empty_like(x)",
    )
    assert [line for line, _ in incomplete("\n".join(calls))] == [1, 2, 3, 4]
