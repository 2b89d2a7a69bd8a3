"""``dsconv quantize``: a trained network goes in, a file of its low-bit integers comes out."""

import time
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

import dsconv
from dsconv import strict_json, zoo
from dsconv.cli.common import (
    MODEL_HELP,
    Config,
    Force,
    Json,
    Preset,
    Weights,
    check_out,
    print_json,
    print_table,
    read_config,
    say,
)
from dsconv.config import FLOAT, KdsDtype, LayerConfig, QuantConfig, Settings
from dsconv.errors import ConfigError
from dsconv.numerics import ActivationSign, WeightRule, WeightScale

_every = partial(typer.Option, show_default=False, rich_help_panel="Settings of every layer, in place of the preset's")
_some = partial(
    typer.Option,
    metavar="SETTINGS",
    rich_help_panel='Settings of some layers: "float", "same" (as every layer), weight_bits:8,blocks:flat or JSON',
)


def quantize(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP, show_default=False)],
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="FILE", help="File to write: *.safetensors.", show_default=False)
    ],
    weights: Weights = "default",
    preset: Preset = "default",
    config: Config = None,
    force: Force = False,
    as_json: Json = False,
    weight_bits: Annotated[int | None, _every(min=2, max=8, help="Width of a weight's integer.")] = None,
    activation_bits: Annotated[int | None, _every(min=2, max=8, help="Width of an activation's mantissa.")] = None,
    weights_only: Annotated[bool, _every("--weights-only", help="Leave activations in float.")] = False,
    block_size: Annotated[int | None, _every(min=1, help="Values that share a scale and an exponent.")] = None,
    weight_rule: Annotated[WeightRule | None, _every(help="How weights are rounded.")] = None,
    weight_scale: Annotated[WeightScale | None, _every(help="What a scale minimises; kl takes no shift.")] = None,
    weight_shift: Annotated[bool | None, _every(help="A shift per block, beside the scale.")] = None,
    activation_sign: Annotated[ActivationSign | None, _every(help="Where the sign of a mantissa goes.")] = None,
    kds_dtype: Annotated[KdsDtype | None, _every(help="In which scales and shifts are kept.")] = None,
    first_layer: Annotated[str | None, _some(help="The first convolution.")] = None,
    last_layer: Annotated[str | None, _some(help="The last convolution or linear layer.")] = None,
    depthwise: Annotated[str | None, _some(help="Convolutions of one channel per group.")] = None,
    linear: Annotated[str | None, _some(help="Linear layers.")] = None,
    override: Annotated[
        list[str] | None,
        _some(metavar="PATTERN=SETTINGS", help="Layers by name: 'layer4.*=weight_bits:3'; repeatable."),
    ] = None,
) -> None:
    """Quantize a trained network and write it to a file."""
    given = {name: value for name, value in locals().items() if value is not None}
    changes = {name: value for name, value in given.items() if name in LayerConfig.model_fields}
    if weights_only:
        changes["activation_bits"] = None
    for name in ("first_layer", "last_layer", "depthwise", "linear"):
        if name in given:
            changes[name] = _settings(name, given[name])
    base = read_config(preset, config).to_dict()
    settings = QuantConfig(**{**base, **changes, "overrides": base["overrides"] | _overrides(override or [])})
    check_out(out, force)

    say(f"building {model} with weights {weights}")
    network = zoo.build(model, weights=weights)
    say("quantizing")
    start = time.perf_counter()
    qmodel = dsconv.quantize(network, settings)
    seconds = time.perf_counter() - start
    dsconv.save(qmodel, out)
    summary, file_bytes = dsconv.summary(qmodel), out.stat().st_size
    if as_json:
        facts = {"model": model, "file": str(out), "file_bytes": file_bytes, "quantize_seconds": seconds}
        print_json({**facts, "config": settings.to_dict(), **summary.to_dict()})
    else:
        print_table(summary)
        print(f"Wrote {out}: {file_bytes:,} bytes; quantized in {seconds:.1f} s.")


def _overrides(texts: list[str]) -> dict[str, Settings]:
    pairs = [text.partition("=") for text in texts]
    for pattern, _, settings in pairs:
        if not pattern or not settings:
            raise ConfigError(f"override: expected PATTERN=SETTINGS such as 'fc=weight_bits:8', got {pattern!r}")
    return {pattern: _settings(f"override {pattern}", settings) for pattern, _, settings in pairs}


def _settings(name: str, text: str) -> Settings:
    if text in (FLOAT, "same"):
        return "float" if text == FLOAT else None
    try:
        if text.startswith("{"):
            return dict(strict_json.loads(text))
        pairs = [pair.split(":") for pair in text.split(",")]
        found = {key.strip(): _value(value) for key, value in pairs}
        if len(found) < len(pairs):
            raise ValueError("a setting is there twice")
        return found
    except ValueError as error:
        raise ConfigError(
            f"{name}: expected float, same, settings such as weight_bits:8,blocks:flat or JSON, got {text!r} ({error})"
        ) from None


def _value(text: str) -> Any:
    try:
        return strict_json.loads(text)
    except ValueError:
        return text.strip()
