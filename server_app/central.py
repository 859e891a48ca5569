"""The optional central evaluation: the one place where the server loads a base model, and torch with it.

Off by default (`evaluation.central_source`), so that a server needs neither a GPU nor the base.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

from fedllm.config import RunConfig
from fedllm.model.spec import common_part
from fedllm.update import taken
from fedllm.work import common_of
from server_app.checkpoint import RunState


def central_score(config: RunConfig, home: Path, state: RunState) -> dict[str, float] | None:
    """Return loss, accuracy and number of target tokens on the central set, None if there is none.

    Args:
        config: The effective run config.
        home: Where relative paths of sources start.
        state: The state to evaluate.

    Raises:
        DataError: The set cannot be read.
        ModelError: The base cannot be found.
    """
    source = config.evaluation.central_source
    if not source:
        return None
    # Imported here so that a server without central evaluation never loads torch.
    from fedllm.data.encode import encode
    from fedllm.data.sources import load_examples
    from fedllm.home import default_cache_dir
    from fedllm.model.build import cached_base
    from fedllm.model.evaluate import evaluate_loss
    from fedllm.model.fitted import fit_adapter
    from fedllm.model.generate import without_adapter

    base = cached_base(config.model, home=home, cache_dir=default_cache_dir(), device="auto")
    adapter, layout = fit_adapter(base, common_part(config.spec.adapter)), common_of(state.adapter_layout)
    adapter.write(taken(state.adapter, layout))
    examples = load_examples(source, config.data.format, home, deduplicate=config.data.deduplicate)
    sequences, _ = encode(examples, base.tokenizer, config.data.max_length)
    with nullcontext() if state.round else without_adapter(adapter.model):  # round 0 is the base alone
        totals = evaluate_loss(adapter.model, sequences, config.train.batch_size * 4)
    return {"loss": totals.loss, "accuracy": totals.accuracy, "num_tokens": totals.num_targets}
