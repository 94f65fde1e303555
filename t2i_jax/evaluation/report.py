"""`report.html`: tables, plots and pictures side by side, in one file that needs no other."""

import base64
import html
import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from t2i_jax.evaluation import tables
from t2i_jax.evaluation.tables import Row

SIDE = 128  # pixels, of a picture on the page; larger ones are reduced
PROMPTS = 12  # shown of a set
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; padding: 0 1rem;
       max-width: 90rem; color: #222; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
table { border-collapse: collapse; margin: 0.8rem 0; }
th, td { padding: 0.25rem 0.7rem; border-bottom: 1px solid #ddd; text-align: right;
         vertical-align: top; }
th { border-bottom: 2px solid #888; font-weight: 600; }
th:first-child, td:first-child { text-align: left; }
.pictures td, .pictures th { text-align: center; }
.pictures td:first-child { text-align: left; max-width: 16rem; }
.pictures img { width: 128px; height: auto; image-rendering: pixelated; margin: 1px; }
.plots img { width: 34rem; max-width: 100%; }
.scroll { overflow-x: auto; }
ul { color: #555; font-size: 0.9rem; } code { font-size: 0.9rem; }
"""


def page(title: str, command: str, sections: Sequence[str]) -> str:
  """The whole page.

  Args:
    title: its name.
    command: that made it.
    sections: of HTML.
  """
  return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{_text(title)}</title>
<style>{STYLE}</style></head><body>
<h1>{_text(title)}</h1>
<p><code>{_text(command)}</code></p>
{"".join(sections)}
</body></html>
"""


def section(
  rows: Sequence[Row], plots: dict[str, bytes], columns: Sequence[str], prompts: Sequence[str],
  pictures: Sequence[np.ndarray],
) -> str:
  """One set of prompts: its tables, plots and pictures.

  Args:
    rows: of the set, one for each point.
    plots: SVG files by name.
    columns: names of what is side by side.
    prompts: of the pictures that are shown.
    pictures: of each column, uint8 [prompts, each, H, W, 3].
  """
  parts = [f"<h2>{_text(rows[0]['set'].replace('_', ' '))}</h2>", table(*tables.main_table(rows))]
  judged = [row for row in rows if "verifier" in row["results"]]
  if judged:
    parts.append(table(*tables.verifier_table(judged)))
  parts += [table(*each) for each in tables.category_tables(rows)]
  parts.append("<ul>" + "".join(f"<li>{_text(line)}</li>" for line in tables.notes(rows)) + "</ul>")
  if plots:
    images = "".join(_image(content, "svg+xml", name) for name, content in plots.items())
    parts.append(f'<p class="plots">{images}</p>')
  if prompts:
    parts.append(side_by_side(columns, prompts, pictures))
  return "\n".join(parts)


def table(header: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
  head = "".join(f"<th>{_text(cell)}</th>" for cell in header)
  lines = "\n".join(
    "<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in line) + "</tr>" for line in cells
  )
  return f'<div class="scroll"><table><tr>{head}</tr>\n{lines}</table></div>'


def side_by_side(
  labels: Sequence[str], prompts: Sequence[str], pictures: Sequence[np.ndarray]
) -> str:
  """A line a prompt, a column a point."""
  head = "".join(f"<th>{_text(label)}</th>" for label in labels)
  lines = []
  for i, prompt in enumerate(prompts):
    cells = "".join(
      "<td>" + "".join(_image(_png(image), "png", prompt) for image in of_point[i]) + "</td>"
      for of_point in pictures
    )
    lines.append(f"<tr><td>{_text(prompt)}</td>{cells}</tr>")
  body = "\n".join(lines)
  top = f'<table class="pictures"><tr><th></th>{head}</tr>'
  return f'<div class="scroll">{top}\n{body}</table></div>'


def _png(image: np.ndarray) -> bytes:
  picture = Image.fromarray(image)
  if max(picture.size) > SIDE:
    picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
  content = io.BytesIO()
  picture.save(content, format="PNG")
  return content.getvalue()


def _image(content: bytes, kind: str, text: str) -> str:
  data = base64.b64encode(content).decode()
  return f'<img alt="{_text(text)}" src="data:image/{kind};base64,{data}">'


def _text(text: str) -> str:
  return html.escape(text, quote=True)
