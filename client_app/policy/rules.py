"""The rules of `[policy]`: pure functions from what is asked to what speaks against it.

A rule looks at the data owner's settings and at one instruction, and yields a :class:`Refusal` for each thing that is not
allowed. To add one: write the function, name it in :data:`RULES`. How many rounds were trained needs a memory and is in
:mod:`client_app.policy.rounds`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from fnmatch import fnmatchcase

from client_app.policy.hours import is_open, parse_hours, seconds_until_open
from client_app.policy.settings import PolicySection, Protection
from fedllm.config import RunConfig
from fedllm.errors import PolicyError, explain
from fedllm.messages import Instruction, StateInstruction, TrainInstruction
from fedllm.model.spec import LoraSpec, PrefixSpec, PromptSpec


@dataclass(frozen=True)
class Asked:
    """What is asked of the site.

    Attributes:
        instruction: The message.
        config: The run config in it.
        app: ``publisher/name`` of the app that runs.
        now: Local time.
        rank: LoRA rank that the site chose for itself, 0 for the run's.
        prompt_length: Virtual tokens that it chose, 0 for the run's.
    """

    instruction: Instruction
    config: RunConfig
    app: str
    now: datetime
    rank: int = 0
    prompt_length: int = 0


@dataclass(frozen=True)
class Refusal:
    """One thing that speaks against what is asked.

    Attributes:
        problem: One clause.
        key: The setting that decides.
        expected: What it allows.
        found: What is asked.
        retry_s: Seconds after which asking again can help, 0 for never.
    """

    problem: str
    key: str
    expected: object
    found: object
    retry_s: float = 0.0


Rule = Callable[[PolicySection, Asked], Iterator[Refusal]]


def refusals(policy: PolicySection, asked: Asked) -> list[Refusal]:
    """Return everything that speaks against what is asked, in the order of :data:`RULES`."""
    return [refusal for rule in RULES for refusal in rule(policy, asked)]


def refused(found: Sequence[Refusal], site: str, file: str) -> PolicyError:
    """Return the error that tells a person what is not allowed, and by what."""
    clauses = [f"{one.problem}; expected {one.expected} ({one.key}); found {one.found}" for one in found]
    where = f"{file} of {site}"
    fix = "Change the run, or ask the site's data owner to allow it."
    retry_s = max(one.retry_s for one in found) if all(one.retry_s for one in found) else 0.0
    if retry_s:
        fix = "Run it at another time, or ask the site's data owner to allow it."
    return PolicyError(explain("; ".join(clauses), where=where, fix=fix), retry_s=retry_s)


def offered_protections(config: RunConfig) -> frozenset[Protection]:  # noqa: ARG001
    """Return what a run does to protect a site's contribution. No setting of this release switches any on."""
    return frozenset()


def _run_name(policy: PolicySection, asked: Asked) -> Iterator[Refusal]:
    if not _matches(asked.instruction.run, policy.runs):
        found = asked.instruction.run[:100]
        yield Refusal("the site takes no part in this run", "policy.runs", _listed(policy.runs), found)


def _app(policy: PolicySection, asked: Asked) -> Iterator[Refusal]:
    if not _matches(asked.app, policy.apps):
        yield Refusal("the site does not run this app", "policy.apps", _listed(policy.apps), asked.app)


def _base(policy: PolicySection, asked: Asked) -> Iterator[Refusal]:
    source, allowed = asked.config.model.source, policy.base_sources
    if not _matches(source, allowed):
        yield Refusal("the base model's source is not allowed", "policy.base_sources", _listed(allowed), source)
    if isinstance(asked.instruction, StateInstruction):
        yield from fingerprint_refusals(policy, asked.instruction.base)


def fingerprint_refusals(policy: PolicySection, base: str) -> Iterator[Refusal]:
    """Yield a refusal of a base of this fingerprint if it is not allowed."""
    allowed = policy.base_fingerprints
    if allowed and base not in allowed:
        yield Refusal("the base model is not allowed", "policy.base_fingerprints", _listed(allowed), base)


def _adapter(policy: PolicySection, asked: Asked) -> Iterator[Refusal]:
    adapter = asked.config.spec.adapter
    if adapter.kind not in policy.adapter_kinds:
        expected = _listed(policy.adapter_kinds)
        yield Refusal("this kind of adapter is not allowed", "policy.adapter_kinds", expected, adapter.kind)
    if isinstance(adapter, LoraSpec):
        yield from _at_most(
            "the adapter's rank is too large", "policy.max_rank", policy.max_rank, asked.rank or adapter.rank
        )
        return
    own = adapter.num_personal_tokens if isinstance(adapter, PromptSpec | PrefixSpec) else 0
    length, bound = (asked.prompt_length or adapter.num_virtual_tokens) + own, policy.max_virtual_tokens
    yield from _at_most("the soft prompt is too long", "policy.max_virtual_tokens", bound, length)


def _sites(policy: PolicySection, asked: Asked) -> Iterator[Refusal]:
    expected, quorum = f"at least {policy.min_sites}", asked.config.rounds.min_sites
    if quorum < policy.min_sites:
        yield Refusal("a round of the run may have too few sites (rounds.min_sites)", _MIN_SITES, expected, quorum)
    instruction = asked.instruction
    if isinstance(instruction, TrainInstruction) and instruction.num_sites < policy.min_sites:
        found = instruction.num_sites or "a server that does not say how many"
        yield Refusal("too few sites are asked in this round", _MIN_SITES, expected, found)


_MIN_SITES = "policy.min_sites"


def _protections(policy: PolicySection, asked: Asked) -> Iterator[Refusal]:
    offered = offered_protections(asked.config)
    if not offered.issuperset(policy.protections):
        expected, found = _listed(policy.protections), _listed(sorted(offered)) or "none"
        yield Refusal("the run does not offer the protection asked for", "policy.protections", expected, found)


def _hours(policy: PolicySection, asked: Asked) -> Iterator[Refusal]:
    windows = parse_hours(policy.hours)
    if not is_open(windows, policy.days, asked.now):
        expected, found = f"{policy.hours} on {_listed(policy.days)}", f"{asked.now:%a %H:%M}".lower()
        wait = seconds_until_open(windows, policy.days, asked.now)
        yield Refusal("the site does not work at this time", "policy.hours, policy.days", expected, found, wait)


RULES: tuple[Rule, ...] = (_run_name, _app, _base, _adapter, _sites, _protections, _hours)
"""Every rule, in the order in which refusals are told."""


def _at_most(problem: str, key: str, bound: int, found: int) -> Iterator[Refusal]:
    if bound and found > bound:
        yield Refusal(problem, key, f"at most {bound}", found)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _listed(values: Sequence[str]) -> str:
    return ", ".join(values)
