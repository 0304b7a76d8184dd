import hashlib
import textwrap
from pathlib import Path
from typing import Literal

import pytest
from pydantic import Field

from objectives.digits import Digits
from tuner.errors import TunerError, UsageError
from tuner.study.params import parse_value
from tuner.study.registry import build_objective, find_objective, installed_objectives, is_objective_class

HERE = {
    "function": '''
        """The file's line."""
        def loss(trial):
            """A parabola.

            And more."""
            return trial.suggest_float("x", -1, 1) ** 2
        ''',
    "class": '''
        """The file's line."""
        from objectives.digits import Digits
        class Small(Digits):
            max_units: int = 32
        NUMBER = 3
        class Other: pass
        ''',
}


@pytest.fixture
def write(tmp_path):
    def write_now(code, name="mine.py"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(textwrap.dedent(HERE.get(code, code)))
        return path

    return write_now


def test_an_installed_objective_is_found_by_its_name():
    source = find_objective("digits")
    assert (source.name, source.study_name, source.module) == ("digits", "digits", "objectives.digits")
    assert source.load() is Digits
    assert source.code_hash() == hashlib.sha256(source.file.read_bytes()).hexdigest()
    assert source.summary() == "Classify a digit from its 64 pixels; the accuracy on the validation split is maximized."
    assert source in installed_objectives()


@pytest.mark.parametrize(("code", "attribute", "is_class"), [("function", "loss", False), ("class", "Small", True)])
def test_an_objective_in_a_file_is_found_by_path_and_name(write, code, attribute, is_class):
    path = write(code)
    source = find_objective(f"{path}:{attribute}")
    assert (source.name, source.study_name, source.module) == (f"mine.py:{attribute}", "mine", None)
    kind = source.load()
    assert kind.__name__ == attribute
    assert is_objective_class(kind) == is_class
    assert source.load() is kind


def test_a_summary_is_the_objective_s_own_or_else_the_file_s(write):
    assert find_objective(f"{write('function')}:loss").summary() == "A parabola."
    assert find_objective(f"{write('class')}:Small").summary() == "The file's line."
    assert find_objective(f"{write('x = 1')}:x").summary() == ""


def test_a_file_that_cannot_be_read_does_not_hide_the_others_from_the_list(write):
    assert find_objective(f"{write('def f(:')}:f").summary().startswith("cannot be read: line 1: ")


def test_files_of_one_name_in_two_directories_are_two_objectives(write):
    one = find_objective(f"{write('def f(trial): return 1', 'a/same.py')}:f")
    other = find_objective(f"{write('def f(trial): return 2', 'b/same.py')}:f")
    assert (one.load()(None), other.load()(None)) == (1, 2)


def test_a_file_may_import_its_neighbours_and_any_callable_is_a_function(write):
    write("SCALE = 3", "a_neighbour.py")
    path = write(
        """
        import functools
        import a_neighbour
        loss = functools.partial(lambda scale, trial: scale, a_neighbour.SCALE)
        """
    )
    assert find_objective(f"{path}:loss").load()(None) == 3


def test_the_hash_follows_the_code(write):
    one = find_objective(f"{write('def f(trial): return 1')}:f")
    before = one.code_hash()
    write("def f(trial): return 2")
    assert one.code_hash() != before


@pytest.mark.parametrize(
    ("reference", "error", "told"),
    [
        ("digit", TunerError, "no objective named 'digit' is installed; there are: "),
        ("", TunerError, "no objective named ''"),
        ("missing.py:f", TunerError, "no file missing.py: give the path"),
        ("mine.py", UsageError, "needs its name, got 'mine.py'; say mine.py:NAME"),
        ("HERE:not a name", UsageError, "needs to be a Python name, got 'not a name'"),
        ("HERE:", UsageError, "needs to be a Python name, got ''"),
    ],
)
def test_an_objective_that_is_not_there_is_told_with_advice(write, reference, error, told):
    with pytest.raises(error) as caught:
        find_objective(reference.replace("HERE", str(write("function"))))
    assert type(caught.value) is error
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("def f(trial:\n  pass", "cannot read {path}, line 1: '(' was never closed"),
        ("\nimport no_such_package", "ModuleNotFoundError: No module named 'no_such_package' ({path}, line 2)"),
        ("\n\n1 / 0", "cannot import {path}: ZeroDivisionError: division by zero ({path}, line 3)"),
        ("from .a import b", "({path}, line 1); an __init__.py beside it makes its directory a package"),
        ("x = 1\n\0", "cannot read {path}, line 1: source code "),
        ("def g(trial): pass", "needs to define 'f', an Objective or a function of a trial, got None; it defines: g"),
        ("f = 3", "got 3; it defines: none"),
        ("from math import pi\nclass f: pass", "it defines: none"),
    ],
)
def test_a_file_that_cannot_be_used_is_told_with_its_place(write, code, told):
    path = write(code)
    for _ in range(2):  # the second time as well
        with pytest.raises(TunerError) as caught:
            find_objective(f"{path}:f").load()
        assert told.format(path=path) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_what_is_left_of_a_removed_package_does_not_hide_the_others(tmp_path, monkeypatch):
    before = installed_objectives()
    left = tmp_path / "gone-1.0.dist-info"
    left.mkdir()
    (left / "METADATA").write_text("Metadata-Version: 2.1\nName: gone\nVersion: 1.0\n")
    (left / "entry_points.txt").write_text("[tuner.objectives]\ngone = gone.objective:Gone\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert installed_objectives() == before
    assert "digits" in [source.name for source in before]


def test_options_are_checked_and_converted():
    objective = build_objective(Digits, {"max_units": 128}, seed=7)
    assert (objective.max_units, objective.max_layers, objective.seed) == (128, 2, 7)
    assert objective.model_dump(mode="json") == {"max_units": 128, "max_layers": 2}


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"units": 3}, "--set: Digits has no option 'units'; it has: max_layers, max_units"),
        ({"seed": 3}, "; the seed is set by --seed"),
        ({"max_units": "many"}, "--set max_units: input should be a valid integer"),
        ({"max_units": 0}, "--set max_units: input should be greater than 0, got 0"),
        ({"max_units": None}, "--set max_units: "),
        ({"max_units": 1.5}, "got 1.5"),
    ],
)
def test_an_option_that_cannot_be_is_refused_with_those_there_are(options, told):
    with pytest.raises(UsageError) as caught:
        build_objective(Digits, options, seed=0)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


