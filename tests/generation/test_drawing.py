from __future__ import annotations

import pytest
import torch

from alignment import drawing


def test_noise_is_one_draw_of_its_seed_of_which_few_prompts_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """In blocks of three prompts, the last of one; of one prompt, where one has more numbers than a block."""
    whole = torch.rand(10, 2, 7, generator=torch.Generator().manual_seed(3))
    for numbers in (45, 5, 1 << 20):
        monkeypatch.setattr(drawing, "NUMBERS", numbers)
        noise = drawing.Noise(10, 2, 7, seed=3)
        for rows in ([9, 0, 4], [2], [5, 3], list(range(10))):
            assert torch.equal(noise[rows], whole[rows])


def test_draws_invert_the_distribution() -> None:
    """p = (.5, .3, .2): the running sum passes u at token 0 below .5, 1 below .8, 2 above."""
    logits = torch.tensor([0.5, 0.3, 0.2]).log().repeat(6, 1)
    noise = torch.tensor([0.0, 0.49, 0.51, 0.79, 0.81, 0.9999999])
    assert drawing.choose(logits, noise, temperature=1.0, top_p=1.0).tolist() == [0, 0, 1, 1, 2, 2]


def test_top_p_keeps_the_fewest_most_probable_tokens() -> None:
    """p = (.2, .5, .3), top_p .6: tokens 1 and 2 are kept (.5 alone is short), renormalised 5/8 and 3/8."""
    logits = torch.tensor([0.2, 0.5, 0.3]).log().repeat(4, 1)
    noise = torch.tensor([0.0, 0.62, 0.63, 0.999])
    assert drawing.choose(logits, noise, temperature=1.0, top_p=0.6).tolist() == [1, 1, 2, 2]
    assert drawing.choose(logits, noise, temperature=1.0, top_p=0.4).tolist() == [1, 1, 1, 1]


def test_temperature_sharpens_before_the_draw() -> None:
    """p = (.5, .3, .2) at temperature 0.5 is p squared: (.25, .09, .04) / .38 = (.658, .237, .105)."""
    logits = torch.tensor([0.5, 0.3, 0.2]).log().repeat(4, 1)
    noise = torch.tensor([0.65, 0.67, 0.89, 0.90])
    assert drawing.choose(logits, noise, temperature=0.5, top_p=1.0).tolist() == [0, 1, 1, 2]


def test_a_nucleus_wider_than_the_first_look_is_sorted_whole() -> None:
    """Of 4096 tokens, all alike in row 0 and one of probability near 1 in row 1, only row 0 needs the sort."""
    logits = torch.zeros(2, 4096)
    logits[1, 7] = 30.0
    tokens = drawing.choose(logits, torch.tensor([0.999, 0.5]), temperature=1.0, top_p=0.95)
    everywhere = drawing.choose(logits[:1].repeat(400, 1), torch.rand(400), temperature=1.0, top_p=0.95)
    assert tokens[1] == 7
    assert len(set(everywhere.tolist())) > 300, "draws reach far beyond the 1024 tokens looked at first"


def test_frequencies_of_many_draws_match_the_probabilities() -> None:
    probs = torch.tensor([0.4, 0.3, 0.2, 0.1])
    noise = torch.rand(20000, generator=torch.Generator().manual_seed(0))
    drawn = drawing.choose(probs.log().repeat(20000, 1), noise, temperature=1.0, top_p=1.0)
    assert torch.bincount(drawn) / 20000 == pytest.approx(probs.numpy(), abs=0.01)
