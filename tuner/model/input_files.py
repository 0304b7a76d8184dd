"""Files of inputs, read some rows at a time: .npy, .npz, .csv, .parquet and images. Nothing is unpickled."""

from __future__ import annotations

import csv
import math
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from io import BufferedReader, TextIOWrapper
from itertools import chain, islice, takewhile
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from tuner.errors import TunerError, UsageError, first_line
from tuner.model.images import SUFFIXES as OF_IMAGES
from tuner.model.images import read_image
from tuner.model.inputs import BadValueError
from tuner.model.manifest import Manifest, TensorDescription

STDIN = "-"
AT_ONCE = 1024
"""How many rows are read at once at most, and how large they may be."""
AT_ONCE_BYTES = 1 << 24
SUFFIXES = (".npy", ".npz", ".csv", ".parquet", *OF_IMAGES)
_MAGIC_NPY = b"\x93NUMPY"
_MAGIC_OF_OTHERS = {b"PK\x03\x04": ".npz", b"PAR1": ".parquet", b"\x89PNG": ".png", b"\xff\xd8\xff": ".jpg"}

Array = np.ndarray[Any, Any]
Note = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Some rows as `model_inputs` takes them, and where each is from: the name of a file and the row in it, from 0.

    `columns` are those of a table, and `lines` where its rows are in the file, as editors count them.
    """

    given: Any
    places: Sequence[tuple[str, int]]
    columns: Sequence[str] = ()
    lines: Sequence[int] = ()

    def told(self, error: BadValueError, inputs: Sequence[TensorDescription]) -> str:
        """Return what is wrong with a value, by file, row, and column or place in the row."""
        where = self.where(error.row)
        if not self.columns:
            return f"{where}, place {error.place} of {_name_of(error.its)}the row: needs {error.problem}"
        before = list(takewhile(lambda its: its is not error.its, inputs))
        column = self.columns[sum(math.prod(its.shape) for its in before) + error.place]
        return f"{where}, column {column!r}: needs {error.problem}"

    def where(self, row: int) -> str:
        """Return where one of these rows is, counted from 0 among them, and in its file too."""
        file, number = self.places[row]
        return f"{file}, row {number}{f' (line {self.lines[row]})' if self.lines else ''}"


class Reader:
    """Reads files for the inputs of one model. `note` is told what was decided about a file."""

    def __init__(
        self, manifest: Manifest, *, header: bool | None, resize: bool, stdin: BufferedReader, note: Note
    ) -> None:
        self._inputs = manifest.inputs
        self._is_named = any(its.name is not None for its in manifest.inputs)
        self._header = header
        self._resize = resize
        self._stdin = stdin
        self._note = note
        self._sizes = [math.prod(its.shape) for its in manifest.inputs]
        self._at_once = max(1, min(AT_ONCE, AT_ONCE_BYTES // max(1, 8 * sum(self._sizes))))

    def chunks(self, paths: Sequence[str]) -> Iterator[Chunk]:
        """Yield the rows of all files, in order. Raises TunerError that names what cannot be read and why."""
        files = list(self._files(paths))
        while files:
            images = list(islice(_leading_images(files), self._at_once))
            if images:
                yield self._of_images(images)
                files = files[len(images) :]
                continue
            file, *files = files
            try:
                yield from self._of(file)
            except MemoryError as error:
                raise TunerError(f"there is no memory for the rows of {file}: give them in smaller files") from error

    def _files(self, paths: Sequence[str]) -> Iterator[str]:
        """Yield the files, those of folders by name. Raises TunerError for what is not there or of no known kind."""
        if paths.count(STDIN) > 1:
            raise UsageError("stdin can be read once, got - twice")
        for text in paths:
            path = Path(text)
            if text == STDIN:
                yield text
            elif path.is_dir():
                with _told(text):
                    found = sorted(its for its in path.iterdir() if its.is_file() and not its.name.startswith("."))
                known = [its for its in found if its.suffix.lower() in SUFFIXES]
                if not known:
                    raise TunerError(f"{path} needs to hold a file of {', '.join(SUFFIXES)}, got none")
                if len(found) > len(known):
                    self._note(f"{path}: {len(found) - len(known)} files of other kinds are left out")
                yield from map(str, known)
            elif not path.is_file():
                raise TunerError(f"there is no file {text}: give files, folders or - for stdin")
            elif path.suffix.lower() not in SUFFIXES:
                raise UsageError(f"{text} needs to be one of {', '.join(SUFFIXES)}, by its name: rename or convert it")
            else:
                yield text

    def _of(self, file: str) -> Iterator[Chunk]:
        if file == STDIN:
            yield from self._of_stdin()
            return
        suffix, path = Path(file).suffix.lower(), Path(file)
        if suffix == ".csv":
            with ExitStack() as opened:
                with _told(file):
                    lines = opened.enter_context(path.open(encoding="utf-8-sig", newline=""))
                yield from self._of_csv(file, lines)
        else:
            read = {".npy": self._of_npy, ".npz": self._of_npz, ".parquet": self._of_parquet}[suffix]
            yield from read(file, path)

    def _of_stdin(self) -> Iterator[Chunk]:
        start = self._stdin.peek(8)
        for magic, kind in _MAGIC_OF_OTHERS.items():
            if start.startswith(magic):
                raise TunerError(f"stdin needs to be .csv or .npy, got {kind}: give it as a file")
        if start.startswith(_MAGIC_NPY):
            with tempfile.NamedTemporaryFile(suffix=".npy") as kept:  # a pipe cannot be mapped into memory
                with _told(STDIN):
                    shutil.copyfileobj(self._stdin, kept)
                    kept.flush()
                yield from self._of_npy(STDIN, Path(kept.name))
            return
        yield from self._of_csv(STDIN, TextIOWrapper(self._stdin, encoding="utf-8-sig", newline=""))

    def _of_npy(self, file: str, path: Path) -> Iterator[Chunk]:
        with _told(file):
            with path.open("rb") as opened:
                if opened.read(len(_MAGIC_NPY)) != _MAGIC_NPY:
                    raise ValueError("it does not begin as a .npy file does")
            array = np.lib.format.open_memmap(path, mode="r")
        if len(self._inputs) != 1:
            raise TunerError(f"{file} has one array, and the model {len(self._inputs)} inputs: give a .npz of them")
        yield from self._of_arrays(file, [array])

    def _of_npz(self, file: str, path: Path) -> Iterator[Chunk]:
        with ExitStack() as opened, _told(file):
            if not zipfile.is_zipfile(path):
                raise ValueError("it is no archive of arrays")
            archive = opened.enter_context(np.load(path, allow_pickle=False))
            names = list(archive.files)
            wanted = [its.name for its in self._inputs if its.name is not None]
            is_by_name = self._is_named and not (len(wanted) == len(names) == 1)
            if (is_by_name and set(names) != set(wanted)) or len(names) != len(self._inputs):
                shown = ", ".join(map(repr, wanted)) if self._is_named else f"{len(self._inputs)} arrays"
                raise TunerError(f"{file} needs {shown}, got {', '.join(map(repr, names)) or 'none'}")
            arrays = [archive[name] for name in (wanted if is_by_name else names)]
        yield from self._of_arrays(file, arrays)

    def _of_arrays(self, file: str, arrays: Sequence[Array]) -> Iterator[Chunk]:
        for array, its in zip(arrays, self._inputs, strict=True):
            if not isinstance(array, np.ndarray) or tuple(array.shape[1:]) != its.shape or array.ndim == 0:
                name = "" if its.name is None else f" for {its.name!r}"
                found = tuple(array.shape) if isinstance(array, np.ndarray) else type(array).__name__
                hint = "; x[None] makes a batch of one row" if found == its.shape else ""
                wanted = ", ".join(["n", *map(str, its.shape)])
                raise TunerError(f"{file} needs the shape ({wanted}){name}, got {found}{hint}")
        lengths = [len(array) for array in arrays]
        if len(set(lengths)) > 1:
            raise TunerError(f"{file} needs arrays of the same number of rows, got {', '.join(map(str, lengths))}")
        if not lengths[0]:
            raise TunerError(f"{file} needs at least one row, got none")
        for start in range(0, lengths[0], self._at_once):
            parts = [array[start : start + self._at_once] for array in arrays]
            yield Chunk(given=self._form(parts), places=[(file, start + row) for row in range(len(parts[0]))])

    def _of_csv(self, file: str, lines: TextIO) -> Iterator[Chunk]:
        rows = _rows_of_csv(file, lines)
        first = next(rows, None)
        if first is None:
            raise TunerError(f"{file} needs at least one row, got none")
        columns = [str(number) for number in range(len(first[0]))]
        if self._has_header(file, first[0]):
            columns = [cell.strip() for cell in first[0]]
            self._note(f"{file}: the first line names the columns: {_some_of(columns)}")
        else:
            rows = chain([first], rows)
        self._check_columns(file, columns)
        done = 0
        while taken := list(islice(rows, self._at_once)):
            cells = np.empty((len(taken), len(columns)))
            for number, (texts, line) in enumerate(taken):
                cells[number] = _numbers(texts, columns, f"{file}, row {done + number} (line {line})")
            yield Chunk(
                given=self._of_table(cells),
                places=[(file, done + number) for number in range(len(taken))],
                columns=columns,
                lines=[line for _, line in taken],
            )
            done += len(taken)
        if not done:
            raise TunerError(f"{file} needs at least one row below the names of its columns, got none")

    def _has_header(self, file: str, cells: Sequence[str]) -> bool:
        """Whether the first line is names of columns. Raises UsageError where that is not sure and not said."""
        if self._header is not None:
            return self._header
        numbers = [_is_number(cell) for cell in cells]
        counts = [str(number) for number in range(len(cells))]
        is_counting = len(cells) > 1 and [cell.strip() for cell in cells] == counts
        if not any(numbers):
            return True
        if all(numbers) and not is_counting:
            return False
        found = f"it counts from 0 to {len(cells) - 1}" if is_counting else "it has cells that are numbers and others"
        raise UsageError(f"{file} may begin with names of columns or with a row, as {found}: --header or --no-header")

    def _of_parquet(self, file: str, path: Path) -> Iterator[Chunk]:
        try:
            import pyarrow as pa
            import pyarrow.parquet as pq
        except ImportError as error:
            raise TunerError(f"{file} needs the package pyarrow: pip install 'tuner[parquet]' ({error})") from error
        done = 0
        with ExitStack() as opened:
            with _told(file):
                table = opened.enter_context(pq.ParquetFile(path))
            columns = [field.name for field in table.schema_arrow]
            self._check_columns(file, columns)
            for field in table.schema_arrow:
                kind = field.type
                if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)):
                    raise TunerError(f"{file}, column {field.name!r}: needs numbers, got {kind}")
            batches = table.iter_batches(batch_size=self._at_once)
            while True:
                with _told(file):
                    batch = next(batches, None)
                if batch is None:
                    break
                if not batch.num_rows:
                    continue
                for name, column in zip(columns, batch.columns, strict=True):
                    if column.null_count:
                        row = done + int(np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False))[0])
                        raise TunerError(f"{file}, row {row}, column {name!r}: needs a number, got none (null)")
                cells = np.stack([column.to_numpy(zero_copy_only=False).astype(float) for column in batch.columns], 1)
                places = [(file, done + row) for row in range(len(cells))]
                yield Chunk(given=self._of_table(cells), places=places, columns=columns)
                done += len(cells)
        if not done:
            raise TunerError(f"{file} needs at least one row, got none")

    def _of_images(self, files: Sequence[str]) -> Chunk:
        if len(self._inputs) != 1:
            raise TunerError(f"images are for a model of one input, this one has {len(self._inputs)}: give a .npz")
        rows = [read_image(Path(file), self._inputs[0], resize=self._resize) for file in files]
        return Chunk(given=self._form([np.stack(rows)]), places=[(file, 0) for file in files])

    def _check_columns(self, file: str, columns: Sequence[str]) -> None:
        if len(columns) == sum(self._sizes):
            return
        shapes = " and ".join(f"{_name_of(its)}{list(its.shape)}" for its in self._inputs)
        hint = "; cells are separated by commas" if len(columns) == 1 and ";" in columns[0] else ""
        raise TunerError(
            f"{file} needs {sum(self._sizes)} columns, for {shapes}, got {len(columns)}: {_some_of(columns)}{hint}"
        )

    def _of_table(self, cells: Array) -> Any:
        """Return the columns of a table as inputs, each with as many as it has numbers, in the manifest's order."""
        ends = np.cumsum(self._sizes)[:-1]
        parts = np.split(cells, ends, axis=1)
        return self._form([part.reshape(-1, *its.shape) for part, its in zip(parts, self._inputs, strict=True)])

    def _form(self, arrays: Sequence[Array]) -> Any:
        if self._is_named:
            return {its.name: array for its, array in zip(self._inputs, arrays, strict=True)}
        return arrays[0] if len(arrays) == 1 else tuple(arrays)


