"""Where an export is written: whole or not at all."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from exporting import code

import tuner
from tuner.errors import TunerError
from tuner.model.export import check_output
from tuner.model.loading import MANIFEST, PROGRAM, WEIGHTS, read_manifest, sha256_of
from tuner.model.output import link_by_name


def test_the_manifest_is_moved_last(exporting, monkeypatch):
    moved = []
    replace = os.replace

    def watch(source, target):
        moved.append((target.name, sha256_of(source)))
        replace(source, target)

    exporting.start(code())
    monkeypatch.setattr(os, "replace", watch)
    exporting()
    assert [name for name, _ in moved] == [WEIGHTS, PROGRAM, MANIFEST]


def test_a_second_export_takes_the_place_of_the_first_and_leaves_other_files(exporting):
    exporting.start(code())
    exporting()
    (exporting.output / "notes.txt").write_text("mine")
    before = read_manifest(exporting.output)
    assert exporting().manifest.files[WEIGHTS] == before.files[WEIGHTS]
    names = sorted(path.name for path in exporting.output.iterdir())
    assert names == sorted([WEIGHTS, PROGRAM, MANIFEST, "notes.txt"])
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


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 128 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(place)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount program here")
    if done.returncode != 0:
        pytest.skip(f"a file system cannot be mounted here: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def _files(directory):
    return {path.name: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def _pages(*paths):
    return sum(-(-path.stat().st_size // os.sysconf("SC_PAGE_SIZE")) for path in paths)


@pytest.mark.slow
@pytest.mark.parametrize(
    "fits", [(), (WEIGHTS,), (WEIGHTS, PROGRAM)], ids=["nothing", "the weights", "all but the manifest"]
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
    assert sorted(path.name for path in output.iterdir()) == sorted([WEIGHTS, PROGRAM, MANIFEST])
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
