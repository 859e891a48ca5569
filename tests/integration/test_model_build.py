"""Loading bases: what is held, that the cache changes nothing, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from fedllm.errors import ModelError
from fedllm.model.build import cached_base, load_base
from fedllm.model.quantize import Int8Linear, linear_names
from fedllm.model.spec import BaseSpec
from tests.bases import SMOLLM, dense, load_tiny, logits_of, smollm
from tests.tiny_model import make_tiny_model

IDS = [[5, 40, 200, 33, 7, 90, 12], [60, 61, 62, 63, 64, 65, 66]]


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return make_tiny_model(tmp_path / "tiny")


@pytest.mark.parametrize("double", [True, False])
def test_nf4_computes_what_transformers_own_loader_computes(tiny: Path, double: bool) -> None:
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.float32,
    )
    theirs = AutoModelForCausalLM.from_pretrained(tiny, quantization_config=config, device_map={"": "cpu"})
    ours = load_tiny(tiny.parent, double_quantization=double).model
    assert torch.equal(logits_of(ours, IDS), logits_of(theirs, IDS))
    assert not torch.equal(logits_of(ours, IDS), logits_of(dense(tiny), IDS)), "nothing was quantized"


def test_an_unquantized_base_computes_what_transformers_computes(tiny: Path) -> None:
    assert torch.equal(logits_of(load_tiny(tiny.parent, quantization="none").model, IDS), logits_of(dense(tiny), IDS))


def test_int8_weights_are_within_half_a_step_and_the_product_uses_them(tiny: Path) -> None:
    ours, theirs = load_tiny(tiny.parent, quantization="int8").model, dense(tiny)
    for name in linear_names(theirs):
        layer, weight = ours.get_submodule(name), theirs.get_submodule(name).weight
        assert isinstance(layer, Int8Linear)
        step = weight.abs().amax(dim=1, keepdim=True) / 127
        held = layer.weight.data * step
        assert ((held - weight).abs() <= step * 0.5001).all()
        theirs.get_submodule(name).weight.data = held
    torch.testing.assert_close(logits_of(ours, IDS), logits_of(theirs, IDS), rtol=1e-5, atol=1e-5)


def test_int8_computes_the_same_in_training_and_in_evaluation(tiny: Path) -> None:
    model = load_tiny(tiny.parent, quantization="int8").model
    evaluated = model.eval()(torch.tensor(IDS)).logits
    trained = model.train()(torch.tensor(IDS)).logits
    assert torch.equal(evaluated, trained)


def test_nf4_computes_the_same_in_training_and_in_evaluation(tiny: Path) -> None:
    model = load_tiny(tiny.parent).model
    evaluated = model.eval()(torch.tensor(IDS)).logits
    assert torch.equal(evaluated, model.train()(torch.tensor(IDS)).logits)
    assert not any(layer.support_avx512bf16_for_cpu for layer in model.modules() if isinstance(layer, Linear4bit))


@pytest.mark.parametrize("quantization", ["nf4", "int8", "none"])
@pytest.mark.parametrize("tie", [True, False])
def test_the_head_stays_unquantized_and_tied_weights_stay_tied(tmp_path: Path, quantization: str, tie: bool) -> None:
    model = load_tiny(tmp_path, tie_embeddings=tie, quantization=quantization).model
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    assert type(head) is torch.nn.Linear
    assert (head.weight is embedding.weight) is tie
    assert torch.equal(head.weight, dense(tmp_path / "tiny").get_output_embeddings().weight)


@pytest.mark.parametrize("quantization", ["nf4", "int8", "none"])
def test_a_cached_load_has_the_same_bits_and_is_mapped_and_frozen(tiny: Path, quantization: str) -> None:
    cold = load_tiny(tiny.parent, quantization=quantization)
    warm = load_tiny(tiny.parent, quantization=quantization)
    assert (cold.from_cache, warm.from_cache) == (False, True)
    assert (cold.fingerprint, cold.tokenizer_digest) == (warm.fingerprint, warm.tokenizer_digest)
    assert torch.equal(logits_of(cold.model, IDS), logits_of(warm.model, IDS))
    assert not any(parameter.requires_grad or parameter.is_meta for parameter in warm.model.parameters())
    assert f"{warm.fingerprint}/base.safetensors" in Path("/proc/self/maps").read_text()


def test_bfloat16_holds_half_the_memory_and_stays_close(tiny: Path) -> None:
    full = load_tiny(tiny.parent).model
    half = load_tiny(tiny.parent, compute_dtype="bfloat16").model
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16, torch.uint8}
    assert (logits_of(half, IDS).float() - logits_of(full, IDS)).abs().mean() < 0.05


def test_a_damaged_cache_entry_is_built_again_to_the_same_bits(tiny: Path) -> None:
    before = load_tiny(tiny.parent)
    path = tiny.parent / "cache" / "bases" / before.fingerprint / "base.safetensors"
    logits = logits_of(before.model, IDS)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.unlink()  # not in place: `before` has the old file mapped
    path.write_bytes(content)
    after = load_tiny(tiny.parent)
    assert not after.from_cache
    assert torch.equal(logits_of(after.model, IDS), logits)


def test_a_changed_chat_template_is_seen_although_the_base_is_cached(tiny: Path) -> None:
    before = load_tiny(tiny.parent)
    (tiny / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    after = load_tiny(tiny.parent)
    assert after.fingerprint == before.fingerprint
    assert after.from_cache
    assert after.tokenizer_digest != before.tokenizer_digest
    assert after.tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"


def test_a_cached_tokenizer_does_what_the_source_tokenizer_does(tiny: Path) -> None:
    from transformers import AutoTokenizer

    messages = [{"role": "user", "content": "Grüße, 你好!"}]
    theirs = AutoTokenizer.from_pretrained(tiny)
    for base in (load_tiny(tiny.parent), load_tiny(tiny.parent)):
        assert base.tokenizer.apply_chat_template(messages) == theirs.apply_chat_template(messages)


def test_loading_says_nothing_on_the_terminal(tiny: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load_tiny(tiny.parent)
    load_tiny(tiny.parent)
    assert capfd.readouterr() == ("", "")


def test_a_process_shares_one_base_until_another_is_asked_for(tiny: Path) -> None:
    def get(**settings: str) -> object:
        spec = BaseSpec.model_validate({"source": f"path:{tiny}", **settings})
        return cached_base(spec, home=tiny.parent, cache_dir=tiny.parent / "cache")

    first = get()
    assert get() is first
    assert get(quantization="int8") is not first
    assert get() is not first


def expect_refusal(tiny: Path, says: str) -> None:
    with pytest.raises(ModelError, match=says):
        load_tiny(tiny.parent)
    assert not list((tiny.parent / "cache" / "bases").glob("[!.]*"))


def test_missing_weights_are_refused_rather_than_drawn_at_random(tiny: Path) -> None:
    tensors = load_file(tiny / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tiny / "model.safetensors", metadata={"format": "pt"})
    expect_refusal(tiny, "incomplete.*1 missing.*layers.1.mlp.up_proj.weight")


def test_a_broken_weight_file_is_refused(tiny: Path) -> None:
    os.truncate(tiny / "model.safetensors", 1000)
    expect_refusal(tiny, "a base model cannot be read")


def test_an_unknown_architecture_is_refused(tiny: Path) -> None:
    config = json.loads((tiny / "config.json").read_text())
    (tiny / "config.json").write_text(json.dumps({**config, "model_type": "no-such-thing"}))
    expect_refusal(tiny, "a base model cannot be read.*no-such-thing")


def test_a_quantized_source_is_refused(tiny: Path) -> None:
    config = json.loads((tiny / "config.json").read_text())
    (tiny / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    expect_refusal(tiny, "quantized already.*found gptq")


def test_the_real_model_is_4_bit_tied_and_small() -> None:
    base = smollm()
    layers = [module for module in base.model.modules() if isinstance(module, Linear4bit)]
    assert len(layers) == 30 * 7
    assert base.model.get_output_embeddings().weight is base.model.get_input_embeddings().weight
    held = sum(parameter.numel() * parameter.element_size() for parameter in base.model.parameters())
    assert held < 170e6
    assert base.tokenizer.chat_template


LOAD_SCRIPT = """
import hashlib, json, sys
from pathlib import Path
import torch
from transformers.models.llama import LlamaForCausalLM
from fedllm.model.build import load_base
from fedllm.model.spec import BaseSpec
base = load_base(BaseSpec(source=sys.argv[1]), home=Path("."), cache_dir=Path(sys.argv[2]))
with torch.no_grad():
    logits = base.model(torch.arange(1000, 1040)[None]).logits
