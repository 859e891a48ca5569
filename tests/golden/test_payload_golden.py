"""Payloads written once, readable for ever; and the encoder still writes them, except where zstd decides.

``python -m tests.golden.test_payload_golden NAME`` writes the files of one new stage version. Existing files never change.
"""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from fedllm.codecs.payload import open_payload
from fedllm.codecs.pipeline import parse
from fedllm.codecs.registry import STAGES
from fedllm.update import Arrays, Layout, TensorSpec
from tests.payload_tools import BASE, encode

FOLDER = Path(__file__).parent / "payloads"
LAYOUT = Layout((TensorSpec("q.lora_A", (5, 21), role="lora_A"), TensorSpec("q.lora_B", (14, 5), "bfloat16", "lora_B")))

PIPELINES = {
    "fp32": "fp32@1",
    "bf16": "bf16@1",
    "fp16": "fp16@1",
    "int8": "int8@1:64",
    "int8-sr-f32": "int8@1:8:sr:f32",
    "int4": "int4@1:64",
    "fp8": "fp8@1:64",
    "nf4": "nf4@1:64",
    "q2": "q2@1:64",
    "sign": "sign@1:64",
    "topk": "delta@1|topk@1:0.1|nf4@1:64|rice@1",
    "randk": "randk@1:0.3|fp32@1",
    "randk-unbiased": "randk@1:0.3:unbiased|fp32@1",
    "segment": "delta@1|segment@1:3|fp32@1",
    "mask": "delta@1|mask@1:0.25|fp16@1",
    "zstd": "delta@1|topk@1:0.4|int8@1:256|rice@1|zstd@1:3",
    "roles": "delta@1|bf16@1;lora_B=delta@1|nf4@1:8",
}


def arrays(phase: int) -> Arrays:
    """Values from whole-number arithmetic, the same everywhere and for ever."""
    made = {}
    for spec in LAYOUT.tensors:
        index = np.arange(spec.size, dtype=np.int64) + phase
        made[spec.name] = (((index * 7919) % 1009 - 504).astype(np.float32) / np.float32(512) ** (index % 3)).astype(
            np.float32
        )
        made[spec.name] = made[spec.name].reshape(spec.shape)
    return made


def write(pipeline: str) -> tuple[bytes, Arrays]:
    needs = {"reference": arrays(5)} if "delta" in pipeline else {}
    payload, info = encode(pipeline, arrays(0), LAYOUT, **needs)
    assert info.decoded is not None
    return payload, info.decoded


@pytest.mark.parametrize("name", PIPELINES)
def test_a_payload_written_once_reads_to_the_same_bits(name: str) -> None:
    expected = json.loads((FOLDER / f"{name}.json").read_text())
    with open_payload(FOLDER / f"{name}.payload", layout=LAYOUT, base=BASE, reference=arrays(5)) as payload:
        assert payload.header.pipeline == PIPELINES[name]
        assert payload.digest == expected["digest"]
        for tensor in payload.names:
            found = payload.read(tensor).reshape(-1).view(np.uint32)
            assert [f"{bits:08x}" for bits in found] == expected["bits"][tensor]


@pytest.mark.parametrize("name", [name for name, text in PIPELINES.items() if "zstd" not in text])
def test_the_encoder_still_writes_the_same_bytes(name: str) -> None:
    assert write(PIPELINES[name])[0] == (FOLDER / f"{name}.payload").read_bytes()


def test_every_stage_version_has_golden_bytes() -> None:
    covered = {
        (s.name, s.version) for text in PIPELINES.values() for _, branch in parse(text).branches for s in branch.stages
    }
    assert covered == set(STAGES)


def main() -> None:
    """Write the golden files of the named pipelines, which must not exist yet."""
    for name in sys.argv[1:]:
        payload, decoded = write(PIPELINES[name])
        bits = {key: [f"{word:08x}" for word in values.reshape(-1).view(np.uint32)] for key, values in decoded.items()}
        with open_payload(payload, layout=LAYOUT, base=BASE, reference=arrays(5)) as reader:
            text = json.dumps({"digest": reader.digest, "bits": bits}, separators=(",", ":"))
        with (FOLDER / f"{name}.payload").open("xb") as file:
            file.write(payload)
        (FOLDER / f"{name}.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
