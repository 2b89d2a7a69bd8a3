"""ONNX file as a network that :func:`dsconv.evaluate` and :func:`dsconv.compare` can run."""

import json
import os
from typing import Any

import torch
from torch import nn

from dsconv.data.preprocess import Preprocess
from dsconv.errors import ModelError, import_extra
from dsconv.onnx.int8 import feed
from dsconv.structures import tensors_in


class OnnxNetwork(nn.Module):
    """ONNX file, run by ONNX Runtime on the CPU with as many threads as PyTorch has.

    It takes the arguments of the exported model, and returns the same structure: one tensor, a tuple or a dictionary of
    tensors; nested tensors have names such as ``boxes.0``.

    Attributes:
        preprocess: preprocessing of its images, from the file's metadata, or None if they do not state it.

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
        # Otherwise weights in blocks are dequantized at every call.
        options.add_session_config_entry("session.disable_quant_qdq", str(int(_in_blocks(path))))
        self.session = runtime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])
        stated = self.session.get_modelmeta().custom_metadata_map
        self.preprocess = (
            Preprocess(**json.loads(stated["dsconv.preprocess"])) if "dsconv.preprocess" in stated else None
        )
        self._names = [given.name for given in self.session.get_inputs()]
        ways = [[output.name] for output in self.session.get_outputs()]
        ways = json.loads(stated.get("dsconv.outputs", json.dumps(ways if len(ways) > 1 else [[]])))
        self._outputs: list[str | int] = [way[0] if len(way) == 1 else ".".join(map(str, way)) for way in ways]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the outputs for tensors on the CPU.

        Raises:
            ModelError: the file has another number of inputs.
        """
        tensors = tensors_in((args, kwargs))
        if len(tensors) != len(self._names):
            raise ModelError(
                f"the file has the inputs {', '.join(self._names)}, but was called on {len(tensors)} tensors"
            )
        made = map(torch.from_numpy, self.session.run(None, feed(self._names, tensors)))
        if self._outputs == [""]:
            return next(made)
        if all(isinstance(name, int) for name in self._outputs):
            return tuple(made)
        return dict(zip(map(str, self._outputs), made, strict=True))


def _in_blocks(path: str | os.PathLike[str]) -> bool:
    model = import_extra("onnx", "onnx").load(path)
    return any(a.name == "block_size" for node in model.graph.node for a in node.attribute) or bool(model.functions)
