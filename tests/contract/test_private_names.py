"""What we lean on below the public surface of our libraries. An upgrade that moves one of these fails here."""

from __future__ import annotations

import importlib
import inspect

import accelerate
import deepspeed.ops
import pytest
import torch.utils.file_baton
import transformers
import trl
import trl.trainer.utils
from accelerate.state import GradientState
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.hydra import Hydra
from hydra._internal.utils import get_args_parser, run_and_report
from hydra.core.utils import JobReturn, run_job
from hydra.plugins.sweeper import Sweeper
from transformers.integrations import deepspeed as hf_deepspeed
from trl.kernels import ChunkedLogProbFunction

TRAINERS = (trl.SFTTrainer, trl.DPOTrainer, trl.RewardTrainer)
METHODS = (
    "get_train_dataloader", "training_step", "compute_loss", "floating_point_ops", "log", "remove_callback",
    "_prepare_dataset", "_prepare_inputs", "_get_grad_norm", "_send_telemetry",
)  # fmt: skip


@pytest.mark.parametrize("trainer", TRAINERS)
@pytest.mark.parametrize("method", METHODS)
def test_the_methods_overridden_exist(trainer: type, method: str) -> None:
    assert callable(getattr(trainer, method))


@pytest.mark.parametrize("trainer", TRAINERS)
def test_trainers_call_prepare_dataset_and_keep_metrics_by_mode(trainer: type) -> None:
    source = inspect.getsource(trainer)
    assert "self._prepare_dataset(" in source
    assert 'self._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}' in source
    assert "loss_is_scaled_for_ga" in dir(trainer)


def test_trainer_scales_the_loss_by_the_attributes_that_the_mixin_sets() -> None:
    step = inspect.getsource(transformers.Trainer.training_step)
    assert "if self.loss_is_scaled_for_ga is not None" in step
    assert "loss / self.current_gradient_accumulation_steps" in step
    assert list(inspect.signature(transformers.Trainer.training_step).parameters) == [
        "self", "model", "inputs", "num_items_in_batch",
    ]  # fmt: skip


def test_trainer_takes_one_item_of_the_loader_for_one_step_and_looks_at_the_norm_before_the_update() -> None:
    epoch = inspect.getsource(transformers.Trainer._run_epoch)
    assert "self.training_step(model, inputs, num_items_in_batch)" in epoch
    assert epoch.index("_get_grad_norm") < epoch.index("self.optimizer.step()")
    assert '"labels" in batch_samples[0]' in inspect.getsource(transformers.Trainer._get_num_items_in_batch)


def test_sft_divides_by_the_count_it_is_given_and_multiplies_by_the_processes() -> None:
    source = inspect.getsource(trl.SFTTrainer.compute_loss)
    assert "num_tokens = outputs.label_mask.sum() if num_items_in_batch is None else num_items_in_batch" in source
    assert "loss = loss * (self.accelerator.num_processes // self.get_tp_size())" in source
    assert "steps = self.current_gradient_accumulation_steps" in source


def test_dpo_returns_the_mean_over_pairs_and_takes_the_references_sums_from_the_inputs() -> None:
    source = inspect.getsource(trl.DPOTrainer._compute_loss)
    assert "loss += per_sequence_loss.mean() * loss_weight" in source
    assert 'ref_chosen_logps, ref_rejected_logps = inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]' in source
    assert '_non_model_keys = {"completion_mask", "ref_chosen_logps", "ref_rejected_logps"}' in source
    assert "chosen_mean_logits, rejected_mean_logits = outputs.mean_logits[:, -seq_len:].chunk(2, dim=0)" in source
    assert "1 / (2 * self.beta)) ** 2" in source and "torch.relu(1 - self.beta * delta_score)" in source


def test_dpo_precomputes_through_one_method_after_digesting_the_weights_by_one_name() -> None:
    source = inspect.getsource(trl.DPOTrainer.__init__)
    assert "self.train_dataset = self._precompute_ref_logps(" in source
    assert "hash_module(self.ref_model or self.model) if args.precompute_ref_log_probs else None" in source
    assert "is_peft_model(self.model) or (args.precompute_ref_log_probs and not self.is_fsdp_enabled)" in source


