import os
import socket
import sys

import pytest

from storage.database.errors import InvalidURLError
from tuner.errors import UsageError
from tuner.launch import engine, ray_actor
from tuner.study.registry import find_objective

pytest.importorskip("ray", reason="needs Ray: pip install 'tuner[ray]'")

from tuner.launch import ray_cluster
from tuner.launch.ray_cluster import Needs


@pytest.mark.parametrize(
    ("gpus", "cpus", "resources", "told"),
    [
        (1.5, None, None, "a part of one GPU, as 0.5, or a whole number, got 1.5"),
        (-1.0, None, None, "got -1"),
        (float("nan"), None, None, "got nan"),
        (0.0, 0.0, None, "--cpus-per-worker needs a number above 0"),
        (0.0, None, "a100", "--resources needs a JSON object"),
        (0.0, None, "[1]", "--resources needs a JSON object"),
        (0.0, None, '{"a100": true}', "got True of 'a100'"),
        (0.0, None, '{"a100": 0}', "got 0 of 'a100'"),
        (0.0, None, '{"a100": 1.5}', "parts of one a100"),
        (0.0, None, '{"gpu": 1}', "--gpus-per-worker says how many"),
    ],
)
def test_what_ray_cannot_set_aside_is_refused(gpus, cpus, resources, told):
    with pytest.raises(UsageError) as caught:
        Needs.checked(gpus, cpus, resources)
    assert told in str(caught.value)


def test_a_worker_has_the_slots_threads_and_part_that_ray_gives_it():
    assert Needs(cpus=4).worker_options() == ["--slots", "cpu", "--threads", "4"]
    assert Needs(gpus=0.5).worker_options() == ["--slots", "1", "--threads", "1", "--device-share", "0.5"]
    assert Needs(gpus=2, cpus=8).worker_options() == ["--slots", "2", "--threads", "4"]
    assert Needs(gpus=2).named() == {"GPU": 2, "CPU": 2}


def test_what_no_node_has_is_named():
    nodes = [{"Resources": {"CPU": 8.0, "GPU": 2.0}}, {"Resources": {"CPU": 64.0, "a100": 1.0}}]
    assert "4 GPU, and no node of the cluster has more than 2;" in ray_cluster._too_much(nodes, Needs(gpus=4))
    both = Needs(gpus=1, resources={"a100": 0.5})
    assert "all that a worker needs: 0.5 a100, 1 GPU, 1 CPU;" in ray_cluster._too_much(nodes, both)
    assert not any(ray_cluster._fits(node, both) for node in nodes)
    assert ray_cluster._fits(nodes[0], Needs(gpus=2))


def test_where_ray_is_missing_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "tuner.launch.ray_cluster", raising=False)
    with pytest.raises(engine.NoEngineError, match=r"pip install 'tuner\[ray\]'"):
        engine.imported("ray")


@pytest.mark.parametrize("address", ["http://head:8265", "head", "local", "ray://head:port"])
def test_what_is_no_address_is_refused(address):
    with pytest.raises(UsageError, match="address is ray://HOST:10001"), ray_cluster.connected(address):
        pass


def test_what_is_copied_is_where_imports_begin(tmp_path, monkeypatch):
    package = tmp_path / "mine" / "parts"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "search.py").write_text("def objective(trial): ...\n")
    (tmp_path / "alone.py").write_text("def objective(trial): ...\n")
    monkeypatch.chdir(tmp_path / "mine")
    for reference in ("parts/search.py:objective", "parts.search:objective"):
        found = ray_cluster._carried(find_objective(reference), reference)
        assert found == (tmp_path / "mine", "parts/search.py:objective")
    installed = "sklearn.dummy:DummyClassifier"
    assert ray_cluster._carried(find_objective(installed), installed) == (None, installed)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(UsageError, match="move it into a directory of its own"):
        ray_cluster._carried(find_objective("../alone.py:objective"), "../alone.py:objective")


def test_a_url_that_leads_nowhere_on_other_machines_is_refused(tmp_path):
    here, there = {"NodeManagerHostname": socket.gethostname()}, {"NodeManagerHostname": "elsewhere"}
    url = "postgresql://tuner@127.0.0.1/tuner"
    for nodes in ([here, there], None):
        with pytest.raises(UsageError, match="its loopback"):
            ray_cluster._of_database(url, None, nodes)
    with pytest.raises(UsageError, match="the private one"):
        ray_cluster._of_database(None, None, [here])
    with pytest.raises(InvalidURLError):
        ray_cluster._of_database("mysql://db/tuner", None, [here])
    password = tmp_path / "password"
    password.touch(0o600)
    password.write_text("s3cret")
    found = ray_cluster._of_database(url, password, [here])
    assert found["TUNER_STORAGE"] == "postgresql+psycopg2://tuner:s3cret@127.0.0.1/tuner"


def test_a_node_without_tuner_says_so(tmp_path):
    (tmp_path / "tuner.py").write_text("raise SystemExit('not tuner')")
    code, told = ray_actor.look_around(("worker", "any"), {"PYTHONPATH": str(tmp_path)})
    assert code == 1
    assert told == "not tuner"
    (tmp_path / "tuner.py").unlink()
    (tmp_path / "tuner").mkdir()
    (tmp_path / "tuner" / "__init__.py").touch()
    code, told = ray_actor.look_around(("worker", "any"), {"PYTHONPATH": str(tmp_path)})
    assert code == 1
    assert told.startswith(f"no tuner in {sys.executable}, or an older one")


def test_modules_beside_an_objective_are_not_taken_for_those_of_tuner(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), "/opt/site"]))
    monkeypatch.setenv("TUNER_STORAGE_PASSWORD_FILE", "/of/the/node")
    found = ray_actor.own_environment()
    assert found["PYTHONPATH"] == "/opt/site"
    assert "TUNER_STORAGE_PASSWORD_FILE" not in found


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells where a directory was")
def test_a_worker_starts_in_a_directory_that_another_node_of_the_machine_has_made_anew(tmp_path, monkeypatch):
    place = tmp_path / "package"
    place.mkdir()
    monkeypatch.setenv("PYTHONPATH", str(place))
    monkeypatch.chdir(place)
    place.rmdir()
    place.mkdir()
    (place / "mine.py").touch()
    assert os.listdir(ray_actor.directory()) == ["mine.py"]
    assert "PYTHONPATH" not in ray_actor.own_environment()
    monkeypatch.chdir(tmp_path)


def test_the_password_is_not_in_what_an_order_shows():
    order = ray_actor.Order(
        label="tuner-s-1", launch="a", number=0, arguments=("worker",), environment={"TUNER_STORAGE": "s3cret"}
    )
    assert "s3cret" not in repr(order)
    assert order.name == "tuner-s-1.a.0"
