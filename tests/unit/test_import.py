import json
import subprocess
import sys

import pytest


@pytest.fixture(scope="module")
def modules_after_import() -> set[str]:
    code = "import dsconv, json, sys; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    return set(json.loads(done.stdout))


@pytest.mark.parametrize(
    "heavy",
    [
        "torchvision",
        "timm",
        "matplotlib",
        "jinja2",
        "rich",
        "typer",
        "PIL",
        "onnx",
        "onnx_ir",
        "onnxruntime",
        "onnxscript",
        "openvino",
        "MNN",
        "sklearn",
        "highspy",
        "huggingface_hub",
        "yaml",
    ],
)
def test_import_dsconv_does_not_import(heavy: str, modules_after_import: set[str]) -> None:
    assert "dsconv" in modules_after_import
    assert heavy not in modules_after_import


@pytest.mark.parametrize(
    "module", ["threads", "config", "numerics", "numerics.balanced", "ops.native", "backends.base"]
)
def test_what_the_operators_need_can_be_imported_first(module: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", f"import dsconv.{module}"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
