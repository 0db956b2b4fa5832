"""Small tokenizers of each kind there is, trained on a few sentences, with ChatML's control tokens."""

from __future__ import annotations

from functools import cache
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SPECIALS = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SENTENCES = [
    "The quick brown fox jumps over the lazy dog, doesn't it?",
    "user assistant system im_start im_end s unk < | > / <| |> a<b>c|d/e ",
    "def f(x):\n\n    return x + 1  # 123 456",
    "Größe, 東京, naïve: über alles - it's 3.14!",
    "\n\n\n  hello world hello there  \n",
] * 3
KINDS = ("byte-level", "metaspace first", "metaspace always", "llama", "unigram", "wordpiece")


def tokenizer(kind: str, template: str = CHATML) -> Any:
    made = Tokenizer.from_str(_made(kind).to_str())
    found = PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="<|im_end|>", bos_token="<s>", unk_token="<unk>",
        additional_special_tokens=["</s>", "<|im_start|>"], clean_up_tokenization_spaces=False,
    )  # fmt: skip
    found.chat_template = template
    return found


@cache  # training is not the same twice
def _made(kind: str) -> Tokenizer:
    specials = [AddedToken(word, special=True, normalized=False) for word in SPECIALS]
    bpe = trainers.BpeTrainer(vocab_size=420, special_tokens=specials, show_progress=False)
    if kind == "byte-level":
        made = Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        bpe.initial_alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        made.train_from_iterator(SENTENCES, bpe)
    elif kind.startswith("metaspace"):
        made = Tokenizer(models.BPE(unk_token="<unk>"))
        scheme: Any = kind.split()[1]
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
        made.decoder = decoders.Metaspace(prepend_scheme=scheme)
        made.train_from_iterator(SENTENCES, bpe)
    elif kind == "llama":
        made = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
        made.train_from_iterator(SENTENCES, bpe)
    elif kind == "unigram":
        made = Tokenizer(models.Unigram())
        made.normalizer = normalizers.NFKC()
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        made.decoder = decoders.Metaspace(prepend_scheme="first")
        trainer: Any = trainers.UnigramTrainer(
            vocab_size=150, special_tokens=specials, unk_token="<unk>", show_progress=False
        )
        made.train_from_iterator(SENTENCES, trainer)
    else:
        made = Tokenizer(models.WordPiece(unk_token="<unk>"))
        made.normalizer = normalizers.BertNormalizer()
        made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        made.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(vocab_size=250, special_tokens=specials, show_progress=False)
        made.train_from_iterator(SENTENCES, trainer)
    return made
