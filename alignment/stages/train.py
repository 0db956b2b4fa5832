"""The composition root of the stages that train: settings, rows and a start model in, a plain model folder out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import load_from_disk
from transformers import AutoConfig, AutoTokenizer

from alignment.config.execution import Engine
from alignment.config.launchers import SlurmLauncher
from alignment.config.stages.online import Online
from alignment.data.chat import Chat
from alignment.data.tokens import check_end_of_turn
from alignment.errors import ConfigError, InputError
from alignment.files import require_room, size_text
from alignment.pipeline.identity import code_digest
from alignment.pipeline.store import CHECKPOINTS
from alignment.stages.context import StageContext
from alignment.stages.parts import check_template
from alignment.training import engine
from alignment.training.batching import GlobalBatches, count_steps
from alignment.training.checkpoints import Checkpoints, most_at_once, size_of_one
from alignment.training.four_bits import require_four_bits
from alignment.training.health import ROLLED_BACK, NonFinite
from alignment.training.keeper import Keeper
from alignment.training.model import consolidate, load
from alignment.training.out_of_memory import adapted, advising
from alignment.training.rows import Sizes
from alignment.training.shape import attention_share
from alignment.training.trainers import Packing


@dataclass(frozen=True)
class Plan:
    """How the rows are trained on: what the engine was chosen for, and which rows come in which step."""

    choice: engine.Choice
    batches: GlobalBatches
    widths: list[int]
    longest: int
    config: Any


def train(
    context: StageContext,
    sizes: Callable[[Any], Sizes],
    make_trainer: Callable[..., Any],
    fresh: Callable[[Path], Any] = load,
    rows_of: Callable[[StageContext, Any], Any] | None = None,
) -> dict[str, Any]:
    """sizes(rows) -> Sizes. make_trainer(context, start, arguments, **what every trainer takes). fresh(start) -> the
    model before training, to write the trained weights into. rows_of(context, tokenizer): what is trained on; None: the
    tokenised rows of the parent.

    A request to stop is heeded where all processes can: raises PreemptedError then.
    """
    setup = adapted(context.experiment.engine, context.told())
    require_four_bits(context.settings.lora)
    start = context.inputs["model"] / "model"
    context.progress(0, 0, note="loading the model", force=True)
    engine.start(setup, context.world_size)
    keeper = keeper_of(context, setup)
    context.rewind(keeper.choose())

    tokenizer = AutoTokenizer.from_pretrained(start, local_files_only=True)
    rows = (rows_of or tokenised)(context, tokenizer)
    setup = engine.as_before(setup, keeper.layout_before())
    if context.is_main and len(rows) < context.settings.global_batch_size:
        size = context.settings.global_batch_size
        context.warn(f"global_batch_size is {size}, and there are {len(rows)} rows: a batch has rows more than once")
    plan = plan_of(context, setup, start, sizes(rows))
    keeper.layout.update(plan.choice.layout())
    keeper.say(plan.choice.why)
    common = _what_every_trainer_takes(context, setup, keeper, plan)
    arguments = engine.training_arguments(
        context.settings, setup, plan.batches.steps, context.folder, plan.choice.checkpointing
    )
    with _named(context):
        trainer = make_trainer(context, start, arguments, train_dataset=rows, processing_class=tokenizer, **common)
    written = 4 * sum(map(_size, trainer.model.parameters()))
    choice = plan.choice
    _require_room(context, written, trainer, keeper.checkpoints, choice.load.moving)  # before training, not after it
    with advising(setup, choice.load, choice.checkpointing, plan.config, plan.longest, context.tell_next):
        trainer.train()
    if context.is_main:
        keeper.checkpoints.make_room(written)
    consolidate(trainer, start, context.folder, context, fresh)
    context.flush()
    if context.is_main:
        _keep_best(context, keeper.checkpoints)
    return {**_summary(trainer), "rows": len(rows), "steps": plan.batches.steps, "train_seconds": trainer.seconds}


@contextmanager
def _named(context: StageContext) -> Iterator[None]:
    """A setting that is wrong in here is one of this stage."""
    try:
        yield
    except ConfigError as error:
        stage = context.experiment.pipeline.nodes[context.name].stage
        raise ConfigError(error.what, where=f"stage.{stage}.{error.where}", fix=error.fix) from error


def plan_of(context: StageContext, setup: Engine, start: Path, of_rows: Sizes) -> Plan:
    settings = context.settings
    config = AutoConfig.from_pretrained(start, local_files_only=True)
    steps = count_steps(len(of_rows.lengths), settings.global_batch_size, settings.epochs, settings.max_steps)
    if isinstance(settings, Online) and settings.max_steps is None:
        steps *= settings.epochs_per_rollout
    lengths, widths = of_rows.lengths.tolist(), of_rows.widths.tolist()
    largest, sharers = engine.largest_forward(lengths, widths, settings.global_batch_size), setup.sequence_parallel
    of_one = -(-max(lengths) // sharers), -(-largest // sharers)  # tokens that one process computes
    choice = engine.choose(settings, setup, start, config, context.world_size, *of_one)
    batches = GlobalBatches(
        lengths=lengths,
        weights=of_rows.weights.tolist(),
        global_batch_size=settings.global_batch_size,
        steps=steps,
        seed=settings.seed,
        world_size=context.world_size // sharers,
        tokens_per_micro_batch=choice.tokens_per_micro_batch * sharers,
        quadratic=attention_share(config),
    )
    return Plan(choice, batches, widths, max(lengths), config)


def _what_every_trainer_takes(context: StageContext, setup: Engine, keeper: Keeper, plan: Plan) -> dict[str, Any]:
    settings = context.settings

    def on_step(step: int, total: int, metrics: dict[str, float]) -> None:
        shown: dict[str, Any] = {name: metrics[name] for name in ("loss", "tokens_per_s") if name in metrics}
        context.progress(step, total, **shown)
        if metrics:
            context.log(step, metrics)

    rolled_back = list(context.told().get(ROLLED_BACK, []))
    return {
        "batches": plan.batches,
        "widths": plan.widths,
        "on_step": on_step,
        "say": keeper.say,
        "warn": context.warn,
        "keeper": keeper,
        "nonfinite": NonFinite(settings.nonfinite, settings.max_nonfinite, rolled_back=rolled_back),
        "spike_alarm": settings.spike_alarm,
        "packing": Packing(compile=setup.compile),
    }


def keeper_of(context: StageContext, setup: Engine) -> Keeper:
    settings, launcher = context.experiment.checkpoint, context.experiment.launcher
    folder = context.folder / CHECKPOINTS
    layout = {"strategy": setup.strategy, "world_size": context.world_size, "precision": context.settings.precision}
    run_id = context.folder / "wandb_run_id"
    record = {
        "stage": context.name,
        "run": context.run,
        "wandb_run_id": run_id.read_text().strip() if run_id.is_file() else None,
        "code_sha256": code_digest(),
    }
    return Keeper(
        Checkpoints(folder, context.key, settings, context.warn),
        context,
        layout,
        record,
        say=print if context.is_main else lambda line: None,
        grace=launcher.grace if isinstance(launcher, SlurmLauncher) else None,
    )


def _require_room(context: StageContext, weights: int, trainer: Any, checkpoints: Checkpoints, moving: bool) -> None:
    """On the disk. weights: bytes of the model that will be written. moving: checkpoints have a reference too.

    Raises MachineError if the model does not fit; that checkpoints do not is a warning: a short run saves none, and a
    failed save costs that save."""
    if not context.is_main:
        return
    room = checkpoints.room()
    require_room(context.folder, weights, room)
    trained = sum(_size(parameter) for parameter in trainer.model.parameters() if parameter.requires_grad)
    count, one = most_at_once(checkpoints.settings), size_of_one(trained, moving)
    if count and (free := room + checkpoints.kept_bytes()) < count * one + weights:
        what = f"{count} checkpoints of {size_text(one)} and the model need more disk than the {size_text(free)} free"
        context.warn(f"{what}: saves will fail unless some is freed, or checkpoint.keep_last lowered")


def _keep_best(context: StageContext, checkpoints: Checkpoints) -> None:
    """Say which checkpoints stay beside the result, where that is asked for."""
    settings = checkpoints.settings
    context.checkpoints = [checkpoints.at(step).name for step in checkpoints.best()]
    if settings.keep_best and not context.checkpoints:
        found = "no checkpoint was saved" if not checkpoints.found() else f"no row of metrics has {settings.best_by}"
        context.warn(f"checkpoint.keep_best={settings.keep_best} keeps nothing: {found}")


def _summary(trainer: Any) -> dict[str, float]:
    """The last row of metrics, what the trainer says of the whole run, and how much was trained."""
    history = trainer.state.log_history
    last = {name: value for name, value in history[-1].items() if name not in ("epoch", "step", "learning_rate")}
    trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    return {**last, **trainer.facts(), "trained_parameters": sum(map(_size, trained))}


def _size(parameter: Any) -> int:
    """Its number of elements; ZeRO-3 keeps but a shard of them here, and of 4 bits two are in a byte."""
    if (state := getattr(parameter, "quant_state", None)) is not None:
        return int(state.shape.numel())
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def tokenised(context: StageContext, tokenizer: Any) -> Any:
    """The rows to train on. Raises InputError unless they are this model's: its template, its end of turn."""
    data = context.inputs["data"]
    rows = train_rows(data)
    if (data / "data_report.json").is_file():  # of the prepare stage; whoever tokenises rows alone has none
        check_template(Chat(tokenizer, str(context.inputs["model"])), data)
    check_end_of_turn(rows, tokenizer.eos_token_id)
    return rows


def train_rows(data: Path) -> Any:
    """data: the result of the stage that prepared them. Raises InputError if there are none."""
    folder = data / "train"
    rows = load_from_disk(str(folder))
    if not len(rows):
        raise InputError("there are no rows to train on", where=str(folder))
    if "mismatched_ids" in rows.column_names:  # an answer and one to another prompt are kept and scored as a pair is
        rows = rows.rename_columns({"completion_ids": "chosen_ids", "mismatched_ids": "rejected_ids"})
    return rows
