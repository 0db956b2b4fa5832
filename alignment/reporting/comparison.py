"""What the points of a sweep say together: combinations with their means, which differ beyond noise, what matters."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

from alignment.config.rewards import HIGHER_IS_BETTER, better_of_terms
from alignment.config.stages.reward_model import OF_REWARD_MODELS
from alignment.config.varied import level_of, varied
from alignment.errors import ConfigError
from alignment.reporting import inference
from alignment.reporting.importance import importance
from alignment.reporting.judges import judged_apart
from alignment.reporting.settings import called, is_seed, short_names
from alignment.reporting.words import DONE, METRICS, metric_value
from alignment.reporting.words import metric as words_of

Row = dict[str, Any]
DIRECTIONS = ("maximize", "minimize")
FIRST = ("reward", "kl", "stop_rate", "tokens", "heldout_nll")  # where there is no room for all
LEVEL = 0.05
AS_GOOD, WORSE, UNKNOWN, BEST, NOTHING = "as good", "worse", "not comparable", "best", "no result"
TIED = "tied"  # several have the best mean, but for rounding


def compare(sweep: Row, points: list[Row], metric: str | None = None) -> Row:
    """Everything that is shown of a sweep: the content of --json, and all that the page is drawn from.

    {"sweep", "name", ..., "objective": {"metric", "direction"}, "metrics": those with a value anywhere, the objective
    first, "keys": varied settings but the seeds -> short name, "seeds": the varied seeds, "fixed": settings that all
    points share, "states": {state: count}, "points", "groups": the leaderboard, best first, "apart": metrics that not
    one judge measured, by which nothing is ranked, "conclusion", "frontier", "importance"}. sweep, points: of `sweeps`.
    metric: another objective, NAME or NAME:minimize. Raises ConfigError.
    """
    known = _metrics(points)
    objective = _objective(sweep, points, known, metric)
    placed = [point for point in points if point["settings"] or point["state"] != "unreadable"]
    keys = varied(placed)
    names = short_names([key for key in keys if not is_seed(key)])
    groups = _groups(placed, names)
    _mark_repeats(groups)
    seeds = [key for key in keys if is_seed(key)]
    order = [objective["metric"], *(one["metric"] for one in sweep["objective"]), *FIRST, *METRICS, *known]
    metrics = [name for name in dict.fromkeys(order) if name in known]
    for group in groups:
        group["values"] = {name: value for name in metrics if (value := _value(group["counted"], name))}
    measured = [point for group in groups for point in group["counted"]]
    apart = judged_apart(measured, metrics, lambda point: _seed(point, seeds))
    comparable = objective["metric"] not in apart
    groups = _ranked(groups, objective) if comparable else groups
    _judge(groups, objective, seeds, comparable)
    told = {name: sweep.get(name) for name in ("sweep", "name", "created", "command", "launcher", "wandb_group")}
    named = [point for point in measured if comparable and objective["metric"] in point["metrics"]]
    results = [(point["settings"], _number(point, objective["metric"])) for point in named]
    content: Row = {
        **told,
        "objective": objective,
        "metrics": metrics,
        "keys": names,
        "seeds": seeds,
        "fixed": {k: v for p in placed[:1] for k, v in p["settings"].items() if k not in keys},
        "states": dict(Counter(point["state"] for point in points)),
        "points": points,
        "groups": groups,
        "apart": apart,
        "frontier": _frontier(groups if "reward" not in apart else []),
        "importance": importance(results, list(names)),
    }
    return {**content, "conclusion": conclusion(content)}


def plain(content: Row) -> Row:
    """The content as JSON bears it: groups name their points by number."""
    groups = [{**g, **{k: [p["number"] for p in g[k]] for k in ("points", "counted")}} for g in content["groups"]]
    return {**content, "groups": groups}


# --- what is compared ------------------------------------------------------------------------------------------------


def _metrics(points: list[Row]) -> list[str]:
    return list(dict.fromkeys(name for point in points for name in point["metrics"]))


def _objective(sweep: Row, points: list[Row], known: list[str], asked: str | None) -> Row:
    own = {one["metric"]: one.get("direction") for one in sweep["objective"]}
    name, _, direction = (asked or next(iter(own))).partition(":")
    if asked and known and name not in known:
        raise ConfigError(f"no point has a metric {name!r}", where="--metric", fix=f"known: {', '.join(known)}")
    if not direction and own.get(name) in DIRECTIONS:
        direction = own[name]
    better = _better(name, points)
    if not direction and better is None:
        fix = f"--metric {name}:minimize or --metric {name}:maximize"
        raise ConfigError(f"{name} is neither better high nor low by itself", where="--metric", fix=fix)
    direction = direction or DIRECTIONS[0 if better else 1]
    if direction not in DIRECTIONS:
        raise ConfigError(f"no direction {direction!r}", where="--metric", fix=f"one of: {', '.join(DIRECTIONS)}")
    return {"metric": name, "direction": direction}


def _better(metric: str, points: list[Row]) -> bool | None:
    """Whether more of it is better; None: neither, or a term of the reward that some points want and some do not."""
    weights = [point["weights"] for point in points if metric in point["weights"]]
    found = {better_of_terms(one)[metric] for one in weights} or {
        {**OF_REWARD_MODELS, **HIGHER_IS_BETTER}.get(metric, True)
    }
    return found.pop() if len(found) == 1 else None


def _groups(points: list[Row], names: Row) -> list[Row]:
    """Points that differ in nothing but seeds, together, in the order of the sweep."""
    found: dict[tuple[str, ...], list[Row]] = {}
    for point in points:
        found.setdefault(tuple(level_of(point["settings"], key) for key in names), []).append(point)
    groups = []
    for few in found.values():
        settings = {key: few[0]["settings"][key] for key in names if key in few[0]["settings"]}
        groups.append({"label": called(settings, names) or "the only combination", "settings": settings, "points": few})
    return groups


def _mark_repeats(groups: list[Row]) -> None:
    """In each group "counted": its measured points, each result once, and "of": how many there would be if all were.

    The same run twice, or another seed that changed nothing of the evaluated model, is no further result.
    """
    for group in groups:
        seen: Row = {}
        counted = []
        for point in sorted(group["points"], key=lambda one: not one["measured"]):
            marks = [mark for mark in (point["run"], point["evaluation"]) if mark]
            first = next((seen[mark] for mark in marks if mark in seen), None)
            for mark in marks:
                seen.setdefault(mark, point["number"])
            point["repeats"] = first
            if point["measured"] and first is None:
                counted.append(point)
        group["counted"] = counted
        group["of"] = sum(point["repeats"] is None for point in group["points"])
        group["verdicts"] = dict(Counter(point["verdict"] for point in counted if point["verdict"]))


def _number(point: Row, metric: str) -> float:
    return float(point["metrics"][metric]["mean"])


def _value(points: list[Row], metric: str) -> Row | None:
    """Mean of a group with its interval: {"mean", "low", "high", "n", "noise", "confidence"}.

    noise: what the interval is of: "seeds" (Student's t over n of them) or, of a single one, "prompts" (its own
    verdict's); None: there is no interval.
    """
    values = [point["metrics"][metric] for point in points if metric in point["metrics"]]
    if not values:
        return None
    if len(values) == 1:
        only = values[0]
        whole = only["low"] is not None and only["high"] is not None
        return {**only, "n": 1, "noise": "prompts" if whole else None}
    found = inference.mean_interval([value["mean"] for value in values])
    return {**found, "noise": "seeds", "confidence": inference.CONFIDENCE}


def _ranked(groups: list[Row], objective: Row) -> list[Row]:
    """The best first; without a result last, in the order of the sweep."""
    sign = -1 if objective["direction"] == "maximize" else 1
    known = [group for group in groups if objective["metric"] in group["values"]]
    known.sort(key=lambda group: sign * group["values"][objective["metric"]]["mean"])
    return known + [group for group in groups if objective["metric"] not in group["values"]]


# --- what is within noise --------------------------------------------------------------------------------------------


def _judge(groups: list[Row], objective: Row, seeds: list[str], comparable: bool) -> None:
    """In each group "standing" and "difference": its objective minus the best group's, or None.

    p is Holm's. As the best was chosen by looking at all results, all pairs of groups count as comparisons made, not
    only those with the best: with 12 equal settings those alone would call one of them worse in 17 % of sweeps.
    """
    metric = objective["metric"]
    known = [group for group in groups if metric in group["values"]]
    for group in groups:
        group.update(standing=UNKNOWN if metric in group["values"] else NOTHING, difference=None)
    if not known or not comparable:
        return
    best, others = known[0], known[1:]
    best["standing"] = BEST
    found = [(group, difference(group, best, metric, seeds)) for group in others]
    told = [(group, one) for group, one in found if one]
    adjusted = inference.holm([one["p"] for _, one in told], family=len(known) * len(others) // 2)
    sign = 1 if objective["direction"] == "maximize" else -1
    for (group, one), p in zip(told, adjusted, strict=True):
        worse = p < LEVEL and sign * one["mean"] < 0
        group.update(difference={**one, "p_holm": p}, standing=WORSE if worse else AS_GOOD)
    means = [group["values"][metric]["mean"] for group in known]
    tied = [group for group, mean in zip(known, means, strict=True) if math.isclose(mean, means[0], abs_tol=1e-12)]
    if len(tied) > 1:
        for group in tied:
            group["standing"] = TIED


def difference(group: Row, other: Row, metric: str, seeds: list[str]) -> Row | None:
    """group minus other: {"mean", "low", "high", "p", "by", "n"}; None where nothing is known of the noise.

    by: "paired" (n seeds that both have), "welch" (other seeds, two or more each), or "prompts": too few seeds, or
    seeds that all gave the same, so that only the noise of the prompts is known, which says nothing of other seeds.
    """
    mine, theirs = (
        {_seed(p, seeds): _number(p, metric) for p in g["counted"] if metric in p["metrics"]} for g in (group, other)
    )
    shared = [seed for seed in mine if seed in theirs]
    lists = [[_number(p, metric) for p in g["counted"] if metric in p["metrics"]] for g in (group, other)]
    if len(shared) > 1:
        if found := inference.paired([mine[seed] for seed in shared], [theirs[seed] for seed in shared]):
            return {**found, "by": "paired", "n": len(shared)}
    elif min(map(len, lists)) > 1 and (found := inference.welch(lists[0], lists[1])):
        return {**found, "by": "welch", "n": min(map(len, lists))}
    if found := inference.normal_difference(_by_prompts(group, metric), _by_prompts(other, metric)):
        return {**found, "by": "prompts", "n": min(map(len, lists))}
    return None


def _seed(point: Row, seeds: list[str]) -> tuple[str, ...]:
    return tuple(level_of(point["settings"], key) for key in seeds)


def _by_prompts(group: Row, metric: str) -> Row:
    """The group's mean with an interval as wide as its runs' own over prompts: they all answered the same ones."""
    values = [point["metrics"][metric] for point in group["counted"] if metric in point["metrics"]]
    told = {"mean": group["values"][metric]["mean"], "low": None, "high": None, "confidence": None}
    halves = [inference.standard_error(value) for value in values]
    if any(half is None for half in halves):
        return told
    error = inference.mean([half for half in halves if half is not None])
    z = inference.normal_quantile(inference.CONFIDENCE)
    return {
        **told,
        "low": told["mean"] - z * error,
        "high": told["mean"] + z * error,
        "confidence": inference.CONFIDENCE,
    }


# --- in words --------------------------------------------------------------------------------------------------------


def conclusion(content: Row) -> str:
    """One plain sentence: what leads, what is within noise of it, and which points have no result."""
    groups, objective = content["groups"], content["objective"]
    known = [group for group in groups if group["standing"] != NOTHING]
    parts = []
    if not content["points"]:
        return "The sweep has no points."
    if not known:
        parts.append(f"No point has a {words_of(objective['metric']).title.lower()} yet")
    elif objective["metric"] in content["apart"]:
        parts += _apart(content)
    else:
        parts += [_leads(known[0], content), *_others(known)]
    parts += _open(content)
    return "; ".join(parts) + "."


def _apart(content: Row) -> list[str]:
    """Why nothing is ranked, and by what it could be."""
    name, keys = content["objective"]["metric"], content["keys"]
    decide = [short for key, short in keys.items() if key.partition(".")[0] == "reward"] if name == "reward" else []
    by = f" ({', '.join(decide)})" if decide else ""
    parts = [f"{words_of(name).title} was not measured by one judge for all points{by}, so it does not rank them"]
    others = [metric for metric in content["metrics"] if metric not in content["apart"]]
    return [*parts, f"--metric compares by another: {', '.join(others)}"] if others else parts


def _leads(best: Row, content: Row) -> str:
    name, value = content["objective"]["metric"], best["values"][content["objective"]["metric"]]
    text = f"{words_of(name).title.lower()} {metric_value(name, value['mean'])}"
    over = f"{value['n']} seeds" if value["n"] > 1 else "one seed"
    measured = sum(group["standing"] != NOTHING for group in content["groups"])
    tied = [group for group in content["groups"] if group["standing"] == TIED]
    warning = _broken(tied or [best])
    if measured < 2:
        return f"{best['label']} has {text} ({over}), and nothing to be compared with{warning}"
    if tied:
        return f"{_names(tied, content['groups'][:measured])} tie with {text} ({over}){warning}"
    return f"{best['label']} leads with {text} ({over}){warning}"


def _broken(best: list[Row]) -> str:
    """A clause for those of the best whose verdict is that they are broken."""
    found = [group for group in best if group["verdicts"].get("broken")]
    if not found:
        return ""
    if len(found) > 1:
        return f", but the verdicts of {'all of them' if len(found) == len(best) else _names(found, best)} are broken"
    (group,) = found
    runs, seeds = group["verdicts"]["broken"], sum(group["verdicts"].values())
    whose = "its verdict" if len(best) == 1 else f"the verdict of {group['label']}"
    return f", but {whose} is broken" + (f" in {runs} of {seeds} seeds" if seeds > 1 else "")


def _others(known: list[Row]) -> list[str]:
    by = {word: [group for group in known[1:] if group["standing"] == word] for word in (AS_GOOD, WORSE, UNKNOWN)}
    parts = []
    if few := by[AS_GOOD]:
        alone = " (that of the prompts: too few seeds)" if all(g["difference"]["by"] == "prompts" for g in few) else ""
        parts.append(f"{_names(few, known)} {'is' if len(few) == 1 else 'are'} within noise of it{alone}")
    if few := by[WORSE]:
        parts.append(f"{_names(few, known)} {'is' if len(few) == 1 else 'are'} worse")
    if few := by[UNKNOWN]:
        them = f"{_names(few, known)} differ{'s' if len(few) == 1 else ''}"
        parts.append(f"whether {them} from it cannot be told, as the noise is not known")
    return parts


def _names(few: list[Row], known: list[Row]) -> str:
    """Up to three by name; more by their number, or as all that there are."""
    if len(few) <= 3:
        return " and ".join(group["label"] for group in few)
    if len(few) == len(known):
        return f"all {len(few)}"
    return f"all {len(few)} others" if len(few) == len(known) - 1 else f"{len(few)} others"


def _open(content: Row) -> list[str]:
    """2 of 12 points failed; or, of 12 points 2 failed, 1 is running: every state but done, the commonest first."""
    states: Counter[str] = Counter(content["states"])
    states.update({"without an evaluation": sum(p["state"] in DONE and not p["measured"] for p in content["points"])})
    found = [(state, count) for state, count in states.most_common() if count and state not in DONE]
    if len(found) > 1:
        return [f"of {len(content['points'])} points {', '.join(f'{n} {_became(state, n)}' for state, n in found)}"]
    return [f"{count} of {len(content['points'])} points {_became(state, count)}" for state, count in found]


def _became(state: str, count: int) -> str:
    return "failed" if state == "failed" else f"{'is' if count == 1 else 'are'} {state}"


# --- reward against KL -----------------------------------------------------------------------------------------------


def _frontier(groups: list[Row]) -> Row:
    """{"points": [{"number", "group", "kl", "reward"}], "groups": [{"group", "kl", "reward"}], "pareto": [group]}.

    group: the place in the leaderboard, from 0. pareto: of the groups' means those that no other beats in both.
    """
    points, means = [], []
    for i, group in enumerate(groups):
        for point in group["counted"]:
            if {"kl", "reward"} <= point["metrics"].keys():
                told = {name: _number(point, name) for name in ("kl", "reward")}
                points.append({"number": point["number"], "group": i, **told})
        if {"kl", "reward"} <= group["values"].keys():
            means.append({"group": i, **{name: group["values"][name]["mean"] for name in ("kl", "reward")}})
    best = pareto([(one["kl"], one["reward"]) for one in means])
    return {"points": points, "groups": means, "pareto": [means[i]["group"] for i in best]}


def pareto(places: list[tuple[float, float]]) -> list[int]:
    """Of (KL, reward) those that no other beats: with as little KL and as much reward, and less or more of one.

    By rising KL.
    """
    found: list[int] = []
    for i in sorted(range(len(places)), key=lambda i: (places[i][0], -places[i][1])):
        if not found or places[i][1] > places[found[-1]][1] or places[i] == places[found[-1]]:
            found.append(i)
    return found
