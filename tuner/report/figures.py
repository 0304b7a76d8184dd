"""The figures of a report: plotly's and Optuna's, as JSON that a page draws; what people wrote is text in them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import plotly.colors
import plotly.graph_objects as go
import plotly.io
from optuna import visualization

from tuner.report.shown import a_study, evenly, first_value, shortened

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

    from tuner.model.manifest import ClassDetails, Manifest
    from tuner.report.facts import CurveOf, Facts

SCALE = [[0.0, "#b6bcc6"], [1.0, "#2f7de1"]]
"""From bad to good, or from early to late: to be told from white and from black."""
COLORS = {
    "COMPLETE": "#2f7de1",
    "PRUNED": "#e08a1e",
    "FAIL": "#d64545",
    "best": "#17a673",
    "rest": "#8a93a3",
}
OUTCOMES = {
    "complete": COLORS["COMPLETE"],
    "pruned": COLORS["PRUNED"],
    "fail": COLORS["FAIL"],
    "released": "#9b6dd6",
    "lost": "#b0306a",
    "hung": "#6b2b16",
    "several": COLORS["rest"],
    "running": "#17a673",
}
MAX_LINES, MAX_CONTOUR, MAX_RANKED = 200, 150, 500
"""Trials in the figures whose size, or whose time to be drawn, grows faster."""
MAX_PARAMS, MAX_METRICS, MAX_CLASSES = 16, 12, 40

# A text of plotly's may hold tags, such as links; all but those for lines and for bold letters are shown as they are.
_TAG = re.compile(r"<(?!(?:br\s*/?|/?b)>)")


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A figure as plotly.js takes it, under a name that is the id of its element; `narrow` ones stand side by side."""

    name: str
    caption: str
    plot: Mapping[str, Any]
    narrow: bool = False


def templates() -> dict[str, Any]:
    """Return plotly's templates for a light and for a dark page."""
    found = {}
    for name in ("plotly_white", "plotly_dark"):
        template = plotly.io.templates[name].to_plotly_json()
        template["layout"] |= {"paper_bgcolor": "rgba(0,0,0,0)", "plot_bgcolor": "rgba(0,0,0,0)"}
        # a report has lines, bars and the like, of which each kind else would be some kilobytes
        template["data"] = {
            kind: its for kind, its in template["data"].items() if kind in ("bar", "contour", "scatter")
        }
        found[name.removeprefix("plotly_").replace("white", "light")] = as_plain(template)
    return found


def history(facts: Facts) -> Figure | None:
    """Draw the values in the order in which trials ended, and the best until then."""
    if not facts.history:
        return None
    figure = go.Figure()
    points = list(enumerate(facts.history))
    for state, label in (("COMPLETE", "complete"), ("PRUNED", "pruned: the last value reported")):
        its = [(place, point) for place, point in points if point.state == state and _is_number(point.value)]
        figure.add_trace(
            go.Scatter(
                x=[place for place, _ in its],
                y=[point.value for _, point in its],
                customdata=[point.number for _, point in its],
                mode="markers",
                name=label,
                marker={"color": COLORS[state], "size": 6, "opacity": 0.65},
                hovertemplate="trial %{customdata}: %{y}<extra></extra>",
            )
        )
    if len(facts.study.directions) == 1:
        figure.add_trace(
            go.Scatter(
                x=[place for place, _ in points],
                y=[point.best for _, point in points],
                mode="lines",
                name="best so far",
                line={"color": COLORS["best"], "width": 2, "shape": "hv"},
            )
        )
    figure.update_layout(xaxis_title="trials in the order in which they ended", yaxis_title=facts.study.metrics[0])
    caption = f"{len(points)} of {facts.trials} trials" if facts.is_cut else ""
    return _figure("history", caption, figure)


def curves(facts: Facts) -> Iterator[Figure]:
    """Draw each metric by epoch, a line for each trial."""
    columns = dict.fromkeys(name for curve in facts.curves for row in curve.rows for name in row)
    best = None if facts.best is None else facts.best.number
    metrics = [name for name in columns if name not in ("step", "seconds")][:MAX_METRICS]
    for place, metric in enumerate(metrics):
        figure = go.Figure()
        for label, color, its in _grouped(facts.curves, best):
            x, y, numbers = _line(its, metric)
            if not x:
                continue
            figure.add_trace(
                go.Scatter(
                    x=x,
                    y=y,
                    customdata=numbers,
                    mode="lines+markers",
                    name=label,
                    line={"color": color, "width": 3 if label.startswith("best") else 1},
                    marker={"size": 7 if label.startswith("best") else 3},
                    opacity=1.0 if label.startswith("best") else 0.55,
                    hovertemplate="trial %{customdata}, step %{x}: %{y}<extra></extra>",
                )
            )
        figure.update_layout(xaxis_title="step", yaxis_title=metric)
        if figure.data:
            yield _figure(f"curve-{place}", metric, figure, narrow=True)


