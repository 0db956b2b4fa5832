"""QLoRA where it cannot be: one line, before a model is loaded. With a GPU and bitsandbytes it is trained."""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from alignment.errors import MachineError, TrainingError
from alignment.training.model import load, lora_config
from tests.conftest import write_tiny_model
from tests.training import tiny

QLORA = tiny.lora(quantize="nf4")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_without_a_gpu_it_is_refused_before_anything_is_loaded(kind: str, tmp_path: Path) -> None:
    nowhere = {"model": tmp_path / "absent", "data": tmp_path / "absent"}
    context = tiny.context(tmp_path / "out", nowhere, getattr(tiny, kind)(lora=QLORA), tiny.engine())
    with pytest.raises(MachineError, match=r"lora\.quantize: QLoRA needs a CUDA GPU, and there is none"):
        importlib.import_module(f"alignment.stages.{kind}").run(context)


def test_a_stage_that_loads_all_bits_is_not_taken_for_qlora(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"loaded without regard to lora\.quantize"):
        lora_config(QLORA, load(write_tiny_model(tmp_path)))


@pytest.mark.skipif(not torch.cuda.is_available() or not find_spec("bitsandbytes"), reason="needs CUDA, bitsandbytes")
@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_what_is_written_is_what_was_trained(kind: str, tmp_path: Path) -> None:
    """The merged model answers as the adapter on the model in 4 bits does, to rounding: 1e-3 of its logits."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    inputs = tiny.write_inputs(tmp_path, kind)
    context = tiny.context(tmp_path / "out", inputs, getattr(tiny, kind)(lora=QLORA), tiny.engine())
    importlib.import_module(f"alignment.stages.{kind}").run(context)
    small = load(inputs["model"] / "model", QLORA)
    ids = torch.arange(5, 40)[None].to(small.device)
    with torch.no_grad():
        expected = PeftModel.from_pretrained(small, context.folder / "adapter")(ids).logits
        merged = AutoModelForCausalLM.from_pretrained(context.folder / "model").to(small.device)
        torch.testing.assert_close(merged(ids).logits, expected, atol=1e-3, rtol=0)
        plain = AutoModelForCausalLM.from_pretrained(inputs["model"] / "model").to(small.device)
        assert not torch.allclose(plain(ids).logits, expected, atol=1e-2)
