"""Answers of a model, and the log-probabilities it gives to answers. Shapes: B rows, P prompt tokens, V vocabulary.

Generation is a loop of our own over the model's forward, not transformers' `generate`, for what that cannot do: a
prompt with several completions is read once, answers that have ended leave the batch, and every answer has its own
random numbers, so that who shares its batch changes nothing but rounding.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from alignment import control_tokens, guarded, loading
from alignment.drawing import Noise, choose
from alignment.errors import InputError, MachineError, is_out_of_memory
from alignment.padding import by_budget

Message = dict[str, Any]
Progress = Callable[..., None]  # progress(step, total, **facts)
Drawn = tuple[list[int], list[float]]  # an answer's token ids, and the log-probs of these at temperature 1, in nats
Few = TypeVar("Few")  # the answers to a prompt

TOKENS_PER_BATCH = 2048  # padded tokens of one scoring forward; bounds the logits at 2048 x V floats
COMPACT = 8  # ended answers leave the batch when they are an eighth of it: leaving copies the whole cache


@dataclass(frozen=True)
class Completion:
    """One answer. text: without special tokens. token_ids: with the end-of-turn token, if it came (finished).

    tokens: their number. log_prob: log p(answer | prompt) in nats under the model itself, at temperature 1.
    """

    text: str
    tokens: int
    finished: bool
    token_ids: list[int]
    log_prob: float


def quiet(step: int, total: int, **facts: Any) -> None:
    """The progress of those who do not ask for it."""


def load(folder: Path, precision: str) -> tuple[Any, Any]:
    """(model, tokenizer) of a Hugging Face folder, ready to answer. precision: fp32 | bf16. Raises InputError.

    Only safetensors are read (nothing is unpickled), and no code from the folder is run.
    """
    if not (folder / "config.json").is_file():
        raise InputError("not a model folder: it has no config.json", where=str(folder))
    if not any(folder.glob("*.safetensors")):
        raise InputError("the model folder has no weights (*.safetensors)", where=str(folder))
    model, tokenizer, lost = loading.load(AutoModelForCausalLM, folder, "model", precision)
    if lost:
        what = f"the weights lack {len(lost)} tensors, such as {', '.join(lost[:3])}"
        raise InputError(what, where=str(folder))
    if not tokenizer.chat_template:
        raise InputError("the tokenizer has no chat template", where=str(folder), fix="set model.chat_template")
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), tokenizer


def window(model: Any) -> int:
    """Most tokens of prompt and answer together."""
    return int(getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1 << 30)


def stop_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Ids that end an answer: the tokenizer's end-of-turn token and those of the model's generation settings."""
    named = getattr(model.generation_config, "eos_token_id", None)
    ids = {tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])} - {None}
    if not ids:
        raise InputError("the tokenizer has no end-of-turn token: no answer could ever end")
    return sorted(ids)


def encode_prompt(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """Token ids of a conversation rendered by the tokenizer's template, up to where the model's turn begins.

    Control tokens spelled out in it are text, as in training on neutralised rows. Raises InputError.
    """
    control = control_tokens.of(tokenizer)
    return control.encode(guarded.render(tokenizer, control.hidden(messages), None, prompt=True))


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[Message]],
    *,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    batch_size: int,
    seed: int,
    completions: int = 1,
    progress: Progress = quiet,
) -> list[list[Completion]]:
    """`completions` answers to each prompt, in the order of the prompts. temperature 0 is greedy. See `batches`."""
    how: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
    how |= {"batch_size": batch_size, "completions": completions, "progress": progress}
    return in_order(batches(model, tokenizer, prompts, **how))


def batches(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[Message]],
    *,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    batch_size: int,
    seed: int,
    completions: int = 1,
    skip: Collection[int] = (),
    progress: Progress = quiet,
) -> Iterator[tuple[list[int], list[list[Completion]]]]:
    """(rows of prompts, `completions` answers to each), a batch at a time. temperature 0 is greedy.

    A batch holds whole prompts, at least one, and at most batch_size answers if they fit; longest prompts first, so
    that memory is known early. The result depends on seed, and on batch_size only as rounding does. A batch whose rows
    are all in `skip` is left out, and changes no bit of the others. progress counts tokens, max_new_tokens an answer.
    Raises InputError for a prompt that leaves no room for its answer in the window, and for a model whose log-probs are
    not finite.
    """
    ids = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    check_window(ids, max_new_tokens, window(model))
    noise = Noise(len(ids), completions, max_new_tokens, seed)
    stop = stop_tokens(model, tokenizer)
    how: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "batch_size": batch_size}
    for rows, drawn in draw(model, ids, noise, stop=stop, skip=skip, progress=progress, **how):
        yield rows, [[completion(tokenizer, *one, stop) for one in few] for few in drawn]


