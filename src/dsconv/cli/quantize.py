"""``dsconv quantize``: quantizes a trained network and writes a file of its low-bit integers."""

import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import dsconv
from dsconv import strict_json
from dsconv.cli import options as opt
from dsconv.cli.checks import check_out, read_config
from dsconv.cli.mistakes import Mistakes
from dsconv.cli.networks import begin, build
from dsconv.cli.output import print_json, print_table, say, warn
from dsconv.cli.preparation import read_preparation, unknown_preparation
from dsconv.errors import ConfigError
from dsconv.names import (
    ActivationSignChoice,
    AlgorithmChoice,
    KdsDtype,
    WeightRule,
    WeightScale,
    check_model_name,
    check_weights,
)

if TYPE_CHECKING:
    from dsconv.config import QuantConfig, Settings

_every = partial(typer.Option, show_default=False, rich_help_panel="Settings of all layers, in place of the preset's")
_some = partial(
    typer.Option,
    metavar="SETTINGS",
    rich_help_panel='Settings of some layers: "float", "same" (as all layers), weight_bits:8,blocks:flat or JSON',
)


def quantize(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=opt.MODEL_HELP, show_default=False)],
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="FILE", help="File to write: *.safetensors.", show_default=False)
    ],
    weights: opt.Weights = "default",
    preset: opt.Preset = "default",
    config: opt.Config = None,
    threads: opt.Threads = None,
    force: opt.Force = False,
    quiet: opt.Quiet = False,
    as_json: opt.Json = False,
    weight_bits: Annotated[int | None, _every(min=2, max=8, help="Bits of the integer weights.")] = None,
    activation_bits: Annotated[int | None, _every(min=2, max=8, help="Bits of the activation mantissas.")] = None,
    weights_only: Annotated[bool, _every("--weights-only", help="Leave activations in float.")] = False,
    block_size: Annotated[
        int | None, _every(min=1, help="Number of values that share a scale and an exponent.")
    ] = None,
    algorithm: Annotated[
        AlgorithmChoice | None, _every(help="Algorithm of 3x3 convolutions; auto selects winograd if it is as exact.")
    ] = None,
    weight_rule: Annotated[WeightRule | None, _every(help="Rounding rule of the weights.")] = None,
    weight_scale: Annotated[
        WeightScale | None, _every(help="Criterion that scales minimize; kl excludes a shift.")
    ] = None,
    weight_shift: Annotated[bool | None, _every(help="Store a shift per block in addition to the scale.")] = None,
    activation_sign: Annotated[
        ActivationSignChoice | None,
        _every(help="Sign bit of the mantissas; auto is extra if inputs can be negative, otherwise adaptive."),
    ] = None,
    kds_dtype: Annotated[KdsDtype | None, _every(help="Dtype of stored scales and shifts.")] = None,
    first_layer: Annotated[str | None, _some(help="The first convolution.")] = None,
    last_layer: Annotated[str | None, _some(help="The last convolution or linear layer.")] = None,
    depthwise: Annotated[str | None, _some(help="Convolutions of one channel per group.")] = None,
    linear: Annotated[str | None, _some(help="Linear layers.")] = None,
    small_layers: Annotated[str | None, _some(help="Layers with at most a 512th of all weights.")] = None,
    override: Annotated[
        list[str] | None,
        _some(metavar="PATTERN=SETTINGS", help="Layers by name: 'layer4.*=weight_bits:3'; repeatable."),
    ] = None,
    resize: opt.Resize = None,
    crop: opt.Crop = None,
    mean: opt.Mean = None,
    std: opt.Std = None,
    scale: opt.Scale = None,
    channels: opt.Channels = None,
    interpolation: opt.Interpolation = None,
) -> None:
    """Quantize a trained network and write it to a file, which also stores the preprocessing of images."""
    options = locals()
    mistakes = Mistakes()
    mistakes.check(check_model_name, model)
    mistakes.check(check_weights, weights)
    settings = mistakes.check(_config, options)
    given = mistakes.check(read_preparation, options, model, needed=False)
    mistakes.check(check_out, force, out=out)
    mistakes.end()

    begin(threads)
    from dsconv import zoo

    network = build(model, weights)
    say("quantizing")
    start = time.perf_counter()
    qmodel = dsconv.quantize(network, settings, preprocess=given or None)
    seconds = time.perf_counter() - start
    preprocess = zoo.preprocess_of(qmodel)
    # Not needed here, but by commands that read images for this file.
    if preprocess is None:
        warn(f"note: {unknown_preparation(model)}")
    else:
        say(f"preprocessing of images: {preprocess}")
    dsconv.save(qmodel, out)
    summary, file_bytes = dsconv.summary(qmodel), out.stat().st_size
    if as_json:
        facts = {"model": model, "file": str(out), "file_bytes": file_bytes, "quantize_seconds": seconds}
        prepared = None if preprocess is None else preprocess.model_dump(mode="json")
        print_json({**facts, "config": settings.to_dict(), "preprocess": prepared, **summary.to_dict()})
    else:
        print_table(summary)
        print(f"Wrote {out}: {file_bytes:,} bytes; quantized in {seconds:.1f} s.")


def _config(options: Mapping[str, Any]) -> "QuantConfig":
    """Return the settings from the options of the command, on top of those of the preset or the file."""
    given = {name: value for name, value in options.items() if value is not None}
    changes = {name: value for name, value in given.items() if name in dsconv.LayerConfig.model_fields}
    if given["weights_only"]:
        changes["activation_bits"] = None
    for name in ("first_layer", "last_layer", "depthwise", "linear", "small_layers"):
        if name in given:
            changes[name] = _settings(name, given[name])
    base = read_config(given["preset"], options["config"]).to_dict()
    overrides = base["overrides"] | _overrides(given.get("override", []))
    return dsconv.QuantConfig(**{**base, **changes, "overrides": overrides})


def _overrides(texts: list[str]) -> "dict[str, Settings]":
    pairs = [text.partition("=") for text in texts]
    for pattern, _, settings in pairs:
        if not pattern or not settings:
            raise ConfigError(f"override: expected PATTERN=SETTINGS such as 'fc=weight_bits:8', got {pattern!r}")
    return {pattern: _settings(f"override {pattern}", settings) for pattern, _, settings in pairs}


def _settings(name: str, text: str) -> "Settings":
    from dsconv.config import FLOAT

    if text in (FLOAT, "same"):
        return "float" if text == FLOAT else None
    try:
        if text.startswith("{"):
            return dict(strict_json.loads(text))
        pairs = [pair.split(":") for pair in text.split(",")]
        found = {key.strip(): _value(value) for key, value in pairs}
        if len(found) < len(pairs):
            raise ValueError("a setting is given twice")
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
