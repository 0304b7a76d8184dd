"""The page of a report: one file of HTML, with plotly.js in it, that asks nothing of any network."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from plotly.offline import get_plotlyjs

from storage.files import whole_file
from tuner.errors import TunerError
from tuner.report import figures
from tuner.report.audit import MIGHT_SHARE, MIN_COMPLETE
from tuner.text import duration, number_text
from tuner.versions import versions

if TYPE_CHECKING:
    from tuner.model.manifest import Manifest
    from tuner.report.facts import Facts

_TEMPLATE = "page.html"
MAX_ROWS = 20
_SECTIONS = (
    *("history", "curves", "importance", "front", "parallel", "slices", "contour", "pruned", "cost", "timeline"),
    "tested",
)


def page(facts: Facts, manifest: Manifest | None = None) -> str:
    """Return the page of a study's facts, with what the manifest of an export says of it if there is one."""
    drawn: dict[str, list[figures.Figure]] = {section: [] for section in _SECTIONS}
    for section, figure in _figures(facts, manifest):
        drawn[section].append(figure)
    plots = {its.name: its.plot for section in drawn.values() for its in section}
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": _number, "duration": duration, "percent": _percent, "value": _value}
    return environment.get_template(_TEMPLATE).render(
        facts=facts,
        study=facts.study,
        spec=facts.study.spec,
        status=facts.status,
        manifest=manifest,
        drawn=drawn,
        max_rows=MAX_ROWS,
        might_share=MIGHT_SHARE,
        min_complete=MIN_COMPLETE,
        version=versions()["tuner"],
        nonce=secrets.token_urlsafe(16),
        plotly=get_plotlyjs() if plots else "",
        data=for_script({"plots": plots, "templates": figures.templates()}),
    )


def write_page(path: Path, text: str) -> None:
    """Write a page aside and put it in the place of the one that is there. Raises TunerError if that cannot be done.

    What is no file, as /dev/stdout, is written to.
    """
    try:
        with whole_file(path) as file:
            file.write(text)
    except OSError as error:
        raise TunerError(
            f"cannot write the report to {path}: {error.strerror or error}; choose another file with --output"
        ) from error


def for_script(value: Any) -> str:
    """Return JSON that can stand in an element of a page: nothing in it ends that."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _figures(facts: Facts, manifest: Manifest | None) -> Iterator[tuple[str, figures.Figure]]:
    """Yield the figures, each with the section that it is in."""
    for section, figure in (
        ("history", figures.history(facts)),
        ("cost", figures.cost(facts)),
        ("timeline", figures.timeline(facts)),
    ):
        if figure is not None:
            yield section, figure
    for section, found in (
        ("curves", figures.curves(facts)),
        ("importance", figures.importance(facts)),
        ("pruned", figures.pruned(facts)),
        ("tested", iter(()) if manifest is None else figures.tested(manifest)),
    ):
        for figure in found:
            yield section, figure
    yield from figures.searched(facts)


def _number(value: Any) -> str:
    return number_text(value) if isinstance(value, int | float) and not isinstance(value, bool) else "-"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _value(value: Any) -> str:
    """Return a param's value for people; text as it is, in full."""
    if isinstance(value, str):
        return value
    return number_text(value) if isinstance(value, float) else json.dumps(value, default=str)
