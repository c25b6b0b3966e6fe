"""What `study.py` found, as a table, plots and a page in plain words; all of it from small files.

`write(OUT)` reads about.json, study.jsonl and curves.json, and writes table.md, table.csv, the
plots (*.svg), README.md and index.html beside them.
"""

import base64
from collections.abc import Sequence
from pathlib import Path

import jinja2
from markupsafe import Markup
from study_page import Section, sections_of
from study_plots import PLOTS, plots_of
from study_results import read
from study_tables import Table, csv_table, tables


def write(out: Path) -> None:
    """Write table, plots and pages into `out`, from the small files there."""
    study = read(out)
    plots, shown = plots_of(study), tables(study)
    for old in out.glob("*.svg"):
        if PLOTS.fullmatch(old.stem):
            old.unlink()
    for plot in plots:
        (out / f"{plot.name}.svg").write_text(plot.svg, "utf-8")
    sections = sections_of(study, plots, shown)
    (out / "table.csv").write_text(csv_table(study), "utf-8")
    (out / "table.md").write_text("\n\n".join(markdown(table) for table in shown) + "\n", "utf-8")
    (out / "README.md").write_text(markdown_page(sections), "utf-8")
    (out / "index.html").write_text(html_page(sections), "utf-8")


# ---------------------------------------------------------------- two forms of the page


def markdown(table: Table) -> str:
    """Return a table in Markdown."""
    lines = [table.columns, tuple("---" for _ in table.columns), *table.rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def markdown_page(sections: Sequence[Section]) -> str:
    """Return the page in Markdown, its plots beside it."""
    blocks = []
    for index, section in enumerate(sections):
        blocks += [f"{'#' if index == 0 else '##'} {section.title}", *section.paragraphs]
        if section.items:
            blocks.append("\n".join(f"- {item}" for item in section.items))
        for plot in section.plots:
            said = f"*{plot.title}.* {plot.caption}".strip()
            blocks += [f"![{plot.title}]({plot.name}.svg)", said]
        blocks += [markdown(table) for table in section.tables]
    return "\n\n".join(blocks) + "\n"


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ sections[0].title }}</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 46rem; margin: 0 auto; padding: 1rem; \
color: #222; background: #fff }
figure { margin: 1.5rem 0 }
figcaption { font-size: 0.9rem; color: #555 }
img { width: 100%; max-width: 40rem; height: auto }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-size: 0.8rem; white-space: nowrap }
th, td { padding: 0.3rem 0.6rem; border-bottom: 1px solid #ddd; text-align: left }
code { overflow-wrap: anywhere }
</style>
</head>
<body>
{% for section in sections %}
<h{{ 1 if loop.first else 2 }}>{{ section.title }}</h{{ 1 if loop.first else 2 }}>
{% for paragraph in section.paragraphs %}
<p>{{ paragraph | code }}</p>
{% endfor %}
{% if section.items %}
<ul>
{% for item in section.items %}
<li>{{ item | code }}</li>
{% endfor %}
</ul>
{% endif %}
{% for plot in section.plots %}
<figure>
<img alt="{{ plot.title }}" src="data:image/svg+xml;base64,{{ plot.svg | base64 }}">
<figcaption><em>{{ plot.title }}.</em> {{ plot.caption }}</figcaption>
</figure>
{% endfor %}
{% for table in section.tables %}
<div class="wide"><table>
<tr>{% for cell in table.columns %}<th>{{ cell }}</th>{% endfor %}</tr>
{% for row in table.rows %}
<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</table></div>
{% endfor %}
{% endfor %}
</body>
</html>
"""


def html_page(sections: Sequence[Section]) -> str:
    """Return the page as one HTML file: no script, nothing asked of a network."""
    surroundings = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True,
    )  # fmt: skip
    surroundings.filters["base64"] = lambda text: base64.b64encode(text.encode()).decode()
    surroundings.filters["code"] = code
    return surroundings.from_string(PAGE).render(sections=sections)


def code(text: str) -> Markup:
    """Return a paragraph with what stands between backquotes as code."""
    parts = text.split("`")
    wrapped = [Markup("<code>{}</code>").format(p) if i % 2 else p for i, p in enumerate(parts)]
    return Markup("").join(wrapped)