def test_rewards_are_the_logits_and_their_loss_a_mean_over_pairs() -> None:
    source = inspect.getsource(trl.RewardTrainer.compute_loss)
    assert "outputs = model(**inputs)" in source
    assert "loss = -nn.functional.logsigmoid(rewards_chosen - rewards_rejected).mean()" in source


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "phi3", "mixtral"])
def test_layers_hand_unknown_keyword_arguments_to_the_attention_function(family: str) -> None:
    source = inspect.getsource(importlib.import_module(f"transformers.models.{family}.modeling_{family}"))
    call = source[source.index("= attention_interface(") :]
    assert "**kwargs," in call[: call.index("\n        )\n")]


def test_trls_kernel_takes_and_returns_what_the_head_says() -> None:
    parameters = list(inspect.signature(ChunkedLogProbFunction.forward).parameters)
    assert parameters == [
        "ctx", "hidden", "weight", "bias", "targets", "temperature", "chunk_size", "final_logit_softcapping",
        "logit_scale", "outputs",
    ]  # fmt: skip
    returned = "return logprobs, entropy, log_sum_sq_probs, mean_logits, is_top1"
    assert returned in inspect.getsource(ChunkedLogProbFunction.forward)
    assert callable(trl.trainer.utils.maybe_gather_lm_head_ctx)


def test_the_fused_head_asks_one_name_whether_to_score_trained_positions_only() -> None:
    source = inspect.getsource(trl.trainer.utils.add_fused_lm_head)
    assert "compact = _use_triton(hidden_states.device)" in source
    assert source.count("_use_triton(") == 1
    fields = trl.trainer.utils.FusedCausalLMOutput.__dataclass_fields__
    assert {"log_probs", "entropy", "is_top1", "label_mask"} <= set(fields)


def test_accelerate_lets_the_trainer_say_when_gradients_meet() -> None:
    assert list(inspect.signature(GradientState._set_sync_gradients).parameters) == ["self", "sync_gradients"]
    source = inspect.getsource(accelerate.utils.deepspeed.DeepSpeedEngineWrapper.backward)
    assert "set_gradient_accumulation_boundary(is_boundary=sync_gradients)" in source


def test_deepspeeds_table_of_kernels_can_be_told_to_skip_one() -> None:
    assert "deepspeed_shm_comm" in deepspeed.ops.__compatible_ops__
    assert callable(deepspeed.utils.safe_get_full_fp32_param) and callable(hf_deepspeed.unset_hf_deepspeed_config)


def test_torch_keeps_the_lock_of_a_kernel_build_open() -> None:
    source = inspect.getsource(torch.utils.file_baton.FileBaton.try_acquire)
    assert "self.fd = os.open(self.lock_file_path, os.O_CREAT | os.O_EXCL)" in source


def test_optunas_sweeper_leaves_the_loop_to_whoever_has_its_parts() -> None:
    from hydra_plugins.hydra_optuna_sweeper import _impl, optuna_sweeper

    given = inspect.signature(optuna_sweeper.OptunaSweeper.__init__).parameters
    assert list(given) == list(inspect.signature(_impl.OptunaSweeperImpl.__init__).parameters)
    loop = inspect.getsource(_impl.OptunaSweeperImpl.sweep)
    for part in (
        "_process_searchspace_config()", "_parse_sweeper_params_config()", "_to_grid_sampler_choices(",
        "_configure_trials(", "create_params_from_overrides(params_conf)", "self.launcher.launch(overrides, initial",
    ):  # fmt: skip
        assert part in loop
    assert "custom_search_space_extender(self.config" in inspect.getsource(_impl.OptunaSweeperImpl._configure_trials)
    assert "_return_value: Any" in inspect.getsource(JobReturn)


def test_hydra_loads_every_config_by_one_name_before_it_acts_on_it_and_catches_exceptions_only() -> None:
    assert "ConfigLoaderImpl(" in inspect.getsource(Hydra.create_main_hydra2)
    assert "self.config_loader.load_configuration(" in inspect.getsource(Hydra.compose_config)
    assert "self.load_configuration(" in inspect.getsource(ConfigLoaderImpl.load_sweep_config)
    assert "config_loader.load_sweep_config(" in inspect.getsource(Sweeper.validate_batch_is_legal)
    for function in (run_job, run_and_report, Hydra.get_mode):
        source = inspect.getsource(function)
        assert "except Exception" in source and "except:" not in source and "BaseException:" not in source
    assert get_args_parser().parse_args(["--exp", "x"]).experimental_rerun == "x"
