"""Whether a model can be packed, found before the first step.

In two ways: `refusal(config, longest)` knows what cannot (layers that carry a state from token to token, rotary
frequencies that follow the length of a call), and `trial` computes a few short rows both ways, padded and packed, in
the engine that will train.
"""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from alignment.training import sequence
from alignment.training.attention import PACKED, WORDS, Call, NotPackable, Seen, calls_seen
from alignment.training.packing import IGNORED, Pack, pack

PACKABLE_LAYERS = {"full_attention", "sliding_attention"}
# How far apart packed and padded answers to the trial's rows may be in the mean, in nats (logits). Floor: rounding, of
# any model. Cap: for models that round more (OWN times what another padding changes); wrong masks give more than it.
FLOOR = {torch.float32: 2e-5, torch.bfloat16: 3e-2}
CAP = {torch.float32: 5e-3, torch.bfloat16: 5e-2}
OWN = 4
WIDER = 41  # columns more of padding


# --- by its configuration ---------------------------------------------------------------------------------------------


def refusal(config: Any, longest: int) -> str | None:
    """Why a model of this configuration is computed padded, or None. What it cannot tell, `trial` finds.

    longest: tokens of the longest row.
    """
    text = config.get_text_config()
    layers = set(getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None) or ())
    if layers - PACKABLE_LAYERS:
        return f"its {', '.join(sorted(layers - PACKABLE_LAYERS))} layers are of a kind that packs do not know"
    if getattr(text, "is_encoder_decoder", False):
        return "it is an encoder-decoder"
    if getattr(text, "attention_chunk_size", None):
        return "its attention is cut into chunks"
    return _rotary(text, longest)


def _rotary(config: Any, longest: int) -> str | None:
    """Two kinds of rotary embeddings choose their frequencies by the longest row of a call, once it leaves the window
    that the model was first trained for: then it matters who shares a micro-batch, and packs have other ones."""
    given = getattr(config, "rope_parameters", None) or {}
    for one in (given, *given.values()):  # for all layers, or for each kind of them
        name = one.get("rope_type") if isinstance(one, dict) else None
        if name not in ("dynamic", "longrope"):
            continue
        first = one.get("original_max_position_embeddings") if name == "longrope" else None
        window = first or config.max_position_embeddings
        if longest > window:
            return f"its rotary frequencies ({name}) follow the longest row of a micro-batch beyond {window} tokens"
    return None


# --- by computing both ways -------------------------------------------------------------------------------------------


class Trial(NamedTuple):
    """reason: why packs of a model are not what its padded rows are, in a line, or None. attention: what computed
    them, in words."""

    reason: str | None
    attention: str


def trial_rows(
    vocabulary: int, device: torch.device, branches: int, pad: int = 0, scored: bool = True
) -> tuple[dict[str, Tensor], Pack]:
    """A few rows, padded and packed: four rows of unlike length; as two groups, they begin alike.

    pad: the token that fills rows up, and is nowhere in them: padded, a classifier finds the ends of its rows by it.
    scored: some tokens have labels, not all: so the last layer leaves some out, as it does of a prompt.
    """
    lengths, shared, unlabelled = (23, 11, 17, 14), (9, 5), 4
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, vocabulary, (4, max(lengths)), generator=generator)
    mask = (torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]).long()
    if branches == 2:
        for first, count in enumerate(shared):
            ids[first + 2, :count] = ids[first, :count]
    ids = ids.masked_fill(ids == pad, (pad + 1) % vocabulary).masked_fill(mask == 0, pad)
    labels = ids.masked_fill((mask == 0) | (ids % 5 == 0), IGNORED)
    labels[:, : unlabelled if scored else None] = IGNORED
    rows = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    packed = sequence.cut(pack(ids, mask, labels, branches, bucket=sequence.size()))
    return {name: value.to(device) for name, value in rows.items()}, packed.to(device)