print(json.dumps([base.seconds, base.from_cache, hashlib.sha256(logits.numpy().tobytes()).hexdigest()]))
"""


@pytest.mark.slow
def test_a_fresh_process_loads_the_real_model_five_times_faster_from_the_cache(tmp_path: Path) -> None:
    def load() -> tuple[float, bool, str]:
        command = [sys.executable, "-c", LOAD_SCRIPT, SMOLLM, str(tmp_path)]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        seconds, from_cache, digest = json.loads(output)
        return seconds, from_cache, digest

    cold, warm = load(), load()
    assert (cold[1], warm[1]) == (False, True)
    assert warm[2] == cold[2]
    assert warm[0] * 5 < cold[0]


RACE_SCRIPT = """
import sys
from pathlib import Path
import torch
from fedllm.model.build import load_base
from fedllm.model.spec import BaseSpec
print("ready", flush=True)
sys.stdin.readline()
base = load_base(BaseSpec(source=sys.argv[1]), home=Path("."), cache_dir=Path(sys.argv[2]))
print(base.from_cache, base.model(torch.arange(40)[None]).logits.sum().item())
"""


@pytest.mark.slow
def test_two_processes_that_start_cold_share_one_quantization(tiny: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", RACE_SCRIPT, f"path:{tiny}", str(tmp_path / "cache")]
    processes = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    outputs = [process.communicate("go\n", timeout=120)[0].split() for process in processes]
    assert sorted(output[0] for output in outputs) == ["False", "True"]
    assert outputs[0][1] == outputs[1][1]


def test_a_base_whose_cache_was_moved_is_loaded_from_there(tiny: Path, tmp_path: Path) -> None:
    first = load_tiny(tiny.parent)
    shutil.copytree(tiny.parent / "cache", tmp_path / "moved")
    second = load_base(first.spec, home=tiny.parent, cache_dir=tmp_path / "moved")
    assert second.from_cache
    assert torch.equal(logits_of(first.model, IDS), logits_of(second.model, IDS))