def importance(facts: Facts) -> Iterator[Figure]:
    """Draw the importances of each objective."""
    for place, its in enumerate(facts.importances):
        if not its.params:
            continue
        names = list(its.params)[::-1]
        bars = go.Bar(
            x=[its.params[name] for name in names],
            y=names,
            orientation="h",
            marker={"color": COLORS["COMPLETE"]},
            hovertemplate="%{y}: %{x:.1%}<extra></extra>",
        )
        figure = go.Figure(bars)
        figure.update_xaxes(tickformat=".0%", title_text=f"part of the variance of {its.metric}", rangemode="tozero")
        figure.update_yaxes(type="category")
        figure.update_layout(height=150 + 26 * len(names))
        yield _figure(f"importance-{place}", "", figure)


def searched(facts: Facts) -> Iterator[tuple[str, Figure]]:
    """Draw values over params by Optuna's figures, each with the name of its section."""
    trials = [trial for trial in facts.drawn if first_value(trial) is not None]
    if not trials:
        return
    study, several = facts.study, len(facts.study.directions) > 1
    by_first: dict[str, Any] = {"target": lambda trial: trial.values[0]} if several else {}
    by_first["target_name"] = study.metrics[0]
    if len(study.directions) == 2:
        whole = [trial for trial in trials if all(map(math.isfinite, trial.values))]
        if whole:
            names = list(study.metrics)
            front = visualization.plot_pareto_front(a_study(whole, study), target_names=names)
            yield "front", _figure("front", "", front)
    params = list(dict.fromkeys(name for trial in trials for name in trial.params))
    if not params:
        return
    lines = evenly(trials, MAX_LINES)
    figure = visualization.plot_parallel_coordinate(a_study(lines, study), **by_first)
    yield "parallel", _figure("parallel", _of(lines, trials), _recolored(figure, lines, study.directions[0]))
    for place, name in enumerate(params[:MAX_PARAMS]):
        figure = visualization.plot_slice(a_study(trials, study), [name], **by_first)
        figure.update_traces(marker={"colorscale": SCALE, "showscale": False, "size": 7})
        yield "slices", _figure(f"slice-{place}", name, figure, narrow=True)
    yield from _of_two(facts, trials, by_first)


def _of_two(facts: Facts, trials: Sequence[FrozenTrial], by_first: dict[str, Any]) -> Iterator[tuple[str, Figure]]:
    """Draw the two most important params that have several values in the trials."""
    varied = [name for name in _by_importance(facts, trials) if _n_values(trials, name) > 1]
    if len(varied) < 2:
        return
    pair = varied[:2]
    both = [trial for trial in trials if all(name in trial.params for name in pair)]
    if len(both) < 2 or any(_n_values(both, name) < 2 for name in pair):
        return
    few = evenly(both, MAX_CONTOUR)
    if all(_n_values(few, name) > 1 for name in pair):
        figure = visualization.plot_contour(a_study(few, facts.study), pair, **by_first)
        figure.update_traces(colorscale=SCALE, reversescale=_is_reversed(facts), selector={"type": "contour"})
        yield "contour", _figure("contour", f"{pair[0]} and {pair[1]}{_of(few, trials, '; ')}", figure)
    many = evenly(both, MAX_RANKED)
    figure = visualization.plot_rank(a_study(many, facts.study), pair, **by_first)
    yield "contour", _figure("rank", f"rank of the value, by {pair[0]} and {pair[1]}{_of(many, trials, '; ')}", figure)


def pruned(facts: Facts) -> Iterator[Figure]:
    """Draw how the pruned trials stood when they were pruned, and what they could have become."""
    audit = facts.audit
    if audit is None or not audit.trials:
        return
    its = evenly(audit.trials, 1000)
    ranks = go.Figure(
        go.Scatter(
            x=[one.step for one in its],
            y=[(one.rank - 0.5) / one.rivals for one in its],
            customdata=[[one.number, one.rank, one.rivals] for one in its],
            mode="markers",
            marker={"color": COLORS["PRUNED"], "size": 7, "opacity": 0.65},
            hovertemplate="trial %{customdata[0]}: place %{customdata[1]} of %{customdata[2]}<extra></extra>",
        )
    )
    ranks.update_yaxes(tickformat=".0%", title_text="rank among all that got so far (top: best)", range=[1.03, -0.03])
    ranks.update_layout(xaxis_title="step at which it was pruned")
    yield _figure("pruned-rank", "Rank of the pruned trials when they were pruned", ranks, narrow=True)
    told = [one for one in its if one.extrapolated is not None]
    if not told or audit.best is None:
        return
    finals = go.Figure(
        go.Scatter(
            x=[one.step for one in told],
            y=[one.extrapolated for one in told],
            customdata=[[one.number, one.share] for one in told],
            mode="markers",
            marker={
                "color": [one.share for one in told],
                "colorscale": [[0.0, "#b6bcc6"], [0.05, "#e0a95e"], [1.0, "#d64545"]],
                "cmin": 0,
                "cmax": 1,
                "size": 7,
                "colorbar": {"title": "chance", "tickformat": ".0%"},
            },
            hovertemplate="trial %{customdata[0]}: %{y}, chance of the best %{customdata[1]:.0%}<extra></extra>",
        )
    )
    finals.add_hline(y=audit.best, line={"color": COLORS["best"], "width": 2}, annotation_text="best")
    finals.update_layout(
        xaxis_title="step at which it was pruned", yaxis_title=f"extrapolated {facts.study.metrics[0]}"
    )
    yield _figure("pruned-final", "What the pruned trials could have become", finals, narrow=True)


