"""Folding of each BatchNorm that follows a quantized layer into the KDS and the bias of that layer."""

import copy
from collections import OrderedDict, defaultdict
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from dsconv.conversion.convert import swapped
from dsconv.conversion.copying import copied, replaced
from dsconv.conversion.info import info_of
from dsconv.conversion.quantized import add_bias, check_inference
from dsconv.conversion.tracing import Traced, line_of, reason_of
from dsconv.conversion.wrappers import unwrapped
from dsconv.errors import ModelError
from dsconv.layers import Affine, DSLayer
from dsconv.layers.kinds import KINDS, kind_of

_BATCHNORM_TYPES = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class _Folded(NamedTuple):
    """Contents of a layer after folding a BatchNorm into it, all in float32."""

    kds: Tensor
    kds_shift: Tensor | None
    bias: Tensor


def fold_batchnorm(qmodel: nn.Module) -> nn.Module:
    """Return a copy of a quantized model, for inference, with BatchNorm folded into the quantized layers before it.

    With ``f = gamma / sqrt(running_var + eps)`` per output channel, a layer's KDS (and its shift) become ``KDS f``, and
    its bias ``beta + (bias - running_mean) f``: computed in float64, stored in float32. VQK and the rounding of
    activations are unchanged, so that a layer's output differs by float32 rounding alone; within a network this can
    change a mantissa of a later layer, as can the difference between kernels and simulation. The BatchNorm becomes
    ``nn.Identity``. A layer with 16-bit KDS takes more memory than before.

    A ``BatchNorm1d``, ``2d`` or ``3d`` in eval mode with running statistics is folded if it reads the output of one
    layer of :mod:`dsconv.nn` that nothing else reads, whether that layer is called once or, always together with the
    BatchNorm, several times. If a subclass continues with modules of its own, like timm's ``BatchNormAct2d``, these are
    kept. Any other BatchNorm with running statistics is replaced by a :class:`dsconv.nn.Affine`.
    ``model_info(result).folded`` maps the name of each folded BatchNorm to that of its layer, ``.not_folded`` maps the
    name of each unfolded one to the reason, and ``.affine`` lists the names of those that became an ``Affine``. Files
    store the first and the last; :func:`dsconv.load` takes the original float model. ``weight_sqnr_db`` still describes
    the quantization.

    The graph is traced by :mod:`torch.fx`, which calls ``forward`` on symbols, for its first argument and those without
    a default. A ``DSLinear`` before a BatchNorm is assumed to read ``(N, in_features)``, a ``DSConv1d`` ``(N, C, L)``.

    Args:
        qmodel: from :func:`dsconv.quantize` or :func:`dsconv.load`, or any model with quantized layers, in eval mode.
            It is unchanged.

    Returns:
        A model whose other modules have the same classes.

    Raises:
        ModelError: the model has no quantized layer, is in training mode, or cannot be traced by ``torch.fx``.

    Source: Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
    Inference", CVPR 2018, section 3.2, with the factor applied to KDS instead of weights.

    >>> import dsconv
    >>> from dsconv.conversion import model_info
    >>> net = nn.Sequential(nn.Conv2d(3, 32, 3, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.BatchNorm2d(32)).eval()
    >>> qnet = dsconv.quantize(net)
    >>> folded = dsconv.fold_batchnorm(qnet)
    >>> folded[1], folded[0].bias.shape
    (Identity(), torch.Size([32]))
    >>> model_info(folded).folded, model_info(folded).not_folded
    ({'1': '0'}, {'3': 'it reads 2 (ReLU), which is not a quantized layer'})
    >>> x = torch.randn(1, 3, 8, 8)
    >>> with torch.inference_mode():
    ...     torch.allclose(folded(x), qnet(x), atol=1e-5)
    True
    """
    qmodel = unwrapped(qmodel)
    check_inference(qmodel, "folding")
    names = {module: name for name, module in qmodel.named_modules()}
    batchnorms = [module for module in names if isinstance(module, _BatchNorm)]
    uses = _uses(qmodel, names) if batchnorms else None
    folds: dict[_BatchNorm, tuple[DSLayer, _Folded]] = {}
    affine: dict[_BatchNorm, Affine] = {}
    not_folded: dict[str, str] = {}
    for batchnorm in batchnorms:
        assert uses is not None
        layer, reason = uses.layer_for(batchnorm)
        folded = None if layer is None else _folded(layer, batchnorm)
        if layer is not None and folded is not None:
            folds[batchnorm] = layer, folded
        else:
            not_folded[names[batchnorm]] = reason or "folding it gives values that are not finite in float32"
            if uses.is_plain(batchnorm):
                made = Affine.from_batchnorm(batchnorm)
                if made.scale.isfinite().all() and made.shift.isfinite().all():
                    affine[batchnorm] = made
    before = copy.deepcopy(info_of(qmodel))
    now = {names[batchnorm]: names[layer] for batchnorm, (layer, _) in folds.items()}
    became = (*before.affine, *(names[batchnorm] for batchnorm in affine))
    info = replace(before, folded=before.folded | now, affine=became, not_folded=not_folded)
    swaps: dict[nn.Module, nn.Module] = {batchnorm: after_normalizing(batchnorm) for batchnorm in folds}
    result = swapped(qmodel, swaps | affine, info)
    for batchnorm, (layer, folded) in folds.items():
        taking = result.get_submodule(names[layer])
        assert isinstance(taking, DSLayer)
        taking.config = taking.config.model_copy(update={"kds_dtype": "float32"})
        taking.kds, taking.kds_shift = folded.kds, folded.kds_shift
        add_bias(taking, batchnorm.bias)
        taking.bias = nn.Parameter(folded.bias, requires_grad=taking.bias is not None and taking.bias.requires_grad)
        taking.pack_()
    return result


