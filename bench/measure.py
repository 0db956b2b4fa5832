"""Peak memory, what a model was really given, and floating-point operations. Used inside the workers."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from bench.workloads import Size, Totals

# Dense bf16 FLOP/s by the name that CUDA gives the device, from the vendor's data sheets. A device that is not here has
# no utilisation rather than a guessed one.
PEAK_BF16 = {"H100": 989e12}


def start_peak(device: str) -> int:
    """Start a new peak. Returns the bytes in use now; see `peak`."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return int(torch.cuda.memory_allocated())
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # else what an earlier run freed would count as in use
    except (OSError, AttributeError):  # another C library
        pass
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def peak(device: str) -> int:
    """Bytes at the peak since start_peak: of the whole process on CPU, of PyTorch's tensors on a GPU."""
    return int(torch.cuda.max_memory_allocated()) if device == "cuda" else status("VmHWM")


def status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}")


class Counter:
    """Positions that went through a model's body: `policy` where gradients are kept, `reference` where they are not.

    positions include padding; attended do not. What is computed again by gradient checkpointing does not count: that
    is in the executed FLOPs.
    """

    def __init__(self) -> None:
        self.positions = {"policy": 0, "reference": 0}
        self._attended: dict[str, Any] = {"policy": 0, "reference": 0}

    def watch(self, model: Any) -> None:
        """model: with a head; its body is model.base_model."""
        model.base_model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module: Any, arguments: Any, kwargs: dict[str, Any]) -> None:
        given = kwargs.get("input_ids", arguments[0] if arguments else None)
        shape = given.shape if given is not None else kwargs["inputs_embeds"].shape[:2]
        who = "policy" if torch.is_grad_enabled() else "reference"
        mask = kwargs.get("attention_mask")
        self.positions[who] += shape.numel()
        # A sum on the device: asking for its value here would make a GPU wait
        self._attended[who] += mask.sum() if torch.is_tensor(mask) and mask.dim() == 2 else shape.numel()

    def to_json(self) -> dict[str, dict[str, int]]:
        return {"positions": self.positions, "attended": {who: int(n) for who, n in self._attended.items()}}


def flop_counter() -> FlopCounterMode:
    """Counts the FLOPs of what is executed inside it: matrix products and attention, the latter without causal halving.

    PyTorch's counter lacks the CPU's fused attention and a product that is added in place, as a head's gradient may be.
    """
    aten = torch.ops.aten

    def forward(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        return sdpa_flop_count(query, key, value)

    def backward(grad: Any, query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        return sdpa_backward_flop_count(grad, query, key, value)

    def added(sums: Any, left: Any, right: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        return int(2 * left[0] * left[1] * right[1])

    mapping = {
        aten.addmm_: added,
        aten._scaled_dot_product_flash_attention_for_cpu: forward,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }
    return FlopCounterMode(display=False, custom_mapping=mapping)


def model_flops(size: Size, totals: Totals, task: str) -> float:
    """FLOPs that the unshared, unpadded computation needs: forward and twice that backward; DPO's reference forward.

    6 FLOPs a weight and token, the head on scored positions only, attention 12 layers hidden sum(length^2), halved
    because it is causal.
    """
    outputs = 1 if task == "reward" else size.vocabulary
    body = 6 * size.body_parameters() * totals.tokens
    head = 6 * size.hidden * outputs * totals.scored
    attention = 12 * size.layers * size.hidden * totals.squares / 2
    policy = body + head + attention
    return policy * 4 / 3 if task == "dpo" else policy


def peak_flops(device_name: str) -> float | None:
    return next((peak for name, peak in PEAK_BF16.items() if name in device_name), None)
