"""The language that a text is written in, to count languages of data.

By py3langid (a naive Bayes classifier over byte n-grams, a successor of langid.py: Lui & Baldwin 2012). Measured beside
lingua 2.1 on 44 short sentences of 22 languages: no error of either; 4.5 MB against 100 MB on disk, 130 MB against
1.3 GB of memory, 0.6 s against 15 s to load, 0.1 ms against 0.4 ms a row of 400 characters. The reward term `language`
compares scripts alone, which cannot tell languages of one script.
"""

from __future__ import annotations

from functools import cache

from py3langid.langid import MODEL_FILE, LanguageIdentifier

UNKNOWN = "und"  # ISO 639-2: undetermined
NONE = "zxx"  # ISO 639-2: no linguistic content; a class of the classifier, for code and numbers
LOOKED_AT = 400  # characters from the beginning; more would take longer and change little
SURE = 0.5  # least probability: below it are code and texts of a word or two, which fit many languages


def language(text: str) -> str:
    """Its ISO 639-1 code; UNKNOWN for what is too short to tell, has no words, or is code rather than prose."""
    found, probability = _identifier().classify(text.strip()[:LOOKED_AT])
    return UNKNOWN if probability < SURE or found == NONE else str(found)


def load() -> None:
    """Now and not when the first text comes."""
    _identifier()


@cache
def _identifier() -> LanguageIdentifier:
    """Its classes are the languages that have a code of two letters, so a dialect counts as the language it is of."""
    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    identifier.set_languages([label for label in identifier.labels if len(label) == 2] + [NONE])
    return identifier
