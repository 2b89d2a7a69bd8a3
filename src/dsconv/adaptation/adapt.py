"""``dsconv.adapt``: trains a quantized network on unlabelled images to match its float original."""

import math
import os
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from dsconv import ops
from dsconv.adaptation.images import drawn, split
from dsconv.adaptation.processes import Processes
from dsconv.adaptation.report import Adaptation, Look, write_csv
from dsconv.adaptation.student import Student, noting_outputs
from dsconv.calibration.calibrate import check_models
from dsconv.calibration.images import check_images, prepared_as, read_images
from dsconv.calibration.layers import Pair, nonfinite_layer, pairs_of, trace
from dsconv.conversion.copying import copied
from dsconv.conversion.functional import as_layers
from dsconv.conversion.info import info_of, note
from dsconv.conversion.preparation import set_preprocess
from dsconv.conversion.quantized import add_bias
from dsconv.conversion.wrappers import unwrapped
from dsconv.data import Images, Preprocess
from dsconv.data.inputs import Batch, by_sample
from dsconv.errors import ConfigError, ModelError, check_whole, usable_device
from dsconv.evaluation.measures import Kinds, Output, Teller, distances, powers
from dsconv.evaluation.outputs import check_same
from dsconv.evaluation.running import outputs_of, ready
from dsconv.files import as_path, check_place
from dsconv.io.state import StateFile
from dsconv.layers import DSLayer
from dsconv.layers.inputs import device_of
from dsconv.names import Task, check_task
from dsconv.progress import progress_bar
from dsconv.recipe import Recipe, as_recipe

# Number of images used to estimate the variance of a layer's outputs.
_SEEN = 32
_ENOUGH, _GOOD = 64, 1000


