"""The operators, and which backend executes them.

There is one backend so far: ``simulate``, the float simulation. It rounds weights and activations exactly as the
integers would be and multiplies them in float32, so that accuracy is the real one and speed is not.
"""

from dsconv.ops.simulate import conv, conv_transpose, linear, transposed_layout

SIMULATION = "float simulation"

__all__ = ["SIMULATION", "conv", "conv_transpose", "linear", "transposed_layout"]