def draw(
    model: Any,
    prompts: Sequence[Sequence[int]],
    noise: Tensor | Noise,
    *,
    stop: Sequence[int],
    temperature: float,
    top_p: float,
    batch_size: int,
    skip: Collection[int] = (),
    progress: Progress = quiet,
    size_key: str = "batch_size",
) -> Iterator[tuple[list[int], list[list[Drawn]]]]:
    """(rows of prompts, the answers to each), a batch at a time, as `batches` has them.

    prompts: token ids. noise: [prompts, answers, tokens], uniform in [0, 1): what an answer is depends on its own
    numbers alone. size_key: the setting that batch_size comes from. Raises InputError for log-probs that are not
    finite, MachineError where memory does not suffice.
    """
    count, copies, most = noise.shape
    per_batch, meter = max(1, batch_size // copies), Meter(count * copies * most, progress)
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))
    for batch in (order[start : start + per_batch] for start in range(0, len(order), per_batch)):
        if all(row in skip for row in batch):
            meter.add(0, ended=len(batch) * copies * most)
            continue
        answers: list[Drawn] = [([], []) for _ in range(len(batch) * copies)]
        given = [prompts[i] for i in batch], noise[batch].flatten(0, 1)
        with _advising(len(batch), copies, most, size_key):
            for rows, tokens, scores in _decode(model, *given, stop=stop, temperature=temperature, top_p=top_p):
                for row, token, score in zip(rows, tokens, scores, strict=True):
                    answers[row][0].append(token)
                    answers[row][1].append(score)
                ended = [row for row, token in zip(rows, tokens, strict=True) if token in stop]
                meter.add(len(rows), ended=sum(most - len(answers[row][0]) for row in ended))
        yield batch, [answers[slot * copies : (slot + 1) * copies] for slot in range(len(batch))]


@contextmanager
def _advising(prompts: int, copies: int, most: int, size_key: str) -> Iterator[None]:
    """Raises MachineError for memory that does not suffice inside, where smaller micro-batches are no help."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        what = f"out of memory: {prompts * copies} answers of up to {most} tokens are decoded at once"
        fewer = f"stage.*.{size_key}={prompts // 2 * copies}, or a lower max_new_tokens"
        alone = "lower max_new_tokens, or how many answers a prompt gets: those to one prompt are decoded together"
        raise MachineError(what, fix=fewer if prompts > 1 else alone) from error


def in_order(made: Iterable[tuple[list[int], list[Few]]]) -> list[Few]:
    """What came a batch at a time, in the order of the prompts."""
    found = {row: few for rows, answers in made for row, few in zip(rows, answers, strict=True)}
    return [found[row] for row in sorted(found)]


def stream(
    model: Any,
    tokenizer: Any,
    messages: Sequence[Message],
    *,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
) -> Iterator[str]:
    """One answer, piece by piece as it comes: a piece a token, empty while a character is incomplete.

    A character that stays incomplete is one more piece. The answer is at most what the window leaves; raises InputError
    if it leaves nothing.
    """
    ids = encode_prompt(tokenizer, messages)
    check_window([ids], 1, window(model))
    room = min(max_new_tokens, window(model) - len(ids))
    noise = torch.rand(1, room, generator=torch.Generator().manual_seed(seed))
    stop = stop_tokens(model, tokenizer)
    answer: list[int] = []
    text = said = ""
    for _, tokens, _ in _decode(model, [ids], noise, stop=stop, temperature=temperature, top_p=top_p):
        answer += tokens
        text = tokenizer.decode(answer, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        ready = said if text.endswith("\N{REPLACEMENT CHARACTER}") else text  # more bytes of a character are to come
        yield ready[len(said) :]
        said = ready
    if text != said:
        yield text[len(said) :]


def sequence_log_probs(
    model: Any,
    rows: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    tokens_per_batch: int = TOKENS_PER_BATCH,
    progress: Progress = quiet,
) -> list[Tensor]:
    """log p(token | all before it) in nats of every answer token. rows: (prompt ids, not empty; answer ids).

    Returns one fp32 CPU tensor [answer tokens] a row, in the order of the rows. Batches of like length under a budget
    of padded tokens; left padding puts all answers at the end, where alone the head is computed. Raises InputError for
    an empty prompt, for a row longer than the window, and for log-probs that are not finite.
    """
    limit = window(model)
    for number, (prompt, answer) in enumerate(rows, start=1):
        length = len(prompt) + len(answer)
        if not prompt or length > limit:
            what = f"{length} tokens, the window holds {limit}" if prompt else "the prompt is empty"
            raise InputError(what, where=f"row {number} to be scored")
    result: list[Tensor] = [torch.empty(0)] * len(rows)
    meter = Meter(sum(len(p) + len(a) for p, a in rows), progress)
    for batch in by_budget([len(p) + len(a) for p, a in rows], tokens_per_batch):
        scores = _score(model, [rows[i] for i in batch])
        for i, score in zip(batch, scores, strict=True):
            check_finite(score)
            result[i] = score
        meter.add(sum(len(rows[i][0]) + len(rows[i][1]) for i in batch))
    return result


# --- parts -----------------------------------------------------------------------------------------------------------


class Meter:
    """Counts tokens towards a total and says how fast they come."""

    def __init__(self, total: int, progress: Progress):
        self.total, self.progress = total, progress
        self.made, self.step, self.started = 0, 0, time.monotonic()

    def add(self, tokens: int, ended: int = 0) -> None:
        """tokens: computed now. ended: those that need not be computed any more."""
        self.made += tokens
        self.step += tokens + ended
        seconds = max(time.monotonic() - self.started, 1e-9)
        self.progress(self.step, self.total, tokens_per_s=round(self.made / seconds, 1))


def check_window(prompts: Sequence[Sequence[int]], answer: int, limit: int) -> None:
    """Raises InputError for a prompt that leaves no room for `answer` tokens in a window of `limit`."""
    longest = max(range(len(prompts)), key=lambda i: len(prompts[i]), default=None)
    if longest is not None and len(prompts[longest]) + answer > limit:
        what = f"a prompt of {len(prompts[longest])} tokens leaves no room for {answer} more in a window of {limit}"
        raise InputError(what, where=f"prompt {longest + 1}", fix="shorten the prompt or lower max_new_tokens")


def _pad_left(rows: Sequence[Sequence[int]], device: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(ids, mask, positions), each [B, longest]: text ends at the right edge, positions count from its first token."""
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    return ids.to(device), mask.to(device), positions.to(device)


