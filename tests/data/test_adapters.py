"""A start model of a base and an adapter is imported as one model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from alignment.data.adapters import check_adapter
from alignment.data.models import import_model
from alignment.errors import InputError
from alignment.estimating.adapting import check_start_adapter
from alignment.estimating.seen import config_of

from .conftest import model_settings

Folder = Callable[..., Path]
IDS = torch.arange(5, 40)[None]


def imported(source: Path, target: Path, adapter: Path) -> None:
    import_model(source, model_settings(), target, lambda *a, **k: None, print, adapter)


def looked_at(base: Path, adapter: Path) -> None:
    """As before a run, without weights."""
    check_adapter(adapter)
    check_start_adapter(config_of(base), adapter)


def adapter_of(base: Path, folder: Path, **how: Any) -> Any:
    """Writes an adapter of random weights; returns the logits of base and adapter together."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = LoraConfig(**{"task_type": "CAUSAL_LM", "r": 2, "target_modules": "all-linear", **how})
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.requires_grad:
                weight.add_(torch.randn_like(weight) * (0.3 if "lora" in name else 0.1))
        model.save_pretrained(folder)
        return model(IDS).logits


@pytest.mark.parametrize("how", [{}, {"use_dora": True, "use_rslora": True}, {"modules_to_save": ["norm"]}])
def test_base_and_adapter_become_a_model_with_their_logits(
    how: dict[str, Any], model_folder: Folder, tmp_path: Path
) -> None:
    """As PEFT computes them, to rounding (1e-5); the base's are others."""
    from transformers import AutoModelForCausalLM

    base = model_folder()
    expected = adapter_of(base, tmp_path / "adapter", **how)
    looked_at(base, tmp_path / "adapter")
    imported(base, tmp_path / "model", tmp_path / "adapter")
    assert not (tmp_path / "model" / "adapter_config.json").exists()
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "model")(IDS).logits
        plain = AutoModelForCausalLM.from_pretrained(base)(IDS).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(found, plain, atol=1e-3)


def edited(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps({**config, **changes}))

    return edit


def pickled(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def wider(folder: Path) -> None:
    weights = load_file(folder / "adapter_model.safetensors")
    name = next(name for name in weights if name.endswith("lora_A.weight"))
    save_file({**weights, name: weights[name].repeat(1, 2)}, folder / "adapter_model.safetensors")


def cut(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "no config": (lambda folder: (folder / "adapter_config.json").unlink(), "has no adapter_config.json"),
    "another method": (edited(peft_type="PROMPT_TUNING"), "is an adapter of the type PROMPT_TUNING"),
    "a pickle": (pickled, "has no adapter_model.safetensors (save it as safetensors"),
    "other layers": (edited(target_modules=["c_attn"]), "does not fit the model: "),
    "of wider layers": (wider, "does not fit the model: "),
    "a cut file": (cut, "does not fit the model: "),
    "more layers": (edited(target_modules=["q_proj"]), "does not fit the model: 12 weights are on one side only"),
    "another rank": (edited(r=3), "does not fit the model: "),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_an_adapter_that_does_not_fit_is_one_line_and_nothing_is_written(
    case: str, model_folder: Folder, tmp_path: Path
) -> None:
    damage, message = DAMAGE[case]
    base, adapter = model_folder(), tmp_path / "adapter"
    adapter_of(base, adapter)
    damage(adapter)
    for find in (lambda: looked_at(base, adapter), lambda: imported(base, tmp_path / "model", adapter)):
        with pytest.raises(InputError) as caught:
            find()
        assert str(caught.value).startswith(f"{adapter}: {message}")
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "model").exists()
