"""Payloads: what is written is read, and whatever else arrives is refused with the right error and both sides' values."""

import io
import struct
from pathlib import Path

import numpy as np
import pytest
import xxhash
import zstandard

from fedllm.codecs.container import MAX_HEADER_BYTES, PayloadHeader
from fedllm.codecs.payload import encode_payload, open_payload
from fedllm.codecs.pipeline import parse
from fedllm.errors import (
    AgreementError,
    ConfigError,
    CorruptPayloadError,
    LayoutError,
    NonFiniteError,
    OversizedPayloadError,
    PayloadError,
    PayloadVersionError,
    TruncatedPayloadError,
)
from fedllm.update import Layout, TensorSpec, zeros
from tests.payload_tools import BASE, LAYOUT, REFERENCE_ID, draw, encode, reseal, reseal_head

SPARSE = "delta|topk:0.2|nf4:64|rice|zstd:3"


def opened(payload, layout=LAYOUT, base=BASE, **settings):
    return open_payload(payload, layout=layout, base=base, **settings)


def test_a_file_is_read_tensor_by_tensor_in_any_order(tmp_path: Path) -> None:
    arrays, path = draw(), tmp_path / "payload"
    info = encode_payload(path, arrays, LAYOUT, kind="state", round_=0, base=BASE, pipeline="fp32")
    assert path.stat().st_size == info.num_bytes
    with opened(path) as payload:
        assert payload.digest == info.digest
        assert payload.header == info.header
        assert payload.names == LAYOUT.names
        payload.verify()
        read = {name: payload.read(name) for name in reversed(payload.names)}
    for name, values in read.items():  # still there after the file is unmapped
        np.testing.assert_array_equal(values, arrays[name])
        assert values.shape == LAYOUT[name].shape


def test_a_stream_is_written_from_where_it_stands_and_left_at_the_end() -> None:
    payload, _ = encode("fp32")
    sink = io.BytesIO()
    sink.write(b"before")
    encode_payload(sink, draw(), LAYOUT, kind="update", round_=7, base=BASE, pipeline="fp32")
    sink.write(b"after")
    assert sink.getvalue() == b"before" + payload + b"after"


def test_a_stream_that_cannot_seek_gets_the_same_bytes() -> None:
    class Pipe(io.BytesIO):
        def seekable(self) -> bool:
            return False

    sink = Pipe()
    encode_payload(sink, draw(), LAYOUT, kind="update", round_=7, base=BASE, pipeline="fp32")
    assert sink.getvalue() == encode("fp32")[0]


def test_what_a_writer_leaves_that_died_half_way_is_no_payload() -> None:
    class FullDisk(io.BytesIO):
        def write(self, data) -> int:
            if self.tell() > 1000:
                raise OSError("no space left on device")
            return super().write(data)

    sink = FullDisk()
    with pytest.raises(OSError, match="no space"):
        encode_payload(sink, draw(), LAYOUT, kind="update", round_=7, base=BASE, pipeline="fp32")
    assert len(sink.getvalue()) > 500
    with pytest.raises(CorruptPayloadError, match="not a payload"):
        opened(sink.getvalue())


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("pipeline", ["fp32", "bf16", "fp16", "int8", "nf4", "fp8", "sign", SPARSE, "randk:0.5|fp32"])
def test_adding_is_reading_times_weight(pipeline: str, dtype: type) -> None:
    payload, info = encode(pipeline)
    with opened(payload) as reader:
        for name in reader.names:
            start = np.random.default_rng(1).standard_normal(LAYOUT[name].shape or ()).astype(dtype)
            accumulator = np.array(start, dtype)
            reader.add_to(name, accumulator, 0.3)
            np.testing.assert_array_equal(accumulator, start + dtype(0.3) * info.decoded[name].astype(dtype))


def test_what_the_sender_is_told_is_what_the_receiver_reads() -> None:
    payload, info = encode(SPARSE)
    with opened(payload) as reader:
        for name in reader.names:
            np.testing.assert_array_equal(reader.read(name).view(np.uint32), info.decoded[name].view(np.uint32))


