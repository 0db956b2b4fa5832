"""After the last attention nothing passes from token to token: what comes then is computed where an answer is read.

The MLP of the last layer is the larger part of it. Of a pack, only the tokens whose hidden state is scored (or, for a
classifier, the last of each row) go through it; the others' hidden states end without it, and nobody reads them.
"""

from __future__ import annotations

import functools
import types
from typing import Any

import torch
from torch import Tensor


def narrow(model: Any) -> None:
    """Teach the last layer of a transformers model to take `read`, [tokens] (indices), from its forward's arguments.

    A model whose layers have no `mlp`, or that does not hand its arguments on to them, computes all as before.
    """
    layers = [
        module for module in model.base_model.modules() if isinstance(getattr(module, "mlp", None), torch.nn.Module)
    ]
    if not layers:
        return
    last, mlp = layers[-1], layers[-1].mlp
    stock = mlp.forward
    reads: list[Tensor | None] = [None]

    def remember(module: Any, arguments: Any, kwargs: dict[str, Any]) -> None:  # also when checkpointing calls it again
        reads[0] = kwargs.get("read")

    @functools.wraps(type(mlp).forward)
    @torch.compiler.disable  # how many are read differs from pack to pack
    def forward(self: Any, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        read = reads[0]
        if read is None:
            return stock(hidden, *args, **kwargs)
        some = stock(hidden.index_select(1, read), *args, **kwargs)
        return some.new_zeros(*hidden.shape[:2], some.shape[-1]).index_copy(1, read, some)

    last.register_forward_pre_hook(remember, with_kwargs=True)
    mlp.forward = types.MethodType(forward, mlp)
