"""Where an export is written: whole or not at all."""

import os
import shutil
from pathlib import Path

import pytest
from exporting import code

import tuner
from tuner.errors import TunerError
from tuner.formats.program import PROGRAM
from tuner.formats.weights import WEIGHTS
from tuner.model import directory as output_directory
from tuner.model.directory import CARD
from tuner.model.export import check_output
from tuner.model.manifest import MANIFEST, read_manifest
from tuner.model.output import link_by_name

# Kills itself at the N-th line that replacing an export runs, for each N there is; sees what is there then, and after
# another export to the same place.
KILLED_AT_EACH_LINE = """
import json, os, pathlib, shutil, signal, sys
from tuner.model import directory
from tuner.model.directory import CARD
from tuner.model.manifest import MANIFEST, read_manifest

base, has_exchange = pathlib.Path(sys.argv[1]), sys.argv[2] == "exchange"
if not has_exchange:
    directory._exchange = lambda one, other: False
output = base / "models" / "model"
manifest = json.loads((base / "copy" / MANIFEST).read_text())

os.fsync = lambda file: None  # who is killed leaves what he has written

def write(place, version):
    for name in ("one", "two", version):
        (place / name).write_text(version)
    text = json.dumps({**manifest, "study": version, "files": {name: "" for name in ("one", "two", version)}})
    (place / MANIFEST).write_text(text)

def export(version):
    with directory.replacing(output) as place:
        write(place, version)

def seen():
    place = directory.current(output)
    version = read_manifest(place).study
    files = {path.name: path.read_text() for path in place.iterdir() if path.is_file()}
    assert files.pop("notes") == "mine", files
    assert (place / "more" / "notes").read_text() == "mine"
    assert files.pop(MANIFEST) and files == {"one": version, "two": version, version: version}, files
    return version

def killed_at(number):
    left = number

    def trace(frame, event, arg):
        nonlocal left
        if frame.f_code.co_filename not in (directory.__file__, shutil.__file__, "<string>"):
            return None
        left -= event == ("call" if frame.f_code.co_filename == shutil.__file__ else "line")
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return trace

    pid = os.fork()
    if pid == 0:
        sys.settrace(trace)
        export("new")
        os._exit(0)
    return os.waitpid(pid, 0)[1] == signal.SIGKILL

found, number, is_killed = [], 0, True
while is_killed:
    shutil.rmtree(base / "models", ignore_errors=True)
    output.mkdir(parents=True)
    write(output, "old")
    (output / "notes").write_text("mine")
    (output / "more").mkdir()
    (output / "more" / "notes").write_text("mine")
    number += 1
    is_killed = killed_at(number)
    found.append(seen())
    export("newer")
    assert seen() == "newer"
    assert os.listdir(output.parent) == ["model"], (number, os.listdir(output.parent))
print(number, found.count("old"), found == sorted(found, reverse=True))
"""


@pytest.mark.slow
@pytest.mark.parametrize("way", ["exchange", "two renames"])
def test_who_is_killed_at_any_moment_leaves_the_old_export_or_the_new_one(export_copy, start_python, tmp_path, way):
    out, err = start_python(KILLED_AT_EACH_LINE, str(tmp_path), way).communicate(timeout=240)
    assert err == ""
    lines, old, is_ordered = out.split()
    assert is_ordered == "True"
    assert 60 < int(old) < int(lines) - 5


