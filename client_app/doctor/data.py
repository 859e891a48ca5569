"""The site's data: can it be read, as what, and how long is it in the base's tokens. Counts only, never content."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np

from client_app.doctor.case import Case
from client_app.doctor.finding import Finding, failure, ok, warning
from fedllm.data.encode import encode
from fedllm.data.examples import Example, distinct
from fedllm.data.formats import detect, to_examples
from fedllm.data.sources import load_rows
from fedllm.data.split import split
from fedllm.errors import DataError, FedLLMError

MAX_CUT_SHARE = 0.2
"""Share of examples longer than the run's length from which on there is a warning."""

_NO_BOUND = 1 << 30


def examine_data(case: Case) -> Iterator[Finding]:
    """Read the site's examples as a round would."""
    config = case.data
    try:
        rows = load_rows(config.source, case.owner.home)
        formats = (
            Counter(detect(row) for row in rows) if config.format == "auto" else Counter({config.format: len(rows)})
        )
        examples, report = to_examples(rows, config.format)
    except DataError as error:
        yield failure("data", str(error), "Correct [data] in the site's file, or the data.")
        return
    listed = ", ".join(f"{count} as {name}" for name, count in formats.most_common())
    facts = {"num_rows": report.num_rows, "num_examples": len(examples), "num_unanswered": report.num_unanswered}
    yield ok("data", f"{report.num_rows} rows read ({listed}), {len(examples)} of them examples", **facts)
    kept = distinct(examples) if config.deduplicate else examples
    if len(kept) < len(examples):
        yield ok(
            "data", f"{len(examples) - len(kept)} examples repeat another and are left out", num_distinct=len(kept)
        )
    yield from _examine_split(kept, case)
    yield from _examine_tokens(kept, case)


def _examine_split(examples: list[Example], case: Case) -> Iterator[Finding]:
    config = case.data
    try:
        bounds = {"max_train": config.max_train_examples, "max_holdout": config.max_holdout_examples}
        sides = split(examples, config.holdout_fraction, case.run.seed, **bounds)
    except DataError as error:
        yield failure("data", str(error), "Give the site more data.")
        return
    facts = {"num_train": len(sides.train), "num_holdout": len(sides.holdout)}
    yield ok("data", f"{len(sides.train)} examples to train on, {len(sides.holdout)} held out", **facts)


def _examine_tokens(examples: list[Example], case: Case) -> Iterator[Finding]:
    from fedllm.model.build import load_tokenizer

    if case.files is None:
        yield warning("tokens", "not counted, because the base is not here", "Fetch the base first.")
        return
    try:
        tokenizer = load_tokenizer(case.files, cache_dir=case.owner.paths.cache_dir)
        sequences, report = encode(examples, tokenizer, _NO_BOUND)
        _, within = encode(examples, tokenizer, case.data.max_length)
    except FedLLMError as error:
        yield failure("tokens", str(error), "Correct [data] in the site's file, or ask for a longer data.max_length.")
        return
    lengths = np.array([len(sequence) for sequence in sequences])
    middle, most = (round(float(value)) for value in np.quantile(lengths, (0.5, 0.95)))
    num_cut, limit = int((lengths > case.data.max_length).sum()), case.data.max_length
    message = (
        f"{report.num_tokens} tokens, {report.num_target_tokens} of them to learn; an example has {middle} (median), "
        f"{most} (95 % have fewer), {lengths.max()} at most; {num_cut} are cut at {limit}, {within.num_dropped} left out"
    )
    facts = {"num_tokens": report.num_tokens, "num_target_tokens": report.num_target_tokens, "median": middle}
    facts |= {"quantile_95": most, "longest": int(lengths.max()), "num_cut": num_cut, "num_dropped": within.num_dropped}
    if num_cut > MAX_CUT_SHARE * len(lengths):
        yield warning(
            "tokens", message, "Ask the operator for a longer data.max_length, or shorten the examples.", **facts
        )
    else:
        yield ok("tokens", message, **facts)