@torch.no_grad()
def _folded(layer: DSLayer, batchnorm: _BatchNorm) -> _Folded | None:
    """Return None if the result is not finite in float32."""

    # On the CPU, since not every device supports float64.
    def exact(value: Tensor | None, missing: float = 0.0) -> Tensor:
        if value is None:
            return torch.tensor(missing, dtype=torch.float64, device="cpu")
        return value.to("cpu", torch.float64)

    factor = exact(batchnorm.weight, 1.0) / (exact(batchnorm.running_var) + batchnorm.eps).sqrt()
    bias = exact(batchnorm.bias) + (exact(layer.bias) - exact(batchnorm.running_mean)) * factor
    scales = [
        None if value is None else exact(value) * factor.view(-1, *[1] * (value.dim() - 1))
        for value in (layer.kds, layer.kds_shift)
    ]
    kds, shift, bias_32 = (None if v is None else v.to(layer.kds.device, torch.float32) for v in (*scales, bias))
    assert kds is not None
    assert bias_32 is not None
    finite = all(bool(v.isfinite().all()) for v in (kds, shift, bias_32) if v is not None)
    return _Folded(kds, shift, bias_32) if finite else None


class _Uses:
    """Call sites and inputs of the modules of a model, and modules whose tensors are read without a call."""

    def __init__(self, graph: fx.Graph, names: Mapping[nn.Module, str], read: set[int]):
        self.names, self.read = names, read
        modules = {name: module for module, name in names.items()}
        self.module_of = {node: modules[str(node.target)] for node in graph.nodes if node.op == "call_module"}
        self.calls: dict[nn.Module, list[fx.Node]] = defaultdict(list)
        for node, module in self.module_of.items():
            self.calls[module].append(node)

    def layer_for(self, batchnorm: _BatchNorm) -> tuple[DSLayer | None, str]:
        """Return the layer that ``batchnorm`` can be folded into, or None and the reason."""
        kind, calls = type(batchnorm).__name__, self.calls[batchnorm]
        if not _is_one_of(batchnorm, _BATCHNORM_TYPES) and not _goes_on(batchnorm):
            return None, f"its class {kind} is not known to be a plain BatchNorm"
        if batchnorm.training:
            return None, "it is in training mode"
        if batchnorm.running_mean is None or batchnorm.running_var is None:
            return None, "it has no running statistics"
        if not calls:
            return None, "forward does not call it"
        inputs = [node for call in calls for node in call.all_input_nodes]
        others = [node for node in inputs if not isinstance(self.module_of.get(node), DSLayer)]
        if others:
            return None, f"it reads {self._describe(others[0])}, which is not a quantized layer"
        layers = {self.module_of[node] for node in inputs}
        if len(layers) != 1:
            return None, f"it reads several layers: {', '.join(sorted(self.names[layer] for layer in layers))}"
        (layer,) = layers
        assert isinstance(layer, DSLayer)
        name = self.names[layer]
        readers = [node for call in self.calls[layer] for node in call.users if node not in calls]
        if readers:
            return None, f"the output of {name} is also read by {self._describe(readers[0])}"
        fits = isinstance(batchnorm, _BATCHNORM_TYPES[max(layer.dims, 1) - 1])
        if not _is_one_of(layer, KINDS.values()) or not fits or batchnorm.num_features != len(layer.vqk):
            fed = f"{name}, a {type(layer).__name__} of {len(layer.vqk)}"
            return None, f"a {kind} of {batchnorm.num_features} channels does not belong to the output of {fed}"
        if layer._forward_hooks or batchnorm._forward_hooks or batchnorm._forward_pre_hooks:
            return None, f"a hook reads the tensor between {name} and it"
        for module in (layer, batchnorm):
            if any(id(t) in self.read for t in (*module.parameters(), *module.buffers())):
                return None, f"forward reads the tensors of {self.names[module]} directly"
        return layer, ""

    def is_plain(self, batchnorm: _BatchNorm) -> bool:
        """Return whether it may become an :class:`Affine`: its values are fixed and nothing else reads them."""
        known = _is_one_of(batchnorm, _BATCHNORM_TYPES) and not batchnorm.training
        numbers = batchnorm.running_mean is not None and batchnorm.running_var is not None
        read = any(id(t) in self.read for t in (*batchnorm.parameters(), *batchnorm.buffers()))
        return known and numbers and bool(self.calls[batchnorm]) and not read

    def _describe(self, node: fx.Node) -> str:
        if node in self.module_of:
            return f"{node.target} ({type(self.module_of[node]).__name__})"
        if node.op == "output":
            return "the caller of the model"
        return str(getattr(node.target, "__name__", node.target))


