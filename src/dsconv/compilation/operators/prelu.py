"""PReLU: a leaky ReLU whose slope is a tensor of the model."""

from torch import fx

from dsconv.compilation.operators.activations import alone
from dsconv.compilation.operators.operator import Constant, Settings, register


def _prelu(node: fx.Node, constant: Constant) -> Settings | None:
    slopes = constant(node.args[1])
    if slopes is None or not slopes.numel() or not bool((slopes == slopes.flatten()[0]).all()):
        return None  # a layer has one slope for all channels
    return {"activation": "leaky_relu", "slope": slopes.flatten()[0].item()}


register("aten", "prelu", returns="new", rounds="alike", by_image=True, activation=_prelu, lower=alone)
