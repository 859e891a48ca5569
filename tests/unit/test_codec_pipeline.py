"""Pipeline texts: what they may say, how they are written back, and why impossible ones are refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedllm.codecs.pipeline import Pipeline, parse
from fedllm.codecs.registry import STAGES, known_names, register
from fedllm.errors import ConfigError
from fedllm.update import Layout, TensorSpec

CANONICAL = [
    "fp32",
    "bf16",
    "delta|nf4:64",
    "delta|topk:0.1|nf4:64|rice|zstd:3",
    "delta|segment:5|mask:0.5|topk:0.1|fp16|rice",
    "randk:0.25:unbiased|fp32",
    "int8:256:sr:f32",
    "delta|nf4:64;lora_A=delta|int8:256;lora_B=delta|q2:64",
]


@pytest.mark.parametrize("text", CANONICAL)
def test_a_canonical_text_is_written_back_unchanged(text: str) -> None:
    assert str(parse(text)) == text


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        (" delta | topk:0.10 | nf4 | rice | zstd ", "delta|topk:0.1|nf4:64|rice|zstd:3"),
        ("lora_B = int8 ; fp32", "fp32;lora_B=int8:256"),
        ("nf4@1:32", "nf4:32"),
        ("topk:1e-2|fp32|rice", "topk:0.01|fp32|rice"),
        ("int4:f32:sr", "int4:64:sr:f32"),
    ],
)
def test_a_text_is_made_canonical(text: str, canonical: str) -> None:
    assert str(parse(text)) == canonical
    assert parse(canonical) == parse(text)


@given(st.sampled_from(CANONICAL), st.sampled_from(CANONICAL))
def test_parsing_inverts_writing(first: str, second: str) -> None:
    for text in (first, second):
        pipeline = parse(text)
        assert parse(str(pipeline)) == pipeline
        assert parse(pipeline.wire_text) == pipeline
        assert "@" in pipeline.wire_text


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("nf4|delta", "'delta' .* cannot follow 'nf4'"),
        ("zstd|fp32", "'fp32' .* cannot follow 'zstd'"),
        ("topk:0.1|delta|nf4|rice", "'delta' .* cannot follow 'topk'"),
        ("topk:0.1|segment:3|nf4|rice", "'segment' .* cannot follow 'topk'"),
        ("topk:0.1|rice|nf4", "'nf4' .* cannot follow 'rice'"),
        ("delta", "no stage from array to bytes"),
        ("fp32|bf16", "two stages of one kind"),
        ("topk:0.1|randk:0.1|fp32|rice", "two stages of one kind"),
        ("fp32|zstd|zstd", "two stages of one kind"),
        ("topk:0.1|nf4", "needs? an index coder"),
        ("randk:0.1|nf4|rice", "no positions to code"),
        ("nf4|rice", "no positions to code"),
        ("gzip", "unknown codec stage 'gzip'; expected one of bf16, delta, fp16"),
        ("nf4@2", "no such version"),
        ("nf4:63", "multiple of 8"),
        ("nf4:0", "block size"),
        ("nf4:999999", "block size"),
        ("nf4:sr", "equal steps"),
        ("int8:256:fast", "unknown parameters"),
        ("int8:sr:sr", "unknown parameters"),
        ("topk|fp32|rice", "share of coordinates"),
        ("topk:0|fp32|rice", "share of coordinates"),
        ("topk:1.5|fp32|rice", "share of coordinates"),
        ("topk:nan|fp32|rice", "share of coordinates"),
        ("topk:0.1:2|fp32|rice", "too many parameters"),
        ("randk:0.1:biased|fp32", "unknown parameters"),
        ("segment:1|fp32", "number of segments"),
        ("segment|fp32", "number of segments"),
        ("zstd:20", "no stage|level"),
        ("fp32|zstd:0", "level"),
        ("fp32:8", "no parameters|too many"),
        ("", "malformed"),
        ("fp32;", "malformed"),
        ("FP32", "malformed"),
        ("1x=fp32", "role is malformed"),
        ("a=fp32;a=bf16", "names a role twice"),
        ("delta|nf4;lora_A=nf4", "difference for some roles only"),
        ("fp32" + " " * 5000, "too long"),
    ],
)
def test_an_impossible_pipeline_is_refused_with_its_reason(text: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        parse(text)


@given(st.text(alphabet="abcdefnprztik48612@:|;=. ", max_size=40))
def test_any_text_is_parsed_or_refused(text: str) -> None:
    try:
        pipeline = parse(text)
    except ConfigError:
        return
    assert parse(str(pipeline)) == pipeline


@pytest.mark.parametrize(
    ("text", "linear", "lossless", "needs", "partial"),
    [
        ("fp32", True, True, False, False),
        ("fp32|zstd", True, True, False, False),
        ("bf16", False, False, False, False),
        ("delta|fp32", True, False, True, False),
        ("delta|randk:0.1|fp32", True, False, True, False),
        ("randk:0.1|bf16", False, False, False, False),
        ("topk:0.1|fp32|rice", False, False, False, False),
        ("delta|segment:4|fp32", True, False, True, True),
        ("delta|mask:0.5|nf4", False, False, True, True),
        ("fp32;lora_A=nf4", False, False, False, False),
    ],
)
def test_a_pipeline_knows_what_it_is(text: str, linear: bool, lossless: bool, needs: bool, partial: bool) -> None:
    pipeline = parse(text)
    assert (pipeline.is_linear, pipeline.is_lossless) == (linear, lossless)
    assert (pipeline.needs_reference, pipeline.is_partial) == (needs, partial)


def test_a_role_without_a_branch_is_named() -> None:
    layout = Layout((TensorSpec("x", (2,), role="prompt"),))
    with pytest.raises(ConfigError, match="covers role 'prompt'"):
        parse("lora_A=fp32").check(layout)
    parse("fp32;lora_A=nf4").check(layout)


def test_a_stage_cannot_be_registered_twice() -> None:
    before = dict(STAGES)
    with pytest.raises(ConfigError, match="registered twice; found nf4@1"):
        register("nf4", 1, lambda _: parse("fp32").branch("").values)
    assert before == STAGES


def test_a_newer_version_of_a_stage_does_not_change_what_an_old_header_means(monkeypatch: pytest.MonkeyPatch) -> None:
    old = parse("nf4:64")
    old_wire_text = old.wire_text

    class Nf4Two(type(old.branch("").values)):  # type: ignore[misc]
        version = 2

    stage = old.branch("").values
    monkeypatch.setitem(STAGES, ("nf4", 2), lambda params: Nf4Two(stage.grid, int(params[0])))
    assert parse(old_wire_text) == old
    assert str(parse(old_wire_text)) == "nf4@1:64"
    assert parse("nf4:64").wire_text == "nf4@2:64"
    assert isinstance(parse("nf4:64"), Pipeline)
    assert "nf4" in known_names()
