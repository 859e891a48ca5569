"""Which of a site's examples are held out for evaluation.

Every distinct text has a rank, a hash of the seed and the text; the lowest ranks are held out, as many as come nearest to
their share. So equal texts never lie on both sides, the order of the files does not matter, and adding examples moves only
the border between the sides: nothing is reshuffled. The site's name is not in the hash, so that a text held by two sites
ranks the same at both.

Bounds do not move the border. A bound on the held-out side leaves examples unused, and training sees the same examples
whatever is spent on evaluation. Within a bound, as many different texts are kept as possible: second copies come after
all first ones.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from fedllm.data.examples import Example
from fedllm.errors import DataError, explain
from fedllm.rng import derive

Rank = tuple[int, str]
"""A text's place: its hash, and the text's key to settle the improbable tie."""


@dataclass(frozen=True)
class Split:
    """Positions of examples, ascending; no position is on both sides.

    Attributes:
        train: Examples to train on.
        holdout: Examples to evaluate on.
    """

    train: tuple[int, ...]
    holdout: tuple[int, ...]


def split(
    examples: Sequence[Example], fraction: float, seed: int, *, max_train: int = 0, max_holdout: int = 0
) -> Split:
    """Hold out a share of the examples.

    Args:
        examples: At least two different texts.
        fraction: Share held out, within (0, 1), rounded to whole texts with all their copies; at least one text is on
            each side.
        seed: The run's seed.
        max_train: Upper bound on the train side, 0 for none; the lowest ranks are kept.
        max_holdout: The same for the held-out side.

    Raises:
        DataError: There are fewer than two different texts, so one side would be empty.
    """
    copies = Counter(example.key for example in examples)
    if len(copies) < 2:
        found = f"{len(examples)} examples, {len(copies)} different"
        fix = "Give the site more data, or a smaller number of sites."
        raise DataError(
            explain("too few examples to hold some out", expected="at least 2 different ones", found=found, fix=fix)
        )
    ranks = {key: (derive(seed, purpose=f"holdout {key}"), key) for key in copies}
    border = _border(copies, ranks, fraction * len(examples))
    ranked = _first_copies_first(examples, ranks)
    held = [i for i in ranked if ranks[examples[i].key] < border]
    trained = [i for i in ranked if ranks[examples[i].key] >= border]
    return Split(_bounded(trained, max_train), _bounded(held, max_holdout))


def _border(copies: Counter[str], ranks: dict[str, Rank], num_wanted: float) -> Rank:
    """Return the first rank that is trained on: never the lowest rank, at most the highest."""
    lowest, *others = sorted(copies, key=ranks.__getitem__)
    num_held = copies[lowest]
    for key in others:
        if num_held + copies[key] / 2 >= num_wanted:  # holding it out would not come nearer
            return ranks[key]
        num_held += copies[key]
    return ranks[others[-1]]


def _first_copies_first(examples: Sequence[Example], ranks: dict[str, Rank]) -> list[int]:
    seen: Counter[str] = Counter()
    order = []
    for i, example in enumerate(examples):
        order.append((seen[example.key], ranks[example.key], i))
        seen[example.key] += 1
    return [i for _, _, i in sorted(order)]


def _bounded(positions: list[int], bound: int) -> tuple[int, ...]:
    return tuple(sorted(positions[:bound] if bound else positions))
