"""The run config: one set of defaults, clear refusals."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from fedllm.config import RunConfig, describe, flatten, read_run_config
from fedllm.errors import ConfigError


def test_the_flat_form_and_the_config_are_inverse() -> None:
    config = read_run_config({"num_rounds": 7, "train.batch_size": 2, "adapter.target_modules": "q_proj,v_proj"})
    assert read_run_config(flatten(config)) == config
    assert flatten(config)["train.batch_size"] == 2


def test_every_setting_has_a_default_and_a_meaning() -> None:
    rows = list(describe(RunConfig))
    assert len({key for key, _, _ in rows}) == len(rows)
    for key, default, meaning in rows:
        assert isinstance(default, str | int | float | bool), key
        assert len(meaning) > 10, f"{key} has no documentation"


def test_an_empty_run_config_is_the_default_one() -> None:
    assert read_run_config({}) == RunConfig()
    assert isinstance(RunConfig(), BaseModel)


@pytest.mark.parametrize(
    ("flat", "words"),
    [
        ({"train.batchsize": 2}, "unknown run config key 'train.batchsize'.*Did you mean 'train.batch_size'"),
        ({"num_round": 2}, "Did you mean 'num_rounds'"),
        ({"zzz.qqq": 2}, "fedllm config"),
        ({"num_rounds": 0}, "num_rounds.*greater than or equal to 1.*found 0"),
        ({"num_rounds": "three"}, "num_rounds.*valid integer.*found 'three'"),
        ({"model.source": "SmolLM2"}, "model.source.*hf:org/name@revision.*found 'SmolLM2'"),
        ({"model.quantization": "fp4"}, "model.quantization.*'none', 'int8' or 'nf4'.*found 'fp4'"),
        ({"train.optimizer": "adamw-8bit"}, "not deterministic; set deterministic=false"),
        ({"data.holdout_fraction": 1.0}, "holdout_fraction.*less than 1"),
    ],
)
def test_a_wrong_setting_is_refused_in_words_that_help(flat: dict[str, str | int | float], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        read_run_config(flat)


@given(
    st.dictionaries(st.text(max_size=12), st.one_of(st.text(), st.integers(), st.floats(), st.booleans()), max_size=4)
)
def test_any_flat_mapping_is_read_or_refused_as_a_config_error(flat: dict[str, str | int | float | bool]) -> None:
    with suppress(ConfigError):
        assert isinstance(read_run_config(flat), RunConfig)
