"""`tuner predict` on an export that is kept: what it prints, and where it writes."""

import csv
import io
import json
import os
import stat
from pathlib import Path

import numpy as np
import pytest
from manifests import a_manifest, an_output
from sklearn.datasets import load_digits
from torch import nn, tensor

from tuner.cli.app import make_app
from tuner.cli.predicting import _cells, _rows, _Writer
from tuner.errors import TunerError, UsageError
from tuner.model.input_files import Chunk

MODEL = Path(__file__).parents[2] / "fixtures" / "0.1.0" / "model"
DIGITS = load_digits().data


@pytest.fixture
def predict(tmp_path, monkeypatch, capsys):
    """Run the command in this process, in a directory of its own; what it prints comes back."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TUNER_LOG_FORMAT", raising=False)
    np.save("rows.npy", DIGITS[:3])

    def run(*arguments, stdin=b""):
        Path("stdin").write_bytes(stdin)
        with open("stdin") as opened:
            monkeypatch.setattr("sys.stdin", opened)
            make_app("predict")(["predict", str(MODEL), *map(str, arguments)], standalone_mode=False)
        printed = capsys.readouterr()
        run.told = printed.err
        return printed.out

    return run


def test_rows_are_a_table_lines_of_json_or_csv(predict):
    table = predict("rows.npy").splitlines()
    assert table[0].split() == ["input", "row", "prediction", "probability"]
    assert [line.split()[:3] for line in table[1:]] == [
        ["rows.npy", "0", "0"],
        ["rows.npy", "1", "1"],
        ["rows.npy", "2", "1"],
    ]
    lines = [json.loads(line) for line in predict("rows.npy", "--json", "--top-k", "2").splitlines()]
    assert lines[1] == {
        "input": "rows.npy",
        "row": 1,
        "prediction": "1",
        "probability": pytest.approx(0.6071, abs=1e-3),
        "top": [
            {"class": "1", "probability": pytest.approx(0.6071, abs=1e-3)},
            {"class": "8", "probability": pytest.approx(0.2622, abs=1e-3)},
        ],
    }
    as_csv = list(csv.DictReader(io.StringIO(predict("rows.npy", "--csv", "--top-k", "2"))))
    assert list(as_csv[0]) == ["input", "row", "prediction", "probability", "prediction_2", "probability_2"]
    assert float(as_csv[1]["probability_2"]) == lines[1]["top"][1]["probability"]
    text = b"\n".join(b",".join(b"%g" % its for its in row) for row in DIGITS[:3])
    assert predict("-", stdin=text).splitlines()[2].split()[:3] == ["-", "1", "1"]


def test_values_far_from_those_of_training_are_told_once(predict, monkeypatch):
    with_range = json.loads((MODEL / "manifest.json").read_text())
    with_range["inputs"][0]["seen"] = [0, 16]
    copy = Path("copy")
    copy.mkdir()
    for name in ("model.pt2", "model.safetensors"):
        (copy / name).symlink_to(MODEL / name)
    (copy / "manifest.json").write_text(json.dumps(with_range))
    monkeypatch.setattr(f"{__name__}.MODEL", copy)
    np.save("far.npy", DIGITS[:2000] * 100)
    predict("far.npy", "far.npy")
    assert predict.told.count("far.npy: the input goes from 0 to 1600, in the training split it went from 0 to 16") == 1
    predict("rows.npy")
    assert predict.told == ""


def test_a_file_is_written_once_all_is_done_and_is_what_its_name_says(predict, tmp_path):
    output = Path("out.csv")
    output.write_text("before")
    output.chmod(0o600)
    Path("link.csv").symlink_to("out.csv")
    Path("bad.csv").write_text("1,2\n")
    with pytest.raises(TunerError, match=r"bad\.csv needs 64 columns"):
        predict("rows.npy", "bad.csv", "-o", "link.csv")
    assert output.read_text() == "before"
    assert predict("rows.npy", "-o", "link.csv") == ""
    assert output.read_text().splitlines()[0] == "input,row,prediction,probability"
    assert (stat.S_IMODE(output.stat().st_mode), Path("link.csv").is_symlink()) == (0o600, True)
    predict("rows.npy", "-o", "out.jsonl")
    assert json.loads(Path("out.jsonl").read_text().splitlines()[2])["row"] == 2
    predict("rows.npy", "-o", os.devnull)
    assert not Path(os.devnull).is_file()
    assert not [name for name in os.listdir() if name.startswith(".tuner")]


@pytest.mark.parametrize(
    ("arguments", "kind", "told"),
    [
        (["rows.npy", "--json", "--csv"], UsageError, "got --json and --csv"),
        (["rows.npy", "--top-k", "0"], UsageError, "--top-k needs a whole number above 0, got 0"),
        (["rows.npy", "-o", "rows.npy"], UsageError, "another file than the inputs"),
        (["rows.npy", "-o", "."], UsageError, "needs a file, got the directory"),
        (["rows.npy", "-o", "none/out.csv"], TunerError, "cannot write to .*none/out.csv: No such file"),
        (["rows.npy", "-o", "rows.npy/out.csv"], TunerError, "cannot write to .*Not a directory; choose another"),
        (["none.npy"], TunerError, "there is no file none.npy"),
    ],
)
def test_what_cannot_be_meant_is_told(predict, arguments, kind, told):
    with pytest.raises(kind, match=told):
        predict(*arguments)


class Model(nn.Module):
    """Gives what it is made with."""

    def __init__(self, gives, /, **manifest):
        super().__init__()
        self.gives = gives
        self.manifest = a_manifest(**manifest)

    def forward(self, x):
        return self.gives


def _said(given, k=None, **manifest):
    chunk = Chunk(given=np.ones((2, 3)), places=[("a.npy", 7), ("a.npy", 8)])
    ((first, second),) = _rows(Model(given, **manifest), iter([chunk]), k, pytest.fail)
    assert (first["input"], first["row"], second["row"]) == ("a.npy", 7, 8)
    return first


def test_each_kind_of_target_is_told_and_has_columns():
    outputs = {
        "kind": tensor([[0.0, 9.0]] * 2),
        "tags": tensor([[9.0, -9.0]] * 2),
        "size": tensor([1.5, 2.5]),
        "place": tensor([[1.5, 2.0]] * 2),
    }
    described = [
        an_output(2, name="kind", kind="classes"),
        an_output(2, name="tags", kind="multilabel"),
        an_output(name="size", kind="number"),
        an_output(2, name="place", kind="number"),
    ]
    names = {"kind": ("a", "b\x1b[2J"), "tags": ("x", "y")}
    row = _said(outputs, outputs=described, class_names=names)
    assert row["predictions"] == {
        "kind": {"prediction": "b\x1b[2J", "probability": pytest.approx(1, abs=1e-3)},
        "tags": {"prediction": ("x",)},
        "size": {"prediction": 1.5},
        "place": {"prediction": [1.5, 2.0]},
    }
    columns = ["kind_prediction", "kind_probability", "tags_prediction", "size_prediction"]
    assert list(dict(_cells(row))) == ["input", "row", *columns, "place_prediction_0", "place_prediction_1"]
    for chosen in ("table", "csv", "json"):
        lines = _Writer(chosen)([row])
        assert "\x1b" not in "".join(lines)
        assert '["x"]' in lines[-1].replace('""', '"')
    ranked = _said(outputs, k=2, outputs=described, class_names=names)["predictions"]
    assert [its["class"] for its in ranked["tags"]["top"]] == ["x", "y"]
    assert "top" not in ranked["size"]
    assert _said(tensor([[[1.0], [2.0]]] * 2), outputs=[an_output(2, 1, kind="classes")], class_names=("a", "b"))[
        "prediction"
    ] == ["b"]


def test_a_row_without_a_number_is_named_as_in_its_file():
    with pytest.raises(TunerError, match=r"^a\.npy, row 8: this model needs outputs that are numbers, got NaN"):
        _said(tensor([1.0, float("nan")]))
    with pytest.raises(UsageError, match="--top-k is for models of classes"):
        _said(tensor([1.0, 2.0]), k=1)
