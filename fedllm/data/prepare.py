"""From a site's examples to what it trains and evaluates on."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fedllm.config import DataConfig
from fedllm.data.encode import EncodeReport, encode
from fedllm.data.examples import Example, distinct
from fedllm.data.packing import pack
from fedllm.data.sequences import Sequence
from fedllm.data.split import split

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DataReport:
    """Counts that describe a site's data without any of its content.

    The topics are the data owner's own labels; whether they may leave the site is the owner's decision.

    Attributes:
        train: Examples and tokens trained on.
        holdout: Examples and tokens evaluated on.
        num_distinct_train: Different texts among the examples trained on.
        num_distinct_holdout: Different texts among those evaluated on; a score on few says little.
        num_train_sequences: Sequences after packing.
        topics: Examples by ``topic``, most frequent first; examples without one are not in it.
    """

    train: EncodeReport
    holdout: EncodeReport
    num_distinct_train: int
    num_distinct_holdout: int
    num_train_sequences: int
    topics: Mapping[str, int]


@dataclass(frozen=True)
class SiteData:
    """What a site trains and evaluates on.

    Attributes:
        train: Sequences, packed if the run says so.
        holdout: One sequence for each held-out example, never packed, so that evaluation does not depend on packing.
        report: Counts.
        probe: The same held-out examples as a simulated attack wants them answered, empty without one.
    """

    train: list[Sequence]
    holdout: list[Sequence]
    report: DataReport
    probe: list[Sequence] = field(default_factory=list)


def prepare_site(
    examples: list[Example],
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
    seed: int,
    change_train: Callable[[list[Example]], list[Example]] | None = None,
    probe: Callable[[list[Example]], list[Example]] | None = None,
) -> SiteData:
    """Hold out, tokenize and pack one site's examples.

    Args:
        examples: The site's examples.
        tokenizer: The base model's.
        config: Length, packing, and how much is held out.
        seed: The run's seed.
        change_train: What a simulated attacker makes of the examples trained on.
        probe: Makes of held-out examples what shows whether a simulated attack succeeds.

    Raises:
        DataError: There are too few examples, or none has a token to learn within the length.
    """
    sides = split(
        examples,
        config.holdout_fraction,
        seed,
        max_train=config.max_train_examples,
        max_holdout=config.max_holdout_examples,
    )
    chosen, held = [examples[i] for i in sides.train], [examples[i] for i in sides.holdout]
    chosen = change_train(chosen) if change_train else chosen
    train, train_report = encode(chosen, tokenizer, config.max_length)
    holdout, holdout_report = encode(held, tokenizer, config.max_length)
    asked = probe(held) if probe else []
    probed = encode(asked, tokenizer, config.max_length)[0] if asked else []
    packed = pack(train, config.max_length) if config.packing else train
    report = DataReport(
        train=train_report,
        holdout=holdout_report,
        num_distinct_train=len(distinct(chosen)),
        num_distinct_holdout=len(distinct(held)),
        num_train_sequences=len(packed),
        topics=_topics(examples),
    )
    log.info("%d examples in %d sequences to train on, %d to evaluate on", len(train), len(packed), len(holdout))
    return SiteData(packed, holdout, report, probed)


def _topics(examples: list[Example]) -> dict[str, int]:
    topics = Counter(example.attributes["topic"] for example in examples if "topic" in example.attributes)
    return dict(topics.most_common())