def test_a_difference_is_added_to_its_reference_on_request() -> None:
    arrays, reference = draw(), draw(seed=99)
    payload, _ = encode("delta|fp32", arrays)
    with opened(payload, reference=reference) as reader:
        assert reader.is_difference
        for name in reader.names:
            np.testing.assert_array_equal(reader.read(name), arrays[name] - reference[name])
            np.testing.assert_allclose(reader.restore(name), arrays[name], rtol=1e-5, atol=1e-6)
    with opened(payload) as reader, pytest.raises(ConfigError, match="reference's arrays"):
        reader.restore("scalar")
    with opened(encode("fp32", arrays)[0]) as reader:
        np.testing.assert_array_equal(reader.restore("scalar"), arrays["scalar"])


def test_a_difference_that_is_one_already_is_not_taken_twice() -> None:
    arrays = draw()
    twice, _ = encode("delta|fp32", arrays, is_difference=True)
    with opened(twice, reference_id=REFERENCE_ID) as reader:
        np.testing.assert_array_equal(reader.read("scalar"), arrays["scalar"])
    plain, info = encode("nf4", arrays, is_difference=True, reference_id=REFERENCE_ID)
    assert info.header.reference == REFERENCE_ID
    with opened(plain) as reader:
        assert reader.is_difference


