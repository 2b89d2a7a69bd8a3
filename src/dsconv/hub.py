"""Quantized networks as folders and on the Hugging Face Hub. Needs huggingface_hub: ``pip install 'dsconv[hub]'``."""

import json
import os
from collections import Counter
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, Self

from torch import nn

from dsconv import zoo
from dsconv.compilation import CompiledModel
from dsconv.conversion import LayerSummary, Summary, model_info, summary
from dsconv.conversion.wrappers import unwrapped
from dsconv.data import Preprocess
from dsconv.errors import MissingExtraError
from dsconv.evaluation import Comparison, Evaluation
from dsconv.files import replacing
from dsconv.io import FILE_NAME, load, read_header, save
from dsconv.io import architecture as architecture_of

try:
    import jinja2  # noqa: F401  (ModelCard.from_template needs it)
    from huggingface_hub import ModelCard, ModelHubMixin, hf_hub_download
except ModuleNotFoundError as error:
    raise MissingExtraError("hub", str(error.name)) from None

_CARD = """\
---
{{ card_data }}
---

# {{ name }} in low-bit integers

`{{ name }}` with the weights of its layers in blocks of small integers, and block floating point activations (DSConv,
ICCV 2019): {{ config }}. Made with dsconv {{ version }}.

| | float32 | quantized |
|---|---|---|
{% for row in figures -%}
| {{ row | join(" | ") }} |
{% endfor %}
## Use

```
pip install 'dsconv[hub]'
```

```python
import torch
from dsconv.nn import DSConvModel

{% if by_name -%}
model = DSConvModel.from_pretrained("{{ repo_id }}").eval()
{% else -%}
net = ...  # the float network, a {{ model_class }}; its weights do not matter
model = DSConvModel.from_pretrained("{{ repo_id }}", model=net).eval()
{% endif -%}
with torch.inference_mode():
    logits = model(images)
```
{% if preprocess %}
Images are prepared as `model.preprocess` says: {{ preprocess }}.
{% endif %}
## Layers

| layers | weight | activation | block |
|---|---|---|---|
{% for cells, count in settings.items() -%}
| {{ count }} | {{ cells | join(" | ") }} |
{% endfor %}
{% if in_float -%}
Left in float:

| layer | shape | why |
|---|---|---|
{% for layer in in_float -%}
| `{{ layer.name }}` | {{ layer.shape | join("x") }} | {{ layer.reason }} |
{% endfor %}
{%- else -%}
No layer is left in float.
{% endif -%}
"""