def cost(facts: Facts) -> Figure | None:
    """Draw what devices' time was spent on."""
    spent = {kind: seconds for kind, seconds in vars(facts.status.cost).items() if seconds > 0}
    if not spent:
        return None
    known = {**OUTCOMES, "failed": OUTCOMES["fail"], "idle": COLORS["rest"]}
    kinds = list(spent)[::-1]
    bars = go.Bar(
        x=[spent[kind] / 3600 for kind in kinds],
        y=kinds,
        orientation="h",
        marker={"color": [known[kind] for kind in kinds]},
        hovertemplate="%{y}: %{x:.3g} h<extra></extra>",
    )
    figure = go.Figure(bars)
    figure.update_layout(xaxis_title="hours of devices", height=150 + 26 * len(kinds))
    return _figure("cost", "", figure)


def timeline(facts: Facts) -> Figure | None:
    """Draw what each slot did when."""
    if facts.timeline is None:
        return None
    figure = go.Figure()
    for outcome, color in OUTCOMES.items():
        spans = [span for span in facts.timeline.spans if (span.outcome or "running") == outcome]
        if spans:
            figure.add_trace(
                go.Bar(
                    base=[f"{span.since:%Y-%m-%d %H:%M:%S.%f}"[:-3] for span in spans],
                    x=[round(1000 * (span.until - span.since).total_seconds()) for span in spans],
                    y=[f"{span.worker} slot {span.slot}" for span in spans],
                    customdata=[[span.number, span.device] for span in spans],
                    orientation="h",
                    name=outcome,
                    marker={"color": color, "line": {"width": 0.5, "color": "rgba(255,255,255,0.5)"}},
                    hovertemplate=f"trial %{{customdata[0]}} on %{{customdata[1]}}: {outcome}<extra></extra>",
                )
            )
    figure.update_xaxes(type="date", title_text="UTC")
    figure.update_yaxes(type="category", categoryorder="category descending", automargin=True)
    figure.update_layout(barmode="overlay", height=160 + 24 * facts.timeline.shown)
    cut = facts.timeline.shown < facts.timeline.slots
    caption = f"the busiest {facts.timeline.shown} of {facts.timeline.slots} slots" if cut else ""
    return _figure("timeline", caption, figure)


def tested(manifest: Manifest) -> Iterator[Figure]:
    """Draw where an exported model errs on the test split."""
    details = manifest.test_details
    if details is None:
        return
    for place, (target, its) in enumerate(details.classes.items()):
        if its.confusion is not None and len(its.by_class) <= MAX_CLASSES:
            yield _confusion(f"confusion-{place}", target, its, its.confusion)
    for place, (target, residuals) in enumerate(details.residuals.items()):
        boxes = go.Figure()
        for output, (low, _, first, middle, third, _, high) in enumerate(residuals):
            name = target or f"output {output}"
            box = {"lowerfence": [low], "q1": [first], "median": [middle], "q3": [third], "upperfence": [high]}
            boxes.add_trace(go.Box(x=[name], name=name, marker={"color": COLORS["COMPLETE"]}, **box))
        boxes.update_layout(yaxis_title="given less wanted", showlegend=False)
        yield _figure(f"residuals-{place}", f"Residuals on test{' of ' + target if target else ''}", boxes)


def _confusion(name: str, target: str, its: ClassDetails, rows: Sequence[Sequence[int]]) -> Figure:
    labels = list(its.by_class)
    heat = go.Heatmap(
        z=[[count / max(1, sum(row)) for count in row] for row in rows],
        customdata=rows,
        x=labels,
        y=labels,
        zmin=0,
        zmax=1,
        colorscale=[[0.0, "rgba(47,125,225,0.04)"], [1.0, "rgba(47,125,225,1)"]],
        colorbar={"tickformat": ".0%"},
        hovertemplate="%{y} given as %{x}: %{customdata} rows<extra></extra>",
    )
    if len(labels) <= 12:
        heat.update(text=rows, texttemplate="%{text}")
    figure = go.Figure(heat)
    figure.update_xaxes(type="category", title_text="given")
    figure.update_yaxes(type="category", title_text="wanted", autorange="reversed")
    figure.update_layout(height=min(900, 220 + 32 * len(labels)))
    return _figure(name, f"Confusion on test{' of ' + target if target else ''}", figure)


