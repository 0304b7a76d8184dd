"""The contract, under faults at random: nothing that was told to be done is lost, doubled or changed.

`--soak 30m` goes on for longer, and with partitions that outlast a lease; `--soak-seed` repeats a run's faults.
"""

from __future__ import annotations

import configparser
from collections import Counter, defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
import pytest
from chaos import OBJECTIVE, Chaos, Machine, run_under_faults
from command import Tuner
from optuna.trial import FrozenTrial, TrialState
from pooler import ListeningServer, a_pooler
from sqlalchemy import text

from storage import EmbeddedServer, StorageError, open_engine, open_storage
from tuner.cli.options import seconds

if TYPE_CHECKING:
    from collections.abc import Iterator

TRIALS_A_SECOND, TRIALS_A_SECOND_OF_A_SOAK = 0.7, 1.5
"""What three machines with two slots each manage under faults: less, and more, so that a soak is one to its end."""

PASSES_AT_ONCE = ("restart of the pooler", "restart of PostgreSQL", "SIGKILL of a slot", "SIGTERM of a worker")
"""Faults after which nobody waits for a lease to run out."""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[EmbeddedServer]:
    server = EmbeddedServer(tmp_path / "home")
    server.start()
    yield server
    server.destroy()


class Watch:
    """Looks at the finished trials now and then: they are never to change."""

    def __init__(self, url: str) -> None:
        self._storage = open_storage(url)
        self.changed: list[tuple[FrozenTrial, FrozenTrial]] = []
        self._seen: dict[int, FrozenTrial] = {}

    def __call__(self) -> None:
        try:
            study_id = self._storage.get_study_id_from_name("s")
            trials = self._storage.get_all_trials(study_id)
        except StorageError:
            return  # the server is away just now
        for trial in trials:
            if trial.state.is_finished():
                before = self._seen.setdefault(trial.number, trial)
                if before != trial:
                    self.changed.append((before, trial))