def adapt(
    student: nn.Module,
    teacher: nn.Module,
    images: Images,
    *,
    recipe: Recipe | Mapping[str, Any] | str | None = None,
    preprocess: Preprocess | None = None,
    limit: int | None = None,
    seed: int = 0,
    state: str | os.PathLike[str] | None = None,
    resume: bool = False,
    log: str | os.PathLike[str] | None = None,
    device: str | torch.device | None = None,
    autocast: bool = False,
    any_range: bool = False,
    task: Task | None = None,
    progress: bool = False,
    on_look: Callable[[Look], None] = lambda look: None,
) -> nn.Module:
    """Return a copy of a quantized network, trained on unlabelled images to match the outputs of its float original.

    Adam minimises the distance of the outputs, which is the KL divergence of logits and the relative error of others
    (:mod:`dsconv.evaluation.measures`), and the errors of all layers' outputs, with straight-through gradients for the
    rounding of weights and activations. The trained parameters are the integers, scales and shifts of the quantized
    layers, and their biases; layers without a bias get one. BatchNorm stays in evaluation mode, and everything else is
    unchanged. Some of the images are held back; the state closest to the teacher on these is kept, which may be the one
    before training.

    Under ``torchrun``, all processes train the same network, each on its part of a batch, and return the same result.

    Args:
        student: from :func:`dsconv.quantize`, :func:`dsconv.calibrate` or :func:`dsconv.load`, with BatchNorm folded or
            not. It is unchanged.
        teacher: the float network that it was made from.
        images: a few hundred or more unlabelled images that are representative of the application, as in
            :func:`dsconv.evaluate`; they are kept in memory.
        recipe: a :class:`Recipe`, a dictionary of its fields, or the name of one; None is ``default``.
        preprocess: preprocessing of a folder; None uses the one stored with the networks. The result stores it.
        limit: maximum number of images; None uses the number in the recipe.
        seed: seed of all random choices. The same arguments give the same result on the same machine.
        state: file written every ``recipe.every`` steps, so that a stopped training can be resumed.
        resume: continue from ``state``; the result is that of an uninterrupted training.
        log: file ``*.csv`` to which the :class:`Look` of every ``recipe.every`` steps is written.
        device: device on which to train; None is the device of the networks.
        autocast: multiply in bfloat16.
        any_range: accept images far outside the range that the network expects, with a warning.
        task: kind of the outputs, which determines the loss, as in :func:`dsconv.evaluate`.
        progress: show the progress on stderr, as :func:`dsconv.evaluate` does.
        on_look: called with each :class:`Look`.

    Returns:
        A model with the same classes, in the same training mode. ``model_info(result).adaptation`` is an
        :class:`Adaptation`. A NaN ends the training with a warning that states where it originated; the best state is
        kept.

    Raises:
        ConfigError: an argument is out of range; or ``state`` exists and ``resume`` is False, or the other way round.
        DataError: there are fewer than 4 different images, unusable ones, or images far outside the network's range.
        ModelError: the networks do not match, cannot run on the images, or compute a NaN before training.
        FileFormatError: ``state`` is damaged, or belongs to other networks, images or arguments.
        OSError: ``state`` or ``log`` cannot be written; the previous state is kept.

    Source: Hinton et al., "Distilling the Knowledge in a Neural Network", 2015; Bengio et al., "Estimating or
    Propagating Gradients Through Stochastic Neurons", 2013 (straight-through gradients).

    >>> import dsconv
    >>> from dsconv.conversion import model_info
    >>> net, (images, _) = dsconv.zoo.build("dsconv/digits_resnet"), dsconv.demo.load_digits("unlabelled")
    >>> qnet = dsconv.quantize(net, dsconv.QuantConfig.preset("w4a4", weight_bits=2))
    >>> better = dsconv.adapt(qnet, net, images[:256], recipe={"steps": 40, "every": 20})
    >>> held_out, _ = dsconv.demo.load_digits("test")
    >>> before, after = (dsconv.compare(net, q, held_out).kl for q in (qnet, better))
    >>> after < before, model_info(better).adapted_on
    (True, 256)
    """
    recipe = as_recipe(recipe)
    check_whole("seed", seed, 0)
    names = "student", "teacher"
    student, teacher = unwrapped(student), as_layers(teacher)[0]
    check_models(student, teacher, names)
    check_task(task)
    if log is not None:
        check_place(as_path(log, "log"))
    with usable_device(device):
        place = device_of(student) if device is None else torch.device(device)
    with Processes(place) as processes:
        if recipe.batch_size % processes.count:
            raise ConfigError(
                f"batch_size: expected a multiple of the {processes.count} processes, got {recipe.batch_size}"
            )
        # The word in state files.
        saved = StateFile(None if state is None else as_path(state, "state"), resume, "distillation")
        limit = recipe.images if limit is None else limit
        progress = progress and processes.rank == 0
        x = read_images(images, preprocess, limit, student, teacher, enough=_ENOUGH, good=_GOOD, progress=progress)
        with torch.inference_mode(False):
            result = copied(student)
        if (prepared := prepared_as(images, preprocess, student, teacher)) is not None:
            set_preprocess(result, prepared)
        with ready([result, teacher], processes.device), torch.inference_mode(False), ops.simulated():
            with torch.no_grad():
                pairs, _ = trace(pairs_of(result, teacher, names), result, teacher, x[:1], names)
                check_images(x, teacher, result, any_range=any_range)
            pairs = [pair for pair in pairs if pair.outputs]
            run = _Training(result, teacher, pairs, x, recipe, seed, processes, autocast, task)
            settings = {
                "recipe": recipe.model_dump(mode="json"),
                "seed": seed,
                "autocast": autocast,
                "task": task,
                "processes": processes.count,
                "dsconv version": metadata.version("dsconv"),
            }
            found = saved.open({"student": student, "teacher": teacher}, x, settings)
            if found is not None:
                run.resume(saved, *found)
            adaptation = run.train(saved, None if log is None else Path(log), progress, on_look)
    added = (pair.name for pair in pairs if student.get_submodule(pair.name).bias is None)
    note(result, adapted_on=len(x), biases=(*info_of(result).biases, *added), adaptation=adaptation)
    return result


