"""Quantized linear layer."""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from dsconv.config import LayerConfig
from dsconv.layers.kinds import register
from dsconv.layers.layer import DSLayer


@register
class DSLinear(DSLayer):
    """Quantized ``torch.nn.Linear``: ``x (..., in_features)``; blocks of input features, see :class:`DSLayer`.

    >>> import torch
    >>> layer = DSLinear.from_float(nn.Linear(64, 10))
    >>> layer(torch.zeros(2, 64)).shape, layer.kds.shape
    (torch.Size([2, 10]), torch.Size([10, 1]))
    """

    kind, dims, onnx_operator = "linear", 0, "Gemm"
    float_type, float_function, float_attributes = nn.Linear, F.linear, ("in_features", "out_features", "bias")

    def __init__(self, in_features: int, out_features: int, bias: bool = True, *, config: LayerConfig | None = None):
        super().__init__((out_features, in_features), bias, self._layer_config(config))
        self.in_features, self.out_features = in_features, out_features

    @classmethod
    def float_input_shape(cls, layer: Any, extra: int) -> tuple[int, ...]:
        return 2, layer.in_features

    def forward(self, x: Tensor) -> Tensor:
        """Return the output ``(..., out_features)`` in the dtype of ``x``."""
        if x.shape[-1] != self.in_features:
            raise ValueError(f"DSLinear: expected input (..., {self.in_features}), got {tuple(x.shape)}")
        return self._run(x, self.operation)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self._settings_repr()}"
