"""``dsconv adapt``: trains a quantized network on unlabelled images to match its float original."""

from pathlib import Path
from typing import Annotated, Any

import typer

import dsconv
from dsconv.cli import options as opt
from dsconv.cli.checks import check_data, check_file, check_out, state_beside
from dsconv.cli.mistakes import Mistakes
from dsconv.cli.networks import begin, load_file, original_of, resumable
from dsconv.cli.output import print_json, print_table, say
from dsconv.cli.preparation import preparation_of, read_preparation, say_preparation
from dsconv.names import RECIPES, check_task, check_weights

_OUT_HELP = "File to write: *.safetensors."
_RESUME_HELP = "Continue a stopped training from its state file beside OUT."
_AUTOCAST_HELP = "Multiply in bfloat16, which is faster on GPUs."


def adapt(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="A file written by dsconv quantize or calibrate.", show_default=False)
    ],
    data: Annotated[Path, typer.Option(metavar="DIR", help=opt.UNLABELLED_HELP, show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="OUT", help=_OUT_HELP, show_default=False)],
    reference: opt.Reference = None,
    weights: opt.Weights = "default",
    model: opt.ModelOfFile = None,
    recipe: Annotated[str, opt.choice(RECIPES, help="Preset of the training.")] = "default",
    steps: Annotated[int | None, typer.Option(min=1, help="Maximum number of steps, in place of the recipe's.")] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, metavar="IMAGES", help="Images per step, over all processes.")
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate.")] = None,
    limit: opt.LimitOrAll = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of all random choices.")] = 0,
    log: Annotated[Path | None, typer.Option(metavar="FILE.csv", help="Write the progress of the training.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help=_RESUME_HELP)] = False,
    threads: opt.Threads = None,
    device: opt.Device = "cpu",
    autocast: Annotated[bool, typer.Option("--autocast", help=_AUTOCAST_HELP)] = False,
    any_range: opt.AnyRange = False,
    task: opt.Task = None,
    force: opt.Force = False,
    quiet: opt.Quiet = False,
    as_json: opt.Json = False,
    resize: opt.Resize = None,
    crop: opt.Crop = None,
    mean: opt.Mean = None,
    std: opt.Std = None,
    scale: opt.Scale = None,
    channels: opt.Channels = None,
    interpolation: opt.Interpolation = None,
) -> None:
    """Train a quantized network on your images to match its float original.

    The images need no labels. Some of them are held back, and the state with the best result on these is kept. If
    started by torchrun, several processes train the network together, and the first of them writes OUT.
    """
    mistakes = Mistakes()
    given = mistakes.check(read_preparation, locals(), str(file), model, reference)
    changes = {"steps": steps, "batch_size": batch_size, "lr": lr}
    changed: dict[str, Any] = {name: value for name, value in changes.items() if value is not None}
    settings = mistakes.check(dsconv.Recipe.preset, recipe, **changed)
    mistakes.check(check_file, file, model, reference)
    mistakes.check(check_weights, weights)
    mistakes.check(check_data, data)
    mistakes.check(check_out, force, out=out)
    mistakes.check(check_out, force or resume, log=log)
    state = mistakes.check(state_beside, out, resume, "training")
    kind = mistakes.check(check_task, task)
    mistakes.end()

    begin(threads)
    from dsconv import zoo
    from dsconv.adaptation.processes import is_first
    from dsconv.conversion import model_info

    tell = say if is_first() else lambda _: None
    tell(f"loading {file}")
    student = load_file(file, model, reference)
    name = reference or model or original_of(student, str(file))
    tell(f"building {name} with weights {weights}")
    teacher = zoo.build(name, weights=weights)
    preprocess = preparation_of(given, str(file), student, teacher)
    if is_first():
        say_preparation(preprocess, data)
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
            task=kind,
            progress=not quiet,
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