def _figure(name: str, caption: str, figure: Any, *, narrow: bool = False) -> Figure:
    plot = figure.to_plotly_json()
    layout = plot["layout"]
    for unwanted in ("template", "title", "width", "plot_bgcolor"):
        layout.pop(unwanted, None)
    layout.setdefault("height", 320 if narrow else 420)
    layout["margin"] = {"l": 56, "r": 16, "t": 24, "b": 48}
    layout["legend"] = {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0}
    layout.setdefault("yaxis", {})["automargin"] = True
    for axis in ("xaxis", "yaxis"):
        if text := layout.get(axis, {}).get("title", {}).get("text"):
            layout[axis]["title"]["text"] = shortened(text)
    return Figure(name=f"plot-{name}", caption=caption, plot=as_plain(plot), narrow=narrow)


def as_plain(value: Any) -> Any:
    """Return a part of a figure as JSON has it: no number of more than six digits, no tag that somebody wrote."""
    match value:
        case str():
            return _TAG.sub("&lt;", value)
        case bool() | None:
            return value
        case dict():
            # the templates for hovering are ours and Optuna's, and name the texts that they show
            return {key: item if key == "hovertemplate" else as_plain(item) for key, item in value.items()}
        case list() | tuple():
            return [as_plain(item) for item in value]
        case np.ndarray():
            return as_plain(value.tolist())
        case int():
            return value if abs(value) < 2**53 else float(f"{value:.6g}")
        case _:
            number = float(value)
            return float(f"{number:.6g}") if math.isfinite(number) else None


def _grouped(shown: Sequence[CurveOf], best: int | None) -> Iterator[tuple[str, str, list[CurveOf]]]:
    for state, label in (("FAIL", "failed"), ("PRUNED", "pruned"), ("COMPLETE", "complete")):
        yield label, COLORS[state], [curve for curve in shown if curve.state == state and curve.number != best]
    yield f"best: trial {best}", COLORS["best"], [curve for curve in shown if curve.number == best]


def _line(shown: Sequence[CurveOf], metric: str) -> tuple[list[Any], list[Any], list[Any]]:
    """Return the curves as one line with gaps, which draws faster than a line each."""
    x: list[Any] = []
    y: list[Any] = []
    numbers: list[Any] = []
    for curve in shown:
        points = [(row["step"], row[metric]) for row in curve.rows if _is_number(row.get(metric))]
        if points:
            x += [*(step for step, _ in points), None]
            y += [*(value for _, value in points), None]
            numbers += [curve.number] * (len(points) + 1)
    return x[:-1], y[:-1], numbers[:-1]


def _recolored(figure: Any, trials: Sequence[FrozenTrial], direction: str) -> Any:
    """Give the lines of Optuna's parallel coordinates colours that can be seen on a dark page too."""
    lines = [trace for trace in figure.data if trace.mode == "lines" and len(trace.x) and trace.hoverinfo != "skip"]
    if len(lines) != len(trials):  # several objectives, by their Pareto rank
        return figure
    values = [first_value(trial) or 0.0 for trial in trials]
    order = sorted(range(len(values)), key=values.__getitem__, reverse=direction == "minimize")
    place = {trial: rank / max(1, len(order) - 1) for rank, trial in enumerate(order)}
    shades = plotly.colors.sample_colorscale(SCALE, [place[trial] for trial in range(len(lines))])
    for line, shade in zip(lines, shades, strict=True):
        line.line.color = shade
    figure.update_annotations(font_color=COLORS["rest"])
    figure.update_traces(
        marker_colorscale=SCALE, marker_reversescale=direction == "minimize", selector={"mode": "markers"}
    )
    return figure


def _by_importance(facts: Facts, trials: Sequence[FrozenTrial]) -> list[str]:
    told = list(facts.importances[0].params) if facts.importances else []
    return list(dict.fromkeys([*told, *(name for trial in trials for name in trial.params)]))


def _n_values(trials: Sequence[FrozenTrial], name: str) -> int:
    return len({trial.params[name] for trial in trials if name in trial.params})


def _is_reversed(facts: Facts) -> bool:
    return facts.study.directions[0] == "minimize"


def _of(few: Sequence[Any], all_: Sequence[Any], before: str = "") -> str:
    return f"{before}{len(few)} of {len(all_)} complete trials" if len(few) < len(all_) else ""


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
