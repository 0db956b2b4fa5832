"""The half of online training that asks: the next prompts, answered by the policy, judged, and told to all processes.

Prompts are the next ones of the stream that seed and step give (batching.py); answers have random numbers of their own
by seed and place in the stream. Each process samples and judges its share.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from trl.models.utils import unwrap_model_for_generation

from alignment.config.stages.online import Online
from alignment.training.engine import uncounted
from alignment.training.ranks import all_gather, rank, world_size
from alignment.training.rollouts import Answer, Group
from alignment.training.trainers import AlignedTrainer

# (model, prompts' ids, uniform noise [prompts, answers, tokens], alive) -> the answers to each prompt
Sampler = Callable[[Any, Sequence[Sequence[int]], Tensor, Callable[[int, int], None]], list[list[Answer]]]
# (numbers of prompts' rows, their answers, alive): writes reward and terms into each answer
Judging = Callable[[Sequence[int], Sequence[Answer], Callable[[int, int], None]], None]
# (why answers sampled last have no reward, how many have none, of how many so far): raises where these are too many
ShareCheck = Callable[[Sequence[Mapping[str, str]], int, int], None]


class Answering(AlignedTrainer):
    """train_dataset: rows {"prompt_ids"}."""

    def __init__(
        self,
        *,
        settings: Online,
        sample: Sampler,
        judge: Judging,
        check_share: ShareCheck = lambda failed, without, count: None,
        tell: Callable[[str, int, int], None] = lambda what, done, total: None,
        show: Callable[[int, int, Group], None] = lambda number, step, group: None,
        **kwargs: Any,
    ) -> None:
        """tell(what is done, how far, of how much): called often, as a sign of life too. show(rollout, the step that it
        is first trained on, from 1, its first group): of each rollout."""
        self._show = show
        self.settings, self._sample_answers, self._judge, self._tell = settings, sample, judge, tell
        self._check_share = check_share
        self._taken = 0  # prompts of the stream
        self._judged = [0, 0]  # answers so far, and those of them that have no reward
        super().__init__(**kwargs)

    def _before_training(self) -> None:
        self._decodes_with = self._plain_model().config._attn_implementation
        super()._before_training()

    def _prompt(self: Any, number: int) -> list[int]:
        return self.train_dataset[number]["prompt_ids"]

    def _sampled(self, count: int) -> list[Group]:
        """The next prompts of the stream, answered and judged. A collective."""
        numbers = self.batches.stream(self._taken, count)
        every = list(zip(range(self._taken, self._taken + count), numbers, strict=True))
        self._taken += count
        mine, settings = every[rank() :: world_size()], self.settings
        shape = settings.completions_per_prompt, settings.max_new_tokens
        noise = [np.random.default_rng([settings.seed, place, 1]).random(shape, np.float32) for place, _ in mine]
        groups = []
        with self._decoding() as model:  # a collective, also where there is nothing to do
            if mine:
                prompts = [self._prompt(number) for _, number in mine]
                given = torch.from_numpy(np.stack(noise))
                answers = self._sample_answers(model, prompts, given, lambda *far: self._tell("sampling", *far))
                groups = [Group(*which, few) for which, few in zip(mine, answers, strict=True)]
        flat = [(group.number, answer) for group in groups for answer in group.answers]
        self._tell("judging", 0, len(flat))
        self._judge(
            [number for number, _ in flat], [answer for _, answer in flat], lambda *far: self._tell("judging", *far)
        )
        if settings.truncated == "penalty":
            for _, answer in flat:
                if answer.reward is not None and not answer.finished:
                    answer.reward -= settings.truncation_penalty
        gathered = sorted((group for part in all_gather(groups) for group in part), key=lambda group: group.place)
        self._count_failures([answer for group in gathered for answer in group.answers])
        return gathered

    def _count_failures(self, answers: Sequence[Answer]) -> None:
        """Raises InputError on all processes alike where too many answers have no reward."""
        failed = [answer.failed or {} for answer in answers if answer.reward is None]
        self._judged = [self._judged[0] + len(answers), self._judged[1] + len(failed)]
        judged, without = self._judged
        self._check_share(failed, without, judged)

    def facts(self) -> dict[str, float]:
        return {**super().facts(), "answers": self._judged[0], "reward_failed": self._judged[1]}

    @contextmanager
    def _decoding(self) -> Iterator[Any]:
        """The plain model with whole weights, answering token by token. Under ZeRO-3 a collective."""
        plain, packed = self._plain_model(), self._plain_model().config._attn_implementation
        checkpointing: Any = self.args.activation_checkpointing_kwargs
        engine = self.model_wrapped
        with (
            unwrap_model_for_generation(engine, self.accelerator, gradient_checkpointing_kwargs=checkpointing),
            uncounted(engine),
        ):
            plain.set_attn_implementation(self._decodes_with)
            training = plain.training
            plain.eval()
            with torch.no_grad(), self.accelerator.autocast():
                yield plain
            plain.train(training)
            plain.set_attn_implementation(packed)
        self._output = None  # of the last token, with the cache of all

    def training_state(self) -> dict[str, Any]:
        return {**super().training_state(), "taken": self._taken, "judged": self._judged}

    def load_training_state(self, facts: dict[str, Any], *meters: Any) -> None:
        super().load_training_state(facts, *meters)
        self._taken, self._judged = facts["taken"], facts["judged"]
