"""DSConv: convolutional networks in low-bit integers, without labelled data.

>>> import torch, dsconv
>>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 64, 3), torch.nn.ReLU(), torch.nn.Conv2d(64, 64, 3))
>>> qnet = dsconv.quantize(net)
>>> with torch.inference_mode():
...     qnet(torch.zeros(1, 3, 8, 8)).shape
torch.Size([1, 64, 4, 4])
"""

from importlib import metadata

from dsconv import demo, nn, numerics, ops, zoo
from dsconv.benchmarking import bench
from dsconv.calibration import calibrate
from dsconv.compilation import compile, profile
from dsconv.config import LayerConfig, QuantConfig
from dsconv.conversion import fold_batchnorm, quantize, summary
from dsconv.cpu import cpu_info
from dsconv.evaluation import compare, evaluate
from dsconv.io import load, save
from dsconv.mixed import search, sensitivity
from dsconv.onnx import export_onnx
from dsconv.report import write_report
from dsconv.tradeoffs import tradeoff

__version__ = metadata.version("dsconv")

__all__ = [
    "LayerConfig",
    "QuantConfig",
    "__version__",
    "bench",
    "calibrate",
    "compare",
    "compile",
    "cpu_info",
    "demo",
    "evaluate",
    "export_onnx",
    "fold_batchnorm",
    "load",
    "nn",
    "numerics",
    "ops",
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
