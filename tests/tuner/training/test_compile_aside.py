import os
import warnings
from pathlib import Path

import pytest
import torch
from command import wait_for
from processes import children, forks
from torch import nn

from tuner.data import Batch
from tuner.forks import fork
from tuner.training import compile_aside
from tuner.training.checked_step import By
from tuner.training.compile_aside import Aside, DiedError, name_of
from tuner.training.steps import Step


@pytest.fixture
def aside(tmp_path):
    """What is compiled for a training, whose process works until a file "done" is there."""
    aside = Aside(tmp_path)
    yield aside
    aside.close()


def until_done(directory):
    wait_for((directory / "done").exists, "the file done")
    return True


def in_another_process(directory, work):
    """Whether another training finds it ready, which would start a process that does this work."""
    pid = fork()
    if not pid:
        os._exit(Aside(directory).is_ready("alike", work))
    _, status = os.waitpid(pid, 0)
    return bool(os.waitstatus_to_exitcode(status))


def test_of_two_processes_one_compiles_and_the_other_finds_it_ready(aside, tmp_path):
    def never():
        (tmp_path / "wrong").touch()

    assert not aside.is_ready("alike", lambda: until_done(tmp_path))
    assert not in_another_process(tmp_path, never)
    assert not aside.is_ready("alike", never)
    (tmp_path / "done").touch()
    wait_for(lambda: aside.is_ready("alike", never), "the end of the work")
    assert in_another_process(tmp_path, never)
    assert not (tmp_path / "wrong").exists()
    assert not aside.is_at_work


def test_the_lock_ends_with_the_process_that_holds_it(aside, tmp_path):
    assert not aside.is_ready("alike", lambda: until_done(tmp_path))
    aside.close()
    assert not aside.is_at_work
    (tmp_path / "done").touch()
    another = Aside(tmp_path)
    assert not another.is_ready("alike", lambda: until_done(tmp_path))
    wait_for(lambda: another.is_ready("alike", lambda: False), "the end of the work")


def test_what_compiled_nothing_leaves_no_word_of_it(aside):
    for _ in range(2):
        assert not aside.is_ready("alike", lambda: False)
        wait_for(lambda: aside.is_ready("alike", lambda: False), "the end of the work")


def test_work_that_raises_is_told(aside):
    assert not aside.is_ready("alike", lambda: 1 / 0)
    with pytest.raises(DiedError, match="the process that compiled ended with ZeroDivisionError: division by zero"):
        wait_for(lambda: aside.is_ready("alike", lambda: False), "the end of the work")


def test_work_without_an_end_is_ended(aside, tmp_path, monkeypatch):
    assert not aside.is_ready("alike", lambda: until_done(tmp_path))
    monkeypatch.setattr(compile_aside, "LIMIT_S", 0)
    with pytest.raises(DiedError, match="was not done after 0 minutes"):
        aside.is_ready("alike", lambda: False)
    assert forks() == []


def test_a_process_that_somebody_else_waited_for_is_taken_for_done(aside):
    before = set(children(os.getpid()))
    assert not aside.is_ready("alike", lambda: True)
    (forked,) = set(children(os.getpid())) - before
    os.waitpid(forked, 0)
    assert aside.is_ready("alike", lambda: False)


def test_the_process_ends_with_the_one_that_it_works_for(tmp_path):
    """And is nicer than it, and computes with threads of its own, whatever that one has computed with."""
    torch.ones(1 << 18).add_(1).sum()

    def work():
        torch.ones(1 << 18).add_(1).sum()
        (tmp_path / "at work").write_text(f"{os.getpid()} {os.nice(0)}")
        return until_done(tmp_path)

    before = os.nice(0)
    pid = fork()
    if not pid:
        Aside(tmp_path).is_ready("alike", work)
        wait_for(lambda: bool((tmp_path / "at work").exists() and (tmp_path / "at work").read_text()), "the work")
        os._exit(0)
    os.waitpid(pid, 0)
    worker, nice = map(int, (tmp_path / "at work").read_text().split())
    assert nice == min(19, before + compile_aside.NICE)
    wait_for(lambda: not is_running(worker), "the end of the process")


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")")[1].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def test_the_process_holds_no_pipe_of_its_parent_open(aside, tmp_path):
    read, write = os.pipe()
    try:
        assert not aside.is_ready("alike", lambda: until_done(tmp_path))
    finally:
        os.close(write)
    with os.fdopen(read) as pipe:
        assert pipe.read() == ""  # at once, though the process works


def named(*, dropout=0.1, rate=0.1, momentum=0.9, rows=8, loss=None, buffer=None, **how):
    model = nn.Sequential(nn.Linear(4, 2), nn.Dropout(dropout))
    model.register_buffer("kept", buffer)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=momentum)
    loss = loss or (lambda outputs, targets: outputs.mean())
    step = Step(model, loss, optimizer, torch.device("cpu"), compiled=By(), **how)
    return name_of(step._parts(loss), Batch(torch.zeros(rows, 4), torch.zeros(rows)), By())


def without_strides():
    with warnings.catch_warnings(action="ignore"):  # that such are new
        return torch.eye(3).to_sparse_csr()


@pytest.mark.parametrize(
    "change",
    [
        {"dropout": 0.2},
        {"momentum": 0.8},
        {"rows": 9},
        {"loss": nn.MSELoss()},
        {"precision": "bf16"},
        {"max_grad_norm": 1.0},
        {"buffer": torch.eye(3)},
        {"buffer": without_strides()},
    ],
    ids="".join,
)
def test_what_is_compiled_otherwise_has_another_name(change):
    assert named(**change) != named()
    assert named(**change) == named(**change, rate=0.2)