class Named(Digits):
    """Options that want text, in several forms."""

    tag: str = ""
    version: Literal["1.0", "2.0"] = "1.0"
    place: Path | None = None
    rate: int | str = 0
    tags: list[str] = Field(default_factory=list)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("tag", "2024", "2024"),
        ("tag", "1e3", "1e3"),
        ("tag", "true", "true"),
        ("tag", "007", "007"),
        ("tag", '"quoted"', "quoted"),
        ("tag", "[1]", "[1]"),
        ("version", "2.0", "2.0"),
        ("place", "2024", Path("2024")),
        ("rate", "5", 5),
        ("tags", '["2024"]', ["2024"]),
        ("max_units", "1e2", 100),
    ],
)
def test_an_option_that_wants_text_takes_what_looks_like_something_else(name, text, value):
    objective = build_objective(Named, {name: parse_value(text)}, 0, {name: text})
    assert getattr(objective, name) == value


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("tags", "[2024]", """got 2024; text within JSON needs quotes, as --set 'tags=["2024"]'"""),
        ("version", "3.0", "got 3.0"),
        ("max_units", "many", "should be a valid integer"),
    ],
)
def test_an_option_that_is_nothing_as_text_either_is_refused(name, text, told):
    with pytest.raises(UsageError) as refused:
        build_objective(Named, {name: parse_value(text)}, 0, {name: text})
    assert told in str(refused.value)


def test_installed_objectives_are_listed_without_importing_them(start_python):
    process = start_python(
        "from tuner.study.registry import installed_objectives\nimport sys\n"
        "print('digits' in [its.name for its in installed_objectives()],"
        " {'torch', 'objectives.digits'} & sys.modules.keys())"
    )
    assert process.communicate(timeout=60) == ("True set()\n", "")


def test_the_file_of_an_installed_objective_is_the_one_that_is_imported():
    assert Path(find_objective("digits").file).samefile(Path(__file__).parents[3] / "objectives" / "digits.py")


@pytest.mark.parametrize(
    "line", ["metric: str = 'rmse'", "direction: str = 'minimize'", "epochs: int = 3", "batch_size: int = 32"]
)
def test_an_option_that_would_hide_a_part_of_objective_is_refused_with_the_way_to_write_it(tmp_path, line):
    path = tmp_path / f"hides_{line.partition(':')[0]}.py"
    path.write_text(f"from tuner import Objective\nclass Mine(Objective):\n    {line}\n")
    with pytest.raises(TunerError, match=r"cannot be an option, as Objective has a .* of its own"):
        find_objective(f"{path}:Mine").load()


def test_a_subclass_says_its_metric_direction_and_epochs_without_annotations(tmp_path):
    path = tmp_path / "says.py"
    body = "metric = 'rmse'\n    direction = 'minimize'\n    epochs = 3\n    hidden: int = 5\n"
    path.write_text(f"from tuner import Objective\nclass Mine(Objective):\n    {body}")
    mine = find_objective(f"{path}:Mine").load()
    assert (mine.metric, mine.direction, mine.epochs) == ("rmse", "minimize", 3)
    assert set(mine.model_fields) == {"seed", "hidden"}
