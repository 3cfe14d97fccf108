"""results/REPORT.md: the text in studies/report.md, with the numbers of the tables filled in.

A section of the text that begins with `<!-- STUDY … -->` is filled in from results/STUDY/table.json of these studies;
while one of them is not there yet, it says how many of the study's runs have ended.
"""

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from run.files import read_json

TEMPLATE = Path(__file__).parent / "report.md"


def report(results: Path, markdown: dict[str, Callable[[dict], str]], progress: Callable[[str], str]) -> str:
    """The text of the report. `markdown` makes Markdown of a study's table, `progress` tells of one without a table.

    In a section, {table} is the first study's table in Markdown, and {STUDY[…]} a figure of a study's table.json, in
    the notation of str.format.
    """
    sections = re.split(r"^(?=## )", TEMPLATE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return "".join(filled(section, results, markdown, progress) for section in sections)


def filled(section: str, results: Path, markdown: dict[str, Callable[[dict], str]], progress: Callable) -> str:
    match = re.search(r"^<!-- (.+) -->\n", section, flags=re.MULTILINE)
    if not match:
        return section
    folders, heading = match[1].split(), section[: match.start()]
    paths = {folder: results / folder / "table.json" for folder in folders}
    if missing := [folder for folder, path in paths.items() if not path.exists()]:
        return f"{heading}{progress(missing[0])}\n\n"
    tables = {folder: read_json(path) for folder, path in paths.items()}
    first = markdown[Path(folders[0]).name](tables[folders[0]])
    return heading + section[match.end() :].format(table=first, **tables)


def markdown_table(header: str, rows: Iterable[list[Any]]) -> str:
    """`header` has the columns' names, with | between them."""
    columns = header.count("|") + 1
    lines = [header, " | ".join(["---"] * columns), *(" | ".join(map(str, row)) for row in rows)]
    return "\n".join(f"| {line} |" for line in lines)


def given(settings: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in settings.items())
