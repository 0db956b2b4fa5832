"""QLoRA (Dettmers et al. 2023, arXiv:2305.14314): adapters on a start model in 4 bits, frozen.

The weights of its linear layers, but for the head's, are kept as nf4 with quantised constants (double quantisation,
section 3) and computed with in the precision of the stage; adapters stay fp32, as everything that is trained. The
reference is that model with its adapter off. What is written is a plain model of the weights that were trained with:
those of 4 bits, made fp32 again, and the adapter merged into them.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from alignment.config.stages.training import Lora
from alignment.errors import MachineError


def require_four_bits(lora: Lora | None) -> None:
    """That this machine can compute with what `lora` asks for; to be called before anything is loaded. Raises
    MachineError."""
    if lora is None or lora.quantize is None:
        return
    if not torch.cuda.is_available():
        what = "QLoRA needs a CUDA GPU, and there is none: bitsandbytes is fast there alone, and tested nowhere else"
        raise MachineError(what, where="lora.quantize", fix="lora.quantize=null")
    if find_spec("bitsandbytes") is None:
        raise MachineError("QLoRA needs bitsandbytes", where="lora.quantize", fix="pip install 'alignment[qlora]'")


def loading(lora: Lora | None, precision: str) -> dict[str, Any]:
    """What from_pretrained is told beyond the usual. precision: of the stage."""
    if lora is None or lora.quantize is None:
        return {}
    from transformers import BitsAndBytesConfig

    how = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=lora.quantize,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if precision == "bf16" else torch.float32,
    )
    device = torch.cuda.current_device() if torch.cuda.is_available() else "cpu"
    return {"quantization_config": how, "device_map": {"": device}}


def is_in_four_bits(model: Any) -> bool:
    return bool(getattr(model, "is_loaded_in_4bit", False))


@torch.no_grad()
def in_full(model: Any) -> dict[str, Tensor]:
    """name of each parameter that is kept in 4 bits -> what it stands for, fp32, on the CPU. model: of transformers,
    with adapters or without; the names are those without."""
    from bitsandbytes.functional import dequantize_4bit

    return {
        name.replace(".base_layer.", "."): dequantize_4bit(weight.data, weight.quant_state).to("cpu", torch.float32)
        for name, weight in model.named_parameters()
        if type(weight).__name__ == "Params4bit"
    }