class _Training:
    """Networks and images of a training, and its progress."""

    def __init__(
        self,
        model: nn.Module,
        teacher: nn.Module,
        pairs: list[Pair],
        x: Batch,
        recipe: Recipe,
        seed: int,
        processes: Processes,
        autocast: bool,
        task: Task | None,
    ):
        self.model, self.teacher, self.pairs, self.x = model, teacher, pairs, x
        self.recipe, self.seed, self.processes = recipe, seed, processes
        self.device = device_of(model)
        self.ours, self.held = split(len(x), recipe.held_back, seed)
        self.autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=autocast)
        for pair in pairs:
            add_bias(pair.layer, getattr(pair.original, "weight", None))
            _cast_bias(pair.layer, torch.float32)  # steps are too small for the narrower dtypes
        self.teller = Teller("teacher", task)
        variances, self.power = self._variances()
        self.student = Student(model, pairs, variances, recipe)
        self.student.check_start()
        self.optimizer = torch.optim.Adam(self.student.groups(recipe))
        self.looks: list[Look] = []
        self.best: dict[str, Tensor] = {}

    @torch.no_grad()
    def _variances(self) -> tuple[list[float], dict[str, float]]:
        """Return the output variance of each of the teacher's layers, and the mean power per image of non-logits."""
        x, found = self.x[self.ours[:_SEEN]], []
        with noting_outputs(self.pairs) as noted:
            outputs, kinds = self._taught(x)
        for pair in self.pairs:
            variance = float(torch.stack([y.var() for y in noted[pair.name]]).mean())
            if not math.isfinite(variance):
                raise ModelError(f"teacher: {_where_nonfinite(self.teacher, x)}: check its weights and the images")
            found.append(variance or 1.0)
        power = powers(outputs, kinds)
        # The same in all processes, because their learning rates and losses depend on these values.
        both = torch.tensor([*found, *(value / len(x) for value in power.values())], dtype=torch.float32, device="cpu")
        numbers = cast(list[float], self.processes.mean(both).tolist())
        return numbers[: len(found)], dict(zip(power, numbers[len(found) :], strict=True))

    def _taught(self, x: Batch) -> tuple[dict[str, Output], Kinds]:
        """Return the teacher's outputs for ``x``, and their kinds."""
        outputs = outputs_of("teacher", self.teacher, x, torch.float32)
        return outputs, self.teller.kinds(outputs, len(x))

    def _distances(self, wanted: dict[str, Output], got: dict[str, Output], images: int) -> Tensor:
        """Return the student's distance from the teacher at each image, ``(N,)``."""
        check_same(wanted, got, ("the teacher", "the student"))
        kinds = self.teller.kinds(wanted, images)
        return distances(wanted, got, images, kinds, self.power, self.recipe.temperature)

    def train(self, saved: StateFile, log: Path | None, progress: bool, on_look: Callable[[Look], None]) -> Adaptation:
        """Run the remaining steps, and give the network the best state."""
        recipe, chief, start = self.recipe, self.processes.rank == 0, time.perf_counter()
        before = self.looks[-1].seconds if self.looks else 0.0
        sums = torch.zeros(3, dtype=torch.float64, device="cpu")

        def look(step: int) -> None:
            since = step - self.looks[-1].step if self.looks else 0
            loss, kl, features = (value / since if since else None for value in sums.tolist())
            seconds, lr = before + time.perf_counter() - start, recipe.lr * self._decay(max(0, step - 1))
            self.looks.append(Look(step, seconds, lr, loss, kl, features, self._held_back(held)))
            sums.zero_()
            if self._best_step() == step:
                self.best = {name: p.detach().clone() for name, p in self.student.trained().items()}
            if chief:
                saved.write([asdict(one) for one in self.looks], self._state())
                if log is not None:
                    write_csv(log, self.looks)
                on_look(self.looks[-1])

        first = self.looks[-1].step if self.looks else 0
        bar = progress_bar(progress, "adapt", recipe.steps, "steps", done=first)
        with self.student.training_(), bar as advance:
            held = self._held_outputs()
            if not self.looks:
                look(0)
                if not math.isfinite(self.looks[0].held_back_kl):
                    lost = _where_nonfinite(self.model, held[0][0])
                    raise ModelError(f"student: {lost}: check the images, or quantize it again")
            stopped = "all steps are done"
            schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._decay, last_epoch=first - 1)
            network = self.processes.parallel(self.student)
            for step in range(first, recipe.steps):
                if self.looks[-1].step == step and self._has_stalled():
                    stopped = f"no improvement for {recipe.patience} looks"
                    break
                terms, where = self._gradients(network, step)
                if where is not None:
                    stopped = f"at step {step + 1}, NaN or infinities appeared in {where}"
                    if chief:
                        warnings.warn(f"{stopped}: the state of step {self._best_step()} is kept", stacklevel=3)
                    break
                self.optimizer.step()
                schedule.step()
                self.student.bound_()
                sums += terms
                advance(1)
                if (step + 1) % recipe.every == 0 or step + 1 == recipe.steps:
                    look(step + 1)
        with torch.no_grad():
            for name, p in self.student.trained().items():
                p.copy_(self.best[name])
        self.student.store()
        for pair in self.pairs:
            weight = getattr(pair.original, "weight", None)
            _cast_bias(pair.layer, weight.dtype if isinstance(weight, Tensor) else torch.float32)
        images = len(self.ours), len(self.held)
        measure = self.teller.measure
        return Adaptation(recipe, *images, self.seed, tuple(self.looks), self._best_step(), stopped, measure)

    def _gradients(self, network: nn.Module, step: int) -> tuple[Tensor, str | None]:
        """Return loss, KL and feature error ``(3,)`` of a step over all processes, and where a value is not finite."""
        recipe = self.recipe
        share = recipe.batch_size // self.processes.count
        part = slice(self.processes.rank * share, (self.processes.rank + 1) * share)
        which = self.ours[drawn(step, recipe.batch_size, len(self.ours), self.seed)[part]]
        x = self.x[which].to(self.device)
        with self.autocast:
            with torch.no_grad(), noting_outputs(self.pairs if recipe.features else ()) as outputs:
                wanted, _ = self._taught(x)
            self.student.expect(outputs)
            got, features = network(x)
        kl = self._distances(wanted, got, len(x)).mean()
        loss = kl + recipe.features * features
        self.optimizer.zero_grad()
        loss.backward()
        terms = self.processes.mean(torch.stack([loss, kl, features]).detach().cpu().double())
        bad = [name for name, p in self.student.trained().items() if p.grad is None or not p.grad.isfinite().all()]
        if terms.isfinite().all() and not bad:
            return terms, None
        self.student.expect({})
        with torch.no_grad(), self.autocast:
            layer = nonfinite_layer(self.model, x)
        if layer is not None:
            return terms, f"layer {layer!r}"
        return terms, f"the gradient of {bad[-1]!r}" if bad else "the loss"

    @torch.no_grad()
    def _held_outputs(self) -> list[tuple[Batch, dict[str, Output]]]:
        """Return the images held back that this process evaluates, with the teacher's outputs for them."""
        mine = self.held[self.processes.rank :: self.processes.count]
        batches = [self.x[which] for which in torch.split(mine, self.recipe.batch_size)]
        return [(batch, self._taught(batch)[0]) for batch in batches]

    @torch.no_grad()
    def _held_back(self, held: list[tuple[Batch, dict[str, Output]]]) -> float:
        self.student.expect({})
        total = torch.zeros(1, dtype=torch.float64, device="cpu")
        for x, wanted in held:
            with self.autocast:
                got, _ = self.student(x)
            total += float(self._distances(wanted, got, len(x)).sum())
        return float(self.processes.mean(total)) * self.processes.count / len(self.held)

    def _decay(self, step: int) -> float:
        """Return the factor of the learning rate."""
        return (1 + math.cos(math.pi * step / self.recipe.steps)) / 2 if self.recipe.schedule == "cosine" else 1.0

    def _best_step(self) -> int:
        return min(self.looks, key=lambda look: look.held_back_kl).step

    def _has_stalled(self) -> bool:
        since = [look for look in self.looks if look.step > self._best_step()]
        return len(since) >= self.recipe.patience

    def _state(self) -> dict[str, Tensor]:
        named = self.student.trained()
        tensors: dict[str, Tensor] = {f"now/{name}": p for name, p in named.items()}
        tensors |= {f"best/{name}": value for name, value in self.best.items()}
        for name, p in named.items():
            tensors |= {f"{key}/{name}": value for key, value in self.optimizer.state[p].items()}
        return tensors

    @torch.no_grad()
    def resume(self, saved: StateFile, data: Any, tensors: dict[str, Tensor]) -> None:
        """Restore a state.

        Raises:
            FileFormatError: ``data`` and ``tensors`` do not belong to a training of this network.
        """
        self.looks = saved.records(Look, data)
        steps = [look.step for look in self.looks]
        if steps[0] != 0 or sorted(set(steps)) != steps or steps[-1] > self.recipe.steps:
            raise saved.refusal(f"its looks are not at increasing steps from 0 to {self.recipe.steps}")
        expected: dict[str, Tensor] = {}
        for name, p in self.student.trained().items():
            expected |= {f"now/{name}": p, f"best/{name}": p}
            if steps[-1] > 0:
                # Moments stored by Adam.
                expected |= {f"step/{name}": torch.empty((), dtype=torch.float32, device="cpu")}
                expected |= {f"exp_avg/{name}": p, f"exp_avg_sq/{name}": p}
        saved.check_tensors(tensors, expected)
        for key, value in tensors.items():
            kind, _, name = key.partition("/")
            p = self.student.trained()[name]
            if kind == "now":
                p.copy_(value)
            elif kind == "best":
                self.best[name] = value.to(self.device)
            else:
                # The step count stays on the CPU.
                self.optimizer.state[p][kind] = value if kind == "step" else value.to(self.device)


def _cast_bias(layer: DSLayer, dtype: torch.dtype) -> None:
    assert layer.bias is not None
    if layer.bias.dtype != dtype:
        layer.bias = nn.Parameter(layer.bias.detach().to(dtype), requires_grad=layer.bias.requires_grad)


def _where_nonfinite(model: nn.Module, x: Batch) -> str:
    """Describe where values of ``model`` on the images ``x`` become non-finite."""
    layer = nonfinite_layer(model, x)
    if layer is not None:
        return f"NaN or infinities first appear in layer {layer!r}"
    largest = float(by_sample(x).abs().max())
    return f"the squares of its outputs overflow float32, for images with values up to {largest:.3g}"
