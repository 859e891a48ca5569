"""What is cut off, left out and counted on the way from rows to examples."""

import pytest

from fedllm.data.examples import Example, Message, distinct
from fedllm.data.files import Row
from fedllm.data.formats import FormatReport, to_examples
from fedllm.errors import DataError


def row(*turns):
    return Row({"messages": [{"role": role, "content": content} for role, content in turns]}, "here")


def test_turns_after_the_last_answer_are_cut_off_and_counted():
    (example,), report = to_examples([row(("user", "a"), ("assistant", "b"), ("user", "c"), ("system", "d"))])
    assert example.messages == (Message("user", "a"), Message("assistant", "b"))
    assert report == FormatReport(num_rows=1, num_unanswered=0, num_trimmed=1)


@pytest.mark.parametrize(
    "unanswered",
    [
        row(),
        row(("user", "a")),
        row(("assistant", "a")),
        row(("user", "a"), ("assistant", " \n")),
        Row({"instruction": "a", "output": ""}, "here"),
        Row({"text": " \n"}, "here"),
    ],
)
def test_rows_without_an_answer_are_left_out_and_counted(unanswered):
    good = Row({"prompt": "a", "completion": "b"}, "here")
    examples, report = to_examples([unanswered, good])
    assert [example.messages[1].content for example in examples] == ["b"]
    assert report == FormatReport(num_rows=2, num_unanswered=1, num_trimmed=0)
    with pytest.raises(DataError, match="no row holds an answer"):
        to_examples([unanswered])


def test_an_undetectable_row_lists_what_each_format_needs():
    expected = r"messages \(messages or conversations\).*alpaca \(instruction and output\).*columns answer, question"
    with pytest.raises(DataError, match=expected):
        to_examples([Row({"question": "a", "answer": "b"}, "here")])


def test_rows_of_several_formats_mix():
    examples, _ = to_examples([Row({"text": "a"}, ""), Row({"prompt": "a", "completion": "b"}, "")])
    assert [bool(example.text) for example in examples] == [True, False]


def test_a_key_depends_on_content_alone():
    one = Example(text="a", attributes={"topic": "x"}, origin="here")
    same = Example(text="a", attributes={"topic": "y"}, origin="there")
    spoken = Example(messages=(Message("user", "a"), Message("assistant", "b")))
    joined = Example(messages=(Message("user", "a"), Message("assistant", "b"), Message("user", "")))
    assert one.key == same.key
    assert len({one.key, spoken.key, joined.key, Example(text="b").key}) == 4
    assert distinct([one, spoken, same, spoken]) == [one, spoken]


def test_keys_stay_the_same_between_releases_so_that_hold_outs_do():
    assert Example(text="a").key == "74b8131d85cc22e0686f9a6782b56adad96b70dd252051107e82e5908d5b34c9"
    spoken = Example(messages=(Message("user", "é"), Message("assistant", "b")))
    assert spoken.key == "3e0f60afce02e74573c1e02332913435f4e0f2d17b91a89e36f916da696bf2ec"
