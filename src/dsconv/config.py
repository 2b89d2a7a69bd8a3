"""Quantization settings: :class:`QuantConfig` for a model, :class:`LayerConfig` for one of its layers."""

import os
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_serializer, model_validator

from dsconv import strict_json, strict_yaml
from dsconv.errors import ConfigError, check_choice, one_line
from dsconv.files import as_path
from dsconv.names import (
    PRESETS,
    ActivationSign,
    ActivationSignChoice,
    AlgorithmChoice,
    KdsDtype,
    Preset,
    WeightRule,
    WeightScale,
)

if TYPE_CHECKING:
    import torch

Bits = Annotated[int, Field(ge=2, le=8, strict=True)]
LayerKind = Literal["conv", "linear"]

_SHOWN = 10

FLOAT = "float"
"""Setting that leaves a layer in float."""


class Strict(BaseModel):
    """Immutable settings with a fixed set of names; invalid ones raise ConfigError."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def __init__(self, /, **data: Any):
        try:
            super().__init__(**data)
        except ValidationError as error:
            raise ConfigError(_one_paragraph(type(self), error)) from None

    def __repr_args__(self) -> Any:
        return [
            (name, value)
            for name, value in super().__repr_args__()
            if name is None or value != type(self).model_fields[name].default
        ]


class LayerConfig(Strict):
    """Settings of one layer.

    Attributes:
        weight_bits: 2..8.
        activation_bits: 2..8, or None to keep the input in float and quantize only the weights.
        block_size: number of values that share a KDS and an exponent, >= 1.
        weight_rule: ``paper``, ``refined`` or ``balanced``, see :func:`dsconv.numerics.quantize_weight`.
        weight_scale: criterion that selects the scales, ``l2`` or ``kl``; the scales themselves are KDS.
        weight_shift: whether each block has a shift in addition to its scale.
        activation_sign: ``adaptive``, ``extra`` or ``included``, see :func:`dsconv.numerics.quantize_activation`.
            ``auto`` selects ``extra`` if the input of the layer can be negative, and ``adaptive`` otherwise, for
            instance after a ReLU; layers and files record the selected value.
        kds_dtype: ``float32``, ``float16`` or ``bfloat16``. A layer whose KDS exceed the range of float16 keeps
            float32.
        blocks: ``tap``: blocks of input channels at each kernel position; ``flat``: blocks of the flattened
            ``C/groups * K`` values that one output reads, which suits convolutions with few input channels.
        algorithm: ``direct`` or ``winograd``. Winograd requires a 3x3 convolution with stride and dilation 1, one group
            and ``tap`` blocks, see :func:`dsconv.numerics.winograd_conv`; it ignores ``activation_bits`` unless that is
            None. ``auto`` selects Winograd if the layer allows it and the noise of its output, estimated from its
            weights and the known statistics of its inputs, rises by 1 dB at most; layers and files record the selected
            value.

    >>> LayerConfig(weight_bits=3, block_size=64)
    LayerConfig(weight_bits=3, block_size=64)
    """

    weight_bits: Bits = 4
    activation_bits: Bits | None = 4
    block_size: Annotated[int, Field(ge=1, lt=2**31, strict=True)] = 32
    weight_rule: WeightRule = "paper"
    weight_scale: WeightScale = "l2"
    weight_shift: bool = False
    activation_sign: ActivationSignChoice = "adaptive"
    kds_dtype: KdsDtype = "float32"
    blocks: Literal["tap", "flat"] = "tap"
    algorithm: AlgorithmChoice = "direct"

    @model_validator(mode="after")
    def _one_fit(self) -> Self:
        if self.weight_shift and self.weight_scale != "l2":
            raise ValueError("weight_shift is fitted by least squares: use weight_scale='l2' with it")
        if self.algorithm == "winograd" and not self.allows_winograd:
            what = "blocks='flat'" if self.blocks == "flat" else "activation_bits=None"
            raise ValueError(
                f"algorithm='winograd' adds integers within blocks of channels and cannot be combined with {what}: "
                "use 'auto'"
            )
        return self

    @model_serializer(mode="wrap")
    def _as_before(self, serialize: Any) -> dict[str, Any]:
        """Omit fields that older versions do not know, where these behave the same without them."""
        data: dict[str, Any] = serialize(self)
        new = ("algorithm", "direct"), ("small_layers", None)
        return {name: value for name, value in data.items() if (name, value) not in new}

    @property
    def allows_winograd(self) -> bool:
        """Whether these settings are compatible with ``winograd``."""
        return self.blocks == "tap" and self.activation_bits is not None

    @property
    def sign(self) -> ActivationSign:
        """``activation_sign`` of a layer, after ``auto`` has been resolved."""
        assert self.activation_sign != "auto"
        return self.activation_sign

    def with_sign(self, signed: bool) -> Self:
        """Return these settings with ``auto`` resolved to a sign of activations.

        Args:
            signed: whether the input of the layer can be negative, or is unknown.

        >>> LayerConfig(activation_sign="auto").with_sign(signed=True)
        LayerConfig(activation_sign='extra')
        """
        if self.activation_sign != "auto":
            return self
        return self.model_copy(update={"activation_sign": "extra" if signed and self.rounds_signs else "adaptive"})

    @property
    def rounds_signs(self) -> bool:
        """Whether ``activation_sign`` affects the rounding step; with 8 bits the step is the same for every sign."""
        return self.activation_bits is not None and self.activation_bits < 8

    @property
    def torch_kds_dtype(self) -> "torch.dtype":
        """``kds_dtype`` as a torch dtype."""
        import torch

        return {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}[self.kds_dtype]


Settings = dict[str, Any] | Literal["float"] | None
"""Fields of LayerConfig that differ, ``"float"`` to leave the layer in float, or None for no difference."""

_EDGE: dict[str, Any] = {
    "weight_bits": 8,
    "activation_bits": 8,
    "block_size": 32,
    "weight_rule": "paper",
    "weight_shift": False,
    "kds_dtype": "float32",
    "blocks": "flat",
}
_DEPTHWISE: dict[str, Any] = _EDGE | {"activation_bits": None}


class QuantConfig(LayerConfig):
    """Settings of a model: those of every layer, and exceptions for some layers.

    The fields of :class:`LayerConfig` hold for every convolution and linear layer. The following exceptions are applied
    on top of them, each overriding those before it: ``linear`` (linear layers), ``small_layers`` (layers with at most a
    512th of the weights of all convolutions and linear layers), ``depthwise`` (convolutions with one input channel per
    group), ``first_layer`` (the first convolution), ``last_layer`` (the last convolution or linear layer) and
    ``overrides``. First and last refer to the order in which the model registers its layers. Each is a dictionary of
    the fields that differ, or ``"float"`` to leave the layers in float, or None.

    Attributes:
        first_layer: by default 8 bits over flattened blocks, since three channels do not fill a block.
        depthwise: by default 8-bit weights in one block per filter, and float activations, because a filter has too few
            products to repay the rounding of its inputs. In three dimensions, 8-bit activations replace float ones
            unless all layers have float activations.
        small_layers: by default None; 8 bits in the presets ``default`` and ``w4a4``. The effect of a layer's error on
            the output does not depend on its number of weights, but the cost of its bits does.
        last_layer, linear: by default None, like every other layer.
        overrides: maps patterns of layer names (as in ``fnmatch``) to settings; all matching patterns apply, in order.
            A pattern that matches no layer of the model is an error.
        batchnorm_statistics: whether the rule ``balanced`` uses the input means and variances given by the BatchNorm in
            front of a layer, where there is one.

    Raises:
        ConfigError: a value is out of range or a name is unknown.

    >>> config = QuantConfig(weight_bits=4, activation_bits=8, overrides={"layer4.*": {"weight_bits": 3}})
    >>> config.layer("layer4.0.conv1").weight_bits
    3
    >>> QuantConfig.from_json(config.to_json()) == config
    True
    """

    first_layer: Settings = _EDGE
    depthwise: Settings = _DEPTHWISE
    last_layer: Settings = None
    linear: Settings = None
    small_layers: Settings = None
    overrides: dict[str, Settings] = {}
    batchnorm_statistics: bool = True

    @field_validator("first_layer", "depthwise", "last_layer", "linear", "small_layers")
    @classmethod
    def _known_settings(cls, settings: Settings) -> Settings:
        if isinstance(settings, dict):
            try:
                # Compatibility of shift and scale is known only once all settings are merged.
                LayerConfig(**{field: value for field, value in settings.items() if field != "weight_shift"})
            except ConfigError as error:
                raise ValueError(str(error)) from None
        return settings

    @field_validator("overrides")
    @classmethod
    def _known_overrides(cls, overrides: dict[str, Settings]) -> dict[str, Settings]:
        for settings in overrides.values():
            cls._known_settings(settings)
        return overrides

    @classmethod
    def preset(cls, name: str, **changes: Any) -> Self:
        """Return the config called ``name``, with ``changes`` to its fields.

        ``paper``
            The published method: 4-bit weights and activations in blocks of 32, every convolution including the first,
            ``extra`` sign, float32 KDS, image input and linear layers left in float32.
        ``default``
            For current processors: 4-bit weights in blocks of 64 with float16 scale and shift (4.5 bits per weight),
            ``balanced`` rounding, 8-bit mantissas; first and depthwise convolutions and small layers at 8 bits, the
            depthwise ones with float activations.
        ``w4a4``
            ``default`` with 4-bit mantissas, which have an extra sign bit if the input of a layer can be negative.
        ``w8a8``
            8-bit weights and mantissas in blocks of 64.

        >>> QuantConfig.preset("default", weight_bits=3).weight_bits
        3
        """
        check_choice("preset", name, PRESETS)
        return cls(**{**_PRESETS[cast(Preset, name)], **changes})

    def layer(
        self,
        name: str = "",
        *,
        kind: LayerKind = "conv",
        first: bool = False,
        last: bool = False,
        depthwise: bool = False,
        small: bool = False,
        volume: bool = False,
    ) -> LayerConfig | None:
        """Return the settings of the layer called ``name``, or None to leave it in float; ``volume``: it is 3-D.

        Raises:
            ConfigError: the settings that apply contradict one another.
        """
        own = self.depthwise if depthwise else None
        if volume and isinstance(own, dict) and own.get("activation_bits", 8) is None and self.activation_bits:
            own = own | {"activation_bits": 8}  # the kernels for float activations support 2-D only
        layers: list[Settings] = [
            self.linear if kind == "linear" else None,
            self.small_layers if small else None,
            own,
            self.first_layer if first else None,
            self.last_layer if last else None,
            *(settings for pattern, settings in self.overrides.items() if fnmatchcase(name, pattern)),
        ]
        merged: dict[str, Any] = {field: getattr(self, field) for field in LayerConfig.model_fields}
        in_float = False
        for settings in layers:
            if settings is not None:
                in_float = settings == FLOAT
            if isinstance(settings, dict):
                merged.update(settings)
        try:
            return None if in_float else LayerConfig(**merged)
        except ConfigError as error:
            raise ConfigError(f"layer {name!r}: {error}") from None

    @property
    def title(self) -> str:
        """Name of the preset if there is one, and bit widths; otherwise widths, block size and whether layers differ.

        >>> QuantConfig.preset("default").title, QuantConfig(weight_bits=3, overrides={"fc": "float"}).title
        ('default W4A8', 'W3A4, B = 32, by layer')
        """
        widths = f"W{self.weight_bits}A{self.activation_bits or 32}"
        for preset in PRESETS:
            if QuantConfig.preset(preset) == self:
                return f"{preset} {widths}"
        return f"{widths}, B = {self.block_size}{', by layer' if self.overrides else ''}"

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, ready for JSON; inverse of ``QuantConfig(**data)``."""
        return self.model_dump(mode="json")

    def to_json(self) -> str:
        """Return JSON text; inverse of :meth:`from_json`."""
        return self.model_dump_json()

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Return the config described by the output of :meth:`to_json`.

        Raises:
            ConfigError: the text is not a config.
        """
        return cls._from_text(text, "JSON", strict_json.loads)

    @classmethod
    def from_yaml(cls, text: str | bytes) -> Self:
        """Return the config described by YAML text with the names and values of :meth:`to_dict`.

        Raises:
            ConfigError: the text is not a config, or a name occurs twice.
            MissingExtraError: PyYAML is not installed: ``pip install 'dsconv[yaml]'``.

        >>> QuantConfig.from_yaml("weight_bits: 3\\nlinear: {weight_bits: 8}").linear
        {'weight_bits': 8}
        """
        return cls._from_text(text, "YAML", strict_yaml.loads)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> Self:
        """Read a config from a file: YAML if its name ends in ``.yaml`` or ``.yml``, otherwise JSON.

        Raises:
            ConfigError: the file does not contain a config.
            MissingExtraError: as :meth:`from_yaml`.
            OSError: the file cannot be read.
        """
        file = as_path(path)
        read = cls.from_yaml if file.suffix in (".yaml", ".yml") else cls.from_json
        try:
            return read(file.read_bytes())
        except ValueError as error:
            raise ConfigError(f"{file}: {error}") from None

    @classmethod
    def _from_text(cls, text: object, language: str, loads: Callable[[Any], Any]) -> Self:
        if not isinstance(text, str | bytes):
            raise ConfigError(f"config: expected {language}, got {type(text).__name__}")
        try:
            data = loads(text)
        except ValueError as error:
            raise ConfigError(f"config: expected {language}, got {text[:40]!r} ({error})") from None
        if not isinstance(data, dict):
            raise ConfigError(f"config: expected names and values in {language}, got {text[:40]!r}")
        return cls(**data)


_PAPER: dict[str, Any] = {
    "activation_sign": "extra",
    "first_layer": {"activation_bits": None},
    "depthwise": None,
    "linear": FLOAT,
}
_DEFAULT: dict[str, Any] = {
    "activation_bits": 8,
    "block_size": 64,
    "weight_rule": "balanced",
    "weight_shift": True,
    "kds_dtype": "float16",
    "algorithm": "auto",
    "depthwise": _DEPTHWISE | {"kds_dtype": "float16"},
    "small_layers": {"weight_bits": 8, "weight_shift": False},
}
_PRESETS: dict[Preset, dict[str, Any]] = {
    "default": _DEFAULT,
    "paper": _PAPER,
    "w4a4": _DEFAULT | {"activation_bits": 4, "activation_sign": "auto"},
    "w8a8": _DEFAULT
    | {"weight_bits": 8, "weight_rule": "refined", "weight_shift": False, "algorithm": "direct", "small_layers": None},
}


def as_config(config: "QuantConfig | Mapping[str, Any] | str | None") -> QuantConfig:
    """Return the config for a config, a dictionary of its fields, the name of a preset, or None for ``default``."""
    if isinstance(config, QuantConfig):
        return config
    if config is None or isinstance(config, str):
        return QuantConfig.preset(config or "default")
    if isinstance(config, Mapping):
        return QuantConfig(**config)
    raise ConfigError(
        f"config: expected a QuantConfig, a dictionary or the name of a preset, got {type(config).__name__}"
    )


def _one_paragraph(settings: type[BaseModel], error: ValidationError) -> str:
    """Join the findings of pydantic as ``field: problem, got value``."""
    found = []
    for item in error.errors(include_url=False):
        where = ".".join(str(part) for part in item["loc"]) or settings.__name__
        if item["type"] == "extra_forbidden":
            known = ", ".join(settings.model_fields)
            where = one_line(where, 100)
            found.append(f"{where}: unknown setting; known are {known}")
        else:
            got = "" if item["type"] == "value_error" else f", got {_shown(item['input'])}"
            found.append(f"{where}: {item['msg'].removeprefix('Value error, ')}{got}")
    return "; ".join(one_line(text) for text in found[:_SHOWN]) + ("; ..." if len(found) > _SHOWN else "")


def _shown(value: object) -> str:
    return one_line(" ".join(repr(value).split()), 100)