def test_a_directory_that_is_no_export_is_refused_and_stays(exporting, tmp_path, monkeypatch):
    exporting.start(code())
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    for text in (None, "{}", '{"format": 1}'):
        if text is not None:
            (tmp_path / "mine" / MANIFEST).write_text(text)
        with pytest.raises(TunerError, match=r"needs to be an export, or empty, got .*mine, which holds '.*'"):
            exporting(tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "mine"
    assert exporting.recorded() == []
    (tmp_path / "empty").mkdir()
    check_output(tmp_path / "empty")
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(TunerError, match=r"the current directory; choose one in it: --output model"):
        check_output(Path())


def test_an_output_that_is_a_link_stays_one(exporting, export_copy, tmp_path):
    (tmp_path / "link").symlink_to("copy")
    exporting.start(code(), name="other")
    exporting(tmp_path / "link")
    assert (tmp_path / "link").readlink() == Path("copy")
    assert read_manifest(export_copy).study == "other"


def test_a_second_export_takes_the_place_of_the_first_and_leaves_other_files(exporting):
    exporting.start(code())
    exporting()
    (exporting.output / "notes.txt").write_text("mine")
    before = read_manifest(exporting.output)
    assert exporting().manifest.files[WEIGHTS] == before.files[WEIGHTS]
    names = sorted(path.name for path in exporting.output.iterdir())
    assert names == sorted([CARD, WEIGHTS, PROGRAM, MANIFEST, "notes.txt"])
    tuner.load_model(exporting.output)


@pytest.mark.parametrize(
    ("name", "link"),
    [
        ("digits", "digits"),
        ("ümläut 🔥", "ümläut 🔥"),
        ("a/b%c\n", "a%2Fb%25c%0A"),
        ("../../etc", "%2E.%2F..%2Fetc"),
        ("-x", "%2Dx"),
    ],
)
def test_a_model_is_found_by_its_studys_name(tmp_path, name, link):
    directory = tmp_path / "models" / "study-7"
    directory.mkdir(parents=True)
    (directory / MANIFEST).write_text("7")
    assert link_by_name(directory, "before it was renamed") is not None
    found = link_by_name(directory, name)
    assert found == tmp_path / "models" / link
    assert (found / MANIFEST).read_text() == "7"
    assert sorted(path.name for path in directory.parent.iterdir()) == sorted(["study-7", link])


def test_a_models_name_is_the_latest_of_that_name_and_takes_nobodys_place(tmp_path):
    for study_id in (1, 2, 3):
        (tmp_path / f"study-{study_id}").mkdir()
    link_by_name(tmp_path / "study-1", "digits")
    assert link_by_name(tmp_path / "study-2", "digits").resolve() == tmp_path / "study-2"
    shutil.rmtree(tmp_path / "study-2")  # and leaves the link behind
    assert link_by_name(tmp_path / "study-3", "digits").resolve() == tmp_path / "study-3"
    (tmp_path / "mine").symlink_to(tmp_path)
    for name in ("study-1", "study-3", "mine", "x" * 300):
        assert link_by_name(tmp_path / "study-3", name) is None
    assert (tmp_path / "mine").resolve() == tmp_path


def _files(directory):
    return {path.name: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def _pages(*paths):
    return sum(-(-path.stat().st_size // os.sysconf("SC_PAGE_SIZE")) for path in paths)


@pytest.mark.slow
@pytest.mark.parametrize(
    "fits", [(), (WEIGHTS,), (WEIGHTS, PROGRAM, CARD)], ids=["nothing", "the weights", "all but the manifest"]
)
def test_a_full_disk_leaves_the_old_export_and_nothing_half_written(exporting, small_disk, export_copy, fits):
    output = small_disk / "model"
    shutil.copytree(export_copy, output)
    with (small_disk / "filler").open("wb", buffering=0) as filler:
        disk = os.statvfs(small_disk)
        free = disk.f_bavail - _pages(*(export_copy / name for name in fits))
        filler.write(b"x" * free * disk.f_frsize)
    before = _files(small_disk)
    exporting.start(code(), name="other")  # the copy may be of an export in this database
    with pytest.raises(TunerError) as caught:
        exporting(output)
    assert str(caught.value) == (
        f"cannot write the model to {output}: No space left on device; free some space or choose another --output"
    )
    assert _files(small_disk) == before
    assert sorted(path.name for path in output.iterdir()) == sorted([CARD, WEIGHTS, PROGRAM, MANIFEST])
    tuner.load_model(output)
    # Once the test split has been evaluated, that stays on record.
    assert len(exporting.recorded()) == (1 if PROGRAM in fits else 0)


def test_a_full_disk_without_an_old_export_leaves_nothing(exporting, small_disk):
    (small_disk / "filler").write_bytes(b"x" * 120_000)
    exporting.start(code())
    with pytest.raises(TunerError, match="No space left on device"):
        exporting(small_disk / "new" / "model")
    assert [path.name for path in small_disk.iterdir()] == ["filler"]


def test_an_output_that_is_a_file_is_refused_before_training(exporting, tmp_path):
    (tmp_path / "file").touch()
    exporting.start(code())
    for output in (tmp_path / "file", tmp_path / "file" / "model"):
        with pytest.raises(TunerError, match=r"needs to be a directory, got .*file.*; choose another --output"):
            exporting(output)
    assert (tmp_path / "file").read_bytes() == b""


def test_an_output_that_cannot_be_written_is_refused():
    with pytest.raises(TunerError, match=r"cannot write to /proc: .*; choose another --output"):
        check_output(Path("/proc/model"))


def test_looking_at_an_output_leaves_nothing_behind(tmp_path):
    check_output(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []


def test_an_old_export_that_was_left_where_nothing_can_be_locked_is_not_in_the_way(tmp_path, monkeypatch):
    monkeypatch.setattr(output_directory, "_exchange", lambda one, other: False)
    for name in ("model", "new", ".model.tuner-old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / ".tuner-mark").write_text(name)
    output_directory._put(tmp_path / "new", tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model" / ".tuner-mark").read_text() == "new"
