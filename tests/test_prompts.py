"""Prompts from files: lines, PartiPrompts' table, GenEval's rows, and what is wrong with others."""

import pytest

from t2i_jax.errors import UserError
from t2i_jax.prompts import Prompt, read_prompts

PARTI = (
  "Prompt\tCategory\tChallenge\tNote\n"
  "bond\tAbstract\tBasic\tBiology-inspired concepts\n"
  # As one of PartiPrompts' own: quotation marks are part of the prompt.
  '"G I G G L E" painted in thick letters\tWorld Knowledge\tWriting & Symbols\t\n'
)


def written(tmp_path, name, content):
  path = tmp_path / name
  path.write_bytes(content if isinstance(content, bytes) else content.encode())
  return path


def test_lines(tmp_path):
  content = "\ufeffa dog\r\n\n  a cat \nline\u2028separator\n"
  path = written(tmp_path, "prompts.txt", content)
  assert read_prompts(path) == [Prompt("a dog"), Prompt("a cat"), Prompt("line\u2028separator")]


def test_tables_and_rows(tmp_path):
  one, other = read_prompts(written(tmp_path, "parti.tsv", PARTI))
  assert one == Prompt("bond", {"Category": "Abstract", "Challenge": "Basic",
                                "Note": "Biology-inspired concepts"})
  assert other.text == '"G I G G L E" painted in thick letters'
  row = '{"tag": "counting", "include": [{"class": "dog", "count": 2}], "prompt": "two dogs"}'
  (geneval,) = read_prompts(written(tmp_path, "evaluation_metadata.jsonl", row + "\n\n"))
  assert geneval.text == "two dogs" and geneval.about["include"] == [{"class": "dog", "count": 2}]
  assert geneval.about["prompt"] == "two dogs"
  long = "x" * 200_000
  (cell,) = read_prompts(written(tmp_path, "long.tsv", f"prompt\n{long}\n"))
  assert cell.text == long


@pytest.mark.parametrize("name, content, message", [
  ("a.txt", "\n \n", "holds no prompts"),
  ("a.txt", b"\xff\xfe", "is not UTF-8 text"),
  ("a.tsv", "Title\tCategory\nx\ty\n", "line 1: no column prompt, caption or text; it has Title"),
  ("a.tsv", "Prompt\tPrompt\nx\ty\n", "line 1: two columns have one name"),
  ("a.jsonl", "[" * 100_000, "line 1: not JSON ("),
  ("a.tsv", PARTI + "one cell\n", "line 4: 1 cells for the 4 columns Prompt"),
  ("a.jsonl", "{", "line 1: not JSON (Expecting property name enclosed in double "
   "quotes, column 2)"),
  ("a.jsonl", "[1]", "line 1: not an object {"),
  ("a.jsonl", '{"prompt": 3}', "line 1: its prompt is no text"),
  ("a.jsonl", '{"prompt": "half \\ud83d"}', "line 1: its prompt is no text"),
  ("a.jsonl", '{"prompt": "a"}\n{"title": "b"}', "line 2: no column prompt, caption or text"),
])
def test_files_that_hold_none(tmp_path, name, content, message):
  with pytest.raises(UserError) as error:
    read_prompts(written(tmp_path, name, content))
  assert message in str(error.value)
