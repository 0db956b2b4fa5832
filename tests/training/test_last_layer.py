"""In the last layer most is computed for the tokens alone of which an answer is made; the answer is the same.

That answers and gradients of packs are those of padded rows, architecture by architecture, with adapters and with
checkpointing, is in test_shared_prefix.py.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounter

from alignment.training.attention import PACKED, Scores, _left_out
from alignment.training.packing import Layout, Segment, pack
from alignment.training.shared_prefix import decoder_layers
from tests.training import models

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", ["self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "self_attn.k_proj"])
def test_the_last_layer_multiplies_only_what_is_read(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, made = models.packing_model("llama"), models.packed(models.rows(2), 2)
    model.set_attn_implementation(PACKED)
    weights = [layer.get_submodule(name).weight for layer in decoder_layers(model)]
    tokens, stock = [], F.linear

    def linear(given: Any, weight: Any, bias: Any = None) -> Any:
        if any(weight is one for one in weights):
            tokens.append(given.shape[1])
        return stock(given, weight, bias)

    monkeypatch.setattr(F, "linear", linear)
    model(pack=made)
    assert len(made.layout.read) < made.tokens
    assert tokens == [made.tokens, made.tokens if name.endswith("k_proj") else len(made.layout.read)]


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "phi3", "mixtral"])
def test_what_is_read_is_what_a_whole_last_layer_gives(name: str) -> None:
    """<= 1e-5: products of other shapes are rounded otherwise."""
    model, made = models.packing_model(name), models.packed(models.rows(2), 2)
    model.set_attn_implementation(PACKED)
    given = {"input_ids": made.ids, "position_ids": made.positions, "use_cache": False}
    all_read = Layout(made.layout.segments)
    with torch.no_grad():
        whole = model.base_model(**given, layout=all_read).last_hidden_state[0]
        narrow = model.base_model(**given, layout=made.layout).last_hidden_state[0]
        again = model.base_model(**given, layout=all_read).last_hidden_state[0]
    torch.testing.assert_close(narrow[made.layout.read], whole[made.layout.read], rtol=0, atol=1e-5)
    assert torch.equal(whole, again), "a layout without `read` has all computed, also after one with it"
    unread = torch.ones(made.tokens, dtype=torch.bool).index_fill(0, made.layout.read, False)
    assert float((narrow[unread] - whole[unread]).abs().max()) > 1e-3, "the others were not computed"


def test_queries_before_the_first_that_is_read_are_left_out() -> None:
    """Two rows (5 6 7 8) and (5 6 9) that share 5 6; 8 and 9 are scored, so 7 (place 2), 6 (place 1) and the ends are
    read: the first segment from place 1 on, the second, 9 (place 4), whole; what fills the pack up is not read."""
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 9, 0]])
    labels = torch.tensor([[-100, -100, -100, 8], [-100, -100, 9, -100]])
    made = pack(ids, (ids > 0).long(), labels, branches=2, bucket=8)
    assert made.layout.read.tolist() == [1, 2, 3, 4]
    assert made.layout.segments == [Segment(0, 4, 0, 0, 1), Segment(4, 5, 0, 2, 4), Segment(5, 8, 5, 5, 8)]
    assert [segment.unread for segment in made.layout.segments] == [1, 0, 3]
    mask = made.layout.segments[0].mask(None, torch.float32, torch.device("cpu"), skip=1)
    assert (mask == 0).tolist() == [[True, True, False, False], [True, True, True, False], [True] * 4]


def test_queries_are_left_out_where_that_saves_more_than_a_mask_costs() -> None:
    """A segment that is causal only has a kernel's own mask; one of its own grows with the square."""
    plain = Scores(None, None, None, narrow=True)
    assert _left_out(Segment(0, 300, 0, 0, 99), plain) == 0 and _left_out(Segment(0, 300, 0, 0, 100), plain) == 100
    assert _left_out(Segment(0, 30_000, 0, 0, 15_000), plain) == 0
    assert _left_out(Segment(0, 30_000, 0, 0, 30_000), plain) == 30_000, "nothing is read: no mask"
    assert _left_out(Segment(10, 310, 0, 10, 20), plain) == 10, "it has a mask anyway"
    assert _left_out(Segment(0, 300, 0, 0, 5), Scores(None, 64, None, narrow=True)) == 5
    assert _left_out(Segment(0, 300, 0, 0, 200), Scores(None, None, None)) == 0


def test_a_copy_of_a_model_computes_with_its_own_weights() -> None:
    model, made = models.packing_model("llama"), models.packed(models.rows(2), 2)
    model.set_attn_implementation(PACKED)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        wanted = model(pack=made).log_probs
        for parameter in model.parameters():
            parameter.zero_()
        assert torch.equal(copied(pack=made).log_probs, wanted)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_packs_of_one_bucket_are_compiled_for_once(checkpointing: bool) -> None:
    """How many tokens are read differs from pack to pack."""
    model = models.packing_model("llama")
    model.set_attn_implementation(PACKED)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    torch._dynamo.reset()
    graphs = CompileCounter()
    for layer in decoder_layers(model):
        for part in layer.children() if checkpointing else [layer]:
            part.compile(dynamic=False, backend=graphs)
    counts, reads = [], set()
    for seed in range(5):
        made = models.packed(models.rows(2, seed=seed), 2, bucket=256)
        assert made.tokens == 256
        reads.add(len(made.layout.read))
        model(pack=made).log_probs.sum().backward()
        counts.append(graphs.frame_count)
    assert len(reads) > 2 and counts[0] > 0
    assert counts[1:] == counts[1:2] * 4, "after the second, which learns what is not constant"