@pytest.mark.parametrize(
    ("pipeline", "changes", "reason"),
    [
        ("delta|fp32", {"reference_id": ""}, "needs the id"),
        ("delta|fp32", {"reference": None}, "needs the reference's arrays"),
        ("fp32", {"reference_id": "x"}, "absolute values have no reference"),
        ("fp32", {"is_difference": True}, "needs the id"),
        ("segment:3|fp32", {}, "Put delta in front"),
        ("mask:0.5|fp32", {"reference": draw(seed=99)}, "Put delta in front"),
        ("mask:0.5|fp32", {"is_difference": True, "reference_id": "x"}, "needs the reference's arrays"),
        ("lora_A=fp32", {}, "no branch of the pipeline covers role"),
        ("fp32", {"round_": -1}, "impossible value"),
        ("fp32", {"kind": "gossip"}, "impossible value"),
        ("randk:0.5|fp32", {"seed": 1 << 63}, "impossible value"),
    ],
)
def test_what_cannot_be_encoded_is_refused(pipeline: str, changes: dict[str, object], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        encode(pipeline, **changes)


def test_arrays_that_do_not_fit_are_refused() -> None:
    with pytest.raises(LayoutError, match="missing"):
        encode("fp32", {"scalar": np.zeros((), np.float32)})
    with pytest.raises(LayoutError, match="float64"):
        encode("fp32", {name: values.astype(np.float64) for name, values in draw().items()})
    with pytest.raises(LayoutError, match="the reference"):
        encode("delta|fp32", reference={})
    big = {name: np.full(values.shape, 3e38, np.float32) for name, values in draw().items()}
    with pytest.raises(NonFiniteError, match="difference"):
        encode("delta|fp32", big, reference={name: -values for name, values in big.items()})


def test_equal_input_gives_equal_bytes_and_other_input_another_digest() -> None:
    first, second = encode(SPARSE), encode(SPARSE)
    assert first[0] == second[0]
    assert encode(SPARSE, draw(seed=1))[1].digest != first[1].digest
    assert encode(SPARSE, round_=8)[1].digest != first[1].digest


def test_segments_start_on_whole_words() -> None:
    for base in ("b", "bb", "bbb", "ü" * 9):
        payload, _ = encode("fp32", base=base)
        header_bytes, tensors = struct.unpack_from("<II", payload, 12)
        assert (20 + header_bytes + 16 * tensors + 16) % 16 == 0


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize("pipeline", ["fp32", SPARSE])
def test_every_truncation_is_refused(pipeline: str) -> None:
    payload, _ = encode(pipeline)
    for length in range(len(payload)):
        with pytest.raises(TruncatedPayloadError, match=r"expected \d+|empty|ends"):
            opened(payload[:length])


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    with pytest.raises(TruncatedPayloadError, match="empty"):
        opened(tmp_path / "empty")


def test_trailing_bytes_are_refused() -> None:
    payload, info = encode("fp32")
    with pytest.raises(OversizedPayloadError, match=f"expected {info.num_bytes}; found {info.num_bytes + 1}"):
        opened(payload + b"\0")


def test_more_than_the_receiver_allows_is_refused_before_it_is_looked_at(tmp_path: Path) -> None:
    payload, info = encode("fp32")
    (tmp_path / "payload").write_bytes(payload)
    for source in (payload, tmp_path / "payload"):
        with pytest.raises(OversizedPayloadError, match=f"at most {info.num_bytes - 1} bytes; found {info.num_bytes}"):
            opened(source, max_bytes=info.num_bytes - 1)
        opened(source, max_bytes=info.num_bytes).close()


@pytest.mark.parametrize("pipeline", ["fp32", "nf4", SPARSE])
def test_a_damaged_file_is_refused_and_let_go(tmp_path: Path, pipeline: str) -> None:
    path = tmp_path / "payload"
    path.write_bytes(reseal(encode(pipeline)[0], lambda segments: segments.__setitem__(0, b"")))
    with pytest.raises(CorruptPayloadError), opened(path) as reader:
        reader.verify()
    damaged = bytearray(encode(pipeline)[0])
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(CorruptPayloadError, match=f"segment is damaged.*payload {path}"), opened(path) as reader:
        reader.verify()
    with pytest.raises(AgreementError), opened(path, base="other"):
        pass
    with pytest.raises(LayoutError), opened(path, layout=Layout(LAYOUT.tensors[:1])):
        pass


@pytest.mark.parametrize("pipeline", ["fp32", SPARSE])
def test_every_flipped_bit_is_noticed(pipeline: str) -> None:
    payload, _ = encode(pipeline)
    for bit in range(0, 8 * len(payload), 5):
        damaged = bytearray(payload)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(PayloadError), opened(bytes(damaged)) as reader:
            reader.verify()


def test_another_format_version_is_refused() -> None:
    payload, _ = encode("fp32")
    newer = reseal_head(payload, lambda body: struct.pack_into("<H", body, 8, 2))
    with pytest.raises(PayloadVersionError, match="expected 1; found 2"):
        opened(newer)


def test_a_stage_from_the_future_is_refused() -> None:
    payload, _ = encode("nf4")
    newer = reseal_head(payload, lambda body: replace_once(body, b"nf4@1:64", b"nf4@9:64"))
    with pytest.raises(PayloadVersionError, match="at most 1; found 9"):
        opened(newer)
    unknown = reseal_head(payload, lambda body: replace_once(body, b"nf4@1:64", b"zzz@1:64"))
    with pytest.raises(PayloadVersionError, match="unknown codec stage 'zzz'"):
        opened(unknown)


def replace_once(body: bytearray, old: bytes, new: bytes) -> None:
    at = body.index(old)
    body[at : at + len(old)] = new


def test_another_layout_is_refused_with_both_digests() -> None:
    payload, _ = encode("fp32")
    other = Layout(LAYOUT.tensors[:2])
    with pytest.raises(LayoutError, match=f"expected {other.digest}; found {LAYOUT.digest}"):
        opened(payload, layout=other)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"base": "other"}, "another base; expected 'other'; found 'base-fingerprint'"),
        ({"kind": "state"}, "another kind; expected 'state'; found 'update'"),
        ({"round_": 8}, "another round; expected 8; found 7"),
        ({"pipeline": parse("fp32")}, "another pipeline; expected 'fp32@1'; found 'bf16@1'"),
        ({"reference_id": "r"}, "another reference; expected 'r'; found ''"),
    ],
)
def test_what_was_not_agreed_is_refused_with_both_values(settings: dict[str, object], message: str) -> None:
    payload, _ = encode("bf16")
    with pytest.raises(AgreementError, match=message):
        opened(payload, **settings)
    agreed = {"base": BASE, "kind": "update", "round_": 7, "pipeline": parse("bf16"), "reference_id": ""}
    opened(payload, **{name: agreed[name] for name in settings}).close()


def test_a_segment_larger_than_its_tensor_is_refused_at_once() -> None:
    payload, _ = encode("fp32")
    larger = reseal(payload, lambda segments: segments.__setitem__(0, segments[0] + bytes(4)))
    with pytest.raises(OversizedPayloadError, match=r"'q.lora_A' .* at most 528 bytes; found 532"):
        opened(larger)
    smaller = reseal(payload, lambda segments: segments.__setitem__(0, segments[0][:-4]))
    with opened(smaller) as reader, pytest.raises(CorruptPayloadError, match="expected 528; found 524"):
        reader.read("q.lora_A")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(("pipeline", "dtype"), [("fp32", "<f4"), ("bf16", "<u2"), ("fp16", "<f2")])