@torch.inference_mode()
def _decode(
    model: Any,
    prompts: Sequence[Sequence[int]],
    noise: Tensor,
    *,
    stop: Sequence[int],
    temperature: float,
    top_p: float,
) -> Iterator[tuple[list[int], list[int], list[float]]]:
    """Yields, a step at a time, (rows, their next tokens, the tokens' log-probs at temperature 1) of open answers.

    noise [B * copies, steps]: uniform in [0, 1), one number a token. Row r answers prompt r // copies. A row is not
    seen again after a stop token. Raises InputError for log-probs that are not finite.
    """
    from transformers import DynamicCache

    copies = len(noise) // len(prompts)
    ids, mask, positions = _pad_left(prompts, model.device)
    cache = DynamicCache(config=model.config)
    rows = torch.arange(len(noise))  # which answer each row of the batch is
    is_open = torch.ones(len(noise), dtype=torch.bool)
    stops, noise = torch.tensor(stop), noise.to(model.device)
    for step in range(noise.shape[1]):
        given = {"attention_mask": mask, "position_ids": positions, "past_key_values": cache, "use_cache": True}
        logits = model(input_ids=ids, logits_to_keep=1, **given).logits[:, -1].float()  # [B, V]
        if step == 0 and copies > 1:  # the prompt was read once for all its answers
            cache.batch_repeat_interleave(copies)
            logits, mask, positions = (t.repeat_interleave(copies, 0) for t in (logits, mask, positions))
        chosen = choose(logits, noise[rows.to(noise.device), step], temperature=temperature, top_p=top_p)
        scores = (logits.gather(-1, chosen[:, None])[:, 0] - logits.logsumexp(-1)).cpu()[is_open]
        check_finite(scores)
        tokens = chosen.cpu()
        yield rows[is_open].tolist(), tokens[is_open].tolist(), scores.tolist()
        is_open = is_open & ~torch.isin(tokens, stops)
        if not is_open.any():
            return
        mask, positions = torch.cat([mask, mask.new_ones(len(mask), 1)], 1), positions[:, -1:] + 1
        if int((~is_open).sum()) * COMPACT >= len(rows):
            keep = is_open.nonzero()[:, 0]
            rows, is_open = rows[keep], is_open[keep]
            here = keep.to(model.device)
            cache.batch_select_indices(here)
            chosen, mask, positions = chosen[here], mask[here], positions[here]
        ids = chosen[:, None]


def check_finite(log_probs: Tensor) -> None:
    """Raises InputError. A token drawn from a distribution of NaN would look like any other."""
    if not log_probs.isfinite().all():
        raise InputError("the model gives log-probs that are NaN or infinite", fix="look at its weights, or take fp32")


def completion(tokenizer: Any, ids: list[int], log_probs: Sequence[float], stop: Sequence[int]) -> Completion:
    """The answer with these token ids and their log-probs, where these are known; stop: ids that end one."""
    text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    total = reduce(add, log_probs, 0.0)  # one after the other; sum() rounds otherwise from Python 3.12 on
    return Completion(text, len(ids), ids[-1] in stop, ids, total)


@torch.inference_mode()
def _score(model: Any, rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Tensor]:
    """Per-token log-probs of one padded batch."""
    ids, mask, positions = _pad_left([[*prompt, *answer] for prompt, answer in rows], model.device)
    longest = max(len(answer) for _, answer in rows)
    given = {"attention_mask": mask, "position_ids": positions, "use_cache": False}
    logits = model(input_ids=ids, logits_to_keep=longest + 1, **given).logits  # [B, longest + 1, V]
    scores = []
    for row, (_, answer) in enumerate(rows):  # a row at a time: a second copy of all logits would double the memory
        predicting = logits[row, longest - len(answer) : longest].float()  # position t predicts token t + 1
        targets = torch.tensor(answer, dtype=torch.long, device=logits.device)
        scores.append((predicting.gather(-1, targets[:, None])[:, 0] - predicting.logsumexp(-1)).cpu())
    return scores