class DSConvModel(
    nn.Module,
    ModelHubMixin,
    library_name="dsconv",
    tags=["dsconv", "quantized", "block-floating-point"],
    model_card_template=_CARD,
):
    """Quantized network that can be saved to a folder in the Hugging Face layout, pushed to the Hub and downloaded.

    The folder holds ``model.safetensors``, which is the file that :func:`dsconv.save` writes, ``config.json`` for tools
    that expect it, and a model card, ``README.md``. An existing card is left unchanged.

    ``save_pretrained(folder)``, ``push_to_hub("user/name")`` and ``DSConvModel.from_pretrained("user/name")`` take the
    arguments of :class:`huggingface_hub.ModelHubMixin`; ``from_pretrained`` also accepts a folder and, as ``model``,
    the float network to load into if the file cannot name it (see :func:`dsconv.load`).

    Attributes:
        model: the quantized network, which the functions of dsconv take.
        evaluation: result of :func:`dsconv.evaluate` or :func:`dsconv.compare` for the card, or None.

    Raises:
        MissingExtraError: huggingface_hub is not installed.
        ModelError, FileFormatError, OSError: as :func:`dsconv.save` and :func:`dsconv.load`.

    >>> import dsconv, tempfile, torch
    >>> net = dsconv.quantize(dsconv.zoo.build("dsconv/digits_resnet"))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = DSConvModel(net).save_pretrained(folder)
    ...     sorted(os.listdir(folder)), type(DSConvModel.from_pretrained(folder).model).__name__
    (['README.md', 'config.json', 'model.safetensors'], 'DigitsResNet')
    """

    def __init__(self, model: nn.Module, evaluation: Evaluation | None = None):
        super().__init__()
        model = unwrapped(model)
        self.model = model.model if isinstance(model, CompiledModel) else model
        self.evaluation = evaluation

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the network and return its outputs."""
        return self.model(*args, **kwargs)

    @property
    def preprocess(self) -> Preprocess | None:
        """Preprocessing of its images, or None if it is unknown."""
        return zoo.preprocess_of(self.model)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *,
        repo_id: str | None = None,
        push_to_hub: bool = False,
        model_card_kwargs: dict[str, Any] | None = None,
        **options: Any,
    ) -> str | None:
        """Write the folder, each file atomically; see :class:`huggingface_hub.ModelHubMixin`."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        self._save_pretrained(folder)
        card = folder / "README.md"
        if not card.exists():
            with replacing(card) as beside:
                self.generate_model_card(**(model_card_kwargs or {})).save(beside)
        if not push_to_hub:
            return None
        return self.push_to_hub(repo_id or folder.name, model_card_kwargs=model_card_kwargs, **options)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """Push to the Hub as :class:`huggingface_hub.ModelHubMixin` does; return the URL of the commit."""
        kwargs["model_card_kwargs"] = {"repo_id": repo_id, **(kwargs.get("model_card_kwargs") or {})}
        return super().push_to_hub(repo_id, **kwargs)

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """Return the model card; keyword arguments replace its default values, such as ``repo_id``."""
        found, info = summary(self.model), model_info(self.model)
        architecture = info.architecture if info else None
        facts = {
            "name": architecture or type(self.model).__name__,
            "config": info.config.title if info else "settings by layer",
            "version": metadata.version("dsconv"),
            "figures": list(_figures(found, self.evaluation)),
            "by_name": (architecture is not None and zoo.is_registered(architecture))
            or architecture_of.describe(self.model) is not None,
            "model_class": type(self.model).__name__,
            "repo_id": "path/to/this/folder",
            "preprocess": str(self.preprocess or ""),
            "settings": Counter(_settings(layer) for layer in found.layers if layer.quantized),
            "in_float": [layer for layer in found.layers if not layer.quantized],
        }
        return super().generate_model_card(*args, **{**facts, **kwargs})

    def _save_pretrained(self, save_directory: Path) -> None:
        header = read_header(save(self.model, save_directory / FILE_NAME))
        quantization = {"quant_method": "dsconv", "dsconv_version": header.dsconv_version, **header.config}
        config = header.model_dump(include={"architecture", "model_class", "preprocess"})
        with replacing(save_directory / "config.json") as beside:
            beside.write_text(json.dumps({**config, "quantization_config": quantization}, indent=2) + "\n", "utf-8")

    @classmethod
    def _from_pretrained(cls, *, model_id: str, model: nn.Module | None = None, **download: Any) -> Self:
        path = model_id if os.path.isdir(model_id) else hf_hub_download(model_id, FILE_NAME, **download)
        return cls(load(path, model)).eval()


def _figures(found: Summary, evaluation: Evaluation | None) -> Iterator[tuple[str, str, str]]:
    """Yield the rows of the card's first table: label, value of the float network, value of the quantized one."""
    yield "size in MB", f"{found.bytes_before / 1e6:.2f}", f"{found.bytes_after / 1e6:.2f}"
    yield "bits per weight", "32", f"{found.effective_bits:.2f}"
    if evaluation is None:
        return
    reference = evaluation.reference if isinstance(evaluation, Comparison) else None
    known = ("top-1 in %", "top1"), ("top-5 in %", "top5"), ("mIoU in %", "miou"), ("PSNR in dB", "psnr_db")
    for name, attribute in known:
        before, after = getattr(reference, attribute, None), getattr(evaluation, attribute)
        if after is not None:
            yield (
                f"{name}, {evaluation.images:,} images",
                "" if before is None else f"{before:.2f}",
                f"{after:.2f}",
            )
    if isinstance(evaluation, Comparison):
        of, what = ("pixels of the", "outputs") if evaluation.task != "classification" else ("", "logits")
        if evaluation.agreement is not None and evaluation.kl is not None:
            yield f"{of} same class in %, {evaluation.images:,} images".strip(), "", f"{evaluation.agreement:.2f}"
            yield "KL divergence of the logits in nats", "", f"{evaluation.kl:.3g}"
        yield f"SQNR of the {what} in dB", "", f"{evaluation.logit_sqnr_db:.1f}"


def _settings(layer: LayerSummary) -> tuple[str, str, str]:
    """Return the cells of a row in the card's table of settings."""
    activation = f"{layer.activation_bits} bits, {layer.activation_sign}" if layer.activation_bits else "float"
    activation = "8 bits, winograd" if layer.algorithm == "winograd" else activation
    block = f"{layer.block_size}{' flat' if layer.blocks == 'flat' else ''}{', shift' if layer.weight_shift else ''}"
    return f"{layer.weight_bits} bits", activation, block