def test_a_value_that_is_not_finite_is_refused_and_leaves_the_accumulator_alone(
    pipeline: str, dtype: str, bad: float
) -> None:
    payload, _ = encode(pipeline)
    bits = (
        (np.array(bad, np.float32).view(np.uint32) >> 16).astype("<u2") if pipeline == "bf16" else np.array(bad, dtype)
    )

    def poison(segments: list[bytes]) -> None:
        segments[1] = segments[1][: -bits.itemsize] + bits.tobytes()

    with opened(reseal(payload, poison)) as reader:
        accumulator = np.ones((17, 4))
        for use in (
            reader.verify,
            lambda: reader.read("q.lora_B"),
            lambda: reader.add_to("q.lora_B", accumulator, 1.0),
        ):
            with pytest.raises(NonFiniteError, match=r"stage .*'q.lora_B'"):
                use()
        assert (accumulator == 1).all()
        reader.read("q.lora_A")


@pytest.mark.parametrize("pipeline", ["int8", "nf4", "sign", "q2", "fp8", "int4:64:f32"])
def test_a_scale_that_is_not_finite_is_refused(pipeline: str) -> None:
    payload, _ = encode(pipeline)
    wide = pipeline.endswith("f32")

    def poison(segments: list[bytes]) -> None:
        at, bad = (0, np.array(np.inf, "<f4")) if wide else (2, np.array(-1.0, "<f2"))
        segments[0] = segments[0][:at] + bad.tobytes() + segments[0][at + bad.itemsize :]

    with opened(reseal(payload, poison)) as reader, pytest.raises(NonFiniteError, match="scale"):
        reader.verify()


def test_a_frame_that_would_unpack_to_more_than_its_tensor_is_refused_before_it_is_unpacked() -> None:
    payload, _ = encode("fp32|zstd:3")
    bomb = b"\x01" + zstandard.ZstdCompressor(level=19).compress(bytes(1 << 26))
    with pytest.raises(OversizedPayloadError, match="larger than its tensor can need"):
        opened(reseal(payload, lambda segments: segments.__setitem__(0, bomb)))

    small_bomb = b"\x01" + zstandard.ZstdCompressor(level=19).compress(bytes(4096))
    assert len(small_bomb) < 4 * 33 * 4
    reader = opened(reseal(payload, lambda segments: segments.__setitem__(0, small_bomb)))
    with reader, pytest.raises(OversizedPayloadError, match="at most 528; found 4096"):
        reader.verify()


def test_a_frame_that_hides_its_size_is_refused() -> None:
    payload, _ = encode("fp32|zstd:3")
    frame = b"\x01" + zstandard.ZstdCompressor(write_content_size=False).compress(bytes(528))
    reader = opened(reseal(payload, lambda segments: segments.__setitem__(0, frame)))
    with reader, pytest.raises(CorruptPayloadError, match="does not state its size"):
        reader.verify()


def test_a_header_that_is_not_canonical_is_refused() -> None:
    payload, _ = encode("fp32")
    spaced = reseal_head(payload, lambda body: replace_once(body, b'"round":7', b'"round": 7'))
    with pytest.raises((CorruptPayloadError, OversizedPayloadError, TruncatedPayloadError)):
        opened(spaced)
    swapped = reseal_head(payload, lambda body: replace_once(body, b'"round":7', b'"round":-7'[:9]))
    with pytest.raises(CorruptPayloadError):
        opened(swapped)
    renamed = reseal_head(payload, lambda body: replace_once(body, b'"round":7', b'"rouNd":7'))
    with pytest.raises(CorruptPayloadError, match="other fields"):
        opened(renamed)


def test_a_deeply_nested_header_is_refused() -> None:
    nested = b"[" * MAX_HEADER_BYTES
    body = struct.pack("<8sHHII", b"\x89FLP\r\n\x1a\n", 1, 0, len(nested), 0) + nested
    with pytest.raises(CorruptPayloadError, match="not JSON"):
        opened(body + xxhash.xxh3_128_digest(body))


