"""The model in training: loading it for an engine, and bringing its weights back together as an ordinary folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from alignment.config.nearest import closest
from alignment.config.stages.training import Lora
from alignment.errors import ConfigError, TrainingError
from alignment.training.four_bits import in_full, is_in_four_bits, loading
from alignment.training.keeper import Stage
from alignment.training.shared_prefix import VALUE_HEAD


def load(folder: Path, lora: Lora | None = None, precision: str = "fp32") -> Any:
    """The causal language model of a folder with fp32 master weights and no dropout.

    Dropout masks depend on who shares a micro-batch, so with them the engine would change the result; and policy and
    reference would not agree at DPO's first step.
    Under ZeRO-3 the weights are sharded while they are read; transformers sees that from the TrainingArguments, which
    must exist, with the DeepSpeed configuration inside, before this is called.
    lora, precision: of the stage that trains adapters on it, perhaps on weights of 4 bits.
    """
    how = loading(lora, precision)
    return without_dropout(
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True, **how)
    )


def without_dropout(model: Any) -> Any:
    """The model itself, in which nothing is dropped any more."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():  # attention takes it as a number, as in LlamaAttention
            if name.endswith("dropout") and isinstance(value, float):
                setattr(module, name, 0.0)
    return model


Sizes = Mapping[str, int]  # numbers in each tensor of a model, by its name; tied ones under one of their names


def sizes_of(folder: Path) -> dict[str, int]:
    """Of the files of a model folder, from their headers."""
    from safetensors import safe_open

    sizes = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as weights:
            for name in weights.keys():  # noqa: SIM118 - not a dict
                sizes[name] = torch.Size(weights.get_slice(name).get_shape()).numel()
    return sizes


def count_parameters(start: Path | Sizes, modules: list[str] | None = None) -> int:
    """Weights of a model folder, or of a model of these sizes; tied ones count once. modules: those of modules of these
    names alone."""
    sizes = sizes_of(start) if isinstance(start, Path) else start
    places = {name: f".{name.rpartition('.')[0]}" for name in sizes}
    return sum(
        sizes[name]
        for name, place in places.items()
        if modules is None or any(place.endswith(f".{module}") for module in modules)
    )


def lora_config(lora: Lora | None, model: Any) -> Any:
    """PEFT's configuration of the adapters, or None. Raises ConfigError for modules the model does not have, or that
    cannot be adapted or trained whole."""
    if lora is None:
        return None
    if is_in_four_bits(model) != (lora.quantize is not None):
        raise TrainingError("the model was loaded without regard to lora.quantize")
    from peft import LoraConfig, TaskType

    targets = lora.target_modules
    _check_targets(targets, model)
    if isinstance(targets, str) and targets != "all-linear":
        targets = [targets]  # PEFT takes a text for a pattern
    return LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type] # any number will do: it is divided by the rank
        lora_dropout=lora.dropout,
        target_modules=targets,
        use_rslora=lora.rslora,
        use_dora=lora.dora,
        init_lora_weights=True if lora.init == "kaiming" else lora.init,
        modules_to_save=_whole_modules(lora, model) or None,
    )


def _check_targets(targets: str | list[str], model: Any) -> None:
    if targets == "all-linear":
        return
    adaptable = _adaptable(model)
    for target in [targets] if isinstance(targets, str) else targets:
        if target not in adaptable:
            fix = closest(target, sorted(adaptable), otherwise="all-linear, or some of ")
            what = f"the model has no linear layer `{target}` that an adapter can be put on"
            raise ConfigError(what, where="lora.target_modules", fix=fix)


