"""`tuner predict`: what an exported model says of files of inputs."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

import typer

from tuner.cli.settings import Settings, command
from tuner.cli.streams import say
from tuner.errors import TunerError, UsageError
from tuner.text import number_text, printable

if TYPE_CHECKING:
    from tuner.model.input_files import Chunk
    from tuner.model.loading import LoadedModel
    from tuner.model.predicting import Answer

Format: TypeAlias = Literal["table", "csv", "json"]
_BY_SUFFIX: dict[str, Format] = {".csv": "csv", ".json": "json", ".jsonl": "json"}


@command
def predict(
    settings: Settings,
    directory: Annotated[Path, typer.Argument(metavar="DIRECTORY", help="An export's.")],
    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="INPUT...", help=".npy, .npz, .csv, .parquet, .png, .jpg, a folder of them, or - (stdin)."
        ),
    ],
    top_k: Annotated[int | None, typer.Option(metavar="K", help="Tell the K most probable classes.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a line of JSON for each row.")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV.")] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write to this file, once all is done.")] = None,
    header: Annotated[
        bool | None,
        typer.Option("--header/--no-header", help="Whether the first line of CSV is names (default: as it looks)."),
    ] = None,
    resize: Annotated[bool, typer.Option("--resize", help="Fit images of other sizes to the model's input.")] = False,
) -> None:
    """Tell what the model in DIRECTORY predicts for each row of the inputs."""
    if as_json and as_csv:
        raise UsageError("predict prints JSON or CSV, got --json and --csv")
    if top_k is not None and top_k < 1:
        raise UsageError(f"--top-k needs a whole number above 0, got {top_k}")
    if output is not None and any(_is_same(output, text) for text in inputs):
        raise UsageError(f"--output needs another file than the inputs, got {output}")
    chosen: Format = "json" if as_json else "csv" if as_csv else "table"
    if output is not None and chosen == "table":
        chosen = _BY_SUFFIX.get(output.suffix.lower(), "table")
    from tuner.model.input_files import Reader
    from tuner.model.loading import load_model

    log = settings.log()

    def note(text: str) -> None:
        log.event("note", text)

    model = load_model(directory)
    write = _Writer(chosen)
    with open(sys.stdin.fileno(), "rb", closefd=False) as stdin, _output(output) as put:
        reader = Reader(model.manifest, header=header, resize=resize, stdin=stdin, note=note)
        for rows in _rows(model, reader.chunks(inputs), top_k, note):
            put(write(rows))


def _rows(
    model: LoadedModel, chunks: Iterator[Chunk], k: int | None, note: Callable[[str], None]
) -> Iterator[list[dict[str, Any]]]:
    """Yield what is said of some rows at a time, each as JSON has it; of several targets by name."""
    from tuner.model.inputs import BadValueError, far_out, model_inputs
    from tuner.model.predicting import BadOutputError, answers, outputs_of

    is_told = False
    for chunk in chunks:
        try:
            inputs = model_inputs(chunk.given, model.manifest)
            if not is_told and (told := far_out(inputs, model.manifest)) is not None:
                is_told = True
                note(f"{chunk.places[0][0]}: {told}")
            found = answers(outputs_of(model, inputs), model.manifest)
            if k is not None and all(answer.kind == "number" for answer in found):
                raise UsageError("--top-k is for models of classes, this one gives numbers")
            columns = [(answer.target, _said(answer, k)) for answer in found]
        except BadValueError as error:
            raise TunerError(chunk.told(error, model.manifest.inputs)) from error
        except BadOutputError as error:
            raise TunerError(f"{chunk.where(error.row)}: {error.problem}") from error
        is_one = len(found) == 1 and not found[0].target
        yield [
            {"input": file, "row": row}
            | (columns[0][1][number] if is_one else {"predictions": {name: its[number] for name, its in columns}})
            for number, (file, row) in enumerate(chunk.places)
        ]


def _said(answer: Answer, k: int | None) -> list[dict[str, Any]]:
    """Return what is said of each row for one target."""
    predicted = answer.predictions()
    said = [{"prediction": its} for its in (predicted if isinstance(predicted, list) else predicted.tolist())]
    if answer.kind == "number" or (k is None and (answer.has_places or not answer.has_probabilities)):
        return said
    for one, ranked in zip(said, answer.top(k or 1), strict=True):
        if answer.kind != "multilabel":
            one["probability"] = ranked[0][1]
        if k is not None:
            one["top"] = [{"class": name, "probability": share} for name, share in ranked]
    return said


class _Writer:
    """Makes text of rows: the names of the columns come with the first."""

    def __init__(self, chosen: Format) -> None:
        self._chosen = chosen
        self._names: list[str] = []
        self._widths: list[int] = []

    def __call__(self, rows: Sequence[dict[str, Any]]) -> list[str]:
        """Return the lines of these rows."""
        if self._chosen == "json":
            return [json.dumps(row, allow_nan=False) for row in rows]
        table = [dict(_cells(row)) for row in rows]
        head = [] if self._names else [list(table[0])]
        self._names = self._names or list(table[0])
        values = [[row[name] for name in self._names] for row in table]
        if self._chosen == "csv":
            text = io.StringIO()
            writer = csv.writer(text, lineterminator="\n")
            writer.writerows([printable(its) if isinstance(its, str) else its for its in row] for row in head + values)
            return text.getvalue().splitlines()
        texts = [
            [number_text(its) if isinstance(its, float) else printable(str(its)) for its in row]
            for row in head + values
        ]
        self._widths = self._widths or [max(map(len, column)) for column in zip(*texts, strict=True)]
        return ["  ".join(map(str.ljust, row, self._widths)).rstrip() for row in texts]


def _cells(row: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield a row's columns: ranks from the second on, and numbers of one row, are numbered; what else is no single
    value is JSON."""
    yield "input", row["input"]
    yield "row", row["row"]
    for target, said in row.get("predictions", {"": row}).items():
        prefix = f"{target}_" if target else ""
        predicted = said["prediction"]
        if isinstance(predicted, list) and all(isinstance(its, float | int) for its in predicted):
            yield from ((f"{prefix}prediction_{place}", its) for place, its in enumerate(predicted))
        else:
            is_one = isinstance(predicted, str | float | int)
            yield f"{prefix}prediction", predicted if is_one else json.dumps(predicted)
        if "probability" in said:
            yield f"{prefix}probability", said["probability"]
        first = 1 if "probability" in said else 0
        for rank, its in enumerate(said.get("top", [])[first:], start=first + 1):
            yield f"{prefix}prediction_{rank}", its["class"]
            yield f"{prefix}probability_{rank}", its["probability"]


@contextmanager
def _output(path: Path | None) -> Iterator[Callable[[list[str]], None]]:
    """Yield what takes lines: for stdout, or for a file that is there as a whole once the block has ended."""
    if path is None:
        yield lambda lines: say(*lines)
        return
    from storage.files import whole_file

    if path.is_dir():
        raise UsageError(f"--output needs a file, got the directory {path}")
    try:
        with whole_file(path) as file:
            yield lambda lines: file.writelines(f"{line}\n" for line in lines)
    except OSError as error:
        raise TunerError(f"cannot write to {path}: {error.strerror or error}; choose another --output") from error


def _is_same(output: Path, text: str) -> bool:
    return text != "-" and output.exists() and Path(text).exists() and output.samefile(text)
