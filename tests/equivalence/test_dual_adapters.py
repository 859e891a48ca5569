"""Two adapters on one base: what they compute, which share an example gets, and a federation that trains both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel

from client_app.kept import Kept
from client_app.memory import Memory
from fedllm.codecs.payload import open_payload
from fedllm.config import RunConfig
from fedllm.data.sequences import Sequence
from fedllm.errors import ConfigError
from fedllm.lora.mixed import mixed_as_one
from fedllm.model.batch import collate, target_logits
from fedllm.model.build import LoadedBase, attach_adapter, layout_of, only_trainable, write_adapter
from fedllm.model.dual import ByLikeness, mixed
from fedllm.model.evaluate import evaluate_loss
from fedllm.model.export import load_peft_adapter
from fedllm.model.initial import initial_arrays
from fedllm.model.spec import LoraSpec
from fedllm.update import Arrays, Layout
from fedllm.work import PERSONAL, common_of
from server_app.checkpoint import RunState, load_latest
from server_app.events import read_events
from server_app.results import Results
from strategies.compatibility import check_compatibility
from tests.bases import load_tiny
from tests.soft_prompts import random_arrays
from tests.text import example, packed
from tests.tiny_federation import run_tiny, tiny_home
from tests.unit.test_loop import events

__all__ = ["tiny_home"]

SPEC = LoraSpec(rank=3, alpha=12.0, personal_rank=2)
SEQUENCES = [packed(example(7, 2, first_target=3), example(9, 3, first_target=5)), example(12, 4, first_target=6)]


@pytest.fixture(scope="module", params=["none", "nf4"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoadedBase:
    return load_tiny(tmp_path_factory.mktemp("base"), quantization=request.param)


@pytest.fixture
def dual(base: LoadedBase) -> tuple[PeftModel, Layout, Arrays]:
    model = attach_adapter(base, SPEC)
    layout = layout_of(model)
    arrays = random_arrays(layout)
    write_adapter(model, layout, arrays)
    return model, layout, arrays


def logits(model: PeftModel, sequences: list[Sequence]) -> torch.Tensor:
    with torch.no_grad():
        return target_logits(model, collate(sequences, model))


def as_one(base: LoadedBase, layout: Layout, arrays: Arrays, share: float) -> torch.Tensor:
    """The oracle: PEFT's plain LoRA of the factors side by side."""
    spec, one, values = mixed_as_one(SPEC, layout, arrays, share)
    model = attach_adapter(base, spec)
    assert layout_of(model) == one
    write_adapter(model, one, values)
    return logits(model, SEQUENCES)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_both_adapters_compute_what_one_of_their_factors_side_by_side_does(
    base: LoadedBase, dual: tuple[PeftModel, Layout, Arrays], share: float
) -> None:
    model, layout, arrays = dual
    with mixed(model, share):
        found = logits(model, SEQUENCES)
    torch.testing.assert_close(found, as_one(base, layout, arrays, share), rtol=1e-4, atol=1e-4)


def test_alone_the_model_is_the_federations_and_mixing_leaves_nothing_behind(
    base: LoadedBase, dual: tuple[PeftModel, Layout, Arrays]
) -> None:
    model, layout, arrays = dual
    alone = logits(model, SEQUENCES)
    trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with pytest.raises(ZeroDivisionError), mixed(model, 0.7):
        raise ZeroDivisionError
    torch.testing.assert_close(logits(model, SEQUENCES), alone, rtol=0, atol=0)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == trainable
    torch.testing.assert_close(alone, as_one(base, layout, arrays, 0.0), rtol=1e-4, atol=1e-4)


def test_gradients_reach_only_the_adapter_in_training_with_both_on(dual: tuple[PeftModel, Layout, Arrays]) -> None:
    model, layout, _ = dual
    own = layout.only([spec.name for spec in layout.tensors if spec.role in PERSONAL])
    with mixed(model, 0.5), only_trainable(model, own) as parameters:
        target_logits(model, collate(SEQUENCES, model)).sum().backward()
        assert all(parameter.grad is not None and parameter.grad.any() for parameter in parameters.values())
    others = [value for name, value in model.named_parameters() if ".personal." not in name]
    assert all(parameter.grad is None for parameter in others)
    model.zero_grad()


