"""A start checkpoint of any kind -> a plain Hugging Face folder with the run's chat template and special tokens."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from alignment.config.paths import TEMPLATES, template_path
from alignment.config.sources import Model
from alignment.data.adapters import check_adapter, merge
from alignment.data.chat import Chat, adds_bos, without_clock
from alignment.data.gguf import opened, plain_model, read_tokenizer
from alignment.errors import ConfigError, InputError, MachineError
from alignment.files import read_json, require_room

STEPS = 4


def import_model(
    source: Path,
    settings: Model,
    target: Path,
    progress: Callable[..., None],
    warn: Callable[[str], None],
    adapter: Path | None = None,
) -> dict[str, float]:
    """Write `target`: config.json, model.safetensors, tokenizer, chat_template.jinja, generation_config.json.

    source: a Hugging Face folder with safetensors, or a .gguf file. adapter: a folder of PEFT's that is merged into it;
    it takes storage_precision fp32. progress(step, total, note=...). warn(text): what
    people should know though it goes on.
    Raises InputError (weights, config, tokenizer or template missing or not matching), ConfigError (a setting names a
    token or template that does not exist), MachineError (no room).
    """
    name = str(source)
    check_files(source)
    if adapter is not None:
        check_adapter(adapter)
    with opened(source) if source.is_file() else nullcontext(source) as place:
        model, tokenizer = _read(place, settings, name, progress, warn)
    if adapter is not None:
        model = merge(model, adapter)
    size = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    target.mkdir(parents=True, exist_ok=True)
    require_room(target, size)
    progress(3, STEPS, note="writing", force=True)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    progress(STEPS, STEPS)
    parameters = sum(weight.numel() for weight in model.parameters())
    window = context_window(target) or 0
    return {"parameters": parameters, "bytes": size, "vocabulary": len(tokenizer), "window": window}


def _read(
    source: Path, settings: Model, name: str, progress: Callable[..., None], warn: Callable[[str], None]
) -> tuple[Any, Any]:
    """(model, tokenizer) as they are to be written. name: what to call the source in errors."""
    progress(0, STEPS, note="reading the tokenizer", force=True)
    tokenizer = usable_tokenizer(source, settings, name, warn)
    progress(1, STEPS, note="reading the weights", force=True)
    model = _load(source, torch.float32 if settings.storage_precision == "fp32" else torch.bfloat16, name)
    progress(2, STEPS, note="checking", force=True)
    check_vocabulary(tokenizer, model.get_input_embeddings().weight.shape[0], name)
    ids = {key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    for key, value in ids.items():
        setattr(model.config, key, value)
    ids["eos_token_id"] = end_tokens(model, tokenizer)
    model.generation_config = type(model.generation_config)(**ids)  # nothing about sampling: the stages say how
    return model, tokenizer


def check_files(source: Path, weights: bool = True) -> None:
    """That a folder or file can be a model at all. Raises InputError that says what is missing. weights: they have to
    be there."""
    name = str(source)
    if source.is_file():
        if source.suffix.lower() != ".gguf":
            raise InputError("is not a model", where=name, fix="give a Hugging Face folder or a .gguf file")
        if find_spec("gguf") is None:
            raise MachineError("GGUF files need the gguf package", where=name, fix="pip install 'alignment[gguf]'")
        return
    if not source.is_dir():
        raise InputError("no such model folder", where=name, fix="check model.source")
    present = {path.name for path in source.iterdir()}
    if "adapter_config.json" in present:  # even beside whole weights: transformers would read its base from elsewhere
        raise InputError("is an adapter, not a model", where=name, fix="model.adapter names it, model.source its base")
    if "config.json" not in present:
        if ggufs := sorted(n for n in present if n.endswith(".gguf")):
            raise InputError("has no config.json", where=name, fix=f"name the file: {ggufs[0]}")
        raise InputError("has no config.json", where=name, fix="give a folder written by save_pretrained")
    if weights and not any(n.endswith(".safetensors") for n in present):
        if any(n.endswith((".bin", ".pth", ".pt")) for n in present):
            fix = "save it as safetensors: pickles can run code and are never loaded"
            raise InputError("has only pickled weights", where=name, fix=fix)
        raise InputError("has no weights (*.safetensors)", where=name, fix="the folder is incomplete: copy it again")
    for path in sorted(source.glob("*.safetensors")) if weights else ():
        _check_header(path)
    config = _config(source)
    if quantised := config.get("quantization_config"):
        method = quantised.get("quant_method", "unknown method")
        raise InputError(f"is quantised ({method})", where=name, fix="give full-precision weights, or a .gguf file")


def _check_header(path: Path) -> None:
    """That the file's header is one, and all that it names is there: of the weights nothing is read."""
    try:
        with safe_open(path, "pt"):
            return
    except (OSError, SafetensorError) as error:
        with open(path, "rb") as stream:
            is_pointer = stream.read(7) == b"version"
        fix = "it is a pointer of Git LFS: git lfs pull" if is_pointer else "it was cut, or is none: copy it again"
        raise InputError(f"{path.name} holds no weights: {error}", where=str(path.parent), fix=fix) from error


def context_window(folder: Path) -> int | None:
    """config.json's max_position_embeddings (tokens), None where the model has no such limit. Raises InputError."""
    config = _config(folder)
    window = config.get("max_position_embeddings") or config.get("text_config", {}).get("max_position_embeddings")
    return int(window) if window else None


def _config(folder: Path) -> dict[str, Any]:
    try:
        config = read_json(folder / "config.json")
    except (OSError, ValueError) as error:
        raise InputError(f"cannot be read: {error}", where=str(folder / "config.json")) from error
    if not isinstance(config, dict):
        raise InputError("is not an object", where=str(folder / "config.json"))
    return config