def _is_one_of(module: nn.Module, types: Collection[type[nn.Module]]) -> bool:
    """Return whether its forward is that of one of ``types``; a subclass may define its own."""
    return type(module) in types and replaced(module) is None


def after_normalizing(batchnorm: _BatchNorm) -> nn.Module:
    """Return the remainder of a BatchNorm after folding: ``nn.Identity``, or copies of its own modules in sequence."""
    parts = OrderedDict((name, copied(part)) for name, part in batchnorm.named_children())
    return (nn.Sequential(parts) if parts else nn.Identity()).train(batchnorm.training)


def normalized_by(batchnorm: nn.Module) -> nn.Module:
    """Return the module whose output is the normalized tensor of ``batchnorm``; see :func:`_goes_on`."""
    return next(batchnorm.children(), batchnorm)


@torch.no_grad()
def _goes_on(batchnorm: _BatchNorm) -> bool:
    """Return whether it is a BatchNorm in eval mode followed by its own modules, the first of which is an identity.

    It is run on random numbers to determine this.
    """
    dims = next((dims for dims, kind in enumerate(_BATCHNORM_TYPES, 1) if isinstance(batchnorm, kind)), None)
    first = next(batchnorm.children(), None)
    if dims is None or type(first) is not nn.Identity or batchnorm.training or batchnorm.running_mean is None:
        return False
    generator = torch.Generator().manual_seed(0)
    shape = (2, batchnorm.num_features, *[3] * dims)
    x = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(batchnorm.running_mean)
    try:
        probed = copied(batchnorm, isolate=True)
        y = probed(x.clone())
        known = probed.running_mean, probed.running_var, probed.weight, probed.bias
        return torch.equal(after_normalizing(probed)(F.batch_norm(x, *known, eps=probed.eps)), y)
    except Exception:  # it may raise anything for random numbers
        return False


def _uses(qmodel: nn.Module, names: Mapping[nn.Module, str]) -> _Uses:
    kind = type(qmodel).__name__
    # Graphs, such as those of ONNX files, may call functions that cannot be traced.
    graphs = [module.graph for module in names if isinstance(module, fx.GraphModule)]
    called = {node.target for graph in graphs for node in graph.nodes if node.op == "call_function"}
    try:
        found = Traced(qmodel, _is_called, called)
    except Exception as error:
        if replaced(qmodel):
            raise ModelError(
                f"model {kind}: the forward of its class was replaced, and torch.fx cannot trace the replacement"
                f"{line_of(error)}: fold the model before the replacement"
            ) from error
        raise ModelError(
            f"model {kind}: torch.fx cannot trace its forward{line_of(error)} ({reason_of(error)}), so the consumers "
            "of each layer are unknown: move branches that depend on tensors out of it or into a function "
            "marked by torch.fx.wrap, or fold parts: model.part = dsconv.fold_batchnorm(model.part)"
        ) from error
    return _Uses(found.graph, names, found.read)


def _is_called(module: nn.Module, name: str) -> bool:
    known = isinstance(module, DSLayer | _BatchNorm) or kind_of(module) is not None
    return known or fx.Tracer().is_leaf_module(module, name)