def test_an_announced_head_beyond_its_bounds_is_refused() -> None:
    payload, _ = encode("fp32")
    for at in (12, 16):
        huge = bytearray(payload)
        struct.pack_into("<I", huge, at, 0xFFFFFFFF)
        with pytest.raises(OversizedPayloadError, match="at most 16384 header bytes"):
            opened(bytes(huge))


def test_an_unknown_tensor_is_refused() -> None:
    with opened(encode("fp32")[0]) as reader, pytest.raises(LayoutError, match="no tensor 'nowhere'"):
        reader.read("nowhere")


def test_a_header_says_which_value_is_impossible() -> None:
    with pytest.raises(ConfigError, match="round=-1"):
        PayloadHeader("state", -1, "", "", "fp32@1")


# ------------------------------------------------------------------------------------------------ partial payloads


def test_segments_of_all_sites_cover_every_coordinate_once_in_every_round() -> None:
    for round_ in range(3):
        covered = {spec.name: np.zeros(spec.shape, int) for spec in LAYOUT.tensors}
        for site in range(5):
            payload, _ = encode("delta|segment:5|fp32", site_index=site, round_=round_)
            with opened(payload) as reader:
                assert reader.is_partial
                for name in reader.names:
                    covered[name] += reader.coverage(name)
        assert all((count == 1).all() for count in covered.values())


def test_a_site_sends_another_segment_every_round_until_all_have_had_their_turn() -> None:
    total = zeros(LAYOUT)
    for round_ in range(4):
        payload, _ = encode("delta|segment:4|fp32", draw(), round_=round_, site_index=9)
        with opened(payload) as reader:
            for name in reader.names:
                reader.add_to(name, total[name], 1.0)
    reference = draw(seed=99)
    for name, values in draw().items():
        np.testing.assert_array_equal(total[name], values - reference[name])


def test_weights_count_the_sites_that_covered_a_coordinate() -> None:
    sums, weights = zeros(LAYOUT), zeros(LAYOUT)
    ones = {name: np.ones_like(values) for name, values in draw().items()}
    for site, weight in ((0, 2.0), (1, 3.0), (2, 5.0)):
        payload, _ = encode("delta|segment:2|fp32", ones, is_difference=True, site_index=site)
        with opened(payload) as reader:
            for name in reader.names:
                reader.add_to(name, sums[name], weight, weights[name])
    flat = np.concatenate([weights[name].reshape(-1) for name in LAYOUT.names])
    assert sorted(set(flat.tolist())) == [3.0, 7.0]
    for name in LAYOUT.names:
        np.testing.assert_array_equal(sums[name], weights[name])


def test_a_mask_picks_where_the_reference_is_large_and_needs_no_positions() -> None:
    reference = draw(seed=99)
    payload, _ = encode("delta|mask:0.25|fp32")
    with opened(payload, reference=reference) as reader:
        for name in reader.names:
            covered, magnitude = reader.coverage(name), np.abs(reference[name])
            assert covered.sum() == max(1, round(0.25 * magnitude.size))
            assert magnitude[covered].min() >= magnitude[~covered].max(initial=0)
            np.testing.assert_array_equal(reader.read(name) != 0, covered)
    assert len(payload) < len(encode("delta|topk:0.25|fp32|rice")[0])
    with pytest.raises(ConfigError, match="decoding needs the reference"):
        opened(payload)


def test_top_k_and_rand_k_cover_everything() -> None:
    for pipeline in ("topk:0.1|fp32|rice", "randk:0.1|fp32"):
        with opened(encode(pipeline)[0]) as reader:
            assert not reader.is_partial
            assert all(reader.coverage(name).all() for name in reader.names)


def test_tensors_take_the_branch_of_their_role() -> None:
    layout = Layout((TensorSpec("a", (1000,), role="lora_A"), TensorSpec("b", (1000,), role="lora_B")))
    arrays = draw(layout)
    payload, info = encode("fp32;lora_B=int8", arrays, layout)
    assert info.header.pipeline == "fp32@1;lora_B=int8@1:256"
    with opened(payload, layout=layout) as reader:
        np.testing.assert_array_equal(reader.read("a"), arrays["a"])
        error = np.abs(reader.read("b") - arrays["b"]).max()
        assert 0 < error < np.abs(arrays["b"]).max() / 200
