"""Convolution and linear functions that a module calls, found by :mod:`torch.fx` and converted to layers."""

import operator
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from dsconv.conversion.copying import copied, is_of_torch, is_torch_class, replaced
from dsconv.conversion.hooks import WEIGHT_HOOKS, names_of
from dsconv.conversion.plain import computed_weight, plain_layer
from dsconv.conversion.tracing import Traced, line_of, reason_of
from dsconv.conversion.wrappers import unwrapped
from dsconv.layers import DSLayer
from dsconv.layers.kinds import KINDS, kind_of
from dsconv.layers.stand_in import StandIn, arguments

# Properties of a tensor that do not depend on its values.
_FACTS = ("shape", "dtype", "device", "ndim", "size", "dim", "numel", "is_floating_point", "requires_grad")
_RANDOM = re.compile(r"(bernoulli|multinomial|normal|poisson)_?|.*dropout.*|rand.*")


@dataclass(frozen=True)
class FunctionInFloat:
    """Convolution or linear function that stays in float.

    Attributes:
        name: name of the module that calls it.
        kind: class of that module.
        parameters: names, in the model, of the parameters from which its weight is computed.
        reason: the call, its place, and the reason why it stays in float.
    """

    name: str
    kind: str
    parameters: tuple[str, ...]
    reason: str


def as_layers(
    model: nn.Module, keep: Callable[[str], bool] = lambda name: False
) -> tuple[nn.Module, list[FunctionInFloat]]:
    """Return ``model`` with layers in place of the convolution and linear functions that it calls.

    A module that calls ``F.conv2d(x, self.weight)`` gets a ``torch.nn.Conv2d`` named ``conv2d_weight`` and keeps its
    forward: the parameter from which the weight is computed becomes a :class:`dsconv.layers.stand_in.StandIn`, with
    which the function calls the layer. A weight computed from parameters and constants alone is computed here, once,
    and becomes the weight of the layer; so does the bias.

    Args:
        model: a float or quantized network. It is unchanged.
        keep: returns, for the name of a module or parameter, whether it must stay unchanged.

    Returns:
        A copy that shares all tensors with ``model``, or ``model`` itself if there is nothing to replace; and the
        functions that stay.

    >>> from torch.nn import functional as F
    >>> class Scaled(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.weight, self.gain = nn.Parameter(torch.randn(8, 4, 3, 3)), 0.5
    ...     def forward(self, x):
    ...         return F.conv2d(x, self.weight * self.gain, padding=1)
    >>> net = Scaled()
    >>> made, in_float = as_layers(net)
    >>> made.conv2d_weight, in_float
    (Conv2d(4, 8, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), bias=False), [])
    >>> x = torch.randn(1, 4, 8, 8)
    >>> made(x).equal(net(x)), made.conv2d_weight.weight.equal(net.weight * 0.5)
    (True, True)
    """
    model = unwrapped(model)
    # Callers reject an argument that is not a network.
    if not isinstance(model, nn.Module) or not any(calls_functions(module) for module in model.modules()):
        return model, []
    shared = [*model.parameters(), *model.buffers(), *(m for m in model.modules() if isinstance(m, DSLayer))]
    result = copied(model, {id(part): part for part in shared})
    in_float: list[FunctionInFloat] = []
    changed = False
    for name, module in list(result.named_modules()):
        if calls_functions(module) and not keep(name) and not _is_plain(module):
            refused, groups = _functions(name, module)
            in_float += refused
            computed = [path for path, _ in module.named_parameters() if _is_computed_from(path)]
            for group in groups:
                if not any(keep(f"{name}.{path}".lstrip(".")) for path in (*group.taken, *computed)):
                    _resolve(module)
                    group.put_into(module)
                    changed = True
    return (result if changed else model), in_float


def calls_functions(module: nn.Module) -> bool:
    """Return whether the code of ``module`` names a layer function, as far as static analysis can determine."""
    if isinstance(module, fx.GraphModule):
        return any(node.op == "call_function" and node.target in _kinds() for node in module.graph.nodes)
    return _names_functions(type(module).__mro__)


