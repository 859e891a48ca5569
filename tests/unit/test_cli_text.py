import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedllm.text import clean, fit, human_bytes, human_seconds, pad, shorten, table, three_figures, width, wrap

PRINTABLE = st.text(st.characters(codec="utf-8", categories=("L", "N", "P", "S", "Zs", "Mn")), max_size=60)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (812, "812 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (1_254, "1.25 kB"),
        (14_210_000, "14.2 MB"),
        (999_499, "999 kB"),
        (999_600, "1.00 MB"),
        (3.5e18, "3500 PB"),
    ],
)
def test_bytes_are_told_in_decimal_units_with_three_figures(count: int, text: str) -> None:
    assert human_bytes(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0.0 s"),
        (41.24, "41.2 s"),
        (59.96, "1 min 00 s"),
        (252, "4 min 12 s"),
        (3599.7, "1 h 00 min"),
        (7500, "2 h 05 min"),
    ],
)
def test_seconds_are_told_in_the_unit_that_suits(seconds: float, text: str) -> None:
    assert human_seconds(seconds) == text


@given(st.floats(0, 999))
def test_three_figures_are_right_to_half_a_percent_or_a_hundredth(value: float) -> None:
    assert float(three_figures(value)) == pytest.approx(value, rel=0.005, abs=0.005 + 1e-9)
    assert len(three_figures(value).replace(".", "")) <= 3


@given(st.text(max_size=80))
def test_cleaned_text_is_one_printable_line_and_cleaning_again_changes_nothing(text: str) -> None:
    cleaned = clean(text)
    assert cleaned.isprintable() or "\xa0" in text
    assert len(cleaned.splitlines()) <= 1
    assert clean(cleaned) == cleaned


@given(PRINTABLE, st.integers(1, 40))
def test_shortened_text_fits_and_is_a_beginning(text: str, columns: int) -> None:
    short = shorten(text, columns)
    assert width(short) <= columns or short == "\u2026"
    assert short == text or text.startswith(short[:-1])


@given(PRINTABLE, st.integers(0, 80), st.sampled_from("<>"))
def test_padded_text_has_the_columns_it_should_unless_it_is_wider(text: str, columns: int, align: str) -> None:
    assert width(pad(text, columns, align)) == max(columns, width(text))


@given(st.lists(PRINTABLE.filter(str.strip), min_size=1, max_size=9), st.integers(20, 100))
def test_parts_that_fit_are_all_there_and_others_are_counted(parts: list[str], columns: int) -> None:
    line = fit(parts, columns)
    assert width(line) <= columns
    if width(", ".join(parts)) <= columns:
        assert line == ", ".join(parts)
    elif len(parts) > 1:
        assert line.endswith(" more")


@given(PRINTABLE, st.integers(2, 40))
def test_wrapped_text_keeps_every_character_but_spaces_and_fits(text: str, columns: int) -> None:
    lines = wrap(text, columns)
    assert all(width(line) <= columns for line in lines)
    assert "".join("".join(lines).split()) == "".join(text.split())


def test_wrapping_breaks_at_spaces_where_there_are_any() -> None:
    assert wrap("the quick brown fox", 10) == ["the quick", "brown fox"]
    assert wrap("a incomprehensibilities b", 10) == ["a", "incomprehe", "nsibilitie", "s b"]
    assert wrap("", 10) == []


def test_columns_line_up_with_wide_characters() -> None:
    lines = table([["name", "loss"], ["\u533b\u9662", "3.5"], ["clinic", "12.25"]], "<>")
    assert [width(line) for line in lines] == [13, 13, 13]
    assert lines[1] == "\u533b\u9662      3.5"
