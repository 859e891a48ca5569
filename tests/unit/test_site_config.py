"""The data owner's file: what it may say, and what is said about a wrong one."""

from pathlib import Path

import pytest

from client_app.site import SiteConfig, load_site_config
from fedllm.config import DataConfig
from fedllm.errors import ConfigError

EXAMPLE = Path(__file__).parents[2] / "deploy" / "site.example.toml"
MINIMAL = '[site]\nname = "a"\n[data]\nsource = "file:train.jsonl"\n'


def load(folder, text):
    path = folder / "site.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_site_config(path)


def test_the_example_file_is_valid_and_shows_every_key_with_its_default():
    shown, minimal = (
        EXAMPLE.read_text(),
        SiteConfig.model_validate({"site": {"name": "a"}, "data": {"source": "file:a"}, "home": "/"}),
    )
    config = load_site_config(EXAMPLE)
    for section in ("site", "data", "paths", "hardware", "policy", "sharing"):
        for key in type(getattr(config, section)).model_fields:
            assert f"\n{key} = " in shown, f"{section}.{key} is not shown"
    assert config.hardware == minimal.hardware
    assert config.policy == minimal.policy
    assert config.sharing == minimal.sharing
    assert config.data.format == minimal.data.format
    assert config.data.max_train_examples == minimal.data.max_train_examples
    assert config.paths.state_dir == EXAMPLE.parent / minimal.paths.state_dir
    assert config.paths.cache_dir == EXAMPLE.parent / minimal.paths.cache_dir


def test_relative_paths_count_from_the_files_folder(tmp_path):
    config = load(tmp_path, MINIMAL + '[paths]\nstate_dir = "var/state"\ncache_dir = "/big/cache"\n')
    assert config.home == tmp_path
    assert config.data.source == f"file:{tmp_path}/train.jsonl"
    assert config.paths.state_dir == tmp_path / "var/state"
    assert config.paths.cache_dir == Path("/big/cache")


def test_a_home_folder_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/anna")
    config = load(tmp_path, MINIMAL + '[paths]\nstate_dir = "~/state"\n')
    assert config.paths.state_dir == Path("/home/anna/state")


def test_a_relative_file_name_works(tmp_path, monkeypatch):
    load(tmp_path, MINIMAL)
    monkeypatch.chdir(tmp_path)
    assert load_site_config(Path("site.toml")).home == tmp_path


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (MINIMAL + "[hardware]\nnum_thread = 2\n", r"'hardware.num_thread'.*Did you mean 'hardware.num_threads'\?"),
        (MINIMAL + "formt = 'text'\n", r"'data.formt'.*Did you mean 'data.format'\?"),
        ("name = 'a'\n" + MINIMAL, r"'name'.*Did you mean 'site.name'\?"),
        (MINIMAL + "[zzz]\nqqq = 1\n", r"'zzz.qqq'.*Known keys: site.name, data.source"),
        ("home = '/'\n" + MINIMAL, "unknown site config key 'home'"),
        (MINIMAL + "[empty]\n", "empty: Extra inputs"),
        ("[site]\nname = 'a'\n", "data: Field required"),
        ("[data]\nsource = 'file:a'\n[site]\n", "site.name: Field required"),
        (MINIMAL.replace('"a"', '"a/b"'), "site.name: .*found 'a/b'"),
        (MINIMAL.replace("file:train.jsonl", "train.jsonl"), "data.source: .*found 'train.jsonl'"),
        (MINIMAL + "format = 'parrot'\n", "format: .*'auto', 'messages'.*found 'parrot'"),
        (MINIMAL + "max_train_examples = -1\n", "data.max_train_examples: .*found -1"),
        (MINIMAL + "[hardware]\ndevice = 'tpu'\n", "hardware.device: .*found 'tpu'"),
        ("[site\n", "not TOML.*line 1"),
        (b"[site]\nname = 'caf\xe9'\n", "not TOML"),
    ],
)
def test_a_wrong_file_is_refused_with_the_key_and_what_to_do(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, text)


def test_a_missing_file_points_to_the_example(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.toml.*Copy deploy/site\.example\.toml"):
        load_site_config(tmp_path / "none.toml")


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda", "cuda:0", "cuda:11"])
def test_devices(tmp_path, device):
    assert load(tmp_path, MINIMAL + f"[hardware]\ndevice = '{device}'\n").hardware.device == device


def test_the_owners_source_and_format_win_over_the_operators(tmp_path):
    run = DataConfig(source="file:/etc/passwd", format="text", max_length=64, packing=False, holdout_fraction=0.3)
    merged = load(tmp_path, MINIMAL).merged_data(run)
    assert merged == run.model_copy(update={"source": f"file:{tmp_path}/train.jsonl", "format": "auto"})


@pytest.mark.parametrize(("own", "run", "holds"), [(0, 0, 0), (5, 0, 5), (0, 7, 7), (5, 7, 5), (7, 5, 5)])
def test_the_smaller_bound_on_training_examples_holds(tmp_path, own, run, holds):
    config = load(tmp_path, MINIMAL + f"max_train_examples = {own}\n")
    assert config.merged_data(DataConfig(max_train_examples=run)).max_train_examples == holds
