"""Arithmetic of DSConv in plain PyTorch: its single definition, against which everything else is checked."""

from dsconv.names import ACTIVATION_SIGNS, WEIGHT_RULES, WEIGHT_SCALES, ActivationSign, WeightRule, WeightScale
from dsconv.numerics.activations import (
    NONFINITE,
    SMALLEST,
    check_activation,
    dequantize_activation,
    fake_quantize_activation,
    quantize_activation,
)
from dsconv.numerics.measures import sqnr_db
from dsconv.numerics.packing import pack, packed_bytes, unpack
from dsconv.numerics.reference import Reference, reference_conv
from dsconv.numerics.weights import (
    InputMoments,
    QuantizedWeight,
    block_count,
    check_bits,
    check_block_size,
    dequantize_weight,
    quantize_weight,
    quantize_weight_shifted,
)
from dsconv.numerics.winograd import (
    WinogradWeight,
    dequantize_winograd_weight,
    fake_winograd_weight,
    quantize_winograd_input,
    reference_winograd,
    winograd_conv,
    winograd_input,
    winograd_output,
    winograd_shift,
    winograd_weight,
)

__all__ = [
    "ACTIVATION_SIGNS",
    "NONFINITE",
    "SMALLEST",
    "WEIGHT_RULES",
    "WEIGHT_SCALES",
    "ActivationSign",
    "InputMoments",
    "QuantizedWeight",
    "Reference",
    "WeightRule",
    "WeightScale",
    "WinogradWeight",
    "block_count",
    "check_activation",
    "check_bits",
    "check_block_size",
    "dequantize_activation",
    "dequantize_weight",
    "dequantize_winograd_weight",
    "fake_quantize_activation",
    "fake_winograd_weight",
    "pack",
    "packed_bytes",
    "quantize_activation",
    "quantize_weight",
    "quantize_weight_shifted",
    "quantize_winograd_input",
    "reference_conv",
    "reference_winograd",
    "sqnr_db",
    "unpack",
    "winograd_conv",
    "winograd_input",
    "winograd_output",
    "winograd_shift",
    "winograd_weight",
]
