"""`tuner export` and `verify`: from the best trial to a model on disk, and whether it is what it says."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tuner.api.exporting import Wish, export_named
from tuner.api.reading import best_fields, best_fields_of
from tuner.cli.settings import Settings, command
from tuner.cli.streams import say
from tuner.errors import TunerError, UsageError

OBJECTIVE_HELP = "The study's objective, where it is not an installed one."

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from tuner.model.export import Exported
    from tuner.model.manifest import FormatCheck, Manifest
    from tuner.study.joining import Study


@command
def export(
    settings: Settings,
    study: Annotated[str, typer.Argument(metavar="STUDY", help="Name of the study.")],
    output: Annotated[
        Path | None,
        typer.Option(help="Directory for the model (default: in models/ of the data directory)."),
    ] = None,
    objective: Annotated[
        str | None,
        typer.Option(metavar="path/to/file.py:NAME", help=OBJECTIVE_HELP),
    ] = None,
    device: Annotated[str | None, typer.Option(help="cuda, xpu, mps or cpu (default: the best there is).")] = None,
    formats: Annotated[
        str,
        typer.Option(
            metavar="NAME,...", help="What to write: safetensors (always), pt2, onnx, torchscript, aoti (compiled)."
        ),
    ] = "safetensors,pt2",
    trial: Annotated[
        int | None,
        typer.Option(metavar="NUMBER", help="Export this trial (default: the confirmed one, else the best)."),
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(help="Epochs to train for (default: until the best one of the trial).")
    ] = None,
    full_schedule: Annotated[
        bool,
        typer.Option("--full-schedule", help="Train for all of the study's epochs, not only until the best one."),
    ] = False,
    allow_code_change: Annotated[
        bool,
        typer.Option("--allow-code-change", help="Go on although the objective's code is not the study's."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Retrain the best trial of STUDY on train + valid, evaluate it on test and write the model.

    Where tuner confirm has chosen one, it is that. A plain function's model is written as the trial kept it.
    """
    from tuner.study.joining import open_study
    from tuner.study.registry import find_objective

    wish = Wish(
        output=output,
        device=device,
        formats=[name.strip() for name in formats.split(",")],
        trial=trial,
        epochs=epochs,
        full_schedule=full_schedule,
    )
    wish.check()
    engine = settings.open()
    opened = open_study(engine, study)
    log = settings.log(study=opened.name)
    source = None if objective is None else find_objective(objective)
    exported, link = export_named(settings, engine, opened, source, wish, log, allow_code_change=allow_code_change)
    print_exported(settings, engine, opened, exported, as_json=as_json, link=link, with_formats=True)


@command
def verify(
    settings: Settings,
    directory: Annotated[Path, typer.Argument(metavar="DIRECTORY", help="An export's.")],
    formats: Annotated[
        str,
        typer.Option(
            metavar="NAME,...",
            help="Call these against model.pt2, too: torchscript, aoti, which run code of who made the export.",
        ),
    ] = "",
    metrics: Annotated[
        bool,
        typer.Option("--metrics", help="Evaluate on the test split again, by the objective's code and data."),
    ] = False,
    objective: Annotated[
        str | None,
        typer.Option(metavar="path/to/file.py:NAME", help="The export's objective, where it is not an installed one."),
    ] = None,
    allow_code_change: Annotated[
        bool,
        typer.Option("--allow-code-change", help="Evaluate although the objective's code is not the export's."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was checked as JSON.")] = False,
) -> None:
    """Check the export in DIRECTORY against its manifest: hashes, weights against program, and calls of each format."""
    from tuner.cli.reading import print_json
    from tuner.formats.names import chosen
    from tuner.model.verifying import verify as verify_

    if objective is not None and not metrics:
        raise UsageError("--objective is for --metrics, which runs its code; without it none is run")
    named = [name for name in chosen(formats) if name not in ("safetensors", "pt2")] if formats else []
    checks = verify_(directory, named)
    if metrics and all(check.problem is None for check in checks):
        from tuner.model.measuring import measure, source_of

        source = source_of(directory, objective)
        checks += measure(directory, source, data_dir=settings.own_data_dir(), allow_code_change=allow_code_change)
    if as_json:
        print_json([asdict(check) for check in checks])
    else:
        for check in checks:
            say(f"{check.name}: {'ok' if check.problem is None else check.problem}")
    if wrong := [check for check in checks if check.problem is not None]:
        raise TunerError(f"{directory} is not what its manifest says: {wrong[0].name}: {wrong[0].problem}")


def print_exported(
    settings: Settings,
    engine: Engine,
    study: Study,
    exported: Exported | None,
    *,
    as_json: bool,
    link: Path | None = None,
    with_formats: bool = False,
    confirmation: dict[str, Any] | None = None,
) -> None:
    """Print the exported trial or else the best one, its figures, and where the model lies, with the `link` to it.

    If so it is wanted, how each format compares, too. With `--json` the `confirmation` that came before, too.
    """
    from tuner.cli.reading import print_json
    from tuner.text import number_text, params_text

    best = found = best_fields(engine, study)
    label, confirmed = "best trial", None
    if exported is not None:
        best, confirmed = best_fields_of(study, exported.trial), exported.manifest.confirmed
        label = "best trial" if best["number"] == found["number"] else "trial"
    test = None if exported is None else exported.manifest.test
    if as_json:
        model = None if exported is None else str(exported.directory)
        missing = None if exported is None else exported.manifest.missing
        chosen = None if confirmed is None else confirmed.model_dump(mode="json")
        formats = None if exported is None else exported.manifest.model_dump(mode="json")["formats"]
        fields = {**best, "test": test, "model": model, "formats": formats, "missing": missing, "confirmed": chosen}
        print_json(fields if confirmation is None else {**fields, "confirmation": confirmation})
        return
    lines: list[tuple[str, Any]] = [
        ("confirmed trial" if confirmed else label, f"{best['number']} of study {study.name}"),
        ("params", params_text(best["params"])),
        (f"validation {best['metric']}", number_text(best["value"])),
    ]
    if confirmed is not None:
        lines.append((f"mean of {confirmed.runs} runs", f"{number_text(confirmed.mean)} on fresh seeds"))
    if exported is not None:
        lines += [(f"test {name}", _test_text(exported.manifest, name)) for name in exported.manifest.test]
        if before := exported.manifest.tested_before:
            lines.append(
                ("test split", f"used {len(before)} times before, with other weights: the figures may be too good")
            )
        lines.append(("model", exported.directory))
        if link is not None:
            lines.append(("as well", link))
        if with_formats:
            lines += [(its.file, _format_text(its)) for its in exported.manifest.formats.values()]
        lines += [(f"without {name}", reason) for name, reason in exported.manifest.missing.items()]
    lines.append(("dashboard", f"tuner dashboard{settings.options()}"))
    width = max(len(name) for name, _ in lines) + 2
    for name, value in lines:
        say(f"{name:<{width}}{value}")


def _format_text(its: FormatCheck) -> str:
    from tuner.text import number_text

    took = " and ".join(f"{number_text(ms)} ms for {rows}" for rows, ms in its.latency_ms.items())
    return f"{its.bytes} bytes, differs by {number_text(its.relative_difference)} at most, {took} rows"


def _test_text(manifest: Manifest, name: str) -> str:
    from tuner.text import number_text

    details = manifest.test_details
    interval = None if details is None else details.intervals.get(name)
    text = number_text(manifest.test[name])
    return text if interval is None else f"{text} (95 %: {number_text(interval[0])} to {number_text(interval[1])})"
