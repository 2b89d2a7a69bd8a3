"""PReLU: a leaky ReLU whose slopes are a tensor of the model, one for all channels or one for each."""

from torch import fx

from dsconv.compilation.operators.map import Operation, mapped
from dsconv.compilation.operators.operator import Constant, Lowering, Settings, Step, fixed, register


def _prelu(node: fx.Node, constant: Constant) -> Settings | None:
    slopes = constant(node.args[1])
    if slopes is None or not slopes.numel() or not bool((slopes == slopes.flatten()[0]).all()):
        return None  # a layer has one slope for all channels
    return {"activation": "leaky_relu", "alpha": slopes.flatten()[0].item()}


def _alone(lowering: Lowering, node: fx.Node) -> Step | None:
    source, slopes = lowering.value(node.args[0]), lowering.constant(node.args[1])
    if source is None or slopes is None or lowering.channel_dim(node.args[0]) != 1:
        return None
    slopes = fixed(slopes).expand(source.size[0]).contiguous()
    return mapped(lowering, node, source, Operation("slope", "prelu", constants=slopes))


register("aten", "prelu", returns="new", rounds="alike", by_image=True, activation=_prelu, lower=_alone)