@torch.no_grad()
def trial(model: Any, engine: Any, branches: int, dtype: torch.dtype, device: torch.device) -> Trial:
    """Compare packs with padded rows. The model is left as it was.

    model: the transformers model; engine: what training calls (itself, or DDP or DeepSpeed around it); device: the
    engine's, which is not that of offloaded parameters. Every process of a group must call it: the rows are the same on
    all, and so is the number of forwards. An exception in a padded forward is the model's own and leaves here as it is:
    training would meet it, too. One in the packed forward is a reason.
    """
    classifies, text = hasattr(model, "score"), model.config.get_text_config()
    pad = getattr(text, "pad_token_id", None) or 0
    rows, packed = trial_rows(text.vocab_size, device, branches, pad, scored=not classifies)
    wider = {
        name: F.pad(value, (0, WIDER), value={"input_ids": pad, "labels": IGNORED}.get(name, 0))
        for name, value in rows.items()
    }

    def answer(given: dict[str, Tensor], **named: Any) -> Tensor:
        if classifies:
            without = {name: value for name, value in given.items() if name != "labels"}
            return engine(**without, use_cache=False, **named).logits.float()
        return engine(**given, use_cache=False, fused_lm_head=True, **named).log_probs.float()

    wanted = answer(rows)
    own = answer(wider)[:, : wanted.shape[1]]
    if not _takes(model.base_model, "layout"):
        return Trial("its forward does not hand on arguments that it does not know", "")
    before, seen = model.config._attn_implementation, Seen()
    try:
        model.set_attn_implementation(PACKED)
        with calls_seen() as seen:
            got = answer(rows, pack=packed)
        reason = _failed(seen) or _unlike(got, wanted, own, dtype) or _overlooked(seen.calls, text)
    except Exception as error:  # whatever an unknown architecture makes of unknown arguments
        reason = _line(error)
    finally:
        model.set_attn_implementation(before)
    return Trial(reason, " and ".join(WORDS[kernel] for kernel in sorted({call.kernel for call in seen.calls})))


def _takes(module: Any, name: str) -> bool:
    """Asked before the call: a TypeError from within it would leave an engine's hooks open."""
    parameters = inspect.signature(module.forward).parameters
    return name in parameters or any(one.kind is one.VAR_KEYWORD for one in parameters.values())


def _line(error: Exception) -> str:
    said = (str(error).splitlines() or [""])[0]
    return said if isinstance(error, NotPackable) else f"{type(error).__name__}: {said}"


def _failed(seen: Seen) -> str | None:
    return _line(seen.errors[0]) if seen.errors else None


def _unlike(got: Tensor, wanted: Tensor, own: Tensor, dtype: torch.dtype) -> str | None:
    """own: what was wanted, padded in another width. Rounding differs in sign from token to token: the mean says more
    than the largest."""
    apart, rounding = (float((wanted - other).abs().mean()) for other in (got, own))
    if apart <= min(max(FLOOR[dtype], OWN * rounding), CAP[dtype]):
        return None
    return f"packed it answers {apart:.2g} away from what it answers padded"


def _overlooked(calls: list[Call], config: Any) -> str | None:
    """The trial's rows are short: what a long one would show is read off the calls."""
    if len(calls) != config.num_hidden_layers:
        return f"{len(calls)} of its {config.num_hidden_layers} layers attend through transformers' table"
    declared = getattr(config, "sliding_window", None)
    if not declared:
        return None
    kinds, windows = getattr(config, "layer_types", None), [call.window for call in calls]
    if kinds is None:
        slides = getattr(config, "use_sliding_window", True)
        missed = slides and declared not in windows
        return f"its sliding window of {declared} tokens does not reach its attention" if missed else None
    for number, (kind, window) in enumerate(zip(kinds, windows, strict=True), start=1):
        if kind == "sliding_attention" and window != declared:
            return f"its sliding window of {declared} tokens does not reach the attention of layer {number}"
        if kind == "full_attention" and window is not None:
            return f"its layer {number} attends through a window of {window} tokens, though it is said to have none"
    return None
