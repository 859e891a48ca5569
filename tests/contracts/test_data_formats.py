"""What every row format keeps to; a new one needs a line in SAMPLES."""

import typing

import pytest

from fedllm.config import DataConfig
from fedllm.data import formats
from fedllm.data.files import Row
from fedllm.data.formats import FORMATS, RowFormat, register, to_examples
from fedllm.errors import DataError

ASKED = (("user", "What?"), ("assistant", "That."))

SAMPLES = {
    "messages": [
        ({"messages": [{"role": role, "content": content} for role, content in ASKED]}, ASKED),
        ({"conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "That."}]}, ASKED),
    ],
    "alpaca": [
        ({"instruction": "What?", "output": "That."}, ASKED),
        ({"instruction": "What?", "input": "", "output": "That."}, ASKED),
        ({"instruction": "Add.", "input": "1 2", "output": "3"}, (("user", "Add.\n\n1 2"), ("assistant", "3"))),
    ],
    "prompt-completion": [({"prompt": "What?", "completion": "That."}, ASKED)],
    "text": [({"text": "That."}, "That.")],
}
CASES = [(name, *sample) for name, samples in SAMPLES.items() for sample in samples]
SECRET = "Xantippe"


def content(example):
    return example.text or tuple(tuple(message) for message in example.messages)


def test_every_format_has_a_sample_and_a_place_in_the_run_config():
    assert set(SAMPLES) == set(FORMATS)
    assert set(typing.get_args(DataConfig.model_fields["format"].annotation)) == {"auto", *FORMATS}


@pytest.mark.parametrize(("name", "values", "expected"), CASES)
@pytest.mark.parametrize("chosen", ["auto", "by name"])
def test_a_row_is_read_alike_by_name_and_by_detection(name, values, expected, chosen):
    (example,), _ = to_examples([Row(values, "here")], "auto" if chosen == "auto" else name)
    assert content(example) == expected
    assert example.origin == "here"


@pytest.mark.parametrize(("name", "values", "expected"), CASES)
def test_other_short_columns_are_labels_and_content_columns_are_not(name, values, expected):
    more = {"topic": "t", "year": 1999, "long": "x" * 65, "list": ["x"], "nothing": None}
    (example,), _ = to_examples([Row(values | more, "here")], name)
    assert content(example) == expected
    assert example.attributes == {"topic": "t", "year": "1999"}


@pytest.mark.parametrize(("name", "values"), [(name, values) for name, values, _ in CASES])
def test_a_row_that_lacks_a_column_is_named_with_its_columns_and_without_its_values(name, values):
    for column in FORMATS[name].columns[0] & set(values):
        rest = {other: value for other, value in values.items() if other != column} | {"secret": SECRET}
        with pytest.raises(DataError, match=r"found columns .*secret; in file, row 9") as caught:
            to_examples([Row(rest, "file, row 9")], name)
        assert column in str(caught.value)
        assert SECRET not in str(caught.value)


@pytest.mark.parametrize(("name", "values"), [(name, values) for name, values, _ in CASES])
@pytest.mark.parametrize("junk", [None, 7, {"a": SECRET}, [[SECRET]], [{"role": SECRET, "content": SECRET}]])
def test_a_column_of_another_type_is_refused_without_its_value(name, values, junk):
    for column in FORMATS[name].columns[0] & set(values):
        with pytest.raises(DataError, match=r"does not fit its format.*in here") as caught:
            to_examples([Row(values | {column: junk}, "here")], name)
        assert SECRET not in str(caught.value)


def test_a_format_can_be_added_once(monkeypatch):
    monkeypatch.setattr(formats, "FORMATS", dict(FORMATS))
    poem = RowFormat((frozenset({"lines"}),), lambda values: "\n".join(values["lines"]))
    register("poem", poem)
    (example,), _ = to_examples([Row({"lines": ["a", "b"]}, "here")])
    assert example.text == "a\nb"
    for taken in ("poem", "auto"):
        with pytest.raises(ValueError, match="taken"):
            register(taken, poem)