@pytest.mark.timeout(0)
def test_the_contract_holds_under_faults_at_random(
    request: pytest.FixtureRequest, server: EmbeddedServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    soak = request.config.getoption("--soak")
    duration_s = seconds("--soak", soak or "40s")
    budget = max(20, int(duration_s * (TRIALS_A_SECOND_OF_A_SOAK if soak else TRIALS_A_SECOND)))
    create(server.url(), budget, tmp_path)
    machines = [Machine(number, server.url(), tmp_path) for number in range(3)]
    seed = int(request.config.getoption("--soak-seed"))
    chaos = Chaos(seed, machines, server, longest_s=90 if soak else 10)
    check_contract(server, machines, chaos, duration_s, budget, tmp_path, capsys)


@pytest.mark.timeout(0)
def test_it_holds_through_a_pooler(
    request: pytest.FixtureRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the settings of docs/pgbouncer.ini; restarts of the pooler are among the faults."""
    soak = request.config.getoption("--soak")
    duration_s = seconds("--soak", soak or "10s")
    budget = max(12, int(duration_s * (TRIALS_A_SECOND_OF_A_SOAK if soak else TRIALS_A_SECOND)))
    documented = configparser.ConfigParser()
    documented.read(Path(__file__).parents[2] / "docs" / "pgbouncer.ini")
    server = ListeningServer(tmp_path / "home")
    try:
        server.start()
        with a_pooler(server, dict(documented["pgbouncer"])) as pooler:
            create(pooler.url.render_as_string(hide_password=False), budget, tmp_path)
            machines = [Machine(number, pooler.socket_url, tmp_path) for number in range(2)]
            seed = int(request.config.getoption("--soak-seed"))
            among = () if soak else PASSES_AT_ONCE
            chaos = Chaos(seed, machines, server, longest_s=90 if soak else 10, pooler=pooler, among=among)
            check_contract(server, machines, chaos, duration_s, budget, tmp_path, capsys)
    finally:
        server.destroy()


def create(url: str, budget: int, directory: Path) -> None:
    """Create the study `s` by the command line."""
    tuner = Tuner({"TUNER_STORAGE": url, "TUNER_DATA_DIR": str(directory / "here")}, directory)
    (directory / "mine.py").write_text(OBJECTIVE)
    options = ("--study", "s", "--trials", str(budget), "--max-failures", "100000", "--pruner", "median")
    assert tuner("create", f"{directory / 'mine.py'}:objective", *options).code == 0


def check_contract(
    server: EmbeddedServer,
    machines: list[Machine],
    chaos: Chaos,
    duration_s: float,
    budget: int,
    directory: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Let the machines work under faults, and hold what they were told against the server's database."""
    watch = Watch(server.url())
    try:
        run_under_faults(machines, chaos, duration_s, watch)
        watch()
    finally:
        for machine in machines:
            machine.close()
    trials = optuna.load_study(study_name="s", storage=open_storage(server.url())).trials
    with capsys.disabled():
        told = ", ".join(f"{count} x {name}" for name, count in sorted(chaos.injected.items()))
        print(f"\n{len(trials)} trials; {told}; lost attempts: {attempts(server)['lost']}")

    assert watch.changed == []
    check_study(trials, budget)
    check_attempts(server, trials)
    check_params(trials, directory / "params")
    for machine in machines:
        check_told(machine.events(), {trial.number: trial for trial in trials})
    check_ended_once(machines)
    check_exits(machines)  # last: what was told to be done is looked at however a worker ended


def attempts(server: EmbeddedServer) -> Counter[str]:
    engine = open_engine(server.url())
    with engine.connect() as conn:
        found = Counter(conn.execute(text("select outcome from tuner_attempts")).scalars())
    engine.dispose()
    return found


def check_exits(machines: list[Machine]) -> None:
    """No worker ended but by a signal that it was sent, or because all was done."""
    exits = {its for machine in machines for its in machine.exits}
    # One that starts may have no handler for SIGTERM yet, and one that has not joined needs the database.
    assert {code for code, _, is_ready in exits if is_ready} <= {0, 143, -9}, exits
    assert {code for code, has_joined, _ in exits if has_joined} <= {0, 143, -9, -15}, exits
    assert {code for code, has_joined, _ in exits if not has_joined} <= {3, 143, -9, -15}, exits
    for machine in machines:
        assert "Traceback" not in machine.log.read_text()


def check_study(trials: list[FrozenTrial], budget: int) -> None:
    """Numbers are dense, the budget is exact, nothing runs any more, and no failure is but the objective's own."""
    assert [trial.number for trial in trials] == list(range(len(trials)))
    states = Counter(trial.state for trial in trials)
    assert states[TrialState.COMPLETE] + states[TrialState.PRUNED] == budget
    assert states[TrialState.RUNNING] == states[TrialState.WAITING] == 0
    for trial in trials:
        if trial.state == TrialState.FAIL:
            kind = trial.user_attrs["failure"]
            assert (kind == "user_error") == (trial.number % 13 == 5), trial
            assert kind in ("user_error", "lost"), trial


def check_attempts(server: EmbeddedServer, trials: list[FrozenTrial]) -> None:
    """Each trial was ended by one attempt, or failed after as many lost ones as it may have."""
    engine = open_engine(server.url())
    query = "select number, outcome from tuner_attempts join trials using (trial_id)"
    outcomes: dict[int, Counter[str]] = defaultdict(Counter)
    with engine.connect() as conn:
        for number, outcome in conn.execute(text(query)):
            outcomes[number][outcome] += 1
    engine.dispose()
    for trial in trials:
        of_trial = outcomes[trial.number]
        ended = of_trial["complete"] + of_trial["pruned"] + of_trial["fail"]
        if trial.user_attrs.get("failure") == "lost":
            assert (ended, of_trial["lost"]) == (0, 3), (trial, of_trial)
        else:
            assert ended == 1, (trial, of_trial)
            assert of_trial[trial.state.name.lower()] == 1, (trial, of_trial)


def check_params(trials: list[FrozenTrial], notes: Path) -> None:
    """All attempts of a trial had its params."""
    for line in notes.read_text().splitlines():
        number, x = line.split()
        trial = trials[int(number)]
        assert trial.params.get("x") == float(x), trial


def check_told(events: list[dict[str, Any]], trials: dict[int, FrozenTrial]) -> None:
    """What a worker was told had been written is there: ends of trials, and the reports of the attempts that ended."""
    reports: dict[tuple[str, int, int], dict[int, float]] = defaultdict(dict)
    for event in events:
        key = (event["worker"], event["slot"], event["trial"])
        if event["event"] == "trial_started":
            reports[key] = {}
        elif event["event"] == "report":
            reports[key][event["epoch"]] = event["value"]
        elif event["event"] == "trial_ended":
            trial = trials[event["trial"]]
            assert trial.state.name == event["state"], (event, trial)
            if "value" in event:
                assert trial.value == event["value"], (event, trial)
            assert trial.intermediate_values.items() >= reports[key].items(), (event, trial)


def check_ended_once(machines: list[Machine]) -> None:
    ended = Counter(
        event["trial"] for machine in machines for event in machine.events() if event["event"] == "trial_ended"
    )
    assert [number for number, count in ended.items() if count > 1] == []