@cache
def _names_functions(bases: tuple[type, ...]) -> bool:
    functions: dict[int, FunctionType] = {}
    known = list(_kinds())
    for base in bases:
        if not is_torch_class(base):
            methods = [getattr(value, "fget", value) for value in vars(base).values()]
            functions |= {id(value): value for value in methods if isinstance(value, FunctionType)}
    work = list(functions.values())
    while work:
        function = work.pop()
        names = set(names_of(function.__code__))
        if "torch.nn.functional" in names:  # imported there
            return True
        for value in _reached(function, names):
            if any(value is one for one in known):
                return True
            if isinstance(value, FunctionType) and not is_of_torch(value) and id(value) not in functions:
                functions[id(value)] = value
                work.append(value)
    return False


def _reached(function: FunctionType, names: set[str]) -> Iterator[Any]:
    """Yield values of global variables that a function names, and attributes of modules among them."""
    work: list[Any] = [function.__globals__.get(name) for name in names]
    modules: set[ModuleType] = set()
    while work:
        value = work.pop()
        yield value
        if isinstance(value, ModuleType) and value.__name__.partition(".")[0] == "torch" and value not in modules:
            modules.add(value)
            work += [vars(value).get(name) for name in names]


def _kinds() -> dict[Any, type[DSLayer]]:
    return {kind.float_function: kind for kind in KINDS.values() if is_torch_class(kind.float_type)}


def _is_plain(module: nn.Module) -> bool:
    """Return whether it is a layer that is quantized as a whole."""
    kind = kind_of(module)
    return kind is not None and plain_layer(module, kind).weight is not None


@dataclass
class _Call:
    """A function call, and the nodes from which its weight and bias are computed."""

    node: fx.Node
    kind: type[DSLayer]
    given: dict[str, Any]
    weight: Any
    bias: Any


@dataclass
class _Group:
    """Calls that belong to one layer, with the parameters and buffers that the layer replaces."""

    calls: list[_Call]
    main: str
    taken: list[str] = field(default_factory=list)
    operations: frozenset[str] = frozenset()
    values: tuple[Tensor, Tensor | None] | None = None

    def put_into(self, module: nn.Module) -> None:
        """Add it as a layer of ``module``."""
        call = self.calls[0]
        assert self.values is not None
        weight, bias = self.values
        layer = _layer(call.kind, weight, bias, call.given).train(module.training)
        name = f"{call.kind.float_function.__name__}_{self.main.replace('.', '_')}"
        while hasattr(module, name):
            name += "_"
        module.add_module(name, layer)
        for path in self.taken:
            owner_name, _, own = path.rpartition(".")
            owner = module.get_submodule(owner_name)
            value = owner._parameters.pop(own)
            assert value is not None
            like = torch.empty_like(value, device="meta", requires_grad=False)
            geometry = {key: value for key, value in call.given.items() if key not in ("input", "weight", "bias")}
            vars(owner)[own] = StandIn(layer, call.kind.float_function, geometry, like, self.operations)


def _layer(kind: type[DSLayer], weight: Tensor, bias: Tensor | None, given: dict[str, Any]) -> Any:
    make: Any = kind.float_type
    groups = given.get("groups", 1)
    channels = (weight.shape[1] * groups, weight.shape[0])
    if kind.transposed:
        channels = (weight.shape[0], weight.shape[1] * groups)
    names = ("stride", "padding", "output_padding", "dilation", "groups")
    geometry: dict[str, Any] = {name: given[name] for name in names if name in given}
    if kind.dims:
        geometry["kernel_size"] = tuple(weight.shape[2:])
    layer = make(*channels, **geometry, bias=False, device="meta", dtype=weight.dtype)
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None and not isinstance(value, nn.Parameter):
            value = nn.Parameter(value.detach(), requires_grad=False)
        setattr(layer, name, value)
    return layer


