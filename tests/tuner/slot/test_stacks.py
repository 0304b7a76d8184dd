"""Stacks of a group of processes, on request: each process's are whole, and who writes none is not ended by it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from command import wait_for

from tuner.slot import stacks

GROUP = r"""
import multiprocessing, os, subprocess, sys, threading
from tuner.slot import stacks

def stuck_in_a_lock(say):
    say()
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()

def reader(say):
    stuck_in_a_lock(say)

def readers(say):
    for _ in range(4):
        multiprocessing.get_context("fork").Process(target=reader, args=(say,), daemon=True).start()

stacks.write_on_request()
other = subprocess.Popen([sys.executable, "-c", "import os, sys; os.write(1, b'x\\n'); sys.stdin.read()"])
say = lambda: os.write(1, b"x\n")
thread = threading.Thread(target=readers, args=(say,))  # the main thread is not the only one to fork
thread.start()
thread.join()
say()
other.wait()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells of other processes' files")
def test_each_process_of_a_group_writes_its_own_stacks() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", GROUP],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as leader:
        assert leader.stdout is not None
        assert leader.stdin is not None
        assert [leader.stdout.readline() for _ in range(6)] == ["x\n"] * 6
        files = stacks.request(leader.pid)
        assert len(files) == 5
        wait_for(lambda: sorted(map(_where, files)) == ["main"] + ["reader"] * 4, "the stacks of all")
        leader.stdin.close()  # the process that writes no stacks lives, and ends now
        leader.wait(30)
        assert leader.returncode == 0


def _where(file: Path) -> str:
    """Return whose stacks these are."""
    text = file.read_text()
    # Not where in these functions, which a process that has said its word may not have reached yet.
    for frames, whose in ((("in stuck_in_a_lock", "in reader\n"), "reader"), (("in <module>",), "main")):
        if all(text.count(frame) == 1 for frame in frames):
            return whose
    return "none yet"


def test_a_group_that_is_no_more_has_none() -> None:
    with subprocess.Popen([sys.executable, "-c", ""], start_new_session=True) as ended:
        ended.wait()
    assert stacks.request(ended.pid) == []
