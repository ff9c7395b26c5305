"""Generates a paraphrase set: pairs of questions, same meaning or not.

A question expresses a meaning (who does what to whom, or does not) in one of many ways:
with one of three synonyms, or with the opposite verb and the opposite polarity. The
second question of a pair may also be passive. It repeats the meaning (label 1) or
changes one thing (label 0): it replaces a person, swaps the two persons, flips the
polarity, or replaces the verb by one of another meaning. Neither the words that a pair
shares nor the others reveal the label: a model must learn the roles of the persons,
synonyms, and double negation.
"""

import random
from typing import NamedTuple

PERSONS = "alice bruno carla david elena felix greta henry".split()
# Each row holds synonyms; rows 0 and 1 are opposites.
VERBS = (
    ("like", "love", "adore"),
    ("dislike", "hate", "despise"),
    ("invite", "welcome", "receive"),
    ("imitate", "emulate", "impersonate"),
)
_OPPOSITE = {0: 1, 1: 0}
# Probabilities of the changes in a pair with label 0.
_CHANGES = {"person": 0.3, "swap": 0.3, "polarity": 0.2, "verb": 0.2}


class Pair(NamedTuple):
    """Two questions, and 1 if they ask the same thing."""

    question1: str
    question2: str
    label: int


class _Meaning(NamedTuple):
    subject: str
    verb: int  # Row of VERBS.
    object: str
    positive: bool


def vocabulary() -> list[str]:
    """Returns the WordPiece vocabulary; a participle is a verb and the piece `##d`."""
    special_tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    verbs = [verb for row in VERBS for verb in row]
    return [*special_tokens, *PERSONS, *verbs, "##d", "does", "is", "not", "by", "?"]


def generate(num_pairs: int, seed: int) -> list[Pair]:
    """Generates distinct pairs, half of them paraphrases.

    Args:
      num_pairs: number of pairs; no two have the same questions, in either order.
      seed: determines the pairs, on any version of Python.
    """
    rng = random.Random(seed)
    pairs: list[Pair] = []
    seen = set()
    while len(pairs) < num_pairs:
        label = len(pairs) % 2
        subject, object_ = rng.sample(PERSONS, 2)
        verb, positive = rng.randrange(len(VERBS)), rng.random() < 0.5
        meaning = _Meaning(subject, verb, object_, positive)
        other = meaning if label else _changed(meaning, rng)
        pair = Pair(
            _say(meaning, rng, passive=False),
            _say(other, rng, passive=rng.random() < 0.5),
            label,
        )
        questions = frozenset(pair[:2])
        if len(questions) == 2 and questions not in seen:
            seen.add(questions)
            pairs.append(pair)
    rng.shuffle(pairs)
    return pairs


def _changed(meaning: _Meaning, rng: random.Random) -> _Meaning:
    (change,) = rng.choices(list(_CHANGES), list(_CHANGES.values()))
    subject, verb, object_, positive = meaning
    if change == "person":
        other = rng.choice([p for p in PERSONS if p not in (subject, object_)])
        return meaning._replace(**{rng.choice(["subject", "object"]): other})
    if change == "swap":
        return meaning._replace(subject=object_, object=subject)
    if change == "polarity":
        return meaning._replace(positive=not positive)
    # Excludes the opposite verb, which would flip the polarity instead.
    others = set(range(len(VERBS))) - {verb, _OPPOSITE.get(verb)}
    return meaning._replace(verb=rng.choice(sorted(others)))


def _say(meaning: _Meaning, rng: random.Random, *, passive: bool) -> str:
    subject, verb, object_, positive = meaning
    if verb in _OPPOSITE and rng.random() < 0.3:
        verb, positive = _OPPOSITE[verb], not positive
    word = rng.choice(VERBS[verb])
    negation = "" if positive else "not "
    if passive:
        return f"is {object_} {negation}{word}d by {subject} ?"
    return f"does {subject} {negation}{word} {object_} ?"
