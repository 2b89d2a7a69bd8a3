"""``dsconv adapt``: a quantized network is trained on unlabelled images to do what its float original does."""

from pathlib import Path
from typing import Annotated, Any

import typer

import dsconv
from dsconv import zoo
from dsconv.cli.common import (
    REFERENCE_HELP,
    AnyRange,
    Channels,
    Crop,
    Force,
    Interpolation,
    Json,
    Mean,
    ModelOfFile,
    Resize,
    Scale,
    Std,
    Weights,
    check_out,
    load_file,
    original_of,
    preparation,
    preprocess_of,
    print_json,
    print_table,
    resumable,
    say,
    state_beside,
)
from dsconv.conversion import model_info
from dsconv.distillation.processes import is_first
from dsconv.distillation.recipe import RECIPES

_OUT_HELP = "File to write: *.safetensors."
_RESUME_HELP = "Continue a training that was stopped, from the file beside OUT that it left."
_AUTOCAST_HELP = "Multiply in bfloat16, which GPUs do faster."


def adapt(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Of dsconv quantize or calibrate.", show_default=False)],
    data: Annotated[Path, typer.Option(metavar="DIR", help="Images, which need no labels.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="OUT", help=_OUT_HELP, show_default=False)],
    reference: Annotated[str | None, typer.Option(metavar="MODEL", help=REFERENCE_HELP)] = None,
    weights: Weights = "default",
    model: ModelOfFile = None,
    recipe: Annotated[str, typer.Option(metavar="|".join(RECIPES), help="What is done, by name.")] = "default",
    steps: Annotated[int | None, typer.Option(min=1, help="At most, in place of the recipe's.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Of a step, over all processes.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use this many images at most.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of all that is random.")] = 0,
    log: Annotated[Path | None, typer.Option(metavar="FILE.csv", help="Write how far it comes.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help=_RESUME_HELP)] = False,
    device: Annotated[str, typer.Option(help="Where to train, as PyTorch names it: cpu, cuda.")] = "cpu",
    autocast: Annotated[bool, typer.Option("--autocast", help=_AUTOCAST_HELP)] = False,
    any_range: AnyRange = False,
    force: Force = False,
    as_json: Json = False,
    resize: Resize = None,
    crop: Crop = None,
    mean: Mean = None,
    std: Std = None,
    scale: Scale = None,
    channels: Channels = None,
    interpolation: Interpolation = None,
) -> None:
    """Train a quantized network to put out, on your images, what its float original does.

    The images need no labels. A part of them is held back, and the state that does best on these is kept.
    Started by torchrun, several processes train it together, and the first of them writes OUT.
    """
    given = preparation(locals())
    changes = {"steps": steps, "batch_size": batch_size, "lr": lr}
    changed: dict[str, Any] = {name: value for name, value in changes.items() if value is not None}
    settings = dsconv.Recipe.preset(recipe, **changed)
    check_out(out, force)
    state = state_beside(out, resume, "training")
    tell = say if is_first() else lambda _: None
    tell(f"loading {file}")
    student = load_file(file, model)
    name = reference or model or original_of(student, str(file))
    tell(f"building {name} with weights {weights}")
    teacher = zoo.build(name, weights=weights)
    preprocess = preprocess_of(teacher, name, given)
    with resumable(state):
        result = dsconv.adapt(
            student,
            teacher,
            data,
            recipe=settings,
            preprocess=preprocess,
            limit=limit,
            seed=seed,
            state=state,
            resume=resume,
            log=log,
            device=device,
            autocast=autocast,
            any_range=any_range,
            progress=True,
        )
        if not is_first():
            return
        dsconv.save(result, out)
    state.unlink()
    info, file_bytes = model_info(result), out.stat().st_size
    assert info is not None
    if as_json:
        facts = {"model": str(file), "reference_model": name, "data": str(data), "file": str(out)}
        figures = {"file_bytes": file_bytes, "effective_bits": dsconv.summary(result).effective_bits}
        print_json({**facts, **figures, "preprocess": preprocess.model_dump(mode="json"), **info.adaptation.to_dict()})
    else:
        print_table(info.adaptation)
        print(f"Wrote {out}: {file_bytes:,} bytes.")