def _functions(name: str, module: nn.Module) -> tuple[list[FunctionInFloat], list[_Group]]:
    """Return the functions that a module calls: those that stay in float, and those that can become layers."""
    kind = type(module).__name__

    def refused(parameters: Iterable[str], reason: str) -> FunctionInFloat:
        return FunctionInFloat(name, kind, tuple(f"{name}.{p}".lstrip(".") for p in parameters), reason)

    own = [path for path, value in module.named_parameters() if _is_own(module, path) and value.dim() > 1]
    if method := replaced(module):
        return [refused(own, f"its {method} was replaced by another one, whose functions are not seen")], []
    try:
        twin = copied(module, {id(t): t for t in (*module.parameters(), *module.buffers())}, isolate=True)
        _resolve(twin)
        traced = Traced(twin, lambda *_: True)
    except Exception as error:  # it may raise anything for symbols
        if not own:
            return [], []
        why = f"torch.fx cannot trace its forward{line_of(error)} ({reason_of(error)}), so its functions are not known"
        return [refused(own, why)], []
    graph = _Graph(traced)
    groups: dict[str, _Group] = {}
    found: list[FunctionInFloat] = []
    for call in graph.calls():
        parameters, reason = graph.why_float(call)
        if reason:
            place = f"{call.kind.float_function.__name__} at {call.node.meta['place']}"
            found.append(refused(parameters, f"{kind} calls {place}, and {reason}"))
            continue
        main = max(parameters, key=lambda path: graph.tensor(path).numel())
        groups.setdefault(main, _Group([], main)).calls.append(call)
    for group in list(groups.values()):
        if reason := graph.why_not_one(group):
            del groups[group.main]
            place = f"{group.calls[0].kind.float_function.__name__} at {group.calls[0].node.meta['place']}"
            found.append(refused([group.main], f"{kind} calls {place}, and {reason}"))
    return found, list(groups.values())


def _is_own(module: nn.Module, path: str) -> bool:
    """Return whether a parameter belongs to the module, or to a list or dictionary of parameters in it."""
    owner = module.get_submodule(path.rpartition(".")[0])
    return owner is module or isinstance(owner, nn.ParameterList | nn.ParameterDict)


class _Graph:
    """Graph of a module that separates values of parameters and constants alone from values of the input."""

    def __init__(self, traced: Traced):
        self.root: Any = traced.root
        self.nodes = list(traced.graph.nodes)
        # Names of the tensors from which alone each node is computed; None if it depends on the input.
        self.made_of: dict[fx.Node, frozenset[str] | None] = {}
        for node in self.nodes:
            sources = [self.made_of[source] for source in node.all_input_nodes]
            computed = node.op in ("call_function", "call_method") and not _RANDOM.fullmatch(_name(node))
            self.made_of[node] = None
            if node.op == "get_attr":
                self.made_of[node] = frozenset({str(node.target)})
            elif computed and _is_fact(node) and None not in sources:
                self.made_of[node] = frozenset()
            elif computed and None not in sources:
                self.made_of[node] = frozenset[str]().union(*(source for source in sources if source is not None))

    def tensor(self, path: str) -> Any:
        """Return the tensor of a ``get_attr`` node."""
        return operator.attrgetter(path)(self.root)

    def calls(self) -> Iterator[_Call]:
        """Yield calls of layer functions whose input depends on the module's input."""
        for node in self.nodes:
            kind = _kinds().get(node.target) if node.op == "call_function" else None
            if kind is not None and self.made_of[node] is None:
                given = arguments(kind.float_function, node.args, node.kwargs)
                yield _Call(node, kind, given, given.get("weight"), given.get("bias"))

    def why_float(self, call: _Call) -> tuple[list[str], str]:
        """Return the parameters from which the weight of a call is computed, and why it must stay in float, if so."""
        if not isinstance(call.weight, fx.Node):
            return [], "its weight is a fixed tensor, not a parameter"
        sources = self._sources(call.weight)
        parameters = [path for path in sources if isinstance(self.tensor(path), nn.Parameter)]
        made_of = self.made_of[call.weight]
        if made_of is None:
            return parameters, "its weight depends on the input, or on chance"
        if not parameters:
            return [], "its weight is a fixed tensor, not a parameter"
        if others := [path for path in parameters if not _is_own(self.root, path)]:
            return parameters, f"its weight is computed from {others[0]}, which is a parameter of another module"
        rest = {key: value for key, value in call.given.items() if key not in ("input", "weight", "bias")}
        if any(isinstance(value, fx.Node) for value in torch.utils._pytree.tree_leaves(list(rest.values()))):
            return parameters, "its padding or another size depends on the input"
        if isinstance(call.bias, fx.Node) and self.made_of[call.bias] is None:
            return parameters, "its bias depends on the input"
        return parameters, ""

    def why_not_one(self, group: _Group) -> str:
        """Return why the calls of a group cannot become one layer; otherwise set the group's layer parameters."""
        expression = {part for call in group.calls for node in (call.weight, call.bias) for part in self._parts(node)}
        uses = {call.node for call in group.calls}
        leaked: set[str] = set()
        for node in self.nodes:
            made_of = self.made_of[node]
            if made_of and not all(user in uses or user in expression or _is_fact(user) for user in node.users):
                leaked |= made_of
        taken = {str(node.target) for node in expression if node.op == "get_attr"} - leaked
        group.taken = sorted(
            path for path in taken if isinstance(self.tensor(path), nn.Parameter) and _is_own(self.root, path)
        )
        if group.main not in group.taken:
            return f"its parameter {group.main!r} is used for something else, too"
        first, *others = group.calls
        try:
            with torch.no_grad():
                group.values = self.value(first.weight), self.value(first.bias)
                for call in others:
                    rest = {k: v for k, v in call.given.items() if k not in ("input", "weight", "bias")}
                    values = self.value(call.weight), self.value(call.bias)
                    alike = all(_equal(a, b) for a, b in zip(values, group.values, strict=True))
                    if call.kind is not first.kind or not alike or any(first.given[k] != v for k, v in rest.items()):
                        return f"it is called with {group.main!r} in different ways"
        except Exception as error:
            return f"its weight cannot be computed ({reason_of(error)})"
        weight = group.values[0]
        if not isinstance(weight, Tensor) or weight.dim() != (first.kind.dims + 2 if first.kind.dims else 2):
            return "its weight has an unusual shape"
        group.operations = frozenset(_name(node) for node in expression)
        return ""

    def value(self, node: Any) -> Any:
        """Return the value of a node computed from constants."""
        if not isinstance(node, fx.Node):
            return node
        if node.op == "get_attr":
            return self.tensor(str(node.target))
        args, kwargs = fx.map_arg((node.args, node.kwargs), self.value)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        function: Any = node.target
        return function(*args, **kwargs)

    def _parts(self, node: Any) -> set[fx.Node]:
        """Return a node and all nodes from which it is computed."""
        found: set[fx.Node] = set()
        work = [node] if isinstance(node, fx.Node) else []
        while work:
            if (part := work.pop()) not in found:
                found.add(part)
                work += part.all_input_nodes
        return found

    def _sources(self, node: fx.Node) -> list[str]:
        return sorted({str(part.target) for part in self._parts(node) if part.op == "get_attr"})


