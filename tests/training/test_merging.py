"""Merging against values by hand, the parents bit for bit, and folders that must not be merged."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from alignment.errors import InputError
from alignment.training import merging
from tests.conftest import write_tiny_model

Save = Callable[..., Path]


@pytest.fixture(scope="module")
def parents(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two models with different weights; the second in several shards."""
    folder = tmp_path_factory.mktemp("parents")
    one, other = write_tiny_model(folder / "one"), write_tiny_model(folder / "other")
    model = AutoModelForCausalLM.from_pretrained(other)
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    (other / "model.safetensors").unlink()
    model.save_pretrained(other, max_shard_size="40KB")
    assert len(list(other.glob("*.safetensors"))) > 1
    return one, other


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def merge(one: Path, other: Path, target: Path, method: Any, t: float) -> dict[str, float]:
    return merging.merge(one, other, target, method, t, lambda step, total: None)


@pytest.mark.parametrize("method", ["linear", "slerp"])
@pytest.mark.parametrize("turned", [False, True])
def test_the_ends_are_the_parents_bit_for_bit(
    method: str, turned: bool, parents: tuple[Path, Path], tmp_path: Path
) -> None:
    one, other = parents[::-1] if turned else parents
    for t, parent in ((0.0, one), (1.0, other)):
        told = merge(one, other, tmp_path / f"{t}", method, t)
        found, wanted = weights(tmp_path / f"{t}"), weights(parent)
        assert found.keys() == wanted.keys() and told["tensors"] == len(wanted)
        assert all(torch.equal(found[name].view(torch.uint8), wanted[name].view(torch.uint8)) for name in wanted)
        assert {f.name for f in (tmp_path / f"{t}").iterdir()} == {f.name for f in one.iterdir()}


def test_a_merged_folder_is_an_ordinary_model_between_them(parents: tuple[Path, Path], tmp_path: Path) -> None:
    merge(*parents, tmp_path / "m", "linear", 0.25)
    found, one, other = weights(tmp_path / "m"), weights(parents[0]), weights(parents[1])
    for name, value in found.items():
        assert torch.allclose(value, 0.75 * one[name] + 0.25 * other[name], atol=1e-7), name
    model, tokenizer = (auto.from_pretrained(tmp_path / "m") for auto in (AutoModelForCausalLM, AutoTokenizer))
    assert model(torch.tensor([[5, 6]])).logits.shape == (1, 2, 261) and tokenizer.chat_template


def test_slerp_by_hand_and_on_the_sphere() -> None:
    """Between (1, 0) and (0, 1), 90 degrees apart, a third of the way is at 30 degrees: (sqrt(3) / 2, 1 / 2); linear
    it is (2/3, 1/3), inside the circle. Every tensor between two of norm 1 has norm 1."""
    right, up = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    made, fell_back = merging.merged(right, up, "slerp", 1 / 3)
    assert torch.allclose(made, torch.tensor([math.sqrt(3) / 2, 0.5]), atol=1e-7) and not fell_back
    assert torch.allclose(merging.merged(right, up, "linear", 1 / 3)[0], torch.tensor([2 / 3, 1 / 3]), atol=1e-7)
    one, other = (torch.randn(6, 50).double() for _ in range(2))
    for t in (0.1, 0.5, 0.8):
        assert merging.merged(one / one.norm(), other / other.norm(), "slerp", t)[0].norm() == pytest.approx(
            1, abs=1e-12
        )


def test_slerp_of_pieces_is_that_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = torch.randn(7, 5), torch.randn(7, 5)
    whole = merging.merged(one, other, "slerp", 0.3)[0]
    monkeypatch.setattr(merging, "PIECE", 4)
    assert torch.allclose(merging.merged(one, other, "slerp", 0.3)[0], whole, atol=1e-7)


@pytest.mark.parametrize("factor", [1.0, 2.5, -1.0, 0.0])
def test_slerp_of_parallel_opposite_or_empty_tensors_is_linear_and_said(factor: float) -> None:
    one = torch.randn(4, 3)
    made, fell_back = merging.merged(one, factor * one, "slerp", 0.25)
    assert fell_back and torch.allclose(made, (0.75 + 0.25 * factor) * one, atol=1e-6)


def test_other_types_become_the_wider_one(parents: tuple[Path, Path], tmp_path: Path) -> None:
    half = tmp_path / "half"
    shutil.copytree(parents[0], half)
    AutoModelForCausalLM.from_pretrained(half, dtype=torch.bfloat16).save_pretrained(half)
    merge(half, parents[1], tmp_path / "m", "linear", 0.5)
    assert {value.dtype for value in weights(tmp_path / "m").values()} == {torch.float32}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "m").dtype == torch.float32
    (half / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(parents[0], dtype=torch.bfloat16).save_pretrained(half, max_shard_size="20KB")
    merge(half, half, tmp_path / "h", "slerp", 0.5)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "h").dtype == torch.bfloat16


def wider(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))


def another_word(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["word"])
    tokenizer.save_pretrained(folder)


def another_template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ messages }}")


def one_less(folder: Path) -> None:
    from safetensors.torch import save_file

    kept = weights(folder)
    kept.pop("model.norm.weight")
    save_file(kept, folder / "model.safetensors", {"format": "pt"})


def another_shape(folder: Path) -> None:
    from safetensors.torch import save_file

    save_file({**weights(folder), "model.norm.weight": torch.ones(31)}, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("harm", "line"),
    [
        (wider, r"other configurations: rms_norm_eps \(1e-06 and 0.5\)"),
        (another_word, "do not share a tokenizer"),
        (another_template, "another chat_template"),
        (one_less, "model.norm.weight is a tensor of one of the two models only"),
        (another_shape, r"model.norm.weight has the shapes \[32\] and \[31\]"),
    ],
)
def test_models_that_do_not_belong_together_are_refused(
    harm: Callable[[Path], None], line: str, parents: tuple[Path, Path], tmp_path: Path
) -> None:
    shutil.copytree(parents[0], tmp_path / "other")
    harm(tmp_path / "other")
    with pytest.raises(InputError, match=line):
        merge(parents[0], tmp_path / "other", tmp_path / "m", "linear", 0.5)
    assert not (tmp_path / "m").exists()
