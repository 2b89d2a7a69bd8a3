"""Base class of quantized layers: VQK, KDS, bias, settings, and backend."""

import warnings
from collections.abc import Callable
from functools import cache
from itertools import chain
from operator import is_
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dsconv import backends, ops
from dsconv.config import LayerConfig, LayerKind, QuantConfig, as_config
from dsconv.errors import ConfigError
from dsconv.layers.algorithm import MOST_NOISE_DB, added_noise_db, noise_like
from dsconv.layers.readonly import ReadOnly
from dsconv.names import Algorithm
from dsconv.numerics import (
    InputMoments,
    block_count,
    dequantize_weight,
    quantize_weight,
    quantize_weight_shifted,
    sqnr_db,
)
from dsconv.threads import PyTorchOnOneThread

# Not available in PyTorch 2.6.
_is_exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", lambda: False)


class KernelWeights(NamedTuple):
    """Weights of a layer as packed by a backend.

    ``made_of`` are the buffers and the config that these were made from, ``versions`` the versions of the buffers then.
    """

    backend: backends.Backend
    packed: Any
    made_of: tuple[Tensor | LayerConfig | None, ...]
    versions: tuple[int, ...]


class DSLayer(nn.Module):
    """Base class of the quantized layers.

    A layer is executed in integers (:mod:`dsconv.backends`) if the following hold, and simulated in float otherwise:

    - a backend for its device supports it (:attr:`backend` gives the reason if none does);
    - its input is float32, float16 or bfloat16 on that device; the output has the same dtype;
    - no gradient is required: gradients are disabled (``torch.inference_mode``), or neither input nor bias requires
      one. ``torch.export`` of a layer in eval mode requires none;
    - :func:`dsconv.ops.simulated` is not active.

    The backend reads a packed copy of the weights, which is not part of the state. It is updated when the buffers are
    loaded, moved, replaced or changed in place; so is the transformed float32 weight that the simulation of a Winograd
    layer keeps after its first use. ``torch.compile`` and ``torch.export`` use the existing copy: call :meth:`pack_`
    after replacing or changing buffers by hand.

    Attributes:
        vqk: int8 buffer ``(O, C/groups, *K)``, the variable quantized kernel.
        kds: buffer of ``config.kds_dtype``, the kernel distribution shift: ``(O, CB, *K)`` for blocks per tap,
            ``(O, CB)`` for flattened blocks. Keeps its dtype when the layer is cast, since a narrower dtype would
            change the weights.
        kds_shift: like ``kds``, or None without a shift.
        bias: parameter ``(O,)`` or None.
        weight_like: parameter ``(0,)`` with the dtype and device of a float weight, for models that query their
            parameters or :attr:`weight` for these. It is not part of the state.
        config: the settings of this layer.
        algorithms: valid values of ``config.algorithm``.
        weight_sqnr_db: ``10 log10(sum w^2 / sum (w - w_q)^2)`` of the weight it was made from, None if unknown.
    """

    # Other packages read the properties of a kind of layer from these; dsconv.layers.kinds lists the kinds.
    kind: ClassVar[LayerKind] = "conv"
    float_type: ClassVar[type[nn.Module]]
    # The function that the float layer calls, and the methods that its call runs.
    float_function: ClassVar[Callable[..., Tensor]]
    plain_call: ClassVar[dict[str, Any]]
    # Attributes of the float layer that are the positional arguments of the quantized one.
    float_attributes: ClassVar[tuple[str, ...]]
    # Number of spatial dimensions of the kernel; 0 is a linear layer, whose channels are the last dimension.
    dims: ClassVar[int]
    transposed: ClassVar[bool] = False
    onnx_operator: ClassVar[str] = "Conv"
    groups: int = 1
    vqk: Tensor
    kds: Tensor
    kds_shift: Tensor | None
    bias: nn.Parameter | None
    weight_like: nn.Parameter
    _kernel_weights: KernelWeights | None = None
    algorithms: tuple[Algorithm, ...] = ("direct",)
    # Weights of the simulation, if they are expensive to compute.
    _simulated_weights: KernelWeights | None = None
    # Whether the algorithm is chosen together with the weight.
    _chooses: bool = False
    # Returns the weight instead of VQK and KDS while these are trained.
    _shadow: Callable[[], Tensor] | None = None

    def __init__(self, vqk_shape: tuple[int, ...], bias: bool, config: LayerConfig, winograd: bool = False):
        super().__init__()
        self.algorithms = ("direct", "winograd") if winograd and config.allows_winograd else ("direct",)
        # Other block sizes have no kernels, so Winograd gains nothing.
        covered = config.block_size % 8 == 0 or vqk_shape[1] <= config.block_size
        self._chooses = config.algorithm == "auto" and "winograd" in self.algorithms and covered
        if config.algorithm == "auto":
            config = config.model_copy(update={"algorithm": "direct"})
        config = config.with_sign(signed=True)
        if config.algorithm == "winograd" and not winograd:
            raise ConfigError(
                "algorithm: winograd is for 3x3 convolutions of stride and dilation 1 and one group, which this "
                f"{type(self).__name__} is not: use 'auto', or 'direct' for this layer"
            )
        self.config = config
        self.weight_sqnr_db: float | None = None
        rows = self.blockwise(torch.zeros(vqk_shape, dtype=torch.int8, device="cpu"))
        kds = torch.zeros(
            (rows.shape[0], block_count(rows.shape[1], config.block_size), *rows.shape[2:]),
            dtype=config.torch_kds_dtype,
            device="cpu",
        )
        self.register_buffer("vqk", torch.zeros(vqk_shape, dtype=torch.int8, device="cpu"))
        self.register_buffer("kds", kds)
        self.register_buffer("kds_shift", kds.clone() if config.weight_shift else None)
        self.weight_like = nn.Parameter(torch.empty(0, dtype=torch.float32, device="cpu"), requires_grad=False)
        zeros = torch.zeros(vqk_shape[0], dtype=torch.float32, device="cpu")
        self.bias = nn.Parameter(zeros) if bias else None

    def blockwise(self, weight: Tensor) -> Tensor:
        """Return ``weight (O, C/groups, *K)`` as the arithmetic uses it: ``(O, C/groups * K)`` for flattened blocks."""
        return weight.flatten(1) if self.config.blocks == "flat" else weight

    def dequantized_weight(self) -> Tensor:
        """Return the float32 weight represented by VQK and KDS, in the layout of the float layer."""
        return self.conv_weight()

    def conv_weight(self) -> Tensor:
        """Return the float32 weight ``(O, C/groups, *K)`` represented by VQK and KDS, in their layout."""
        if self._shadow is not None:
            return self._shadow()
        rows = dequantize_weight(self.blockwise(self.vqk), self.kds, self.config.block_size, self.kds_shift)
        return rows.view(self.vqk.shape)

    @property
    def weight(self) -> Tensor:
        """Copy of :meth:`dequantized_weight` in the dtype of ``weight_like``, for code that inspects the weight.

        To change the weight, call :meth:`quantize_`.

        Raises:
            ModelError: the copy is written, and the change would be lost.
        """
        weight = self.dequantized_weight().to(self.weight_like.dtype)
        # During graph capture, another object represents the tensor.
        captured = torch.compiler.is_compiling() or type(weight) is not Tensor
        return weight if captured else weight.as_subclass(ReadOnly)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            raise AttributeError(
                f"{type(self).__name__}: its weight is computed from vqk and kds and cannot be replaced: call "
                "quantize_(weight) to quantize another one, or set the weight of the float model before quantizing it"
            )
        super().__setattr__(name, value)

    @torch.no_grad()
    def quantize_(self, weight: Tensor, inputs: InputMoments | None = None) -> Self:
        """Set VQK, KDS and shift from a float ``weight`` ``(O, C/groups, *K)``; return the layer. See :meth:`store_`.

        ``inputs`` are the known moments of the layer's inputs, for rule ``balanced``.

        Raises:
            ValueError: the weight contains a NaN or an infinity.
        """
        with PyTorchOnOneThread(always=True):
            if self._chooses:
                self._have_algorithm("direct")
            self.store_(*self.quantized(weight, inputs), weight)
            if self._chooses:
                self.choose_algorithm_(weight, noise_like(inputs, weight.shape[1], weight.device))
        return self

    @torch.no_grad()
    def choose_algorithm_(self, weight: Tensor, x: Tensor) -> None:
        """Choose the algorithm of a layer that has two: Winograd unless it adds more than 1 dB of noise to the output.

        The direct one is chosen if the layer is on a device with kernels for that algorithm only.

        Args:
            weight: the float weight ``(O, C, 3, 3)`` that the layer was made from.
            x: float32 ``(N, C, H, W)``, an input or a substitute for it.
        """
        # The outputs are computed by this layer, so that the weights packed for them are kept.
        if self.config.algorithm != "direct":
            self._have_algorithm("direct")
        other = self.operation._replace(config=self.config.model_copy(update={"algorithm": "winograd"}))
        executes, would_execute = (backends.choose(of, self.vqk.device)[0] for of in (self.operation, other))
        if would_execute is backends.SIMULATION is not executes:
            return
        expected = F.conv2d(x, weight.float(), padding=list(self.operation.padding))
        direct = self._run(x, self.operation, biased=False)
        before = self.config, self._kernel_weights, self._simulated_weights
        self._have_algorithm("winograd")
        winograd = self._run(x, self.operation, biased=False)
        if added_noise_db(expected, direct, winograd) > MOST_NOISE_DB:
            self.config, self._kernel_weights, self._simulated_weights = before
        if not self._is_current(self._kernel_weights):
            self._kernel_weights = self._packed()

    def _have_algorithm(self, name: str) -> None:
        self.config = self.config.model_copy(update={"algorithm": name})

    def quantized(self, weight: Tensor, inputs: InputMoments | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return VQK int8 in the shape of ``weight (O, C/groups, *K)``, and KDS and shift (or None) in float32.

        Raises:
            ValueError: the weight contains a NaN or an infinity.
        """
        config = self.config
        rows = self.blockwise(weight.float())
        if inputs is not None and rows.dim() < weight.dim():  # each tap of a channel
            inputs = InputMoments(*(m.repeat_interleave(weight[0, 0].numel(), 1) for m in inputs))
        given: dict[str, Any] = {"groups": self.groups, "rule": config.weight_rule, "inputs": inputs}
        given["solver"] = ops.solve_balanced
        if config.weight_shift:
            vqk, kds, shift = quantize_weight_shifted(rows, config.weight_bits, config.block_size, **given)
            return vqk.view(weight.shape), kds, shift
        vqk, kds = quantize_weight(rows, config.weight_bits, config.block_size, scale=config.weight_scale, **given)
        return vqk.view(weight.shape), kds, None

    @torch.no_grad()
    def store_(
        self, vqk: Tensor, kds: Tensor, kds_shift: Tensor | None, weight: Tensor, *, keep_size: bool = False
    ) -> Self:
        """Set VQK, KDS and shift that represent the float ``weight``; return the layer.

        KDS that float16 cannot represent, because they overflow or are so small that digits would be lost, are kept in
        float32.

        Args:
            vqk: int8, with as many values as ``weight``.
            kds, kds_shift: float32, in the shape of the buffers.
            weight: ``(O, C/groups, *K)``, for :attr:`weight_sqnr_db`.
            keep_size: keep float16 if it loses digits, but not if it overflows.
        """
        config = self.config
        fits = _within_float16 if keep_size else _fits_float16
        if config.kds_dtype == "float16" and not fits(kds, kds_shift):
            self.config = config = config.model_copy(update={"kds_dtype": "float32"})
        self.vqk = vqk.view(weight.shape)
        self.kds = kds.to(config.torch_kds_dtype)
        self.kds_shift = None if kds_shift is None else kds_shift.to(config.torch_kds_dtype)
        rows, vqk = self.blockwise(weight.float()), self.blockwise(self.vqk)
        signal = noise = 0.0
        # In parts: float64 copies of a large weight would take several times its memory.
        size = max(1, (1 << 17) // max(1, rows[:1].numel()))
        for o in range(0, len(rows), size):
            w, q, scale = rows[o : o + size], vqk[o : o + size], self.kds[o : o + size]
            c = None if self.kds_shift is None else self.kds_shift[o : o + size]
            signal += _energy(w)
            noise += _energy(w - dequantize_weight(q, scale, config.block_size, c))
        self.weight_sqnr_db = sqnr_db(signal, noise)
        return self.pack_()

    @property
    def operation(self) -> backends.Operation:
        """The computation of the layer, in the form that backends read."""
        return backends.Operation(self.vqk.shape, self.config)

    @property
    def given_padding(self) -> Any:
        """Padding of a convolution that a float layer does not support, as pairs or ``same_upper``; else None."""
        return None

    @property
    def backend(self) -> backends.Execution:
        """Backend that executes the layer when no gradient is required, and the reason if it is the simulation."""
        return backends.execution(self.operation, self.vqk.device)

    def pack_(self) -> Self:
        """Recreate the backend's copy of the weights, which is rarely needed (see above); return the layer."""
        self._simulated_weights = None
        self._kernel_weights = self._packed()
        return self

    @property
    def packed(self) -> Any:
        """Weights in the format of the backend that executes the layer; None if it is simulated."""
        return None if self._kernel_weights is None else self._kernel_weights.packed

    def _buffers_and_config(self) -> tuple[Tensor | LayerConfig | None, ...]:
        return self.vqk, self.kds, self.kds_shift, self.config

    def _packed(self) -> KernelWeights | None:
        """Return None if no backend but the simulation supports the layer."""
        backend, _ = backends.choose(self.operation, self.vqk.device)
        return self._packed_by(backend) if backend is not backends.SIMULATION and self._has_values() else None

    def _has_values(self) -> bool:
        """Return False for tensors without values here: those of a compiler, and those distributed over machines."""
        return type(self.vqk) is Tensor

    def _packed_by(self, backend: backends.Backend) -> KernelWeights:
        made_of = self._buffers_and_config()
        versions = _versions(made_of)
        # Tensors created in inference mode could not be used outside of it.
        with torch.inference_mode(False):
            packed = backend.pack(self.operation, self.vqk, self.kds, self.kds_shift)
        return KernelWeights(backend, packed, made_of, versions)

    def _run(self, x: Tensor, operation: backends.Operation, biased: bool = True) -> Tensor:
        """Return the output for ``x``, batched and padded."""
        bias = self.bias if biased else None
        weights = self._weights_for_kernels(x)
        if weights is None:
            if ops.is_simulated_whole() and self._shadow is None and self.config.algorithm != "winograd":
                return backends.run_whole(operation, self.vqk, self.kds, self.kds_shift, bias, x)
            return backends.SIMULATION.run(operation, self._weights_for_simulation(), bias, x)
        return weights.backend.run(operation, weights.packed, bias, x)

    def _weights_for_simulation(self) -> Any:
        if self._shadow is not None:
            return backends.prepare(self.operation, self._shadow())
        compiling = torch.compiler.is_compiling()
        # Other weights are cheap to compute, and would take more memory than the rest of the layer.
        if self.config.algorithm == "winograd" and (compiling or self._has_values()):
            kept = self._simulated_weights
            if not compiling and not self._is_current(kept):
                kept = self._simulated_weights = self._packed_by(backends.SIMULATION)
            if kept is not None:
                return kept.packed
        return backends.SIMULATION.pack(self.operation, self.vqk, self.kds, self.kds_shift)

    def _weights_for_kernels(self, x: Tensor) -> KernelWeights | None:
        """Return None if ``x`` must be simulated in float: see the rule above."""
        if x.dtype not in _DTYPES or ops.is_simulated():
            return None
        # Several threads may find it outdated at once: each makes the same weights and uses its own.
        weights = self._kernel_weights
        # A compiler has no values to make them from.
        if not torch.compiler.is_compiling() and not self._is_current(weights):
            weights = self._kernel_weights = self._packed()
        if weights is None or x.device.type != weights.backend.device:
            return None
        if self._needs_gradient(x):
            if not self.training and not torch.compiler.is_compiling():
                _warn_of_gradients()
            return None
        return weights

    def _is_current(self, weights: KernelWeights | None) -> bool:
        now = self._buffers_and_config()
        return weights is not None and all(map(is_, weights.made_of, now)) and weights.versions == _versions(now)

    def _needs_gradient(self, x: Tensor) -> bool:
        if not torch.is_grad_enabled() or (_is_exporting() and not self.training):
            return False
        return x.requires_grad or (self.bias is not None and self.bias.requires_grad)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        vqk = self.vqk
        kept = {name: value for name in ("kds", "kds_shift") if (value := getattr(self, name)) is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, value in kept.items():
            moved = getattr(self, name)
            if moved.dtype != value.dtype:
                setattr(self, name, value.to(moved.device))
        if self.vqk is vqk:
            return self
        try:
            return self.pack_()
        except ValueError:  # `to_empty` leaves arbitrary integers until a state is loaded
            self._kernel_weights = None
            return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.pop(f"{prefix}weight_like")

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool, missing_keys: list[str], *args: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, *args)
        missing_keys[:] = [name for name in missing_keys if name != f"{prefix}weight_like"]
        self.pack_()

    # A copy or an unpickled layer makes its own packed weights.
    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_kernel_weights": None, "_simulated_weights": None}  # type: ignore[no-untyped-call]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.pack_()

    @classmethod
    def like(cls, layer: Any, config: LayerConfig, padding: Any = None) -> Self:
        """Return a layer with the geometry, device, training flag and bias of the float ``layer`` and a zero weight.

        ``padding`` replaces the padding of the float layer, unless it is None.
        """
        make: Callable[..., Self] = cls
        geometry = list(cls.float_geometry(layer))
        if padding is not None:
            if not cls.dims or cls.transposed:
                raise ValueError(f"padding: expected None for a {cls.__name__}, got {padding!r}")
            geometry[cls.float_attributes.index("padding")] = padding
        made = make(*geometry, config=config)
        tensors = chain(layer.parameters(), layer.buffers())
        home = next((t for t in tensors if t.is_floating_point()), made.weight_like)
        made.to(home.device)
        made.weight_like.data = made.weight_like.data.to(home.dtype)
        if layer.bias is not None:
            made.bias = nn.Parameter(layer.bias.detach().clone(), requires_grad=layer.bias.requires_grad)
        return made.train(layer.training)

    @classmethod
    def from_float(
        cls,
        layer: Any,
        config: LayerConfig | str | None = None,
        *,
        weight: Tensor | None = None,
        padding: Any = None,
        inputs: InputMoments | None = None,
    ) -> Self:
        """Return a quantized layer made from a float one, which is unchanged.

        Args:
            layer: the PyTorch layer of the same name, ``nn.Conv2d`` for ``DSConv2d``.
            config: a LayerConfig, or a QuantConfig or the name of a preset, whose general settings apply; None is the
                preset ``default``.
            weight: weight to quantize instead of ``layer.weight``, with the same shape.
            padding: padding of a convolution to use instead of ``layer.padding``.
            inputs: known moments of the layer's inputs, for rule ``balanced``.

        Raises:
            TypeError: ``layer`` is of another kind.
            ValueError: the weight contains a NaN or an infinity.

        >>> from dsconv.nn import DSConv2d
        >>> DSConv2d.from_float(nn.Conv2d(64, 8, 3), LayerConfig(block_size=32)).kds.shape
        torch.Size([8, 2, 3, 3])
        """
        if not isinstance(layer, cls.float_type):
            raise TypeError(f"{cls.__name__}: expected a {cls.float_type.__name__}, got {type(layer).__name__}")
        made = cls.like(layer, cls._layer_config(config), padding)
        float_weight: Tensor = layer.weight if weight is None else weight  # type: ignore[assignment]
        return made.quantize_(made.conv_layout(float_weight.detach()), inputs)

    @classmethod
    def float_geometry(cls, layer: Any) -> tuple[Any, ...]:
        """Return the positional arguments of a quantized layer with the same geometry as the float ``layer``."""
        return tuple(
            layer.bias is not None if name == "bias" else getattr(layer, name) for name in cls.float_attributes
        )

    @classmethod
    def float_input_shape(cls, layer: Any, extra: int) -> tuple[int, ...]:
        """Return the shape of an input of the float ``layer``, ``extra`` longer than the window of an output."""
        raise NotImplementedError(cls.__name__)

    @classmethod
    def float_is_depthwise(cls, layer: Any) -> bool:
        """Return whether each channel of the float ``layer`` is a group of its own."""
        return cls.dims > 0 and not cls.transposed and bool(layer.groups == layer.in_channels > 1)

    @classmethod
    def _layer_config(cls, config: LayerConfig | str | None) -> LayerConfig:
        if isinstance(config, LayerConfig) and not isinstance(config, QuantConfig):
            return config
        settings = as_config(config).layer(kind=cls.kind)
        if settings is None:
            raise ConfigError(f"config: it leaves layers of kind {cls.kind!r} in float: pass a LayerConfig")
        return settings

    def conv_layout(self, weight: Tensor) -> Tensor:
        """Return a ``weight`` of the float layer in the layout of ``vqk``."""
        return weight

    def _settings_repr(self) -> str:
        config = self.config
        activation = "float" if config.activation_bits is None else f"{config.activation_bits} {config.activation_sign}"
        shift = "+shift" if config.weight_shift else ""
        return (
            f"weight_bits={config.weight_bits}, activation_bits={activation}, "
            f"block_size={config.block_size} {config.blocks}, kds={config.kds_dtype}{shift}"
            f"{', winograd' if config.algorithm == 'winograd' else ''}"
        )


_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _energy(x: Tensor) -> float:
    """Return the sum of squares, in float64."""
    x = x.double().flatten()
    return torch.dot(x, x).item()


def _versions(made_of: tuple[Tensor | LayerConfig | None, ...]) -> tuple[int, ...]:
    """Return how often each tensor was changed in place; tensors made in inference mode do not count changes."""
    return tuple(t._version for t in made_of if isinstance(t, Tensor) and not t.is_inference())


@cache
def _warn_of_gradients() -> None:
    warnings.warn(
        "Gradients are enabled, so quantized layers are simulated in float: wrap the call in torch.inference_mode() "
        "to run them in integers.",
        stacklevel=2,
    )


def _within_float16(kds: Tensor, shift: Tensor | None) -> bool:
    """Return whether all values are within the range of float16."""
    return all(bool(value.half().isfinite().all()) for value in (kds, shift) if value is not None)


def _fits_float16(kds: Tensor, shift: Tensor | None) -> bool:
    """Return whether float16 changes each output channel by at most a small fraction of its quantization error."""
    scales = kds.flatten(1)
    largest = scales.abs().amax(1)
    significant = largest > largest.max() * 2.0**-10
    for value in (scales, None if shift is None else shift.flatten(1)):
        if value is not None:
            error = (value - value.half().float()).abs().amax(1)
            if not (error <= largest * 2.0**-7)[significant].all():
                return False
    return True