def _name(node: fx.Node) -> str:
    return str(getattr(node.target, "__name__", node.target))


def _is_fact(node: fx.Node) -> bool:
    """Return whether a node reads no value of a tensor."""
    return (str(node.args[1]) if node.target is getattr else _name(node)) in _FACTS


def _equal(a: Any, b: Any) -> bool:
    return a is b or (isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a, b))


@torch.no_grad()
def _resolve(module: nn.Module) -> None:
    """Permanently convert what parametrizations and PyTorch's hooks compute for ``module`` to a parameter of it."""
    if parametrize.is_parametrized(module):
        parts: Any = module.parametrizations
        training = parts.training
        parts.eval()
        values = {name: getattr(module, name).detach() for name in parts}
        parts.train(training)
        module.__class__ = type(module).__mro__[1]
        del module._modules["parametrizations"]
        for name, value in values.items():
            module.register_parameter(name, nn.Parameter(value, requires_grad=False))
    for key, hook in list(module._forward_pre_hooks.items()):
        if isinstance(hook, WEIGHT_HOOKS) and (value := computed_weight(module)) is not None:
            del module._forward_pre_hooks[key]
            vars(module).pop("weight", None)
            for kind in (module._parameters, module._buffers):
                for name in [name for name in kind if name in ("weight", *(f"weight_{end}" for end in _HOOKED))]:
                    del kind[name]
            module.register_parameter("weight", nn.Parameter(value.detach(), requires_grad=False))


def _is_computed_from(path: str) -> bool:
    """Return whether a parametrization or hook computes the weight from this parameter."""
    return path.startswith("parametrizations.") or path in [f"weight_{end}" for end in _HOOKED]


_HOOKED = ("g", "v", "u", "orig", "mask")
