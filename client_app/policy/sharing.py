"""What numbers leave the site: every reply passes :func:`disclosed` last, so nothing goes out unrounded.

Sizes and times of what is sent are not hidden; they follow from the run's own settings and from the machine.
"""

from __future__ import annotations

from collections.abc import Iterator

from client_app.policy.rules import Refusal
from client_app.policy.settings import SharingSection
from fedllm.messages import (
    AnyMessage,
    DataCounts,
    EvaluateInstruction,
    EvaluateReport,
    Instruction,
    Introduction,
    LocalOnlyInstruction,
    LocalOnlyReport,
    PersonaliseInstruction,
    PersonaliseReport,
    Score,
    TrainReport,
)


def sharing_refusals(sharing: SharingSection, instruction: Instruction) -> Iterator[Refusal]:
    """Yield what speaks against an instruction whose answer is numbers or words that do not leave the site."""
    is_scoring = isinstance(instruction, EvaluateInstruction | LocalOnlyInstruction | PersonaliseInstruction)
    if is_scoring and not sharing.losses:
        yield Refusal("the site reports no losses", "sharing.losses", "training alone", "a request for held-out scores")
    if isinstance(instruction, EvaluateInstruction) and instruction.prompt and not sharing.answers:
        yield Refusal("the site answers no prompts", "sharing.answers", "no prompt", "evaluation.prompt")


def disclosed(reply: AnyMessage, sharing: SharingSection) -> AnyMessage:
    """Return a reply as it may leave: numbers rounded, and left out where they are not shared."""
    match reply:
        case Introduction():
            return reply.model_copy(update={"data": _counts(reply.data, sharing)})
        case TrainReport():
            return _trained(reply, sharing)
        case EvaluateReport() | LocalOnlyReport():
            return reply.model_copy(update={"score": _score(reply.score, sharing)})
        case PersonaliseReport():
            scores = {name: _score(getattr(reply, name), sharing) for name in ("federated", "personalised")}
            return reply.model_copy(update=scores)
        case _:
            return reply


def rounded_count(count: int, multiple: int) -> int:
    """Return the nearest multiple, halves upward; a count above zero gives at least one multiple."""
    return max(multiple, (count + multiple // 2) // multiple * multiple) if count else 0


def _counts(data: DataCounts, sharing: SharingSection) -> DataCounts:
    numbers = {name: value for name, value in data if name.startswith("num_")}
    counts = {name: rounded_count(value, sharing.count_multiple) for name, value in numbers.items()}
    topics = {name: rounded_count(value, sharing.count_multiple) for name, value in data.topics.items()}
    return data.model_copy(update={**counts, "topics": topics if sharing.topics else {}})


def _trained(report: TrainReport, sharing: SharingSection) -> TrainReport:
    losses = {name: _number(getattr(report, name), sharing) for name in ("loss", "loss_last", "grad_norm")}
    return report.model_copy(update={**losses, **_rounded(report, sharing), "residual_norm": _ratio(report, sharing)})


def _ratio(report: TrainReport, sharing: SharingSection) -> float:
    return round(report.residual_norm, sharing.decimals)


def _number(value: float | None, sharing: SharingSection) -> float | None:
    return round(value, sharing.decimals) if value is not None and sharing.losses else None


def _rounded(numbers: TrainReport | Score, sharing: SharingSection) -> dict[str, int]:
    return {
        name: rounded_count(getattr(numbers, name), sharing.count_multiple) for name in ("num_examples", "num_tokens")
    }


def _score(score: Score, sharing: SharingSection) -> Score:
    losses = {name: round(getattr(score, name), sharing.decimals) for name in ("loss", "accuracy")}
    return score.model_copy(update={**losses, **_rounded(score, sharing)})
