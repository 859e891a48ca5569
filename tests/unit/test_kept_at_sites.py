"""FedSA-LoRA through the whole round loop: B stays at its site, by round, through crashes and losses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from client_app.kept import Kept
from client_app.memory import Memory
from fedllm.codecs.payload import open_payload
from fedllm.model.initial import initial_arrays
from fedllm.runs import RunFolder
from fedllm.update import Arrays, Layout
from server_app.events import read_events
from server_app.results import Results
from server_app.story import final_table
from tests.fake_federation import LAYOUT, Handler, InProcessGrid, LocalSite, first_values
from tests.unit.test_loop import TRANSPORTS, events, params, run

A, B = LAYOUT.names
QUIET = {"strategy.name": "fedsa-lora", "evaluation.local_only": False, "evaluation.prompt": ""}
LOSSY = {"transport.uplink": "delta|topk:0.3|int8:8|rice", "transport.downlink": "delta|int8:8"}


def members(folder: Path) -> list[LocalSite]:
    return [LocalSite(f"site-{i}", i, folder / f"site-{i}", 10 * (i + 1)) for i in range(3)]


def run_with(home: Path, sites: list[LocalSite] | None = None, **changes: Any) -> RunFolder:
    handlers: dict[int, Handler] = {100 + index: site for index, site in enumerate(sites or members(home))}
    return run(home, InProcessGrid(handlers), **{**QUIET, **changes})


def kept(site: LocalSite, round_: int) -> Arrays:
    part = LAYOUT.only([B])
    found = Kept(Memory(site.folder, LAYOUT, site.agreement.base), part, first_values).at(round_)
    assert found is not None
    return found


def pseudocode(num_rounds: int) -> tuple[NDArray[np.float64], list[NDArray[np.float64]]]:
    """A averaged after every round, B going on where each site left it; in float64."""
    sites = members(Path("nowhere"))
    weights = [site.num_examples / 60 for site in sites]
    first = {name: value.astype(np.float64) for name, value in initial_arrays(LAYOUT, 42).items()}
    shared, own = first[A], [first[B].copy() for _ in sites]
    for _ in range(num_rounds):
        results = []
        for index, site in enumerate(sites):
            local = {A: shared.copy(), B: own[index]}
            for _ in range(site.num_steps):
                for name in local:
                    local[name] = local[name] - site.step_size * site.curvature[name] * (
                        local[name] - site.optimum[name]
                    )
            results.append(local[A])
            own[index] = local[B]
        shared = sum(w * value for w, value in zip(weights, results, strict=True))
    return shared, own


@pytest.mark.parametrize("kind", TRANSPORTS)
def test_a_is_averaged_and_b_goes_on_at_its_site(kind: str, tmp_path: Path) -> None:
    sites = members(tmp_path)
    folder = run_with(tmp_path, sites, num_rounds=4, **{"transport.kind": kind})
    shared, own = pseudocode(4)
    np.testing.assert_allclose(params(folder)[A], shared, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(params(folder)[B], initial_arrays(LAYOUT, 42)[B])
    for site, expected in zip(sites, own, strict=True):
        np.testing.assert_allclose(kept(site, 4)[B], expected, rtol=1e-5, atol=1e-6)


def test_no_update_holds_b(tmp_path: Path) -> None:
    sites = members(tmp_path)
    run_with(tmp_path, sites)
    for site in sites:
        for path in site.folder.glob("*.update"):
            with open_payload(path, layout=LAYOUT.only([A]), base=site.agreement.base) as payload:
                assert payload.names == (A,)


def test_every_site_is_evaluated_with_its_own_b(tmp_path: Path) -> None:
    sites = members(tmp_path)
    folder = run_with(tmp_path, sites)
    state = params(folder)
    rows = events(folder, "evaluation")[-1]["sites"]
    for site in sites:
        assert rows[site.name]["loss"] == pytest.approx(site.score(state | kept(site, 3)).loss, rel=1e-6)
        assert rows[site.name]["loss"] < site.score(state).loss


def test_the_last_global_adapter_and_every_sites_own_are_told_apart(tmp_path: Path) -> None:
    sites = members(tmp_path)
    folder = run_with(tmp_path, sites)
    [event] = events(folder, "personalised")
    state = params(folder)
    for site in sites:
        row = event["sites"][site.name]
        assert row["federated"] == pytest.approx(site.score(state).loss, rel=1e-6)
        assert row["loss"] == pytest.approx(site.score(state | kept(site, 3)).loss, rel=1e-6)
    [*rows, overall] = Results.of(read_events(folder.metrics)).rows()
    for row, site in zip(rows, sites, strict=True):
        losses = [site.score(one).loss for one in (initial_arrays(LAYOUT, 42), state, state | kept(site, 3))]
        assert [row.base, row.federated, row.personalised] == pytest.approx(losses, rel=1e-6)
        assert row.winner == "personalised"
    assert overall.personalised == pytest.approx(event["loss"])
    table = "\n".join(final_table(Results.of(read_events(folder.metrics))))
    assert "personalised" in table
    assert f"{overall.personalised:.3f}" in table


@pytest.mark.parametrize("changes", [{}, LOSSY], ids=["lossless", "lossy"])
def test_a_server_that_goes_back_and_sites_that_do_not_give_the_same_bits(changes: Any, tmp_path: Path) -> None:
    changes = {**changes, "keep_checkpoints": 9}
    clean = members(tmp_path / "clean")
    expected = params(run_with(tmp_path / "clean", clean, num_rounds=6, **changes))
    folder = run_with(tmp_path / "cut", num_rounds=5, **changes)
    for name in ("round-00004", "round-00005"):
        for path in (folder.checkpoints / name).iterdir():
            path.unlink()
        (folder.checkpoints / name).rmdir()
    sites = members(tmp_path / "cut")
    again = run_with(tmp_path / "cut", sites, name="", resume="test", num_rounds=6, **changes)
    np.testing.assert_array_equal(params(again)[A], expected[A])
    for one, two in zip(clean, sites, strict=True):
        np.testing.assert_array_equal(kept(one, 6)[B], kept(two, 6)[B])


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:20])])
def test_a_site_that_lost_its_b_starts_over_and_says_so(damage: Any, tmp_path: Path) -> None:
    run_with(tmp_path, num_rounds=2)
    sites = members(tmp_path)
    for path in sites[1].folder.glob("*.kept-*"):
        damage(path)
    folder = run_with(tmp_path, sites, name="", resume="test", num_rounds=3)
    rows = events(folder, "round")[-1]["sites"]
    assert "starts over" in rows["site-1"]["note"]
    assert rows["site-0"]["note"] == ""
    start = {A: load_a(tmp_path, 2), B: initial_arrays(LAYOUT, 42)[B]}
    expected = sites[1].descend(start, LAYOUT, 0.0, None)
    np.testing.assert_allclose(kept(sites[1], 3)[B], expected[B], rtol=1e-5, atol=1e-6)


def load_a(home: Path, round_: int) -> NDArray[np.float32]:
    from safetensors.numpy import load_file

    [folder] = (home / "runs").iterdir()
    return load_file(folder / "checkpoints" / f"round-{round_:05d}" / "params.safetensors")[A]


def test_what_is_kept_belongs_to_its_round_and_its_tensors(tmp_path: Path) -> None:
    memory = Memory(tmp_path, LAYOUT, "b" * 64)
    own, other = (Kept(memory, Layout((LAYOUT[name],)), first_values) for name in (B, A))
    values = {round_: {B: np.full(LAYOUT[B].shape, round_, np.float32)} for round_ in (1, 2, 4)}
    for round_, arrays in values.items():
        own.keep(round_, arrays)
    for asked, expected in ((1, 1), (2, 2), (3, 2), (4, 4), (9, 4)):
        found = own.after(asked)
        assert found is not None
        np.testing.assert_array_equal(found[B], values[expected][B])
    assert own.after(0) is None
    assert own.at(3) is None
    assert other.after(9) is None


def test_what_the_server_folded_last_is_never_forgotten(tmp_path: Path) -> None:
    memory = Memory(tmp_path, LAYOUT, "b" * 64)
    own = Kept(memory, Layout((LAYOUT[B],)), first_values)
    for round_ in range(1, 9):
        own.keep(round_, {B: np.zeros(LAYOUT[B].shape, np.float32)})
        memory.finish(round_, "request", "report", last_folded=min(2, round_ - 1))
    assert [round_ for round_ in range(1, 9) if own.at(round_)] == [2, 6, 7, 8]
