"""Which stages of a graph become one SLURM job each, and which together an array: those that are alike and wait for the
same. Sweeps are made of such stages, so a scheduler sees a few arrays instead of thousands of jobs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field

AFTEROK, AFTERCORR = "afterok", "aftercorr"


@dataclass(frozen=True)
class Wait:
    """For a job that is queued already (job), or for a batch: one element of it (index), each for its own (aftercorr),
    or all of it."""

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
    """In an order in which they can be submitted. tasks: parents before children. queued: key -> job that will make it.

    largest: highest index of an array, and one more; 1: no arrays. Parents that are neither tasks nor queued are done.
    """
    made: list[Batch] = []
    place: dict[str, tuple[Batch, int]] = {}
    for level in _levels(tasks):
        for alike in _buckets(level, lambda task: (task.alike, _above(task, place, queued))):
            corresponding = _corresponding(alike, place)
            for group in _buckets(alike, lambda task: _waits(task, place, queued, corresponding)):  # noqa: B023
                for first in range(0, len(group), largest):
                    batch = _batch(len(made), group[first : first + largest], place, queued, corresponding)
                    made.append(batch)
                    place.update({task.key: (batch, index) for index, task in batch.elements.items()})
    return made


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


def _above(task: Task, place: Mapping[str, tuple[Batch, int]], queued: Mapping[str, str]) -> Hashable:
    """The batches and the jobs that a task waits for."""
    numbers = {place[parent][0].number for parent in task.parents if parent in place}
    return frozenset(numbers), frozenset(queued[parent] for parent in task.parents if parent in queued)


def _corresponding(tasks: Sequence[Task], place: Mapping[str, tuple[Batch, int]]) -> frozenset[int]:
    """Arrays of which each of these tasks waits for another element, all of them at the same index of each array."""
    index: list[int] | None = None
    found = []
    numbers = sorted({place[p][0].number for p in tasks[0].parents if p in place and place[p][0].array})
    for number in numbers:
        mine = [[place[p][1] for p in t.parents if p in place and place[p][0].number == number] for t in tasks]
        if any(len(one) != 1 for one in mine):
            continue
        at = [one[0] for one in mine]
        if len(set(at)) == len(tasks) > 1 and index in (None, at):
            index = at
            found.append(number)
    return frozenset(found)


def _waits(
    task: Task, place: Mapping[str, tuple[Batch, int]], queued: Mapping[str, str], corresponding: frozenset[int]
) -> tuple[Wait, ...]:
    waits = []
    for parent in task.parents:
        if parent in place:
            batch, index = place[parent]
            if batch.number in corresponding:
                waits.append(Wait(AFTERCORR, batch=batch.number))
            else:
                waits.append(Wait(AFTEROK, batch=batch.number, index=index if batch.array else None))
        elif parent in queued:
            waits.append(Wait(AFTEROK, job=queued[parent]))
    return tuple(sorted(set(waits), key=repr))


def _batch(
    number: int,
    tasks: Sequence[Task],
    place: Mapping[str, tuple[Batch, int]],
    queued: Mapping[str, str],
    corresponding: frozenset[int],
) -> Batch:
    waits = _waits(tasks[0], place, queued, corresponding)
    if not corresponding:
        return Batch(number, dict(enumerate(tasks)), waits, array=len(tasks) > 1)
    at = {}
    for task in tasks:
        index = next(place[p][1] for p in task.parents if p in place and place[p][0].number in corresponding)
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