# --- tokenizer --------------------------------------------------------------------------------------------------------


def load_tokenizer(source: Path, name: str) -> Any:
    try:
        if source.is_file():
            return read_tokenizer(source, name)
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except InputError:
        raise
    except Exception as error:  # tokenizers raise whatever their file format's parser raises
        fix = "the folder needs tokenizer.json (or tokenizer.model) and tokenizer_config.json"
        what = f"has no tokenizer that can be read: {_cause(error, source, name)}"
        raise InputError(what, where=name, fix=fix) from error


def usable_tokenizer(source: Path, settings: Model, name: str, warn: Callable[[str], None]) -> Any:
    """The tokenizer with the settings' tokens and the run's chat template, which is tried. source: as for import_model,
    a GGUF file alone in its folder. Raises InputError and ConfigError."""
    tokenizer = load_tokenizer(source, name)
    set_tokens(tokenizer, settings, name)
    template = chat_template(settings.chat_template, tokenizer, name)
    tokenizer.chat_template = without_clock(template)
    if tokenizer.chat_template != template:
        warn("the chat template prints today's date; it is left its own default, the same every day")
    for odd in Chat(tokenizer, name).check(needs_bos=settings.chat_template != "keep" and adds_bos(tokenizer)):
        warn(odd)
    return tokenizer


def set_tokens(tokenizer: Any, settings: Model, name: str) -> None:
    """The end-of-turn and padding tokens of the settings, each a token that exists, and two different ones."""
    vocabulary = tokenizer.get_vocab()
    for key in ("eos_token", "pad_token"):
        token = getattr(settings, key)
        if token is None:
            continue
        if token not in vocabulary:
            special = sorted(str(t) for t in tokenizer.added_tokens_decoder.values())
            near = get_close_matches(token, special, 1, 0.3)
            fix = f"nearest: {near[0]}" if near else "name a token of its vocabulary"
            raise ConfigError(f"the tokenizer has no token {token!r}", where=f"model.{key}", fix=fix)
        setattr(tokenizer, key, token)
    if tokenizer.eos_token_id is None:
        raise InputError("the tokenizer has no end-of-turn token", where=name, fix="set model.eos_token")
    if tokenizer.pad_token_id is None:
        raise InputError("the tokenizer has no padding token", where=name, fix="set model.pad_token")
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        what = f"the padding token is the end-of-turn token {tokenizer.eos_token!r}: models trained so never stop"
        raise InputError(what, where=name, fix="set model.pad_token to another token")


def chat_template(choice: str, tokenizer: Any, name: str) -> str:
    """The template's text: the tokenizer's own ("keep"), one of conf/chat_template by name, or a file.

    A shipped template is written without a begin-of-text token; it gets one where the tokenizer adds one itself.
    """
    if choice == "keep":
        own = tokenizer.chat_template
        own = own.get("default") if isinstance(own, dict) else own
        if not own:
            fix = "set model.chat_template to a name in conf/chat_template, or to a .jinja file"
            raise InputError("the tokenizer has no chat template", where=name, fix=fix)
        return str(own).replace("\r\n", "\n")  # as it is read back: its hash is that of the file written
    path = template_path(choice)
    shipped = path.parent == TEMPLATES
    return ("{{ bos_token }}" if shipped and adds_bos(tokenizer) else "") + path.read_text(encoding="utf-8")


def end_tokens(model: Any, tokenizer: Any) -> int | list[int]:
    """Ids that end an answer: the tokenizer's end-of-turn token and those that the model was published with.

    Without the latter a start model that ends another way (Llama 3's <|eom_id|>) would count as one that never stops.
    Only control tokens: where nobody chose, the number is a default of the config's class and may be a piece of text.
    """
    named = model.generation_config.eos_token_id
    ids = set(named if isinstance(named, list) else [named]) & set(tokenizer.added_tokens_decoder)
    ends = sorted(ids | {tokenizer.eos_token_id})
    return ends if len(ends) > 1 else ends[0]


def check_vocabulary(tokenizer: Any, rows: int, name: str) -> None:
    """That every token id has a row of the embedding. Raises InputError."""
    highest = max(tokenizer.get_vocab().values())
    if highest >= rows:
        what = f"the tokenizer has token ids up to {highest}, the embedding {rows} rows"
        raise InputError(what, where=name, fix="this tokenizer belongs to another model")


# --- weights ----------------------------------------------------------------------------------------------------------


def _load(source: Path, dtype: Any, name: str) -> Any:
    """A causal language model with every weight from the source. Raises InputError."""
    packed = source.is_file()  # a GGUF file is dequantised in fp32, then rounded once
    given: dict[str, Any] = {"dtype": dtype, "use_safetensors": True}
    if packed:
        given = {"dtype": torch.float32, "gguf_file": source.name}
    folder = source.parent if packed else source
    try:
        auto: Any = AutoModelForCausalLM
        model, loading = auto.from_pretrained(folder, output_loading_info=True, trust_remote_code=False, **given)
    except Exception as error:  # a damaged file, an unknown architecture: each library on the way has its own classes
        what = f"cannot be loaded as a causal language model: {_cause(error, source, name)}"
        raise InputError(what, where=name) from error
    wrong = [str(key) for kind in ("missing_keys", "mismatched_keys") for key in loading[kind]]
    if wrong:
        what = f"lacks {len(wrong)} weights of its architecture, among them {wrong[0]}"
        raise InputError(what, where=name, fix="the folder is incomplete or its config is of another model")
    return plain_model(model, dtype) if packed else model


def _cause(error: Exception, source: Path, name: str) -> str:
    """The error's first line; a file that was read under another path has the name that people know."""
    first = (str(error).strip() or json.dumps(type(error).__name__)).splitlines()[0]
    return first.replace(str(source), name)
