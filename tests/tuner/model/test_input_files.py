"""Files of inputs: rows come in order, some at a time, and what is wrong is named by file, row and column."""

import io
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from manifests import a_manifest, an_input

from tuner.errors import TunerError, UsageError
from tuner.model import input_files
from tuner.model.input_files import Reader
from tuner.model.inputs import BadValueError, model_inputs

TWO = a_manifest(an_input(2))
ROWS = [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]


class Files:
    """Makes files and reads them for a model."""

    def __init__(self, directory):
        self.directory = directory
        self.notes = []

    def made(self, name, content):
        path = self.directory / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(content, newline="")
        return path

    def read(self, *paths, manifest=TWO, header=None, stdin=b"", resize=False):
        reader = Reader(
            manifest,
            header=header,
            resize=resize,
            stdin=io.BufferedReader(io.BytesIO(stdin)),
            note=self.notes.append,
        )
        return list(reader.chunks([str(path) for path in paths]))

    def rows(self, *paths, manifest=TWO, **how):
        return [
            row
            for chunk in self.read(*paths, manifest=manifest, **how)
            for row in model_inputs(chunk.given, manifest).tolist()
        ]

    def error(self, *paths, kind=TunerError, **how):
        with pytest.raises(kind) as caught:
            self._check(*paths, **how)
        return str(caught.value).replace(f"{self.directory}/", "")

    def _check(self, *paths, manifest=TWO, **how):
        for chunk in self.read(*paths, manifest=manifest, **how):
            try:
                model_inputs(chunk.given, manifest)
            except BadValueError as error:
                raise TunerError(chunk.told(error, manifest.inputs)) from error


@pytest.fixture
def files(tmp_path):
    return Files(tmp_path)


@pytest.fixture
def two_at_once(monkeypatch):
    monkeypatch.setattr(input_files, "AT_ONCE", 2)


def _npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def _npz(**arrays):
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


def _parquet(path, **columns):
    pq.write_table(pa.table(columns), path)
    return path


def test_rows_of_each_kind_of_file_are_the_same_and_come_some_at_a_time(files, two_at_once):
    files.made("a.npy", _npy(np.array(ROWS)))
    files.made("fortran.npy", _npy(np.asfortranarray(ROWS)))
    files.made("b.npz", _npz(whatever=np.array(ROWS, dtype=np.int8)))
    files.made("c.csv", "1,2\r\n\n 3 , 4e0\n5.0,6")
    files.made("named.csv", "\ufeffleft,right\n1,2\n3,4\n5,6\n")
    _parquet(files.directory / "d.parquet", left=[1, 3, 5], right=[2.0, 4.0, 6.0])
    for path in sorted(files.directory.iterdir()):
        chunks = files.read(path)
        assert [chunk.places for chunk in chunks] == [[(str(path), 0), (str(path), 1)], [(str(path), 2)]], path
        assert files.rows(path) == ROWS, path
    assert len(files.rows(files.directory)) == 6 * 3  # a folder is its files
    assert files.notes[-1].endswith("named.csv: the first line names the columns: left, right")
    assert files.read(files.directory / "c.csv")[1].lines == [4]
    for stdin in (_npy(np.array(ROWS)), b"1,2\n3,4\n5,6\n", b"left,right\n1,2\n3,4\n5,6\n"):
        assert files.rows("-", stdin=stdin) == ROWS


def test_columns_of_a_table_go_to_the_inputs_in_their_order(files):
    manifest = a_manifest(an_input(2, 1, name="x"), an_input(name="y", dtype="int64"))
    table = files.made("a.csv", "1,2,3\n4,5,6\n")
    (chunk,) = files.read(table, manifest=manifest)
    found = model_inputs(chunk.given, manifest)
    assert {name: its.tolist() for name, its in found.items()} == {"x": [[[1], [2]], [[4], [5]]], "y": [3, 6]}
    bad = files.made("bad.csv", "left,right,years\n1,2,3\n4,5,6.5\n")
    told = files.error(bad, manifest=manifest)
    assert re.search(r"bad.csv, row 1 \(line 3\), column 'years': needs whole numbers from .*, got 6.5", told)
    archive = files.made("b.npz", _npz(y=np.array([3, 6]), x=np.array([[[1], [2]], [[4], [5]]])))
    assert len(files.read(archive, manifest=manifest)) == 1


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("1,2\n3,x\n", "a.csv, row 1 (line 2), column '1': needs a number, got 'x'"),
        ("left,right\n1,\n", "a.csv, row 0 (line 2), column 'right': needs a number, got an empty cell"),
        ("left,right\n1,1_0\n", "a.csv, row 0 (line 2), column 'right': needs a number, got '1_0'"),
        ("left,right\n1,2\n3,nan\n", "a.csv, row 1 (line 3), column 'right': needs finite numbers, got nan"),
        ("1,2\n3\n", "a.csv, row 1 (line 2): needs 2 cells, got 1"),
        ("id,left,right\n1,2,3\n", "a.csv needs 2 columns, for [2], got 3: id, left, right"),
        ("1;2\n", "a.csv needs 2 columns, for [2], got 1: 1;2; cells are separated by commas"),
        ("", "a.csv needs at least one row, got none"),
        ("left,right\n", "a.csv needs at least one row below the names of its columns, got none"),
        ('"1,2\n', "cannot read a.csv: unexpected end of data"),
        (b"\xff\xfe1,2\n", "a.csv needs to be text in UTF-8, got byte 0xff"),
    ],
)
def test_what_is_wrong_with_csv_is_named(files, content, told):
    assert files.error(files.made("a.csv", content)) == told


