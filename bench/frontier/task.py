"""A small language with a known reward: the sentiment experiment of Rafailov et al. 2023 (sec. 6.1) for two cores.

A prompt names a topic; an answer is three to ten words, some of the topic, some friendly, some hostile.
"""

from __future__ import annotations

import random
from pathlib import Path

from alignment.files import write_jsonl

TOPICS = ("river", "market", "garden", "winter", "train", "school", "kitchen", "island")
FRIENDLY = ("lovely", "bright", "gentle", "warm", "sweet", "fair", "calm", "proud", "happy", "kind", "fresh", "glad")
HOSTILE = ("ugly", "grim", "harsh", "cold", "bitter", "cruel", "loud", "vain", "angry", "mean", "stale", "sad")
OF_TOPIC = tuple(f"{topic}{letter}" for topic in TOPICS for letter in "abc")
FILLER = tuple(f"w{number}" for number in range(24))  # what makes prompts of one topic different
SPECIAL = ("<pad>", "<eos>", "<user>", "<assistant>", "<unk>")
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }}{% if m['role'] == 'assistant' %} <eos>{% else %} "
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant> {% endif %}"
)


def write_model(folder: Path, seed: int = 0) -> None:
    """A random Llama of 2 layers and 64 dimensions, a token a word."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = [*SPECIAL, *TOPICS, *FRIENDLY, *HOSTILE, *OF_TOPIC, *FILLER]
    table = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    table.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=table, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>",
        additional_special_tokens=["<user>", "<assistant>"],
    )  # fmt: skip
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=64, tie_word_embeddings=True,
        pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_rows(path: Path, count: int, seed: int = 0) -> None:
    """Prompts that are all different, each with one answer: as friendly as it is hostile in the mean."""
    draw = random.Random(seed)
    prompts: set[str] = set()
    while len(prompts) < count:
        prompts.add(" ".join([draw.choice(TOPICS), *draw.sample(FILLER, 3)]))
    write_jsonl(path, ({"prompt": prompt, "completion": _answer(prompt, draw)} for prompt in sorted(prompts)))


def _answer(prompt: str, draw: random.Random) -> str:
    topic = prompt.split()[0]
    kinds = draw.choices(("topic", "friendly", "hostile"), (0.5, 0.25, 0.25), k=draw.randint(3, 10))
    pools = {"topic": [f"{topic}{letter}" for letter in "abc"], "friendly": FRIENDLY, "hostile": HOSTILE}
    return " ".join(draw.choice(pools[kind]) for kind in kinds)
