"""After the last attention nothing passes from token to token: what comes then is computed where an answer is read.

In the last layer all tokens of a pack need keys and values. Queries, the output's projection and the MLP are needed by
those alone whose hidden state is scored (or, for a classifier, is the last of its row). The others' hidden states end
without them, and nobody reads these.
"""

from __future__ import annotations

import functools
import types
from typing import Any

import torch
from torch import Tensor

ON_READ_TOKENS = ("self_attn.q_proj", "self_attn.o_proj", "mlp")  # where a layer has modules of these names


def narrow(layer: torch.nn.Module) -> None:
    """Teach a decoder's last layer to take `read` from its forward's arguments, [K] places in the pack.

    A layer that has none of these modules, or is not given the argument, computes all as before.
    """
    read: list[Tensor | None] = [None]

    def remember(layer: Any, args: Any, kwargs: dict[str, Any]) -> Any:  # also when checkpointing calls the layer anew
        read[0] = kwargs.get("read")
        return None if read[0] is None else (args, {**kwargs, "narrow": True})

    layer.register_forward_pre_hook(remember, with_kwargs=True)
    for name, module in layer.named_modules():
        if name in ON_READ_TOKENS:
            module.forward = types.MethodType(_on_read_tokens(module, read), module)


def _on_read_tokens(module: Any, read: list[Tensor | None]) -> Any:
    stock = module.forward

    @functools.wraps(type(module).forward)
    @torch.compiler.disable  # how many are read differs from pack to pack
    def forward(self: Any, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        if read[0] is None:
            return stock(hidden, *args, **kwargs)
        some = stock(hidden.index_select(1, read[0]), *args, **kwargs)
        if isinstance(some, tuple):  # experts tell of their routing, too, which is used for no loss here
            return _among(some[0], read[0], hidden), *some[1:]
        return _among(some, read[0], hidden)

    return forward


def _among(some: Tensor, places: Tensor, hidden: Tensor) -> Tensor:
    """some: [1, K, size] -> [1, N, size] as `hidden` has it, 0 elsewhere; gradients flow back."""
    return some.new_zeros(*hidden.shape[:2], some.shape[-1]).index_copy(1, places, some)