def test_a_first_line_that_may_be_either_is_asked_about(files):
    pandas = files.made("a.csv", "0,1\n5,6\n")
    assert "as it counts from 0 to 1: --header or --no-header" in files.error(pandas, kind=UsageError)
    assert files.rows(pandas, header=True) == [[5, 6]]
    assert files.rows(pandas, header=False) == [[0, 1], [5, 6]]
    assert "as it has cells that are numbers and others: --header" in files.error(
        files.made("b.csv", "1,x\n5,6\n"), kind=UsageError
    )


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.npy", _npy(np.ones((4, 3))), "a.npy needs the shape (n, 2), got (4, 3)"),
        ("a.npy", _npy(np.ones(2)), "a.npy needs the shape (n, 2), got (2,); x[None] makes a batch of one row"),
        ("a.npy", _npy(np.ones((0, 2))), "a.npy needs at least one row, got none"),
        ("a.npy", _npy(np.array([[1, 2]]))[:-4], "cannot read a.npy: "),
        ("a.npy", _npy(np.array([[1, np.inf]])), "a.npy, row 0, place 1 of the row: needs finite numbers, got inf"),
        ("a.npy", b"1,2\n", "cannot read a.npy: it does not begin as a .npy file does"),
        ("a.npz", b"PK\x03\x04", "cannot read a.npz: it is no archive of arrays"),
        ("a.npz", _npz(a=np.ones((1, 2)), b=np.ones((1, 2))), "a.npz needs 1 arrays, got 'a', 'b'"),
        ("a.parquet", b"PAR1", "cannot read a.parquet: "),
        ("a.png", b"\x89PNG", "images need an input of pixels from 0 to 1, 16 or 255, and the range that this"),
    ],
)
def test_what_is_wrong_with_a_file_is_told(files, name, content, told):
    assert files.error(files.made(name, content)).startswith(told)


def test_nothing_is_unpickled(files):
    class Payload:
        def __reduce__(self):
            return pytest.fail, ("something was unpickled",)

    array = np.array([[Payload(), 1]], dtype=object)
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    archive = io.BytesIO()
    np.savez(archive, a=array)
    assert "cannot read a.npy" in files.error(files.made("a.npy", buffer.getvalue()))
    assert "cannot read b.npz: Object arrays cannot be loaded" in files.error(files.made("b.npz", archive.getvalue()))
    assert "cannot read -" in files.error("-", stdin=buffer.getvalue())


def test_what_is_wrong_with_parquet_is_named(files, monkeypatch):
    missing = _parquet(files.directory / "a.parquet", left=[1, 2], right=[1.0, None])
    assert files.error(missing) == "a.parquet, row 1, column 'right': needs a number, got none (null)"
    text = _parquet(files.directory / "b.parquet", left=[1], right=["x"])
    assert files.error(text).startswith("b.parquet, column 'right': needs numbers, got ")
    few = _parquet(files.directory / "c.parquet", left=[1])
    assert files.error(few) == "c.parquet needs 2 columns, for [2], got 1: left"
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    assert "b.parquet needs the package pyarrow: pip install 'tuner[parquet]'" in files.error(text)


def test_what_is_not_there_or_of_no_known_kind_is_told_before_anything_is_read(files):
    good = files.made("a.csv", "1,2\n")
    assert files.error(good, "nowhere.csv") == "there is no file nowhere.csv: give files, folders or - for stdin"
    assert "needs to be one of .npy, .npz, .csv" in files.error(files.made("a.txt", "1,2"), kind=UsageError)
    (files.directory / "empty").mkdir()
    assert files.error(files.directory / "empty").startswith("empty needs to hold a file of .npy")
    assert files.error("-", "-", kind=UsageError) == "stdin can be read once, got - twice"
    assert files.error("-", stdin=b"PAR1....") == "stdin needs to be .csv or .npy, got .parquet: give it as a file"
    assert files.rows(files.directory) == [[1, 2]]
    assert files.notes == [f"{files.directory}: 1 files of other kinds are left out"]