def test_every_example_of_a_packed_batch_has_its_own_share(dual: tuple[PeftModel, Layout, Arrays]) -> None:
    """Each example is computed by itself with the one number that the definition gives it."""
    model, _, _ = dual
    alone = [example(7, 2, first_target=3), example(9, 3, first_target=5), SEQUENCES[1]]
    references = [example(8, 5, first_target=4), example(6, 6, first_target=2)]
    likeness = ByLikeness.of(model, 0.9, references)

    def hidden(sequence: Sequence) -> np.ndarray[Any, np.dtype[np.float64]]:
        end = int(np.flatnonzero(sequence.target_mask)[0])
        ids = torch.from_numpy(sequence.input_ids[:end].astype(np.int64))[None]
        with torch.no_grad(), mixed(model, 1.0):
            states = model(input_ids=ids, output_hidden_states=True).hidden_states
        state = states[-1][0, -1].double().numpy()
        return state / np.linalg.norm(state)

    batch, expected = collate(SEQUENCES, model), []
    for sequence in alone:
        share = 0.9 * float(np.mean([hidden(sequence) @ hidden(reference) for reference in references]))
        with mixed(model, min(1.0, max(0.0, share))):
            expected.append(logits(model, [sequence]))
    with torch.no_grad(), likeness.applied(batch):
        found = target_logits(model, batch)
    torch.testing.assert_close(found, torch.cat(expected), rtol=2e-3, atol=2e-3)


def test_an_example_of_the_site_itself_gets_the_whole_share(dual: tuple[PeftModel, Layout, Arrays]) -> None:
    model, _, _ = dual
    reference = example(8, 5, first_target=4)
    likeness = ByLikeness.of(model, 0.6, [reference])
    assert float(likeness.shares(likeness.references)[0]) == pytest.approx(0.6, abs=1e-5)
    assert float(likeness.shares(-likeness.references)[0]) == 0.0
    whole = evaluate_loss(model, [reference], 1, likeness.applied).loss
    with mixed(model, 0.6):
        assert evaluate_loss(model, [reference], 1).loss == pytest.approx(whole, rel=1e-5)


DUAL: dict[str, Any] = {
    "strategy.name": "feddpa",
    "adapter.personal_rank": 4,
    "train.local_steps": 6,
    "num_rounds": 3,
    "transport.uplink": "fp32",
}


def state_of(folder: Any) -> RunState:
    state = load_latest(folder.checkpoints)
    assert state is not None
    return state


def test_a_federation_trains_both_and_the_own_adapters_never_leave_their_sites(tiny_home: Path) -> None:
    folder = run_tiny(tiny_home, **DUAL)
    state = state_of(folder)
    own = state.layout.only([spec.name for spec in state.layout.tensors if spec.role in PERSONAL])
    first = initial_arrays(state.layout, 42)
    for name in own.names:
        np.testing.assert_array_equal(state.params[name], first[name])
    shared = common_of(state.layout)
    kept = {}
    for site in ("site-0", "site-1"):
        files = folder.path / "sites" / site
        with open_payload(next(files.glob("*.update")), layout=shared, base=state.agreement.base) as payload:
            assert payload.names == shared.names
        kept[site] = Kept(Memory(files, state.layout, state.agreement.base), own, dict).after(3)
        assert kept[site] is not None
        assert load_peft_adapter(files / "adapter").keys() == set(shared.names)
    assert any(not np.array_equal(kept["site-0"][name], kept["site-1"][name]) for name in own.names)  # type: ignore[index]
    [event] = events(folder, "personalised")
    assert event["loss"] < event["federated"] < events(folder, "evaluation")[0]["loss"]
    assert event["loss"] == pytest.approx(events(folder, "evaluation")[-1]["loss"], rel=1e-6)
    assert all(row.personalised and row.federated for row in Results.of(read_events(folder.metrics)).rows())
    assert load_peft_adapter(folder.adapter).keys() == set(shared.names)


def test_a_resumed_federation_of_two_adapters_gives_the_same_bits(tiny_home: Path) -> None:
    steady = {**DUAL, "train.schedule": "constant", "train.warmup_fraction": 0.0, "train.local_steps": 2}
    one = run_tiny(tiny_home, name="whole", **steady)
    run_tiny(tiny_home, name="cut", **{**steady, "num_rounds": 1})
    two = run_tiny(tiny_home, name="", resume="cut", **steady)
    for name, value in state_of(one).params.items():
        np.testing.assert_array_equal(state_of(two).params[name], value)
    assert events(one, "personalised")[0]["sites"] == events(two, "personalised")[0]["sites"]


def test_further_steps_train_a_sites_own_adapter_only(tiny_home: Path) -> None:
    plain = run_tiny(tiny_home, name="plain", **{**DUAL, "num_rounds": 2})
    further = run_tiny(tiny_home, name="further", **{**DUAL, "num_rounds": 2, "evaluation.personal_steps": 12})
    before, after = (events(folder, "personalised")[0] for folder in (plain, further))
    assert after["federated"] == before["federated"]
    assert after["loss"] < before["loss"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"strategy": {"name": "feddpa"}}, "adapter of their own"),
        ({"adapter": {"personal_rank": 4}}, "only strategy.name = 'feddpa'"),
        ({"strategy": {"name": "feddpa"}, "adapter": {"kind": "prompt"}}, "two factors"),
    ],
)
def test_a_second_adapter_and_its_strategy_belong_together(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        check_compatibility(RunConfig.model_validate(changes))