def _adaptable(model: Any) -> set[str]:
    """Names of linear layers, but for the head's."""
    linear = {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    return linear - {name for name, module in model.named_modules() if module is model.get_output_embeddings()}


def _whole_modules(lora: Lora, model: Any) -> list[str]:
    """Full names of what is to be trained whole: PEFT would take `norm` for every name that ends so."""
    adapted = _adaptable(model) if lora.target_modules == "all-linear" else set()
    tied = {model.get_input_embeddings(), model.get_output_embeddings()} if model.config.tie_word_embeddings else set()
    found: list[str] = []
    for wanted in lora.modules_to_save:
        fitting = {name: part for name, part in model.named_modules() if f".{name}".endswith(f".{wanted}")}
        why = None
        if not fitting:
            leaves = {name.rsplit(".", 1)[-1] for name, part in model.named_modules() if _is_leaf(part)}
            fix = closest(wanted, sorted(leaves - adapted), otherwise="some of ")
            why = f"the model has no module `{wanted}`", fix
        elif wanted.rsplit(".", 1)[-1] in adapted:
            why = f"`{wanted}` has an adapter: target_modules is all-linear", "name the target_modules without it"
        elif not all(map(_is_leaf, fitting.values())):
            why = f"`{wanted}` has parts of its own, or no weights", "name a norm, an embedding or the head"
        elif tied & set(fitting.values()):
            why = f"`{wanted}` shares its weights: embedding and head would come apart", "leave it out"
        if why:
            raise ConfigError(why[0], where="lora.modules_to_save", fix=why[1])
        found += fitting
    return sorted(set(found))


def _is_leaf(module: Any) -> bool:
    return not list(module.children()) and any(True for _ in module.parameters(recurse=False))


def consolidate(trainer: Any, start: Path, folder: Path, stage: Stage, fresh: Callable[[Path], Any] = load) -> None:
    """Write folder/model (fp32, adapters merged) and, with LoRA, folder/adapter. Every process must call it.

    A fresh copy of the start model takes the trained weights, so that nothing of the trainer or the engine is left in
    what is written, and tied weights stay tied. start: folder of the model that training began from. fresh: makes the
    copy of it.
    """
    trained = gather_trained(trainer, stage.tick)  # a collective: every process enters
    if trainer.accelerator.is_main_process:
        with stage.busy("writing the model"):
            _write(trainer, trained, start, folder, fresh)
    trainer.accelerator.wait_for_everyone()


def _write(trainer: Any, trained: dict[str, Tensor], start: Path, folder: Path, fresh: Callable[[Path], Any]) -> None:
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()  # else the fresh copy would be sharded over processes that are not here
    check_whole(trained)
    plain, model = fresh(start), trainer.accelerator.unwrap_model(trainer.model)
    adapters = getattr(model, "peft_config", None)
    if is_in_four_bits(model):
        plain.load_state_dict(in_full(model.get_base_model()), strict=False)
    if adapters:
        from peft import get_peft_model

        plain = get_peft_model(plain, adapters["default"])
    _put(plain, trained)
    if adapters:
        plain.save_pretrained(folder / "adapter")
        (folder / "adapter" / "README.md").unlink(missing_ok=True)  # PEFT's unfilled model card
        plain = plain.merge_and_unload()
    plain.save_pretrained(folder / "model")
    _check_written(folder / "model", plain)
    trainer.processing_class.save_pretrained(folder / "model")


def gather_trained(trainer: Any, tick: Callable[[], None] = lambda: None) -> dict[str, Tensor]:
    """name -> whole fp32 weights on the CPU, of all that was trained; empty except on the main process. tick: called as
    it gets on."""
    sharded = trainer.is_deepspeed_enabled
    if sharded:
        from deepspeed.utils import safe_get_full_fp32_param
    whole: dict[str, Tensor] = {}
    for name, parameter in trainer.accelerator.unwrap_model(trainer.model).named_parameters():
        if parameter.requires_grad and VALUE_HEAD not in name.split("."):  # which training alone wants
            tick()
            value = safe_get_full_fp32_param(parameter) if sharded else parameter.detach()
            if value is None:
                raise TrainingError(f"the engine cannot give back the weights of {name}")
            if trainer.accelerator.is_main_process:
                whole[name] = value.to("cpu", torch.float32, copy=True)
    return whole


def check_whole(weights: dict[str, Tensor]) -> None:
    """Raise TrainingError for weights that are missing, empty (a shard taken for the whole) or not finite."""
    if not weights:
        raise TrainingError("nothing was trained: the model has no trainable parameter")
    for name, value in weights.items():
        if value.numel() == 0:
            raise TrainingError(f"{name} has no elements: it was not gathered from all processes")
        if not torch.isfinite(value).all():
            raise TrainingError(f"{name} has values that are NaN or infinite", fix="lower the learning rate")


def _put(model: Any, weights: dict[str, Tensor]) -> None:
    own = dict(model.named_parameters())
    wanted = {name for name, parameter in own.items() if parameter.requires_grad}
    if wanted != set(weights):
        raise TrainingError(f"trained weights do not match the model: {sorted(wanted ^ set(weights))[:3]}")
    with torch.no_grad():
        for name, value in weights.items():
            if own[name].shape != value.shape:
                raise TrainingError(f"{name} has shape {tuple(value.shape)}, the model {tuple(own[name].shape)}")
            own[name].copy_(value)


def _check_written(folder: Path, model: Any) -> None:
    """The files must hold as many weights as the model has, no tensor empty."""
    from safetensors import safe_open

    count = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as weights:
            for name in weights.keys():  # noqa: SIM118 - not a dict
                size = torch.Size(weights.get_slice(name).get_shape()).numel()
                if size == 0:
                    raise TrainingError(f"{name} was written without elements", where=str(file))
                count += size
    expected = sum(parameter.numel() for parameter in model.parameters())  # tied weights count once
    if count < expected:
        raise TrainingError(f"{count} weights were written, the model has {expected}", where=str(folder))
