"""Sites that use different numbers of a soft prompt's virtual tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tests.fake_federation as fakes
from client_app.site import load_site_config
from client_app.workplace import open_workplace
from fedllm.codecs.payload import open_payload
from fedllm.config import read_run_config
from fedllm.errors import ConfigError, LayoutError
from fedllm.messages import Hello, TrainReport
from fedllm.model.batch import collate, target_logits
from fedllm.model.build import LoadedBase, attach_adapter, layout_of, read_adapter, write_adapter
from fedllm.model.initial import initial_arrays
from fedllm.model.prompts.attach import num_used, use_first, without_personal
from fedllm.model.spec import PromptSpec
from fedllm.update import Arrays, Contribution, Layout, TensorSpec, digest_arrays
from server_app.checkpoint import load_latest
from strategies.aggregators import WeightedMean
from strategies.parts import FirstTokens, check_length, in_part
from strategies.slots import ArraySource, Origin
from tests.bases import load_tiny, logits_of
from tests.fake_federation import InProcessGrid, QuadraticSite
from tests.site_handlers import TINY, make_home, simulated_sites
from tests.soft_prompts import KINDS, NUM_TOKENS, with_prompt
from tests.text import example, packed
from tests.unit.test_loop import events, run

IDS = [[5, 40, 200, 33, 7, 90, 12]]
LAYOUT = Layout((TensorSpec("prefix.0", (4, 3), role="prefix"), TensorSpec("other", (4, 3), role="encoder")))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> LoadedBase:
    return load_tiny(tmp_path_factory.mktemp("base"))


def shortened(arrays: Arrays, layout: Layout, count: int) -> Arrays:
    return {
        spec.name: arrays[spec.name][:count] if spec.shape[0] == NUM_TOKENS else arrays[spec.name]
        for spec in layout.tensors
    }


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_site_computes_with_the_first_tokens_and_trains_them_alone(base: LoadedBase, kind: str) -> None:
    """The oracle is a soft prompt that has only those tokens."""
    model = with_prompt(base, KINDS[kind])
    arrays, whole = read_adapter(model, layout_of(model)), logits_of(model, IDS)
    shorter = shortened(arrays, layout_of(model), 2)
    use_first(model, 2)
    assert num_used(model) == 2
    found = logits_of(model, IDS)
    row = packed(example(6, 1), example(9, 2))
    target_logits(model, collate([row], model)).square().mean().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.shape[0] == NUM_TOKENS:
            assert parameter.grad is not None
            assert parameter.grad[:2].abs().min() > 0, name
            assert not parameter.grad[2:].any(), name
    packed_found = target_logits(model, collate([row], model)).detach()
    model.zero_grad(set_to_none=True)
    plain = attach_adapter(base, KINDS[kind].model_copy(update={"num_virtual_tokens": 2}))
    write_adapter(plain, layout_of(plain), shorter)
    torch.testing.assert_close(found, logits_of(plain, IDS), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(packed_found, target_logits(plain, collate([row], plain)).detach(), rtol=1e-4, atol=1e-5)
    assert (found[:, -1] - whole[:, -1]).abs().max() > 1e-2


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_attaching_again_uses_all_tokens_again(base: LoadedBase, kind: str) -> None:
    model = attach_adapter(base, KINDS[kind])
    use_first(model, 1)
    assert num_used(attach_adapter(base, KINDS[kind])) == NUM_TOKENS


def test_a_sites_own_tokens_are_used_beside_the_first_shared_ones(base: LoadedBase) -> None:
    model = with_prompt(base, PromptSpec(num_virtual_tokens=3, num_personal_tokens=2))
    use_first(model, 1)
    arrays, found = read_adapter(model, layout_of(model)), logits_of(model, IDS)
    with without_personal(model):
        shared = logits_of(model, IDS)
    assert num_used(model) == 1
    for own, logits in ((2, found), (0, shared)):
        parts = [arrays["prompt_embeddings"][:1], arrays["personal_embeddings"][:own]]
        plain = attach_adapter(base, PromptSpec(num_virtual_tokens=1 + own))
        write_adapter(plain, layout_of(plain), {"prompt_embeddings": np.concatenate(parts)})
        torch.testing.assert_close(logits, logits_of(plain, IDS), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("wanted", "fewest", "length"), [(0, 0, 20), (20, 0, 20), (0, 5, 20), (5, 5, 5), (7, 5, 7)])
def test_a_site_uses_as_many_tokens_as_it_wants_within_bounds(wanted: int, fewest: int, length: int) -> None:
    assert PromptSpec(num_virtual_tokens=20, min_virtual_tokens=fewest).own_length(wanted) == length


@pytest.mark.parametrize(("wanted", "fewest"), [(19, 0), (4, 5), (21, 5)])
def test_a_length_out_of_bounds_is_refused_at_both_ends(wanted: int, fewest: int) -> None:
    with pytest.raises(ConfigError, match="prompt length is out of bounds"):
        PromptSpec(num_virtual_tokens=20, min_virtual_tokens=fewest).own_length(wanted)
    layout = Layout((TensorSpec("prompt_embeddings", (20, 8), role="prompt"),))
    with pytest.raises(LayoutError, match="prompt length is out of bounds"):
        check_length(layout, wanted, fewest)
    check_length(layout, 0, fewest)


def test_the_fewest_cannot_be_more_than_all() -> None:
    with pytest.raises(ConfigError, match="min_virtual_tokens is larger"):
        read_run_config({"adapter.kind": "prompt", "adapter.min_virtual_tokens": 21})


def test_every_token_is_averaged_over_the_sites_that_use_it() -> None:
    start = initial_arrays(Layout((LAYOUT["prefix.0"],)), 0) | {"other": np.zeros((4, 3), np.float32)}
    aggregation = WeightedMean().start(LAYOUT, Origin(1, LAYOUT, start, start, 3))
    for weight, value, count in ((1.0, 2.0, 0), (2.0, 5.0, 1), (1.0, 8.0, 3)):
        arrays = {name: np.full((4, 3), value, np.float32) for name in LAYOUT.names}
        source = in_part(ArraySource(arrays), LAYOUT, (), count)
        assert source.is_partial == bool(count)
        assert source.read("prefix.0")[-1, 0] == (value if not count else 0)
        aggregation.fold(source, Contribution(f"site-{count}", weight, {}))
    mean, _ = aggregation.finish()
    np.testing.assert_allclose(mean["prefix.0"][:, 0], [20 / 4, 10 / 2, 10 / 2, 2.0])
    np.testing.assert_allclose(mean["other"], 20 / 4)


def test_what_a_site_says_of_tokens_that_it_does_not_use_counts_nothing() -> None:
    """Noise of a codec, or a lie."""
    arrays = {name: np.ones((4, 3), np.float32) for name in LAYOUT.names}
    sums, weights = np.zeros((4, 3)), np.zeros((4, 3))
    FirstTokens(ArraySource(arrays), 2, LAYOUT).add_to("prefix.0", sums, 3.0, weights)
    np.testing.assert_array_equal(sums[:, 0], [3, 3, 0, 0])
    np.testing.assert_array_equal(weights[:, 0], [3, 3, 0, 0])


def test_a_report_of_an_impossible_length_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = Layout((TensorSpec("prefix.0", (4, 3), role="prefix"),))
    initial = digest_arrays(initial_arrays(layout, 42), layout)
    monkeypatch.setattr(fakes, "LAYOUT", layout)
    agreement = fakes.AGREEMENT.model_copy(update={"layout": layout.digest, "initial": initial})

    class Short(QuadraticSite):
        def report(self, *args: Any, **changes: Any) -> TrainReport:
            return super().report(*args, num_virtual_tokens=1, **changes)

    kinds = {"a": QuadraticSite, "b": QuadraticSite, "c": Short}
    sites = {seed: kind(name, seed, 10, agreement) for seed, (name, kind) in enumerate(kinds.items())}
    settings = {"adapter.kind": "prefix", "adapter.num_virtual_tokens": 4, "adapter.min_virtual_tokens": 2}
    folder = run(tmp_path, InProcessGrid({100 + node: site for node, site in sites.items()}), num_rounds=1, **settings)
    [rejected] = events(folder, "round")[0]["rejected"]
    assert rejected["site"] == "c"
    assert "out of bounds; expected 2 to 4; found 1" in rejected["reason"]


def test_a_federation_of_sites_with_different_lengths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real sites; the first two tokens move by the mean of both updates, the last two by the longer prompt's alone."""
    monkeypatch.setenv("FEDLLM_CACHE", str(tmp_path / "cache"))
    lengths = {"adapter.num_virtual_tokens": 4, "adapter.min_virtual_tokens": 2, "simulation.prompt_lengths": "2,4"}
    settings = {**TINY, **lengths, "strategy.name": "fedprompt", "adapter.kind": "prompt", "num_rounds": 1}
    home = make_home(tmp_path)
    folder = run(home, InProcessGrid(simulated_sites()), **{**settings, "evaluation.local_only": False})
    state = load_latest(folder.checkpoints)
    assert state is not None
    deltas, weights = [], []
    for site in ("site-0", "site-1"):
        path = folder.path / "sites" / site / "round-00001.update"
        with open_payload(path, layout=state.layout, base=state.agreement.base, kind="update") as payload:
            deltas.append(payload.read("prompt_embeddings"))
        weights.append(events(folder, "round")[0]["sites"][site]["weight"])
    assert not deltas[0][2:].any()
    assert deltas[0][:2].any(axis=1).all()
    expected = state.sent["prompt_embeddings"] + np.where(
        np.arange(4)[:, None] < 2, (weights[0] * deltas[0] + weights[1] * deltas[1]) / sum(weights), deltas[1]
    )
    np.testing.assert_allclose(state.params["prompt_embeddings"], expected, rtol=1e-5, atol=1e-6)


def test_the_data_owner_chooses_the_length(tmp_path: Path) -> None:
    text = '[site]\nname = "a"\n[data]\nsource = "file:x.jsonl"\n'
    config = read_run_config({"adapter.kind": "prompt"})
    for section, length in (("", 0), ("[adapter]\nnum_virtual_tokens = 7\n", 7)):
        (tmp_path / "site.toml").write_text(text + section)
        assert load_site_config(tmp_path / "site.toml").adapter.num_virtual_tokens == length
        hello = Hello(run="r", run_folder="/x", config={})
        assert open_workplace({"site-config": str(tmp_path / "site.toml")}, hello).prompt_length(config) == length
