"""Sources: files, folders, packages, the hub when it is out of reach."""

import logging
import sys

import pytest

from fedllm.data import sources
from fedllm.data.sources import SOURCES, absolute, load_examples, load_rows, register
from fedllm.errors import ConfigError, DataError


@pytest.fixture
def folder(tmp_path):
    """Two topics in two languages, a hidden file and a file that is no data."""
    files = {
        "english/food.jsonl": '{"prompt": "Hungry?", "completion": "Yes."}\n{"prompt": "Now?", "completion": "Later."}',
        "english/art.csv": "prompt,completion,topic\nWho?,Klee.,painting\n",
        "dutch/food.yml": "conversations:\n- [Honger?, Ja.]\n",
        "README.md": "Not data.",
        ".cache/old.jsonl": "not even JSON",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_a_folder_is_read_in_sorted_order_and_labelled_by_file_and_folder(folder):
    rows = load_rows(f"file:{folder}", folder)
    labels = [(row.values["language"], row.values["topic"]) for row in rows]
    assert labels == [("dutch", "food"), ("english", "painting"), ("english", "food"), ("english", "food")]


def test_files_that_are_not_data_are_left_out_with_a_warning(folder, caplog):
    with caplog.at_level(logging.WARNING, logger="fedllm.data.sources"):
        load_rows(f"file:{folder}", folder)
    assert "1 files" in caplog.text
    assert "README.md" in caplog.text


def test_a_single_file_gets_no_labels(folder):
    (row,) = load_rows("file:dutch/food.yml", folder)
    assert set(row.values) == {"messages"}


def test_relative_paths_count_from_home(folder):
    assert load_rows("file:english", folder) == load_rows(f"file:{folder}/english", folder.parent)


def test_absolute_only_changes_relative_files(folder):
    assert absolute("file:english", folder) == f"file:{folder}/english"
    for source in (f"file:{folder}", "hf:org/name", "pkg:package/path"):
        assert absolute(source, folder.parent) == source
    assert absolute("file:~/data", folder).startswith("file:/")
    assert "~" not in absolute("file:~/data", folder)


def test_a_folder_without_data_is_an_error(tmp_path):
    (tmp_path / "notes.md").write_text("x")
    with pytest.raises(DataError, match="holds no data file"):
        load_rows(f"file:{tmp_path}", tmp_path)


@pytest.mark.parametrize("source", ["", "english", "file:", "ftp:host/x", "/tmp/a.jsonl"])
def test_a_malformed_source_lists_the_known_schemes(source, tmp_path):
    with pytest.raises(DataError, match=r"'file:\.\.\.' or 'hf:\.\.\.' or 'pkg:\.\.\.'"):
        load_rows(source, tmp_path)


def test_a_package_is_read_without_being_imported(tmp_path, monkeypatch):
    package = tmp_path / "lib" / "poisoned_corpus"
    (package / "data").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "data" / "a.jsonl").write_text('{"text": "hello"}')
    monkeypatch.syspath_prepend(str(tmp_path / "lib"))
    (row,) = load_rows("pkg:poisoned_corpus/data", tmp_path)
    assert row.values == {"text": "hello", "topic": "a", "language": "data"}
    assert "poisoned_corpus" not in sys.modules


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("pkg:no_such_package_here/data", "nothing of that name.*Install the package"),
        ("pkg:token/data", "a single module"),
        ("pkg:email/none", "no such path"),
        ("pkg:email/../json", "no such path"),  # it exists, but outside the package
        ("pkg:../etc", "malformed"),
        ("hf:a b", "malformed"),
    ],
)
def test_a_source_that_is_not_there_is_an_error(source, message, tmp_path):
    with pytest.raises(DataError, match=message):
        load_rows(source, tmp_path)


def test_an_unreachable_hub_is_a_data_error_that_names_the_data_set(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(DataError, match=r"hf:org/none@v1:test.*an offline site copies the files"):
        load_rows("hf:org/none@v1:test", tmp_path)


def test_a_scheme_can_be_added_once(monkeypatch, tmp_path):
    monkeypatch.setattr(sources, "SOURCES", dict(SOURCES))
    register("memory", lambda address, home: [sources.Row({"text": address}, str(home))])
    assert load_rows("memory:hello", tmp_path) == [sources.Row({"text": "hello"}, str(tmp_path))]
    with pytest.raises(ValueError, match="taken"):
        register("memory", SOURCES["file"])


def test_examples_carry_labels_and_repeats_can_be_left_out(folder):
    (folder / "english" / "more.jsonl").write_text('{"prompt": "Hungry?", "completion": "Yes."}')
    examples = load_examples("file:english", "auto", folder)
    assert [example.attributes["topic"] for example in examples] == ["painting", "food", "food", "more"]
    kept = load_examples("file:english", "auto", folder, deduplicate=True)
    assert kept == examples[:3]


def test_rows_without_an_answer_are_counted_in_the_log(tmp_path, caplog):
    (tmp_path / "a.yml").write_text("conversations:\n- [Lonely]\n- [a, b, c]\n")
    with caplog.at_level(logging.INFO, logger="fedllm.data.sources"):
        load_examples("file:a.yml", "auto", tmp_path)
    assert "1 of 2 rows hold no answer, 1 were cut" in caplog.text


def test_an_unknown_format_lists_the_known_ones(folder):
    with pytest.raises(ConfigError, match="auto, messages, alpaca, prompt-completion, text"):
        load_examples("file:english", "parrot", folder)