@contextmanager
def _told(file: str) -> Iterator[None]:
    """Tell what reading a file raises in the block in one line that names the file."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise TunerError(f"{file} needs to be text in UTF-8, got byte {error.object[error.start]:#x}") from error
    except (OSError, ValueError, EOFError, csv.Error, zipfile.BadZipFile, zlib.error, RuntimeError) as error:
        shown = (error.strerror if isinstance(error, OSError) else None) or first_line(error)
        raise TunerError(f"cannot read {file}: {shown}") from error


def _rows_of_csv(file: str, lines: TextIO) -> Iterator[tuple[list[str], int]]:
    """Yield the rows that are not empty, each with the number of its line, from 1."""
    reader = csv.reader(lines, strict=True)
    with _told(file):
        for row in reader:
            if row:
                yield row, reader.line_num


def _number(cell: str) -> float:
    """Return the number in a cell. Raises ValueError where Python alone would take it for one."""
    if "_" in cell:
        raise ValueError(cell)
    return float(cell)


def _numbers(texts: Sequence[str], columns: Sequence[str], where: str) -> list[float]:
    """Return the numbers of a row. Raises TunerError that names the column of what is none."""
    if len(texts) != len(columns):
        raise TunerError(f"{where}: needs {len(columns)} cells, got {len(texts)}")
    try:
        return [_number(text) for text in texts]
    except ValueError:
        column, text = next(pair for pair in zip(columns, texts, strict=True) if not _is_number(pair[1]))
        found = repr(text) if text.strip() else "an empty cell"
        raise TunerError(f"{where}, column {column!r}: needs a number, got {found}") from None


def _is_number(cell: str) -> bool:
    try:
        _number(cell)
    except ValueError:
        return False
    return True


def _leading_images(files: Sequence[str]) -> Iterator[str]:
    return takewhile(lambda file: file != STDIN and file.lower().endswith(OF_IMAGES), files)


def _some_of(columns: Sequence[str]) -> str:
    return f"{', '.join(columns[:8])}{', ...' if len(columns) > 8 else ''}"


def _name_of(its: TensorDescription) -> str:
    return "" if its.name is None else f"{its.name!r} "
