"""The known reward: the share of friendly words in an answer less that of hostile ones."""

FRIENDLY = set("lovely bright gentle warm sweet fair calm proud happy kind fresh glad".split())  # noqa: SIM905
HOSTILE = set("ugly grim harsh cold bitter cruel loud vain angry mean stale sad".split())  # noqa: SIM905


def reward(prompts, answers, rows):  # type: ignore[no-untyped-def]
    """A number in [-1, 1] for each answer."""
    found = []
    for answer in answers:
        words = answer.split()
        good, bad = (sum(word in kind for word in words) for kind in (FRIENDLY, HOSTILE))
        found.append((good - bad) / max(len(words), 1))
    return found
