"""DSConv: convolutional networks in low-bit integers, without labelled data.

>>> import torch, dsconv
>>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 64, 3), torch.nn.ReLU(), torch.nn.Conv2d(64, 64, 3))
>>> qnet = dsconv.quantize(net)
>>> with torch.inference_mode():
...     qnet(torch.zeros(1, 3, 8, 8)).shape
torch.Size([1, 64, 4, 4])
"""

from typing import TYPE_CHECKING

from dsconv.lazy import import_with, lazily

if TYPE_CHECKING:
    from dsconv import demo, nn, numerics, ops, zoo
    from dsconv.adaptation.adapt import adapt
    from dsconv.benchmarking.bench import bench
    from dsconv.benchmarking.profiling import profile
    from dsconv.calibration.calibrate import calibrate
    from dsconv.compilation import compile
    from dsconv.config import LayerConfig, QuantConfig
    from dsconv.conversion import fold_batchnorm, quantize
    from dsconv.conversion.summary import summary
    from dsconv.cpu import cpu_info
    from dsconv.data.inputs import Inputs
    from dsconv.evaluation.compare import compare
    from dsconv.evaluation.evaluate import evaluate
    from dsconv.io import load, save
    from dsconv.mixed import search, sensitivity
    from dsconv.onnx import export_onnx, from_onnx
    from dsconv.optimization.optimize import optimize
    from dsconv.recipe import Recipe
    from dsconv.report import write_report
    from dsconv.tradeoffs import tradeoff
    from dsconv.version import __version__

__all__ = [
    "Inputs",
    "LayerConfig",
    "QuantConfig",
    "Recipe",
    "__version__",
    "adapt",
    "bench",
    "calibrate",
    "compare",
    "compile",
    "cpu_info",
    "demo",
    "evaluate",
    "export_onnx",
    "fold_batchnorm",
    "from_onnx",
    "load",
    "nn",
    "numerics",
    "ops",
    "optimize",
    "profile",
    "quantize",
    "save",
    "search",
    "sensitivity",
    "summary",
    "tradeoff",
    "write_report",
    "zoo",
]

__getattr__, __dir__ = lazily(
    __name__,
    {
        "dsconv.benchmarking": ("bench", "profile"),
        "dsconv.calibration": ("calibrate",),
        "dsconv.compilation": ("compile",),
        "dsconv.config": ("LayerConfig", "QuantConfig"),
        "dsconv.conversion": ("fold_batchnorm", "quantize", "summary"),
        "dsconv.cpu": ("cpu_info",),
        "dsconv.data": ("Inputs",),
        "dsconv.adaptation": ("adapt",),
        "dsconv.evaluation": ("compare", "evaluate"),
        "dsconv.io": ("load", "save"),
        "dsconv.mixed": ("search", "sensitivity"),
        "dsconv.onnx": ("export_onnx", "from_onnx"),
        "dsconv.optimization": ("optimize",),
        "dsconv.recipe": ("Recipe",),
        "dsconv.report": ("write_report",),
        "dsconv.tradeoffs": ("tradeoff",),
        "dsconv.version": ("__version__",),
    },
)

# Programs of torch.export call the operators by their names, without a word to this package.
import_with(("torch", "dsconv.numerics", "dsconv.threads"), "dsconv.ops")
