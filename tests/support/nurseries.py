"""What becomes of a nursery and its slots, in a process that has no thread but its own: `nurseries.py FUNCTION ...`."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from command import wait_for
from processes import children

from tuner.worker.nursery import Nursery

OBJECTIVE = """
import atexit, os, tempfile

MADE = tempfile.TemporaryDirectory()
atexit.register(os.write, 2, b"ended\\n")
os.write(2, f"imported {MADE.name}\\n".encode())

def objective(trial):
    return 0.0
"""


class Streams:
    """The standard streams of a slot."""

    def __init__(self) -> None:
        (stdin, self.orders), (self.events, stdout) = os.pipe(), os.pipe()
        self.its = (stdin, stdout, os.open(os.devnull, os.O_WRONLY))

    def hand_over(self) -> None:
        for stream in self.its:
            os.close(stream)


def importing(directory: Path, lines: list[str], text: str = "") -> Nursery:
    """A nursery that imports an objective, and what it prints."""
    (directory / "plain.py").write_text(OBJECTIVE + text)
    nursery = Nursery.importing(dict(os.environ), str(directory), lines.append)
    nursery.load(f"{directory / 'plain.py'}:objective")
    return nursery


def never(why: str) -> None:
    """A slot has to be forked."""
    raise AssertionError(why)


def fork_and_kill_slots(directory: str) -> None:
    """The objective is imported once, whatever its slots do, and what it made is deleted once."""
    lines: list[str] = []
    nursery = importing(Path(directory), lines)
    streams, others = Streams(), Streams()
    slot, other = (nursery.fork({}, each.its, never) for each in (streams, others))
    assert slot is not None
    assert other is not None
    for each in (streams, others):
        each.hand_over()
    os.close(streams.orders)
    assert slot.wait() == 0
    os.kill(other.pid, signal.SIGKILL)
    assert other.wait() == -signal.SIGKILL
    assert os.read(streams.events, 1) == b"", "nobody else holds the pipe"
    wait_for(lambda: bool(lines), "the objective is imported")
    (imported,) = lines
    made = imported.removeprefix("imported ")
    assert os.path.isdir(made), "it is not a slot's to delete"
    nursery.close()
    assert not os.path.exists(made)
    wait_for(lambda: lines[1:] == ["ended"], "the end is told once")
    nursery.close()


def kill_the_nursery(directory: str) -> None:
    """It forks no more, and its slots count as killed."""
    nursery = importing(Path(directory), [])
    streams = Streams()
    slot = nursery.fork({}, streams.its, never)
    assert slot is not None
    (pid,) = (child for child in children(os.getpid()) if slot.pid in children(child))
    os.kill(pid, signal.SIGKILL)
    assert slot.wait() == -signal.SIGKILL
    assert nursery.fork({}, streams.its, never) is None
    streams.hand_over()
    os.close(streams.orders)
    wait_for(lambda: not os.path.exists(f"/proc/{slot.pid}"), "the slot ends")
    nursery.close()


def end_it_while_it_imports(directory: str) -> None:
    """What the objective has started by then ends with it."""
    lines: list[str] = []
    text = """
import subprocess, threading
os.write(2, f"{subprocess.Popen(['sleep', '600']).pid}\\n".encode())
threading.Event().wait()
"""
    nursery = importing(Path(directory), lines, text)
    wait_for(lambda: len(lines) == 2, "the objective has started it")
    nursery.close()
    status = Path("/proc", lines[1], "status")
    wait_for(lambda: not status.exists() or "State:\tZ" in status.read_text(), "it has ended")


def kill_its_worker_while_it_imports(directory: str) -> None:
    """The nursery is not left behind, though its objective hangs and never looks up."""
    worker = os.fork()
    if not worker:
        text = (
            "\nimport pathlib, threading\npathlib.Path('pid').write_text(str(os.getpid()))\nthreading.Event().wait()\n"
        )
        importing(Path(directory), [], text)
        signal.pause()
    told = Path(directory, "pid")
    wait_for(lambda: told.exists() and bool(told.read_text()), "the objective hangs")
    status = Path("/proc", told.read_text(), "status")
    assert status.exists()
    os.kill(worker, signal.SIGKILL)
    os.waitpid(worker, 0)
    wait_for(lambda: not status.exists() or "State:\tZ" in status.read_text(), "the nursery ends")


def import_odd(directory: str, text: str) -> None:
    """Print why no slot is forked, once."""
    nursery = importing(Path(directory), [], text)
    streams = Streams()
    assert nursery.fork({}, streams.its, print) is None
    assert nursery.fork({}, streams.its, never) is None
    nursery.close()


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
    if sys.argv[1] != "import_odd":
        print("all as it should")
