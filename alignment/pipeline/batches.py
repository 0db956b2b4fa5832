"""Which stages of a graph become one SLURM job each, and which together an array: those that are alike and wait for the
same. Sweeps are made of such stages, so a scheduler sees a few arrays instead of thousands of jobs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

AFTEROK, AFTERCORR = "afterok", "aftercorr"
Source = int | str  # what a task waits for, or for an element of: a batch, or a job that is queued already
Places = dict[str, tuple[Source, int | None]]  # key -> the source that makes it, and the index if that is an array


@dataclass(frozen=True)
class Wait:
    """For a job that is queued already (job), or for a batch: one element of it (index; job: 7_0), each for its own
    (aftercorr), or all of it."""

    how: str
    job: str | None = None
    batch: int | None = None
    index: int | None = None


@dataclass(frozen=True)
class Task:
    """One stage to submit. alike: equal for those that may share an array. parents: keys that it waits for."""

    key: str
    name: str
    alike: Hashable
    parents: tuple[str, ...]


@dataclass
class Batch:
    """Tasks of one sbatch. elements: index in the array -> task; a single job is element 0."""

    number: int
    elements: dict[int, Task]
    waits: tuple[Wait, ...]
    array: bool = field(default=False)


def batches(tasks: Sequence[Task], queued: Mapping[str, str], largest: int) -> list[Batch]:
    """In an order in which they can be submitted. tasks: parents before children. queued: key -> job that will make it,
    7_0 if it is an element of an array.

    largest: highest index of an array, and one more; 1: no arrays. Parents that are neither tasks nor queued are done.
    """
    made: list[Batch] = []
    places: Places = {key: _queued(job) for key, job in queued.items()}
    for level in _levels(tasks):
        for alike in _buckets(level, lambda task: (task.alike, _above(task, places))):
            for group, corresponding in _groups(alike, places):
                for first in range(0, len(group), largest):
                    batch = _batch(len(made), group[first : first + largest], places, corresponding)
                    made.append(batch)
                    for index, task in batch.elements.items():
                        places[task.key] = (batch.number, index if batch.array else None)
    return made


def _queued(job: str) -> tuple[Source, int | None]:
    number, _, index = job.partition("_")
    return number, int(index) if index else None


def _levels(tasks: Sequence[Task]) -> list[list[Task]]:
    """By the length of the longest way down to a task that waits for none."""
    depth: dict[str, int] = {}
    levels: dict[int, list[Task]] = defaultdict(list)
    for task in tasks:
        depth[task.key] = 1 + max((depth[parent] for parent in task.parents if parent in depth), default=-1)
        levels[depth[task.key]].append(task)
    return [levels[number] for number in sorted(levels)]


def _buckets(tasks: Sequence[Task], by: Callable[[Task], Hashable]) -> list[list[Task]]:
    found: dict[Hashable, list[Task]] = defaultdict(list)
    for task in tasks:
        found[by(task)].append(task)
    return list(found.values())


def _above(task: Task, places: Places) -> Hashable:
    """The batches and the jobs that a task waits for."""
    return frozenset(places[parent][0] for parent in task.parents if parent in places)


Groups = list[tuple[list[Task], frozenset[Source]]]


def _groups(tasks: Sequence[Task], places: Places) -> Groups:
    """Tasks that can share an array, as few as can be, and the arrays to whose elements theirs correspond.

    Where several tasks wait for each element of one array they are as many arrays as it has elements, or, dealt in
    rounds, the first task of each element, the second of each, and so on: few seeds with many values, or many with few.
    """
    together = _split(tasks, places)
    if len(together) == 1:
        return together
    rounds = zip_longest(*(group for group, _ in together))
    dealt = [part for one in rounds for part in _split([task for task in one if task], places)]
    return min(together, dealt, key=len)


def _split(tasks: Sequence[Task], places: Places) -> Groups:
    corresponding = _corresponding(tasks, places)
    return [(group, corresponding) for group in _buckets(tasks, lambda task: _waits(task, places, corresponding))]


def _corresponding(tasks: Sequence[Task], places: Places) -> frozenset[Source]:
    """Arrays of which each of these tasks waits for another element, all of them at the same index of each array."""
    index: list[int | None] | None = None
    found = []
    sources = dict.fromkeys(places[p][0] for p in tasks[0].parents if p in places and places[p][1] is not None)
    for source in sorted(sources, key=str):
        mine = [[places[p][1] for p in t.parents if p in places and places[p][0] == source] for t in tasks]
        if any(len(one) != 1 for one in mine):
            continue
        at = [one[0] for one in mine]
        if len(set(at)) == len(tasks) > 1 and index in (None, at):
            index = at
            found.append(source)
    return frozenset(found)


def _waits(task: Task, places: Places, corresponding: frozenset[Source]) -> tuple[Wait, ...]:
    waits = []
    for source, index in (places[parent] for parent in task.parents if parent in places):
        if source in corresponding:
            waits.append(Wait(AFTERCORR, **_named(source)))
        elif isinstance(source, int):
            waits.append(Wait(AFTEROK, batch=source, index=index))
        else:
            waits.append(Wait(AFTEROK, job=source if index is None else f"{source}_{index}"))
    return tuple(sorted(set(waits), key=repr))


def _named(source: Source) -> dict[str, Any]:
    return {"batch": source} if isinstance(source, int) else {"job": source}


def _batch(number: int, tasks: Sequence[Task], places: Places, corresponding: frozenset[Source]) -> Batch:
    waits = _waits(tasks[0], places, corresponding)
    if not corresponding:
        return Batch(number, dict(enumerate(tasks)), waits, array=len(tasks) > 1)
    at = {}
    for task in tasks:
        found = (places[parent] for parent in task.parents if parent in places)
        index = next(index for source, index in found if source in corresponding)
        assert index is not None, "only arrays correspond"
        at[index] = task
    return Batch(number, at, waits, array=True)


def nearest(parents: Mapping[str, Sequence[str]]) -> dict[str, tuple[str, ...]]:
    """Of every key those parents that are not above another of its parents: who waits for these waits for all.

    parents: key -> its parents, in an order in which parents come first.
    """
    above: dict[str, set[str]] = {}
    for key, direct in parents.items():
        above[key] = {*direct, *(one for parent in direct for one in above.get(parent, ()))}
    return {
        key: tuple(dict.fromkeys(p for p in direct if not any(p in above.get(q, ()) for q in direct)))
        for key, direct in parents.items()
    }
