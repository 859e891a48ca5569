"""Reading one file: what each kind gives, and what is said about a broken one."""

import json

import pytest

from fedllm.data.files import READERS, read_file
from fedllm.errors import DataError

SECRET = "Xantippe"  # stands for private text; no error message may show it


def write(folder, name, text):
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def values(path):
    return [dict(row.values) for row in read_file(path)]


def test_json_lines_skip_blank_lines_and_name_the_line(tmp_path):
    path = write(tmp_path, "a.jsonl", '{"text": "one"}\n\n{"text": "two"}\n')
    assert [(row.values["text"], row.origin) for row in read_file(path)] == [
        ("one", f"{path}, line 1"),
        ("two", f"{path}, line 3"),
    ]


def test_a_line_separator_inside_a_json_string_does_not_end_the_line(tmp_path):
    path = write(tmp_path, "a.jsonl", json.dumps({"text": "one\u2028two\x85three"}, ensure_ascii=False))
    assert values(path) == [{"text": "one\u2028two\x85three"}]


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path):
    assert values(write(tmp_path, "a.csv", b"\xef\xbb\xbftext,topic\none,t\n")) == [{"text": "one", "topic": "t"}]


def test_separated_values_may_hold_line_breaks(tmp_path):
    assert values(write(tmp_path, "a.csv", 'text,n\n"one\ntwo, three",1\n')) == [{"text": "one\ntwo, three", "n": "1"}]
    assert values(write(tmp_path, "a.tsv", "text\tn\none, two\t1\n")) == [{"text": "one, two", "n": "1"}]


def test_a_blank_line_separates_texts(tmp_path):
    path = write(tmp_path, "a.txt", "One goes\non.\r\n\r\n\n  Two.\n\n")
    assert values(path) == [{"text": "One goes\r\non.".replace("\r", "")}, {"text": "Two."}]


def test_yaml_words_stay_the_words_that_were_written(tmp_path):
    path = write(tmp_path, "a.yml", "conversations:\n- - Is it?\n  - Yes\n- - 1.10\n  - 2020-01-01\n  - ~\n  - null\n")
    contents = [[message["content"] for message in row["messages"]] for row in values(path)]
    assert contents == [["Is it?", "Yes"], ["1.10", "2020-01-01", "~", "null"]]


def test_corpus_entries_that_are_not_text_become_text_and_a_lone_string_is_one_utterance(tmp_path):
    path = write(tmp_path, "a.yaml", "conversations:\n- - What?\n  - Note: well\n- A lone string\n- []\n")
    rows = read_file(path)
    assert [[message["content"] for message in row.values["messages"]] for row in rows] == [
        ["What?", "Note: well"],
        ["A lone string"],
        [],
    ]
    assert rows[1].origin == f"{path}, conversation 2"
    document = {"conversations": [["Is it?", True, 3]]}
    as_json = values(write(tmp_path, "b.json", json.dumps(document)))
    assert [message["content"] for message in as_json[0]["messages"]] == ["Is it?", "True", "3"]


def test_corpus_utterances_alternate_between_user_and_assistant(tmp_path):
    (row,) = values(write(tmp_path, "a.yml", "conversations:\n- [a, b, c]\n"))
    assert [message["role"] for message in row["messages"]] == ["user", "assistant", "user"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", f'{{"text": "ok"}}\n{{"text": "{SECRET}', "not JSON.*line 2"),
        ("a.jsonl", f'"{SECRET}"\n', "a row is malformed.*found str.*line 1"),
        ("a.json", f'{{"text": "{SECRET}"}}', "another shape"),
        ("a.json", f'[{{"text": "a"}}, "{SECRET}"]', "malformed.*row 2"),
        ("a.json", f'["{SECRET}', "not JSON"),
        ("a.json", "[" * 100_000, "not JSON"),
        ("a.csv", f"text,topic\n{SECRET},b,c\n", "columns.*line 2"),
        ("a.csv", f"text,topic\n{SECRET}\n", "columns.*line 2"),
        ("a.csv", f'text\n"{SECRET}" x\n', "not CSV.*line 2"),
        ("a.yml", f"conversations:\n- - *{SECRET}\n", "not YAML.*line 2"),
        ("a.yml", f"conversations: [{SECRET}\n", "not YAML"),
        ("a.yml", f"a: \x01{SECRET}", "not YAML"),
        ("a.yml", f"{SECRET}", "another shape"),
        ("a.txt", b"caf\xe9 " + SECRET.encode(), "not UTF-8.*byte 3"),
        ("a.parquet", SECRET, "not Parquet"),
        ("a.docx", SECRET, "unknown kind.*.jsonl.*found .docx"),
    ],
)
def test_a_broken_file_is_named_with_its_line_and_without_its_content(tmp_path, name, text, message):
    path = write(tmp_path, name, text)
    with pytest.raises(DataError, match=message) as caught:
        read_file(path)
    assert str(path) in str(caught.value)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("suffix", [suffix for suffix in READERS if suffix != ".parquet"])
@pytest.mark.parametrize("text", ["", " \n\n"])
def test_an_empty_file_is_an_error(tmp_path, suffix, text):
    with pytest.raises(DataError, match="is empty"):
        read_file(write(tmp_path, f"a{suffix}", text))


@pytest.mark.parametrize("text", ["conversations: []", "[]"])
def test_a_document_without_rows_is_an_error(tmp_path, text):
    with pytest.raises(DataError, match="is empty"):
        read_file(write(tmp_path, "a.yml", text))


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        read_file(tmp_path / "none.jsonl")
