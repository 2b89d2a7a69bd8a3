"""Folders in the format of the Hugging Face Hub: written, pushed and fetched. No test uses the internet."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi, ModelCard, RepoUrl
from huggingface_hub.errors import LocalEntryNotFoundError
from torch import nn

import dsconv
from dsconv.demo import load_digits
from dsconv.errors import FileFormatError, ModelError
from dsconv.io import read_header
from dsconv.nn import DSConvModel

FILES = {"README.md", "config.json", "model.safetensors"}
IMAGES, LABELS = load_digits("test")


@pytest.fixture(scope="module")
def network() -> nn.Module:
    return dsconv.zoo.build("dsconv/digits_resnet")


@pytest.fixture(scope="module")
def quantized(network: nn.Module) -> nn.Module:
    return dsconv.quantize(network, "paper")


@pytest.fixture
def folder(quantized: nn.Module, tmp_path: Path) -> Path:
    DSConvModel(quantized).save_pretrained(tmp_path / "digits")
    return tmp_path / "digits"


def unnamed() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 10, 3))


def output(model: nn.Module, images: torch.Tensor = IMAGES[:8]) -> torch.Tensor:
    with torch.inference_mode():
        return model(images)


def card_of(model: nn.Module, evaluation: Any = None, **facts: Any) -> str:
    return str(DSConvModel(model, evaluation).generate_model_card(**facts))


def test_what_is_loaded_computes_what_was_saved(folder: Path, quantized: nn.Module) -> None:
    assert {file.name for file in folder.iterdir()} == FILES
    loaded = DSConvModel.from_pretrained(folder)
    assert torch.equal(output(loaded), output(quantized))
    assert loaded.preprocess == dsconv.zoo.preprocess_of(quantized) is not None
    # There is one file format.
    assert torch.equal(output(dsconv.load(folder)), output(quantized))
    assert torch.equal(output(dsconv.load(folder / "model.safetensors")), output(quantized))


def test_a_network_that_the_file_cannot_name_is_loaded_into_the_one_given(tmp_path: Path) -> None:
    quantized, images = dsconv.quantize(unnamed()), torch.randn(2, 3, 8, 8)
    DSConvModel(quantized).save_pretrained(tmp_path)
    assert torch.equal(
        output(DSConvModel.from_pretrained(tmp_path, model=unnamed()), images), output(quantized, images)
    )
    with pytest.raises(ModelError, match="pass the float model"):
        DSConvModel.from_pretrained(tmp_path)


def test_of_a_compiled_network_the_network_is_saved(quantized: nn.Module, tmp_path: Path) -> None:
    compiled = dsconv.compile(quantized, IMAGES[:1])
    DSConvModel(compiled).save_pretrained(tmp_path)
    assert torch.equal(output(DSConvModel.from_pretrained(tmp_path)), output(compiled))


def test_the_config_is_what_the_file_says(folder: Path) -> None:
    config, header = json.loads((folder / "config.json").read_text()), read_header(folder / "model.safetensors")
    assert config["architecture"] == header.architecture == "dsconv/digits_resnet"
    assert config["quantization_config"].items() >= {"quant_method": "dsconv", **header.config}.items()
    assert config["preprocess"] == header.preprocess


# The card


def rows(card: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in card.splitlines() if line.startswith("|")]


def test_the_card_states_size_accuracy_and_what_stayed_in_float(network: nn.Module, quantized: nn.Module) -> None:
    found, evaluation = dsconv.summary(quantized), dsconv.compare(network, quantized, [(IMAGES, LABELS)])
    cells = rows(card_of(quantized, evaluation))
    assert ["size in MB", f"{found.bytes_before / 1e6:.2f}", f"{found.bytes_after / 1e6:.2f}"] in cells
    assert ["bits per weight", "32", f"{found.effective_bits:.2f}"] in cells
    top1 = [f"top-1 in %, {len(IMAGES)} images", f"{evaluation.reference.top1:.2f}", f"{evaluation.top1:.2f}"]
    assert top1 in cells
    assert ["KL divergence of the logits in nats", "", f"{evaluation.kl:.3g}"] in cells
    assert ["`fc`", "10x96", "the config leaves it in float"] in cells
    counts = [int(row[0]) for row in cells if row[1].endswith(" bits")]
    assert sum(counts) == sum(layer.quantized for layer in found.layers)


def test_an_evaluation_without_a_reference_or_labels_has_no_figures_of_them(quantized: nn.Module) -> None:
    alone = dsconv.evaluate(quantized, [(IMAGES, LABELS)])
    cells = rows(card_of(quantized, alone))
    assert [f"top-1 in %, {len(IMAGES)} images", "", f"{alone.top1:.2f}"] in cells
    assert "nats" not in card_of(quantized, alone)
    assert "top-1" not in card_of(quantized, dsconv.evaluate(quantized, IMAGES)) + card_of(quantized)


def test_a_network_quantized_whole_says_so() -> None:
    card = card_of(dsconv.quantize(unnamed()))
    assert "No layer is left in float." in card and "Left in float" not in card
    assert "the float network, a Sequential" in card and "Images are prepared" not in card


def test_the_code_of_the_card_runs(folder: Path, quantized: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "README.md").unlink()
    DSConvModel(quantized).save_pretrained(folder, model_card_kwargs={"repo_id": "digits"})
    monkeypatch.chdir(folder.parent)
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), flags=re.DOTALL)
    names: dict[str, Any] = {"images": IMAGES[:8]}
    exec(code, names)
    assert torch.equal(names["logits"], output(quantized))


def test_the_card_can_be_read_by_the_hub_and_is_not_replaced(folder: Path, quantized: nn.Module) -> None:
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "dsconv" and "quantized" in card.data.tags
    (folder / "README.md").write_text("mine")
    DSConvModel(quantized).save_pretrained(folder)
    assert (folder / "README.md").read_text() == "mine"


# The Hub


def test_what_is_pushed_is_the_folder(quantized: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def create_repo(api: HfApi, repo_id: str, **options: Any) -> RepoUrl:
        assert options == {"private": True, "exist_ok": True}
        return RepoUrl(f"https://huggingface.co/{repo_id}")

    def upload_folder(api: HfApi, *, folder_path: Path, **options: Any) -> str:
        Path(folder_path).rename(tmp_path / "pushed")
        return f"{options['repo_id']} {options['commit_message']}"

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    pushed = DSConvModel(quantized).push_to_hub("someone/digits", private=True, commit_message="first")
    assert pushed == "someone/digits first"
    assert {file.name for file in (tmp_path / "pushed").iterdir()} == FILES
    assert torch.equal(output(DSConvModel.from_pretrained(tmp_path / "pushed")), output(quantized))
    assert 'from_pretrained("someone/digits")' in (tmp_path / "pushed" / "README.md").read_text()


def test_a_name_on_the_hub_is_fetched_through_its_cache(folder: Path, quantized: nn.Module, tmp_path: Path) -> None:
    commit, cached = "0" * 40, tmp_path / "cache" / "models--someone--digits"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text(commit)
    (cached / "snapshots").mkdir()
    folder.rename(cached / "snapshots" / commit)
    fetch: Callable[[str], nn.Module] = lambda name: DSConvModel.from_pretrained(  # noqa: E731
        name, cache_dir=tmp_path / "cache", local_files_only=True
    )
    assert torch.equal(output(fetch("someone/digits")), output(quantized))
    with pytest.raises(LocalEntryNotFoundError):
        fetch("someone/else")


# Mistakes


def test_a_network_that_is_not_quantized_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"dsconv\.quantize first"):
        DSConvModel(unnamed()).save_pretrained(tmp_path)


def test_a_folder_without_the_file_or_with_a_broken_one_is_an_error_that_names_it(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path / "model.safetensors"))):
        DSConvModel.from_pretrained(tmp_path)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(FileFormatError, match=re.escape(str(file))):
        DSConvModel.from_pretrained(folder)


def test_without_the_hubs_package_the_extra_is_named() -> None:
    code = "import sys; sys.modules['huggingface_hub'] = None; import dsconv; dsconv.nn.DSConvModel"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert "MissingExtraError: huggingface_hub is not installed: pip install 'dsconv[hub]'" in done.stderr
