from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from alignment import generation
from alignment.errors import InputError, MachineError
from tests.generation.conftest import STOPS

QUESTIONS = ["a", "Who?", "What is the colour of the sky?", "b", "Tell me more about it, please", "zz", "1 + 1 = "]
PROMPTS = [[{"role": "user", "content": text}] for text in QUESTIONS]
GREEDY: dict[str, Any] = {"max_new_tokens": 12, "temperature": 0.0, "top_p": 1.0, "seed": 0}
SAMPLED: dict[str, Any] = {"max_new_tokens": 12, "temperature": 1.0, "top_p": 0.95, "seed": 3}
GIVEN = [[244, 60, 177, 99, 97, 164, 143, 165, 255, 48], [91, 16]]  # to the third prompt, by SAMPLED


@torch.inference_mode()
def plain_greedy(model: Any, ids: list[int], steps: int) -> list[int]:
    """Without cache, padding or batch: the arg max of a whole forward, again and again."""
    answer: list[int] = []
    for _ in range(steps):
        token = int(model(torch.tensor([ids + answer])).logits[0, -1].argmax())
        answer.append(token)
        if token in STOPS:
            break
    return answer


def test_a_left_padded_batch_gives_the_tokens_of_a_plain_forward_one_at_a_time(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    expected = [plain_greedy(model, generation.encode_prompt(tokenizer, prompt), 12) for prompt in PROMPTS]
    found = [few[0].token_ids for few in generation.generate(model, tokenizer, PROMPTS, batch_size=7, **GREEDY)]
    assert found == expected
    assert len({len(ids) for ids in expected}) > 1, "answers of one length would not show that ended rows leave"
    assert len({tuple(ids) for ids in expected}) > 3


def test_greedy_answers_equal_those_of_transformers_generate(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    ours = generation.generate(model, tokenizer, PROMPTS, batch_size=4, **GREEDY)
    for prompt, few in zip(PROMPTS, ours, strict=True):
        ids = torch.tensor([generation.encode_prompt(tokenizer, prompt)])
        theirs = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, pad_token_id=0
        )
        assert few[0].token_ids == theirs[0, ids.shape[1] :].tolist()


def test_the_batch_size_changes_no_answer_greedy_or_sampled(loaded: tuple[Any, Any]) -> None:
    for how in (GREEDY, SAMPLED):
        runs = [generation.generate(*loaded, PROMPTS, batch_size=size, completions=3, **how) for size in (1, 6, 64)]
        ids = [[[c.token_ids for c in few] for few in run] for run in runs]
        assert ids[0] == ids[1] == ids[2]


def test_a_seed_gives_the_same_answers_and_another_seed_others(loaded: tuple[Any, Any]) -> None:
    first, again = (generation.generate(*loaded, PROMPTS, batch_size=4, completions=2, **SAMPLED) for _ in range(2))
    other = generation.generate(*loaded, PROMPTS, batch_size=4, completions=2, **{**SAMPLED, "seed": 4})
    assert first == again
    assert first != other
    assert any(few[0].token_ids != few[1].token_ids for few in first), "two answers to a prompt are two draws"


def test_finished_means_that_a_stop_token_ended_the_answer(loaded: tuple[Any, Any]) -> None:
    every = [c for few in generation.generate(*loaded, PROMPTS, batch_size=4, completions=4, **SAMPLED) for c in few]
    assert {c.finished for c in every} == {True, False}
    for completion in every:
        assert completion.tokens == len(completion.token_ids)
        assert completion.finished == (completion.token_ids[-1] in STOPS)
        assert not set(completion.token_ids[:-1]) & set(STOPS)
        assert completion.finished or completion.tokens == 12


def test_the_end_of_turn_token_is_not_in_the_text(loaded: tuple[Any, Any]) -> None:
    _, tokenizer = loaded
    completion = generation.completion(tokenizer, [*tokenizer("Hi")["input_ids"], 1], [-1.0, -2.0, -0.5], [1])
    assert (completion.text, completion.tokens, completion.finished) == ("Hi", 3, True)
    assert completion.log_prob == -3.5


def test_the_log_prob_of_an_answer_is_that_of_a_plain_forward(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    for prompt, few in zip(PROMPTS, generation.generate(*loaded, PROMPTS, batch_size=8, **SAMPLED), strict=True):
        ids, answer = generation.encode_prompt(tokenizer, prompt), few[0].token_ids
        with torch.inference_mode():
            table = model(torch.tensor([ids + answer])).logits[0].log_softmax(-1)
        expected = sum(float(table[len(ids) + i - 1, token]) for i, token in enumerate(answer))
        assert few[0].log_prob == pytest.approx(expected, abs=1e-4)


def test_answers_drawn_from_token_ids_are_those_of_generate_bit_for_bit(loaded: tuple[Any, Any]) -> None:
    """What trains online draws from ids and noise of its own; an answer's log-prob is the sum of its tokens', one after
    the other. The ids are those that a seed has given since there are samples."""
    model, tokenizer = loaded
    texts = generation.generate(model, tokenizer, PROMPTS, batch_size=4, completions=2, **SAMPLED)
    ids = [generation.encode_prompt(tokenizer, prompt) for prompt in PROMPTS]
    noise = torch.rand(len(ids), 2, 12, generator=torch.Generator().manual_seed(SAMPLED["seed"]))
    how: dict[str, Any] = {"stop": generation.stop_tokens(model, tokenizer), "temperature": 1.0, "top_p": 0.95}
    drawn = generation.in_order(generation.draw(model, ids, noise, batch_size=4, **how))
    assert [[one.token_ids for one in few] for few in texts] == [[tokens for tokens, _ in few] for few in drawn]
    for few, log_probs in zip(texts, ([scores for _, scores in few] for few in drawn), strict=True):
        for one, scores in zip(few, log_probs, strict=True):
            total = 0.0
            for score in scores:
                total += score
            assert one.log_prob == total
    assert [one.token_ids for one in texts[2]] == GIVEN


def test_progress_reaches_its_total_and_tells_the_speed(loaded: tuple[Any, Any]) -> None:
    told: list[tuple[int, int, float]] = []
    generation.generate(
        *loaded, PROMPTS, batch_size=3, **GREEDY, progress=lambda s, t, **f: told.append((s, t, *f.values()))
    )
    assert [step for step, _, _ in told] == sorted(step for step, _, _ in told)
    assert told[-1][:2] == (7 * 12, 7 * 12)
    assert all(speed > 0 for _, _, speed in told)


def test_a_prompt_without_room_for_its_answer_is_refused(loaded: tuple[Any, Any]) -> None:
    long = [{"role": "user", "content": "x" * 600}]
    with pytest.raises(
        InputError, match=r"prompt 2: a prompt of 602 tokens leaves no room for 12 more in a window of 512"
    ):
        generation.generate(*loaded, [PROMPTS[0], long], batch_size=2, **GREEDY)


@pytest.mark.parametrize("how", [GREEDY, SAMPLED])
def test_log_probs_that_are_not_finite_are_an_error_and_no_answer(loaded: tuple[Any, Any], how: dict[str, Any]) -> None:
    model, tokenizer = loaded
    with torch.no_grad():
        model.get_output_embeddings().weight[70] = torch.nan
    with pytest.raises(InputError, match="log-probs that are NaN or infinite"):
        generation.generate(model, tokenizer, PROMPTS, batch_size=4, **how)
    with pytest.raises(InputError, match="log-probs that are NaN or infinite"):
        generation.sequence_log_probs(model, [([1, 2], [3])])


@pytest.mark.parametrize(
    ("size", "fix"),
    [(14, r"stage\.\*\.batch_size=6"), (2, "lower max_new_tokens, or how many answers a prompt gets")],
)
def test_memory_that_does_not_suffice_says_how_many_answers_to_decode_at_once(
    size: int, fix: str, loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """7 prompts with 2 answers each, of which half are 3 prompts; or one prompt alone."""

    def refuse(*given: Any, **how: Any) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 107374182400 bytes.")

    monkeypatch.setattr(loaded[0], "forward", refuse)
    with pytest.raises(MachineError, match=f"out of memory: {size} answers of up to 12 tokens .*{fix}"):
        generation.generate(*loaded, PROMPTS, batch_size=size, completions=2, **SAMPLED)


def test_no_prompts_give_no_answers(loaded: tuple[Any, Any]) -> None:
    assert generation.generate(*loaded, [], batch_size=2, **GREEDY) == []


def test_streamed_pieces_make_the_text_of_generate(loaded: tuple[Any, Any]) -> None:
    for prompt, few in zip(PROMPTS, generation.generate(*loaded, PROMPTS, batch_size=1, **GREEDY), strict=True):
        pieces = list(generation.stream(*loaded, prompt, max_new_tokens=12, temperature=0.0, top_p=1.0, seed=0))
        assert len(pieces) in (few[0].tokens, few[0].tokens + 1)
        assert "".join(pieces) == few[0].text


def test_a_character_of_several_tokens_is_streamed_whole(
    loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The two bytes of e acute are two tokens; those of a third are cut off by the end of the answer."""
    model, tokenizer = loaded
    tokens = tokenizer("h\u00e9\u00e9")["input_ids"][:4]
    steps = [([0], [token], [0.0]) for token in tokens]
    monkeypatch.setattr(generation, "_decode", lambda *_, **__: iter(steps))
    pieces = list(generation.stream(model, tokenizer, PROMPTS[0], max_new_tokens=4, temperature=0.0, top_p=1.0, seed=0))
    assert pieces == ["h", "", "\u00e9", "", "\N{REPLACEMENT CHARACTER}"]


def test_a_stream_stops_at_the_end_of_the_window_and_says_when_it_is_full(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    how: dict[str, Any] = {"max_new_tokens": 50, "temperature": 0.0, "top_p": 1.0, "seed": 0}
    nearly = [{"role": "user", "content": "x" * 506}]  # 508 tokens with the two of the template: four are left
    assert len(list(generation.stream(model, tokenizer, nearly, **how))) <= 4
    with pytest.raises(InputError, match="leaves no room"):
        list(generation.stream(model, tokenizer, [{"role": "user", "content": "x" * 510}], **how))


@pytest.mark.parametrize(("missing", "what"), [("config.json", "no config.json"), ("model.safetensors", "no weights")])
def test_a_folder_that_is_no_model_is_refused(sharp_model: Path, tmp_path: Path, missing: str, what: str) -> None:
    for file in sharp_model.iterdir():
        if file.name != missing:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(InputError, match=what):
        generation.load(tmp_path, "fp32")


def test_a_tokenizer_without_a_template_is_refused(sharp_model: Path, tmp_path: Path) -> None:
    for file in sharp_model.iterdir():
        if file.name != "chat_template.jinja":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(InputError, match="no chat template"):
        generation.load(tmp_path, "fp32")


def test_truncated_weights_are_refused_in_one_line(sharp_model: Path, tmp_path: Path) -> None:
    for file in sharp_model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(InputError, match="does not load") as told:
        generation.load(tmp_path, "fp32")
    assert "\n" not in str(told.value)


def test_weights_that_lack_a_tensor_are_refused(sharp_model: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    for file in sharp_model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"lack 1 tensors, such as model\.layers\.1\.mlp\.up_proj\.weight"):
        generation.load(tmp_path, "fp32")
