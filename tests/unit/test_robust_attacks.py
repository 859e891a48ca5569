"""Robust rules under attackers who know everything: 20 sites of which 4 attack, in 4000 dimensions.

Every honest update is a common direction of length 1 plus noise of length 0.79, so a single one has cosine 0.78 to it.
"""

from __future__ import annotations

import numpy as np
import pytest

from fedllm import rng
from fedllm.update import Layout, TensorSpec
from tests.attacks import COHORT_ATTACKS
from tests.robust_tools import RULES, Matrix, aggregate

WIDE = Layout((TensorSpec("lora_A", (40, 50), role="lora_A"), TensorSpec("lora_B", (50, 40), role="lora_B")))
NUM_SITES, NUM_ATTACKERS = 20, 4


def cohort(attack: str) -> tuple[Matrix, Matrix]:
    """Return the truth [D] and all updates [K, D], the attackers' last."""
    draw = rng.generator(7, purpose=f"cohort {attack}")
    truth = draw.standard_normal(WIDE.num_parameters)
    truth /= np.linalg.norm(truth)
    noise = 0.79 / np.sqrt(WIDE.num_parameters) * draw.standard_normal((NUM_SITES, WIDE.num_parameters))
    rows = truth + noise
    if attack != "none":
        honest = rows[:-NUM_ATTACKERS]
        rows = np.vstack([honest, COHORT_ATTACKS[attack](honest, NUM_ATTACKERS, draw)])
    return truth, rows


def error_and_cosine(attack: str, rule: str) -> tuple[float, float]:
    truth, rows = cohort(attack)
    settings = {**RULES.get(rule, {}), "strategy.byzantine_sites": NUM_ATTACKERS}
    found, _ = aggregate(rows, settings, layout=WIDE)
    return float(np.linalg.norm(found - truth)), float(found @ truth / np.linalg.norm(found))


TABLE = {
    "none": "mean .18/.98, median .22/.98, trimmed-mean .19/.98, krum .79/.78, multi-krum .22/.98, "
    "geometric-median .18/.98, fltrust .18/.98, norm bound .18/.98",
    "sign-flip": "mean 2.21/-.99, median .35/.94, trimmed-mean .38/.94, krum .80/.78, multi-krum .21/.98, "
    "geometric-median .28/.97, fltrust .20/.98, norm bound .49/.96",
    "gaussian": "mean 2.06/.35, median .27/.96, trimmed-mean .26/.97, krum .80/.78, multi-krum .21/.98, "
    "geometric-median .22/.98, fltrust .20/.98, norm bound .29/.97",
    "ipm": "mean .33/.98, median .31/.96, trimmed-mean .30/.97, krum .80/.78, multi-krum .21/.98, "
    "geometric-median .26/.98, fltrust .20/.98, norm bound .34/.98",
    "alie": "mean .26/.97, median .36/.94, trimmed-mean .32/.95, krum .81/.76, multi-krum .33/.95, "
    "geometric-median .29/.96, fltrust .26/.97, norm bound .26/.97",
}
"""Error and cosine to the truth by attack and rule."""


@pytest.mark.parametrize("attack", list(TABLE))
def test_every_rule_comes_as_near_to_the_truth_as_the_table_says(attack: str) -> None:
    for cell in TABLE[attack].split(", "):
        rule, _, numbers = cell.rpartition(" ")
        error, cosine = map(float, numbers.split("/"))
        found = error_and_cosine(attack, rule)
        assert found == pytest.approx((error, cosine), abs=0.05), f"{rule} under {attack}"


def test_the_mean_is_turned_around_where_every_robust_rule_holds() -> None:
    assert error_and_cosine("sign-flip", "mean")[1] < 0
    for rule in RULES:
        assert error_and_cosine("sign-flip", rule)[1] > (0.75 if rule == "krum" else 0.93), rule


def test_a_norm_bound_in_front_of_a_rule_changes_what_the_rule_sees() -> None:
    truth, rows = cohort("gaussian")
    both = {"strategy.aggregator": "median", "strategy.norm_bound": "median"}
    found, measured = aggregate(rows, both, layout=WIDE)
    alone, _ = aggregate(rows, RULES["median"], layout=WIDE)
    assert np.linalg.norm(found - truth) < np.linalg.norm(alone - truth)
    assert measured["sites_scaled"] >= NUM_ATTACKERS
    assert measured["norm_max"] == pytest.approx(np.linalg.norm(rows, axis=1).max()), "norms are those that came"
    assert measured["values_kept"] == 2
