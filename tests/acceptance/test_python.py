"""From Python: the notebook of the docs in a real kernel, a script, and what neither can do."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nbformat
import pytest
from command import wait_for
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat.v4 import new_code_cell

from storage import StudyNotFoundError, open_engine
from storage.coordination import records
from tuner.study.joining import open_study

if TYPE_CHECKING:
    from collections.abc import Iterator

    from command import Tuner

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),  # its first test waits for the whole notebook
    # of nbclient and of what it is built on, which are not ours to mend
    pytest.mark.filterwarnings("default::DeprecationWarning", "default::ResourceWarning", "default::UserWarning"),
]

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "docs/notebook.ipynb"
SLOW = """
import threading
def slow(trial):
    x = trial.suggest_float("x", 0, 1)
    for step in range(100):
        trial.report(x, step)
        if not QUICK:
            threading.Event().wait(0.1)
    return x
QUICK = False
"""


class Notebook:
    """A kernel in which the notebook of the docs has run; more cells can be run after it."""

    def __init__(self, client: NotebookClient) -> None:
        self._client = client
        self.by_source = {cell.source: cell for cell in client.nb.cells if cell.cell_type == "code"}

    def run(self, source: str) -> Any:
        """Run another cell, and return it. Raises CellExecutionError."""
        cell = new_code_cell(source)
        self._client.nb.cells.append(cell)
        return self._client.execute_cell(cell, len(self._client.nb.cells) - 1)

    def interrupt(self) -> None:
        """Do as the button of that name."""
        asyncio.run(self._client.km.interrupt_kernel())

    def after(self, start: str) -> str:
        """What is shown below the cell that starts so, as text."""
        [cell] = [cell for source, cell in self.by_source.items() if source.startswith(start)]
        return shown(cell)


def shown(cell: Any) -> str:
    """What is shown below a cell, as text."""
    parts = [output.get("text") or output.get("data", {}).get("text/plain", "") for output in cell.outputs]
    return "\n".join(parts)


@pytest.fixture(scope="module")
def notebook(module_database: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Notebook]:
    """The notebook of the docs, run to its end, in a kernel that still runs."""
    directory = tmp_path_factory.mktemp("notebook")
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    env = {
        **os.environ,
        "TUNER_STORAGE": module_database,
        "TUNER_DATA_DIR": str(directory / "data"),
        "PYTHONPATH": path,
    }
    env["IPYTHONDIR"] = env["JUPYTER_RUNTIME_DIR"] = str(directory / "jupyter")
    nb = nbformat.read(NOTEBOOK, as_version=4)
    client = NotebookClient(nb, timeout=200, kernel_name="python3", resources={"metadata": {"path": str(directory)}})
    with client.setup_kernel(env=env):
        for index, cell in enumerate([*nb.cells]):
            client.execute_cell(cell, index)
        yield Notebook(client)


def test_the_notebook_of_the_docs_runs_from_objective_to_model(notebook: Notebook) -> None:
    progress = notebook.after("study = tuner.run")
    assert "6/6 done" in progress
    assert "BestTrial(study='Handwriting'" in notebook.after("tuner.best")
    assert notebook.after("tuner.trials").count("COMPLETE") >= 1
    for plot in ("optuna.visualization.plot_optimization_history", "optuna.visualization.plot_intermediate"):
        [cell] = [cell for source, cell in notebook.by_source.items() if source.startswith(plot)]
        assert any("application/vnd.plotly.v1+json" in output.get("data", {}) for output in cell.outputs)
    assert re.search(r"\{'accuracy': 0\.\d+\}", notebook.after("exported ="))
    assert re.match(r"\(\[('\d'(, )?){5}\], array", notebook.after("model ="))
    assert "Linear(in_features=" in notebook.after("tuner.rebuild")


def test_nothing_is_printed_but_progress(notebook: Notebook) -> None:
    for source, cell in notebook.by_source.items():
        printed = [output for output in cell.outputs if output.output_type == "stream" and output.name == "stdout"]
        assert printed == [], source


def test_the_spec_tells_the_source_that_was_in_the_notebook(notebook: Notebook, module_database: str) -> None:
    engine = open_engine(module_database)
    spec = open_study(engine, "Handwriting").spec
    engine.dispose()
    assert spec.objective.name == "Handwriting.py:Handwriting"
    source = spec.objective.source or ""
    assert "class Handwriting(tuner.Objective):" in source
    assert "MOST_UNITS = 128" in source
    assert "def normalised(pixels):" in source
    assert "optuna" not in source


def test_an_interrupt_gives_the_trials_back_and_the_same_call_goes_on(notebook: Notebook, module_database: str) -> None:
    notebook.run(SLOW)
    call = "tuner.run(slow, trials=1, workers=1, name='interrupted', allow_code_change=True)"
    engine = open_engine(module_database)

    def trials() -> list[tuple[str, int | None]]:
        try:
            study_id = open_study(engine, "interrupted").study_id
        except StudyNotFoundError:
            return []
        return [(trial.state, trial.last_step) for trial in records.list_trials(engine, study_id)]

    def interrupt_once_it_runs() -> None:
        wait_for(lambda: [step is not None for _, step in trials()] == [True], "a trial that reports", 120)
        notebook.interrupt()

    thread = threading.Thread(target=interrupt_once_it_runs)
    thread.start()
    with pytest.raises(CellExecutionError, match="KeyboardInterrupt"):
        notebook.run(call)
    thread.join()
    assert [state for state, _ in trials()] == ["WAITING"]
    # In another thread, beside the loop that runs: signals cannot be had there, and are done without.
    notebook.run("QUICK = True")
    notebook.run(f"import asyncio\nawait asyncio.to_thread(lambda: {call})")
    cell = notebook.run("tuner.best('interrupted').number")
    assert shown(cell) == "0"
    assert [state for state, _ in trials()] == ["COMPLETE"]
    engine.dispose()


def test_what_workers_could_not_have_is_told_before_anything_starts(notebook: Notebook) -> None:
    notebook.run(
        "frame = tuner.trials(study)\n"
        "class Held(Handwriting):\n    def rows(self):\n        return frame\n"
        "def make():\n    class Inner(Handwriting):\n        pass\n    return Inner\n"
    )
    for objective, message in (
        ("Held", "objective Held uses 'frame' (DataFrame) of this notebook or script"),
        ("make()", "Inner is defined within make, whose variables the process of a worker has not"),
        ("lambda trial: 1.0", "a lambda cannot be an objective"),
    ):
        with pytest.raises(CellExecutionError, match=re.escape(message)):
            notebook.run(f"tuner.run({objective}, trials=1)")


@pytest.fixture
def script(tuner: Tuner, tmp_path: Path) -> Any:
    """Run a program of Python, a file or its text."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        return subprocess.run(
            [sys.executable, *arguments],
            env={**os.environ, **tuner.environment, "PYTHONPATH": path},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )

    return run


def test_the_page_runs_as_a_script_without_a_main_guard(script: Any, tuner: Tuner, tmp_path: Path) -> None:
    """Its blocks one after the other, with what each says that it gives."""
    page = (ROOT / "docs/python.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```$", page, re.M | re.S)
    assert "__main__" not in "".join(blocks)
    (tmp_path / "neighbour.py").write_text("WIDTH = 8\n")
    (tmp_path / "program.py").write_text("from neighbour import WIDTH\n" + "\n".join(blocks) + "\nassert WIDTH == 8\n")
    done = script("program.py")
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    # What was written here is found by the command line, too, without a path.
    assert tuner("export", "circle", "--output", tmp_path / "again").code == 0


def test_a_prompt_has_no_source(script: Any) -> None:
    code = "import tuner\nclass Mine(tuner.Objective): pass\ntuner.run(Mine, trials=1)"
    done = script("-c", code)
    assert done.returncode == 1
    assert "TunerError: the source of Mine is not to be had, as it was typed at a prompt or given by -c" in done.stderr
