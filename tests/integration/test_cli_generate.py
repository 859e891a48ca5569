"""``fedllm generate`` on a tiny base, against transformers and PEFT used directly."""

import io
import json
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedllm.cli.main import main
from fedllm.config import RunConfig
from fedllm.model.build import adapter_target_modules, attach_adapter, layout_of, load_base
from fedllm.model.export import save_peft_adapter
from fedllm.model.spec import AdapterConfig, BaseSpec
from fedllm.rng import generator
from fedllm.runs import Manifest, RunFolder
from tests.tiny_model import make_tiny_model

PROMPT = "What is the law of gravity?"
NUM_TOKENS = 12


ADAPTERS = {
    "lora": AdapterConfig(rank=4, alpha=64.0, target_modules="all-linear"),
    "prompt": AdapterConfig(kind="prompt", num_virtual_tokens=4),
    "prefix": AdapterConfig(kind="prefix", num_virtual_tokens=4),
    "ptuning": AdapterConfig(kind="ptuning", num_virtual_tokens=4, encoder_hidden_size=16),
}
RANDOM_SIZE = {"lora": 0.2, "prompt": 1.0, "prefix": 1.0, "ptuning": 0.5}
"""Deviations under which the tiny model answers differently."""


@pytest.fixture(scope="module", params=sorted(ADAPTERS))
def home(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with a tiny base and a run, whose final and best adapters are random and differ."""
    home, kind = tmp_path_factory.mktemp("home"), str(request.param)
    make_tiny_model(home / "tiny")
    model = BaseSpec(source="path:tiny", quantization="none")
    config = RunConfig(model=model, adapter=ADAPTERS[kind])
    base = load_base(model, home=home, cache_dir=home / "cache", device="cpu")
    adapted = attach_adapter(base, config.spec.adapter)
    folder, layout = RunFolder.create(home, "run"), layout_of(adapted)
    Manifest.of("run", config, base_fingerprint=base.fingerprint).write(folder.manifest)
    for seed, path in enumerate((folder.adapter, folder.best)):
        draw = generator(seed, purpose="adapter")
        size = RANDOM_SIZE[kind]
        arrays = {spec.name: draw.normal(0, size, spec.shape).astype("float32") for spec in layout.tensors}
        save_peft_adapter(path, layout, arrays, config.spec, adapter_target_modules(adapted), model.source)
    return home


@pytest.fixture
def fedllm(home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    monkeypatch.setenv("FEDLLM_CACHE", str(home / "cache"))

    def run(*arguments: str, status: int = 0) -> str:
        common = ("--home", str(home), "--max-new-tokens", str(NUM_TOKENS), "--device", "cpu")
        assert main(["generate", "--run", "run", *common, *arguments]) == status
        captured = capsys.readouterr()
        return captured.err if status else captured.out

    return run


def reference(home: Path, adapter: Path | None) -> str:
    """Answer the prompt greedily with transformers and PEFT alone."""
    tokenizer = AutoTokenizer.from_pretrained(home / "tiny")
    model = AutoModelForCausalLM.from_pretrained(home / "tiny", dtype=torch.float32)
    if adapter:
        with warnings.catch_warnings():  # PEFT 0.21 asks transformers 5 under a name that goes in its release 6
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            model = PeftModel.from_pretrained(model, adapter)
    chat = [{"role": "user", "content": PROMPT}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    tokens = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Position ids are not supported", UserWarning)
        done = model.generate(**tokens, max_new_tokens=NUM_TOKENS, do_sample=False)
    return str(tokenizer.decode(done[0, tokens["input_ids"].shape[1] :], skip_special_tokens=True)).strip()


@pytest.mark.parametrize(("which", "name"), [("", "adapter"), ("--best", "best"), ("--base", None)])
def test_an_answer_is_that_of_peft_with_the_run_s_folder(
    fedllm: Callable[..., str], home: Path, which: str, name: str | None
) -> None:
    adapter = home / "runs" / "run" / name if name else None
    output = fedllm("--json", "--prompt", PROMPT, *([which] if which else []))
    assert json.loads(output) == {"prompt": PROMPT, "answer": reference(home, adapter)}


def test_the_three_answers_differ(home: Path) -> None:
    folder = RunFolder.open(home, "run")
    assert len({reference(home, adapter) for adapter in (folder.adapter, folder.best, None)}) == 3


def test_every_line_of_standard_input_is_answered(fedllm: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(f"\nHello\n\n  {PROMPT} \nBye"))
    rows = [json.loads(line) for line in fedllm("--json").splitlines()]
    assert [row["prompt"] for row in rows] == ["Hello", PROMPT, "Bye"]
    assert rows[1]["answer"] == json.loads(fedllm("--json", "--prompt", PROMPT))["answer"]


def test_a_base_that_is_not_the_run_s_is_refused(fedllm: Callable[..., str], home: Path) -> None:
    path = home / "runs" / "run" / "manifest.json"
    before = path.read_text()
    manifest = Manifest.read(path)
    manifest.model_copy(update={"base_fingerprint": "ab" * 32}).write(path)
    try:
        errors = fedllm("--prompt", PROMPT, status=2)
    finally:
        path.write_text(before)
    assert "another base" in errors
    assert manifest.base_fingerprint in errors
