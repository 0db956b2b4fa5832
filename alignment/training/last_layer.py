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


class _Read:
    """places: [K], of the pack that the layer is called with; None: all, as for padded rows."""

    places: Tensor | None = None


def narrow(layer: torch.nn.Module) -> None:
    """Teach a decoder's last layer to heed `layout.read` where its forward is given a layout.

    A layer that has none of these modules, or is not given the layout, computes all as before.
    """
    read = _Read()

    @torch.compiler.disable  # how many are read differs from pack to pack: a compiler must not look
    def remember(layer: Any, args: Any, kwargs: dict[str, Any]) -> Any:  # also when checkpointing calls the layer anew
        read.places = getattr(kwargs.get("layout"), "read", None)
        return None if read.places is None else (args, {**kwargs, "narrow": True})

    layer.register_forward_pre_hook(remember, with_kwargs=True)
    for name, module in layer.named_modules():
        if name in ON_READ_TOKENS:
            _on_read_tokens(module, read)


def _on_read_tokens(module: Any, read: _Read) -> None:
    module.whole_forward = module.forward  # a copy of the model takes it along, as its own

    @functools.wraps(type(module).forward)
    @torch.compiler.disable
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if read.places is None or not args:
            return self.whole_forward(*args, **kwargs)
        hidden = args[0]
        some = self.whole_forward(hidden.index_select(1, read.places), *args[1:], **kwargs)
        if isinstance(some, tuple):  # experts tell of their routing, too, which is used for no loss here
            return _among(some[0], read.places, hidden), *some[1:]
        return _among(some, read.places, hidden)

    module.forward = types.MethodType(forward, module)


def _among(some: Tensor, places: Tensor, hidden: Tensor) -> Tensor:
    """some: [1, K, size] -> [1, N, size] as `hidden` has it, 0 elsewhere; gradients flow back."""
    return some.new_zeros(*hidden.shape[:2], some.shape[-1]).index_copy(1, places, some)
