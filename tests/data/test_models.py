from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from alignment import generation
from alignment.data.chat import Chat
from alignment.data.models import check_files, context_window, import_model
from alignment.errors import AlignmentError, ConfigError, InputError
from alignment.files import model_files, sha256

from .conftest import PLAIN, SPECIALS, make_tokenizer, model_settings

Folder = Callable[..., Path]


def imported(source: Path, target: Path, **settings: Any) -> dict[str, float]:
    return import_model(source, model_settings(**settings), target, lambda *a, **k: None, print)


def test_a_folder_is_imported_whole_with_the_chosen_template(model_folder: Folder, tmp_path: Path) -> None:
    """260 x 16 embedding + 4 x 16 x 16 attention + 3 x 16 x 32 MLP + 3 x 16 norms = 6768 weights."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = model_folder()
    numbers = imported(source, tmp_path / "model", chat_template="instruction", pad_token="<|user|>")
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "model" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert numbers == {"parameters": 6768, "bytes": 4 * 6768, "vocabulary": 260, "window": 64}
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    hello = [{"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(hello, tokenize=False, add_generation_prompt=True)
    assert text == "### Instruction:\nHi\n\n### Response:\n"
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<|user|>", "<eos>")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (1, 3)
    assert (tmp_path / "model" / "chat_template.jinja").exists()


def test_a_model_keeps_the_ends_it_was_published_with_and_no_way_of_sampling(
    model_folder: Folder, tmp_path: Path
) -> None:
    """3 is a control token, 7 a letter, 260 beyond the vocabulary."""
    source = model_folder()
    published = {"eos_token_id": [3, 1, 7, 260], "do_sample": True, "temperature": 0.6, "top_p": 0.9}
    (source / "generation_config.json").write_text(json.dumps(published))
    imported(source, tmp_path / "model")
    model, tokenizer = generation.load(tmp_path / "model", "fp32")
    assert generation.stop_tokens(model, tokenizer) == model.generation_config.eos_token_id == [1, 3]
    assert model.config.eos_token_id == 1, "the one that is trained"
    written = json.loads((tmp_path / "model" / "generation_config.json").read_text())
    assert written.keys() - {"transformers_version"} == {"bos_token_id", "eos_token_id", "pad_token_id"}


def test_storage_precision_rounds_the_weights_once(model_folder: Folder, tmp_path: Path) -> None:
    source = model_folder()
    imported(source, tmp_path / "model", storage_precision="bf16")
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "model" / "model.safetensors")
    assert all(torch.equal(before[name].to(torch.bfloat16), after[name]) for name in before)
    assert context_window(tmp_path / "model") == 64


def test_a_shipped_template_begins_the_text_where_the_tokenizer_would(model_folder: Folder, tmp_path: Path) -> None:
    imported(model_folder(make_tokenizer(bos=True)), tmp_path / "model", chat_template="instruction")
    template = (tmp_path / "model" / "chat_template.jinja").read_text()
    assert template.startswith("{{ bos_token }}{%- for message in messages -%}")


@pytest.mark.parametrize("template", [PLAIN, PLAIN + "\r\n{# Windows #}\r\n", PLAIN + "{# ä #}\n\n"])
def test_the_hash_of_the_template_is_that_of_its_file(template: str, model_folder: Folder, tmp_path: Path) -> None:
    """So every record of a model has it, in `files`."""
    imported(model_folder(make_tokenizer(template)), tmp_path / "model")
    assert sha256(tmp_path / "model" / "chat_template.jinja") == Chat.load(tmp_path / "model").template_sha256


def test_a_template_may_be_a_file(model_folder: Folder, tmp_path: Path) -> None:
    (tmp_path / "mine.jinja").write_text(PLAIN.replace("Q", "Question"))
    imported(model_folder(), tmp_path / "model", chat_template=str(tmp_path / "mine.jinja"))
    assert (tmp_path / "model" / "chat_template.jinja").read_text() == PLAIN.replace("Q", "Question")


def test_only_the_files_that_are_in_the_key_are_read(model_folder: Folder, tmp_path: Path) -> None:
    """A folder full of other things, and one with its digested files alone, are imported to the same bytes."""
    source = model_folder()
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "default.jinja").write_text(PLAIN.replace("Q", "Question"))
    for name in ("README.md", "optimizer.pt", "original/consolidated.00.pth", "checkpoint-5/config.json", ".hid.json"):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text("{")
    for file in model_files(source):
        copy = tmp_path / "alone" / file.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(file.read_bytes())
    imported(source, tmp_path / "model")
    imported(tmp_path / "alone", tmp_path / "again")
    assert "Question" in (tmp_path / "model" / "chat_template.jinja").read_text()
    assert len(made := sorted(path.name for path in (tmp_path / "model").iterdir())) == 6
    assert all((tmp_path / "model" / name).read_bytes() == (tmp_path / "again" / name).read_bytes() for name in made)


def test_a_template_with_todays_date_is_written_without_a_clock_and_that_is_said(
    model_folder: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dated = "{% if strftime_now is defined %}{{ strftime_now('%c') }}{% else %}no date{% endif %}" + PLAIN
    (tmp_path / "mine.jinja").write_text(dated)
    for number, choice in enumerate(("keep", str(tmp_path / "mine.jinja"))):
        imported(model_folder(make_tokenizer(dated)), tmp_path / f"{number}", chat_template=choice)
        assert "the chat template prints today's date" in capsys.readouterr().out
        _, tokenizer = generation.load(tmp_path / f"{number}", "fp32")
        text = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
        assert text == "no dateQ:Hi\n"
    imported(model_folder(), tmp_path / "plain")
    assert capsys.readouterr().out == ""


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def adapter(folder: Path) -> None:
    (folder / "config.json").rename(folder / "adapter_config.json")


def adapter_beside(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "elsewhere"}')


def gguf_only(folder: Path) -> None:
    (folder / "config.json").rename(folder / "tiny.gguf")


def quantised(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))


def truncated(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def lacking(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def nonsense(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "nonsense"}))


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "no config": (without("config.json"), "has no config.json (give a folder written by save_pretrained)"),
    "no weights": (without("model.safetensors"), "has no weights (*.safetensors)"),
    "no tokenizer": (without("tokenizer.json"), "has no tokenizer that can be read: "),
    "only pickles": (pickled, "has only pickled weights (save it as safetensors"),
    "an adapter": (adapter, "is an adapter, not a model"),
    "an adapter beside": (adapter_beside, "is an adapter, not a model"),
    "a gguf beside": (gguf_only, "has no config.json (name the file: tiny.gguf)"),
    "quantised": (quantised, "is quantised (gptq)"),
    "truncated": (truncated, "model.safetensors holds no weights: "),
    "a weight missing": (lacking, "lacks 1 weights of its architecture, among them model.norm.weight"),
    "unknown architecture": (nonsense, "cannot be loaded as a causal language model: "),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_folder_that_is_no_whole_model_is_one_line(case: str, model_folder: Folder, tmp_path: Path) -> None:
    damage, message = DAMAGE[case]
    source = model_folder()
    damage(source)
    with pytest.raises(InputError) as caught:
        imported(source, tmp_path / "model")
    assert str(caught.value).startswith(f"{source}: {message}")
    assert not (tmp_path / "model").exists()


SETTINGS: dict[str, tuple[type[AlignmentError], dict[str, Any], dict[str, Any], str]] = {
    "no template": (InputError, {"template": None}, {}, "the tokenizer has no chat template (set "),
    "unknown template": (
        ConfigError, {}, {"chat_template": "instructions"},
        "model.chat_template: no chat template 'instructions' (keep, a path that ends in .jinja, or one of: chatml, ",
    ),
    "unknown token": (
        ConfigError, {}, {"pad_token": "<padding>"},
        "model.pad_token: the tokenizer has no token '<padding>' (nearest: <pad>)",
    ),
    "pad is eos": (InputError, {}, {"pad_token": "<eos>"}, "the padding token is the end-of-turn token '<eos>'"),
    "template without eos": (
        InputError, {"template": PLAIN.replace("{{ eos_token }}", "<|user|>")}, {},
        "the chat template does not end an answer with the end-of-turn token '<eos>' (set model.eos_token",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", SETTINGS)
def test_tokens_and_template_that_do_not_fit_are_one_line(case: str, model_folder: Folder, tmp_path: Path) -> None:
    kind, tokenizer, settings, message = SETTINGS[case]
    source = model_folder(make_tokenizer(**tokenizer))
    with pytest.raises(kind) as caught:
        imported(source, tmp_path / "model", **settings)
    assert str(caught.value).removeprefix(f"{source}: ").startswith(message)


def test_a_tokenizer_without_padding_token_must_be_given_one(model_folder: Folder, tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.pad_token = None
    source = model_folder(tokenizer)
    with pytest.raises(InputError, match=r"has no padding token \(set model.pad_token\)"):
        imported(source, tmp_path / "model")
    imported(source, tmp_path / "model", pad_token="<pad>")


def test_a_tokenizer_of_a_larger_model_is_refused(model_folder: Folder, tmp_path: Path) -> None:
    source = model_folder(rows=258)
    with pytest.raises(InputError, match="the tokenizer has token ids up to 259, the embedding 258 rows"):
        imported(source, tmp_path / "model")


# --- GGUF -------------------------------------------------------------------------------------------------------------


def write_gguf(folder: Path, cut: str) -> tuple[Path, dict[str, Any]]:
    """A real one-layer Llama as GGUF (fp32): 16 wide, 2 heads; returns its Hugging Face weights too."""
    import gguf
    import numpy as np

    tokens = [*SPECIALS, *sorted(make_tokenizer().get_vocab().keys() - set(SPECIALS)), "ab", "12"]
    random = np.random.default_rng(0)
    weights = {name: random.standard_normal(shape, dtype=np.float32) for name, shape in {
        "model.embed_tokens.weight": (len(tokens), 16), "model.norm.weight": (16,),
        **{f"model.layers.0.self_attn.{part}_proj.weight": (16, 16) for part in "qkvo"},
        "model.layers.0.mlp.gate_proj.weight": (32, 16), "model.layers.0.mlp.up_proj.weight": (32, 16),
        "model.layers.0.mlp.down_proj.weight": (16, 32), "model.layers.0.input_layernorm.weight": (16,),
        "model.layers.0.post_attention_layernorm.weight": (16,),
    }.items()}  # fmt: skip
    names = {
        "model.embed_tokens": "token_embd", "model.norm": "output_norm", "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
        "post_attention_layernorm": "ffn_norm", "input_layernorm": "attn_norm", "model.layers.0": "blk.0",
    }  # fmt: skip
    path = folder / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for key, number in {
        "block_count": 1, "context_length": 64, "embedding_length": 16, "feed_forward_length": 32, "head_count": 2,
        "head_count_kv": 2, "vocab_size": len(tokens), "rope_dimension_count": 8,
    }.items():  # fmt: skip
        getattr(writer, f"add_{key}")(number)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(cut)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in SPECIALS else 1 for token in tokens])
    writer.add_token_merges(["a b", "1 2"])
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(1)  # as in the quickstart's file: padding with the end-of-turn token
    writer.add_chat_template(PLAIN)
    for name, weight in weights.items():
        if "q_proj" in name or "k_proj" in name:  # llama.cpp keeps the two halves of each head interleaved
            weight = weight.reshape(2, 2, 4, 16).swapaxes(1, 2).reshape(16, 16)
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        writer.add_tensor(name, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, weights


def test_a_gguf_file_becomes_a_plain_folder_with_the_same_weights(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path, weights = write_gguf(tmp_path, "smollm")
    numbers = imported(path, tmp_path / "model", pad_token="<pad>")
    assert numbers["vocabulary"] == 262
    made = load_file(tmp_path / "model" / "model.safetensors")
    assert made.keys() == weights.keys()  # the head is tied to the embedding
    assert all(torch.equal(made[name], torch.tensor(weight)) for name, weight in weights.items())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert model.config.tie_word_embeddings and model.config.max_position_embeddings == 64
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.chat_template) == ("<eos>", "<pad>", PLAIN)
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("ab12<eos>")) == ["ab", "1", "2", "<eos>"]


def test_a_gguf_tokenizer_cuts_text_as_its_file_says(tmp_path: Path) -> None:
    """With GPT-2's pattern digits merge, with SmolLM's each stands alone; an unknown pattern is refused."""
    from alignment.data.models import load_tokenizer

    path, _ = write_gguf(tmp_path, "gpt-2")
    tokenizer = load_tokenizer(path, "m")
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("ab12")) == ["ab", "12"]
    path, _ = write_gguf(tmp_path, "nobody-knows")
    with pytest.raises(InputError, match=r"cuts text into words in a way that cannot be reproduced \('nobody-knows'\)"):
        load_tokenizer(path, "m")


def test_what_lies_beside_a_gguf_file_is_not_read(model_folder: Folder, tmp_path: Path) -> None:
    """The key holds the file alone, so a tokenizer, config or template in its folder must not replace its own."""
    path, _ = write_gguf(tmp_path, "smollm")
    imported(path, tmp_path / "alone", pad_token="<pad>")
    shutil.copytree(model_folder(make_tokenizer("{{ 'another template' }}", bos=True)), tmp_path, dirs_exist_ok=True)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 3]}')
    imported(path, tmp_path / "beside", pad_token="<pad>")
    for file in (tmp_path / "alone").iterdir():
        assert (tmp_path / "beside" / file.name).read_bytes() == file.read_bytes(), file.name


def test_a_gguf_file_is_parsed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers looks both names up in gguf whenever it needs them; if that changes, imports are slow again."""
    import gguf

    calls = {"GGUFReader": 0, "get_tensor_name_map": 0}

    def counted(name: str, made: Any) -> Any:
        def call(*given: Any) -> Any:
            calls[name] += 1
            return made(*given)

        return call

    for name in calls:
        monkeypatch.setattr(gguf, name, counted(name, getattr(gguf, name)))
    counting = gguf.GGUFReader
    path, _ = write_gguf(tmp_path, "smollm")
    imported(path, tmp_path / "model", pad_token="<pad>")
    assert calls == {"GGUFReader": 1, "get_tensor_name_map": 1}
    assert gguf.GGUFReader is counting, "what was put in its place is gone again"


def test_a_file_that_is_no_model_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(b"x")
    (tmp_path / "broken.gguf").write_bytes(b"GGUF but not really")
    with pytest.raises(InputError, match=r"weights\.bin: is not a model"):
        imported(tmp_path / "weights.bin", tmp_path / "model")
    with pytest.raises(InputError, match=r"broken\.gguf: has no tokenizer that can be read") as caught:
        imported(tmp_path / "broken.gguf", tmp_path / "model")
    assert "/alignment-" not in str(caught.value), "the folder it was read in is gone"


@pytest.mark.parametrize(
    ("content", "fix"),
    [
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (None, "copy it again"),
        (b"abc", "copy it again"),
    ],
    ids=["pointer", "cut", "something else"],
)
def test_weights_that_are_none_are_found_by_their_header(
    content: bytes | None, fix: str, tiny_model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    check_files(folder)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100] if content is None else content)
    with pytest.raises(InputError, match="holds no weights: ") as caught:
        check_files(folder)
    assert fix in str(caught.value) and caught.value.where == str(folder)
