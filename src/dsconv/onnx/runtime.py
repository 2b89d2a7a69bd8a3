"""An ONNX file as a network that :func:`dsconv.evaluate` and :func:`dsconv.compare` can run."""

import json
import os

import torch
from torch import Tensor, nn

from dsconv.data.preprocess import Preprocess
from dsconv.errors import import_extra


class OnnxNetwork(nn.Module):
    """An ONNX file of one input and one output, run by ONNX Runtime on the CPU with as many threads as PyTorch has.

    Attributes:
        preprocess: how its images are prepared, as the file's metadata say, or None where they do not.

    Raises:
        MissingExtraError: ONNX Runtime is not installed.

    >>> import dsconv, tempfile
    >>> net = dsconv.quantize(nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 1))).eval()
    >>> x = torch.randn(2, 3, 8, 8)
    >>> with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
    ...     again = OnnxNetwork(dsconv.export_onnx(net, x, folder + "/net.onnx"))
    ...     torch.allclose(again(x), net(x), atol=1e-5)
    True
    """

    def __init__(self, path: str | os.PathLike[str]):
        super().__init__()
        runtime = import_extra("onnx", "onnxruntime")
        options = runtime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = torch.get_num_threads()
        # Otherwise weights in blocks are dequantized anew at every call.
        options.add_session_config_entry("session.disable_quant_qdq", str(int(_in_blocks(path))))
        self.session = runtime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])
        stated = self.session.get_modelmeta().custom_metadata_map.get("dsconv.preprocess")
        self.preprocess = None if stated is None else Preprocess(**json.loads(stated))

    def forward(self, x: Tensor) -> Tensor:
        """Output for ``x``, both float32 on the CPU."""
        (name,) = (given.name for given in self.session.get_inputs())
        return torch.from_numpy(self.session.run(None, {name: x.numpy()})[0])


def _in_blocks(path: str | os.PathLike[str]) -> bool:
    model = import_extra("onnx", "onnx").load(path)
    return any(a.name == "block_size" for node in model.graph.node for a in node.attribute) or bool(model.functions)
