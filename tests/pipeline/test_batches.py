"""Which stages share an array, and what they wait for; the graph of a sweep in a few submissions."""

from __future__ import annotations

from itertools import product

from alignment.pipeline.batches import Batch, Task, Wait, batches, nearest


def shape(made: list[Batch]) -> list[tuple[str, list[int], list[tuple[str, int | None, int | None]]]]:
    """(name, indices, waits) of each."""
    return [
        (next(iter(b.elements.values())).name, list(b.elements), [(w.how, w.batch, w.index) for w in b.waits])
        for b in made
    ]


def test_a_chain_is_one_job_after_the_other() -> None:
    tasks = [Task("a", "sft", "sft", ()), Task("b", "dpo", "dpo", ("a",)), Task("c", "evaluate", "e", ("b",))]
    made = batches(tasks, {}, 1001)
    assert shape(made) == [
        ("sft", [0], []), ("dpo", [0], [("afterok", 0, None)]), ("evaluate", [0], [("afterok", 1, None)]),
    ]  # fmt: skip
    assert not any(batch.array for batch in made)


def test_a_sweep_of_three_by_two_is_four_submissions() -> None:
    """Two seeds, each with its SFT; three betas of each; an evaluation of each, after its own DPO only."""
    tasks = [Task(f"sft{s}", "sft", "sft", ()) for s in range(2)]
    tasks += [Task(f"dpo{b}{s}", "dpo", "dpo", (f"sft{s}",)) for b, s in product(range(3), range(2))]
    tasks += [Task(f"eval{b}{s}", "evaluate", "e", (f"dpo{b}{s}",)) for b, s in product(range(3), range(2))]
    made = batches(tasks, {}, 1001)
    assert shape(made) == [
        ("sft", [0, 1], []),
        ("dpo", [0, 1, 2], [("afterok", 0, 0)]),
        ("dpo", [0, 1, 2], [("afterok", 0, 1)]),
        ("evaluate", [0, 1, 2], [("aftercorr", 1, None)]),
        ("evaluate", [0, 1, 2], [("aftercorr", 2, None)]),
    ]
    assert [task.key for task in made[3].elements.values()] == ["eval00", "eval10", "eval20"]


def test_many_seeds_with_few_values_are_an_array_for_each_value() -> None:
    """250 seeds, one of whose SFTs is in the store; two betas of each, but one; an evaluation and a verdict of each."""
    points = [(b, s) for s, b in product(range(250), range(2)) if (b, s) != (1, 9)]
    tasks = [Task(f"sft{s}", "sft", "sft", ()) for s in range(250) if s != 4]
    tasks += [Task(f"base{s}", "evaluate", "e", (f"sft{s}",)) for s in range(250) if s != 4]
    tasks += [Task(f"dpo{b}.{s}", "dpo", "dpo", (f"sft{s}",)) for b, s in points]
    tasks += [Task(f"eval{b}.{s}", "evaluate", "e", (f"dpo{b}.{s}",)) for b, s in points]
    tasks += [Task(f"verdict{b}.{s}", "compare", "c", (f"eval{b}.{s}", f"base{s}")) for b, s in points]
    made = batches(tasks, {}, 1001)
    assert len(made) < 20
    of = {task.key: (batch, index) for batch in made for index, task in batch.elements.items()}
    for task in tasks:
        batch, index = of[task.key]
        assert len(batch.waits) == len(set(task.parents) & set(of))
        for parent in set(task.parents) & set(of):
            above, at = of[parent]
            (wait,) = (wait for wait in batch.waits if wait.batch == above.number)
            assert wait.index == at if wait.how == "afterok" else at == index, "its own, whatever the others wait for"


def test_an_element_of_an_array_keeps_its_parent_s_index() -> None:
    """The second evaluation is in the store: the third still waits for the third DPO."""
    tasks = [Task(f"dpo{i}", "dpo", "dpo", ()) for i in range(3)]
    tasks += [Task(f"eval{i}", "evaluate", "e", (f"dpo{i}",)) for i in (0, 2)]
    made = batches(tasks, {}, 1001)
    assert shape(made)[1] == ("evaluate", [0, 2], [("aftercorr", 0, None)])


def test_parents_at_different_indices_are_waited_for_one_by_one() -> None:
    tasks = [Task(f"a{i}", "a", "a", ()) for i in range(2)] + [Task(f"b{i}", "b", "b", ()) for i in range(2)]
    tasks += [Task("c0", "c", "c", ("a0", "b1")), Task("c1", "c", "c", ("a1", "b0"))]
    made = batches(tasks, {}, 1001)
    assert shape(made)[2:] == [
        ("c", [0], [("aftercorr", 0, None), ("afterok", 1, 1)]),
        ("c", [1], [("aftercorr", 0, None), ("afterok", 1, 0)]),
    ]


def test_what_is_queued_already_is_waited_for_and_not_submitted() -> None:
    tasks = [Task("b", "dpo", "dpo", ("a",))]
    (made,) = batches(tasks, {"a": "17_3"}, 1001)
    assert made.waits == (Wait("afterok", job="17_3"),)


def test_each_waits_for_its_own_element_of_an_array_that_is_queued_already() -> None:
    """A submission was killed after the DPOs: what is left of it is as few jobs as if it had not been."""
    tasks = [Task(f"eval{i}", "evaluate", "e", (f"dpo{i}",)) for i in range(4)]
    tasks += [Task(f"verdict{i}", "compare", "c", (f"eval{i}", "base")) for i in range(4)]
    queued = {"dpo0": "17_0", "dpo1": "17_1", "dpo2": "17_5", "dpo3": "18", "base": "4"}
    evaluations, last, verdicts, verdict = batches(tasks, queued, 1001)
    assert (list(evaluations.elements), evaluations.waits) == ([0, 1, 5], (Wait("aftercorr", job="17"),))
    assert (last.array, last.waits) == (False, (Wait("afterok", job="18"),))
    assert list(verdicts.elements) == [0, 1, 5]
    assert verdicts.waits == (Wait("aftercorr", batch=0), Wait("afterok", job="4"))
    assert set(verdict.waits) == {Wait("afterok", batch=1), Wait("afterok", job="4")}


def test_an_array_is_no_larger_than_the_cluster_takes() -> None:
    tasks = [Task(f"dpo{i}", "dpo", "dpo", ()) for i in range(5)]
    tasks += [Task(f"eval{i}", "evaluate", "e", (f"dpo{i}",)) for i in range(5)]
    made = batches(tasks, {}, 2)
    assert [len(batch.elements) for batch in made] == [2, 2, 1, 2, 2, 1]
    of = {task.key: batch for batch in made for task in batch.elements.values()}
    for number in range(5):
        (wait,) = of[f"eval{number}"].waits
        assert wait.batch == of[f"dpo{number}"].number


def test_unlike_stages_never_share_an_array() -> None:
    tasks = [Task("a", "sft", ("sft", "1 GPU"), ()), Task("b", "sft", ("sft", "8 GPUs"), ())]
    assert len(batches(tasks, {}, 1001)) == 2


def test_who_waits_for_the_last_of_a_chain_waits_for_all_of_it() -> None:
    parents = {"start": [], "rows": ["start"], "sft": ["start", "rows"], "verdict": ["rows", "sft", "start"]}
    assert nearest(parents) == {"start": (), "rows": ("start",), "sft": ("rows",), "verdict": ("sft",)}
