"""`tuner show` and `compare`: what a study was created with, and how several compare."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tuner.api.reading import best_fields_of
from tuner.cli.reading import AsJson, print_json
from tuner.cli.settings import Settings, command
from tuner.cli.streams import say
from tuner.errors import UsageError
from tuner.text import duration, number_text, table

if TYPE_CHECKING:
    from tuner.spec import PrunerSpec, SamplerSpec
    from tuner.study.comparison import Compared
    from tuner.study.joining import AnyStudy


@command
def show(
    settings: Settings,
    study: Annotated[
        str, typer.Argument(metavar="STUDY|DIRECTORY/", help="Name of the study, or an export's directory with its /.")
    ],
    as_json: AsJson = False,
) -> None:
    """Show all that STUDY was created with, or the manifest of the export in DIRECTORY/."""
    if _is_directory(study):
        from tuner.model.directory import current
        from tuner.model.manifest import read_manifest

        manifest = read_manifest(current(Path(study)))
        if as_json:
            print_json(manifest.model_dump(mode="json"))
        else:
            told = manifest.model_dump(mode="json", exclude={"learning_curve"})
            for of_test in ("wrong", "right"):
                (told["test_details"] or {}).pop(of_test, None)
            _print_rows(list(_leaves(told, at_top=())))
        return
    from tuner.study.joining import find_study

    found = find_study(settings.open(), study)
    fields = _spec_fields(found)
    if as_json:
        print_json(fields)
        return
    spec = fields.pop("spec")
    rows = [(name, "-" if value is None else str(value)) for name, value in fields.items()]
    rows += [("spec", "none: not created by tuner")] if spec is None else list(_leaves(spec))
    _print_rows(rows)


def _is_directory(text: str) -> bool:
    """Whether a path of an export is meant and no study, whose name may have a / as well."""
    is_path = text.startswith(("/", "./", "../")) or text.endswith("/") or text in (".", "..")
    return is_path or ("/" in text and (Path(text) / "manifest.json").is_file())


def _print_rows(rows: Sequence[tuple[str, str]]) -> None:
    width = max(len(name) for name, _ in rows)
    for name, text in rows:
        say(f"{name:<{width}}  {text}")


@command
def compare(
    settings: Settings,
    studies: Annotated[list[str], typer.Argument(metavar="STUDY...", help="Names of two studies or more.")],
    as_json: AsJson = False,
) -> None:
    """Compare studies: sampler, pruner, seed, best value and cost, and how soon each came to its best."""
    from tuner.study import comparison
    from tuner.study.joining import find_study

    if len(studies) < 2:
        raise UsageError(f"compare needs two studies or more, got {studies[0]!r}; 'tuner show' shows one")
    engine = settings.open()
    found = comparison.compare(engine, [find_study(engine, name) for name in studies])
    longest_s = max(one.device_s for one in found)
    by_budget = [(share, [one.best_at_share(share) for one in found]) for share in comparison.SHARES]
    times = [share * longest_s for share in comparison.SHARES] if longest_s else []
    by_time = [(device_s, [one.best_within(device_s) for one in found]) for device_s in times]
    if as_json:
        print_json(
            {
                "studies": [_fields(one) for one in found],
                "by_budget": [{"share": share, "best": best} for share, best in by_budget],
                "by_device_s": [{"device_s": device_s, "best": best} for device_s, best in by_time],
            }
        )
        return
    rows = [[name, *(_texts(one)[name] for one in found)] for name in _texts(found[0])]
    rows.append(["best after, of the budget", *[""] * len(found)])
    rows += [[f"  {share:.0%}", *map(number_text, best)] for share, best in by_budget]
    rows.append(["best within, of devices' time", *[""] * len(found)])
    rows += [[f"  {_time(device_s)}", *map(number_text, best)] for device_s, best in by_time]
    for line in table(["study", *(one.status.study.name for one in found)], rows):
        say(line)


def _spec_fields(study: AnyStudy) -> dict[str, Any]:
    return {
        "study": study.name,
        "study_id": study.study_id,
        "created_at": None if study.created_at is None else study.created_at.isoformat(timespec="seconds"),
        "metric": ", ".join(study.metrics),
        "direction": ", ".join(study.directions),
        "spec": None if study.spec is None else study.spec.model_dump(mode="json"),
    }


def _leaves(
    tree: dict[str, Any], prefix: str = "", at_top: Sequence[str] = ("metric", "direction")
) -> Iterator[tuple[str, str]]:
    """Yield the settings by dotted names, but for those `at_top`, which are said above them."""
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        elif prefix or name not in at_top:
            text = value if isinstance(value, str) else "none" if value in (None, {}) else json.dumps(value)
            yield prefix + name, text[:12] if name == "code_hash" else text


def _texts(one: Compared) -> dict[str, str]:
    status, study = one.status, one.status.study
    spec, counts = study.spec, one.status.counts
    return {
        "objective": "-" if spec is None else spec.objective.name,
        "optimizes": study.goal,
        "sampler": "-" if spec is None else _choice(spec.sampler),
        "pruner": "-" if spec is None else _choice(spec.pruner),
        "seed": "-" if spec is None else str(spec.seed),
        "state": status.state,
        "trials": str(counts.done) if spec is None else f"{counts.done}/{spec.budget.trials}",
        "pruned": str(counts.pruned),
        "failed": str(counts.failed),
        "best": number_text(None if status.best is None else status.best.value),
        "best trial": "-" if status.best is None else str(status.best.number),
        "cost": _time(sum(asdict(status.cost).values())),
    }


def _choice(spec: SamplerSpec | PrunerSpec) -> str:
    """Return a sampler or pruner as it was chosen; what a grid holds, `tuner show` tells."""
    settings = ",".join(f"{name}={json.dumps(value)}" for name, value in spec.settings.items())
    return spec.name if not settings or spec.name == "grid" else f"{spec.name}:{settings}"


def _time(seconds: float) -> str:
    return duration(seconds) if seconds >= 10 else f"{seconds:.1f} s"


def _fields(one: Compared) -> dict[str, Any]:
    status, study = one.status, one.status.study
    curve: Sequence[dict[str, Any]] = [asdict(point) for point in one.curve]
    return {
        **_spec_fields(study),
        "state": status.state,
        "trials": asdict(status.counts),
        "best": None if status.best is None else best_fields_of(study, status.best),
        "device_seconds": asdict(status.cost),
        "curve": curve,
    }
