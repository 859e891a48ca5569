"""The same rows come out of every kind of file."""

import csv
import io
import json

import pyarrow
import pyarrow.parquet
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm.data.files import read_file

printable = st.characters(blacklist_categories=("Cs", "Cc"), blacklist_characters="\ufeff\ufffe\uffff")
words = st.text(printable, min_size=1, max_size=20)
tables = st.lists(st.fixed_dictionaries({"instruction": words, "output": words}), min_size=1, max_size=8)


def as_csv(rows):
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, ["instruction", "output"], quoting=csv.QUOTE_ALL)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def as_parquet(rows, path):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2)


@settings(deadline=None, max_examples=60)
@given(tables)
def test_every_kind_of_file_gives_the_rows_that_were_written(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("tables")
    texts = {
        "a.jsonl": "\n".join(json.dumps(row, ensure_ascii=False) for row in rows),
        "a.json": json.dumps(rows, indent=2),
        "a.csv": as_csv(rows),
        "a.yml": yaml.safe_dump(rows, allow_unicode=True),
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8", newline="")
    as_parquet(rows, folder / "a.parquet")
    for path in sorted(folder.iterdir()):
        assert [dict(row.values) for row in read_file(path)] == rows, path.name
