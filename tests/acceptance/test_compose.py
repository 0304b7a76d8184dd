"""docker-compose.yml without Docker: its form, what it promises about safety, and its very commands as processes."""

from __future__ import annotations

import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import tomllib
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg2
import psycopg2.errors
import pytest
import yaml
from dashboards import Client
from forbidden import check_is_refused_all
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from storage import EmbeddedServer
from storage.embedded.programs import bundled_programs

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
COMPOSE_FILE = ROOT / "docker-compose.yml"


def compose(**environ: str) -> dict[str, Any]:
    """The file as Compose reads it, with these variables set."""

    def value(match: re.Match[str]) -> str:
        return environ.get(match["name"]) or match["default"]

    return yaml.safe_load(re.sub(r"\$\{(?P<name>\w+):-(?P<default>[^}]*)\}", value, COMPOSE_FILE.read_text()))


SERVICES: dict[str, Any] = compose()["services"]
OURS = sorted(set(SERVICES) - {"postgres"})


# --- the file


def test_the_file_follows_the_compose_specification() -> None:
    checker = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    done = subprocess.run([*checker, COMPOSE_FILE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", sorted(SERVICES))
def test_a_service_runs_with_as_little_as_it_needs(name: str) -> None:
    service = SERVICES[name]
    assert service["user"] == "1000:1000"
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert "cap_add" not in service
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["init"] is True
    assert not service.get("privileged", False)
    assert service.get("network_mode") is None


def test_what_is_run_is_of_one_version_and_within_limits() -> None:
    exact = r"[a-z]+:\d+\.\d+(\.\d+)?(-[a-z]+)+"
    assert re.fullmatch(exact, SERVICES["postgres"]["image"])
    assert {SERVICES[name]["image"] for name in OURS} == {"tuner"}
    [base] = [line.removeprefix("FROM ") for line in (ROOT / "Dockerfile").read_text().splitlines() if "FROM" in line]
    assert re.fullmatch(exact, base)
    for name, service in SERVICES.items():
        assert re.fullmatch(r"\d+gb", service["mem_limit"]), name
        assert 0 < service["pids_limit"] <= 4096, name
    assert compose(TUNER_WORKER_MEMORY="64gb")["services"]["worker-gpu"]["mem_limit"] == "64gb"


def test_the_database_is_on_a_network_without_an_outside() -> None:
    networks = compose()["networks"]
    assert networks["database"] == {"internal": True}
    assert SERVICES["postgres"]["networks"] == ["database"]
    assert SERVICES["postgres"]["environment"]["POSTGRES_INITDB_ARGS"] == "--auth-host=scram-sha-256"
    for name in OURS:
        first, *others = SERVICES[name]["networks"]
        assert (first, len(others)) == ("database", 1)
        assert networks[others[0]] is None
    # a worker cannot reach the dashboard but by the database
    assert not {"front"} & set(SERVICES["worker-cpu"]["networks"])
    assert "outside" not in SERVICES["dashboard"]["networks"]


def test_the_image_is_of_what_the_constraints_name_with_their_hashes() -> None:
    text = (ROOT / "docker" / "constraints.txt").read_text()
    assert "://" not in text, "the address of a registry"
    assert not re.search(r"^\s*-(?!-hash=sha256:[0-9a-f]{64})", text, re.MULTILINE), "an option"
    named = [line.split(" \\")[0].split(" ; ")[0] for line in text.splitlines() if re.match(r"[a-z]", line)]
    assert all(re.fullmatch(r"[a-z0-9-]+==[\w.]+", one) for one in named)
    assert text.count("--hash=sha256:") >= len(named)
    pinned = {one.partition("==")[0]: one.partition("==")[2] for one in named}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    for wanted in map(Requirement, [*project["project"]["dependencies"], *project["build-system"]["requires"]]):
        assert wanted.specifier.contains(pinned[canonicalize_name(wanted.name)]), f"make it anew for {wanted}"
    installs = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if "pip install" in line]
    assert len(installs) == 2
    assert "--require-hashes" in installs[0]
    assert "--no-deps --no-build-isolation --no-index" in installs[1]


def test_no_password_is_in_the_file_and_every_secret_is_a_file() -> None:
    for service in SERVICES.values():
        for name, value in service["environment"].items():
            assert "PASSWORD" not in name or name.endswith("_FILE")
            assert "TOKEN" not in name or name.endswith("_FILE")
            assert not re.search(r"//[^/@]*:[^/@]*@", value), "a password in a URL"
            if name.endswith("_FILE"):
                assert Path(value).parent == Path("/run/secrets")
                assert Path(value).name in service["secrets"]
        assert not any("PASSWORD" in part or "TOKEN" in part for part in service.get("command", []))
    declared = compose()["secrets"]
    assert {entry["file"] for entry in declared.values()} == {f"./secrets/{name}" for name in declared}
    assert "secrets/" in (ROOT / ".gitignore").read_text().splitlines()


def test_a_service_gets_only_the_secrets_it_uses() -> None:
    assert SERVICES["dashboard"]["secrets"] == ["reader_password", "dashboard_token"]
    for name in ("worker-cpu", "worker-gpu", "setup"):
        assert SERVICES[name]["secrets"] == ["postgres_password"]


def test_only_the_dashboard_is_published_and_only_on_loopback() -> None:
    published = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert published == {"dashboard": ["127.0.0.1:8080:8080"]}


def test_services_wait_for_what_they_need_and_stop_in_time() -> None:
    for name in OURS:
        assert SERVICES[name]["depends_on"]["postgres"] == {"condition": "service_healthy"}
    assert SERVICES["dashboard"]["depends_on"]["setup"] == {"condition": "service_completed_successfully"}
    assert {"postgres", "dashboard"} == {name for name in SERVICES if "healthcheck" in SERVICES[name]}
    for name in ("postgres", "worker-cpu", "worker-gpu"):
        assert int(SERVICES[name]["stop_grace_period"].removesuffix("s")) >= 60
        assert "shm_size" in SERVICES[name]
    assert SERVICES["postgres"]["volumes"] == ["postgres:/var/lib/postgresql"]
    assert SERVICES["postgres"]["restart"] == SERVICES["dashboard"]["restart"] == "unless-stopped"
    # not unless-stopped: a worker whose study is done would start for ever, as without a number would one whose study
    # ended by its failures
    assert SERVICES["worker-cpu"]["restart"] == "on-failure:10"


def test_workers_scale_and_differ_only_in_their_device() -> None:
    cpu, gpu = dict(SERVICES["worker-cpu"]), dict(SERVICES["worker-gpu"])
    assert (cpu.pop("profiles"), gpu.pop("profiles")) == (["cpu"], ["gpu"])
    [device] = gpu.pop("deploy")["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}
    assert cpu == gpu
    assert "container_name" not in cpu


def test_the_study_and_the_user_are_chosen_by_variables() -> None:
    services = compose(TUNER_STUDY="other", TUNER_UID="1234", TUNER_GID="1235", TUNER_SLOTS="cpu*4")["services"]
    assert services["worker-gpu"]["command"] == ["worker", "other"]
    for found, slots in ((services, "cpu*4"), (SERVICES, "auto")):
        assert found["worker-cpu"]["environment"]["TUNER_WORKER_SLOTS"] == slots
    assert {service["user"] for service in services.values()} == {"1234:1235"}


def test_the_image_starts_the_command_line_as_an_unprivileged_user() -> None:
    instructions = (ROOT / "Dockerfile").read_text().splitlines()
    assert instructions[-1] == 'ENTRYPOINT ["tuner"]'
    assert [line for line in instructions if line.startswith("USER ")] == ["USER tuner"]


def test_the_build_sees_the_sources_and_nothing_else() -> None:
    rules = (ROOT / ".dockerignore").read_text().splitlines()
    assert rules[0] == "*"
    kept = {rule.removeprefix("!") for rule in rules if rule.startswith("!")}
    assert kept == {
        "LICENSE",
        "README.md",
        "docker/constraints.txt",
        "pyproject.toml",
        "objectives",
        "storage",
        "tuner",
    }


# --- its commands


@dataclass
class Team:
    """What Compose would start, on this machine: a server with the file's roles, and files for its secrets."""

    postgres_port: int
    dashboard_port: int
    directory: Path
    admin_url: str = ""

    def secret(self, name: str) -> str:
        return (self.directory / name).read_text().strip()

    def here(self, text: str) -> str:
        """The text with the paths, host and port of the containers replaced by those of this machine."""
        return (
            text.replace("/run/secrets", str(self.directory))
            .replace("@postgres/", f"@127.0.0.1:{self.postgres_port}/")
            .replace("8080", str(self.dashboard_port))
            .replace("/data", str(self.directory / "data"))
        )

    def environ(self, service: str) -> dict[str, str]:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("TUNER_", "PG"))}
        own = {name: self.here(value) for name, value in SERVICES[service]["environment"].items()}
        return inherited | own

    def start(self, service: str, *command: str) -> subprocess.Popen[str]:
        """Start a service's command, or another one in its place as `docker compose run` does."""
        arguments = command or [self.here(part) for part in SERVICES[service]["command"]]
        return subprocess.Popen(
            [Path(sys.executable).with_name("tuner"), *arguments],
            env=self.environ(service),
            cwd=self.directory,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, service: str, *command: str) -> str:
        """Run a command to its end and return what it printed."""
        with self.start(service, *command) as process:
            out, err = process.communicate(timeout=240)
        assert process.returncode == 0, err
        return out

    def is_healthy(self, service: str, **environ: str) -> bool:
        kind, program, *arguments = SERVICES[service]["healthcheck"]["test"]
        assert kind == "CMD"
        programs = {"python": sys.executable, "pg_isready": bundled_programs()[0].path("pg_isready")}
        command = [programs[program], *(self.here(part) for part in arguments)]
        return subprocess.run(command, env=self.environ(service) | environ, check=False).returncode == 0

    def url(self, role: str, password: str) -> str:
        return f"postgresql://{role}:{password}@127.0.0.1:{self.postgres_port}/tuner"

    @contextmanager
    def dashboard(self) -> Iterator[subprocess.Popen[str]]:
        """The dashboard's service, serving."""
        with self.start("dashboard") as process:
            try:
                assert process.stderr is not None
                line = process.stderr.readline()
                assert "dashboard on http" in line, line
                yield process
            finally:
                process.kill()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def team(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Team]:
    directory = tmp_path_factory.mktemp("compose")
    for name in compose()["secrets"]:
        with open(os.open(directory / name, os.O_WRONLY | os.O_CREAT, 0o600), "w") as file:
            file.write(f"{secrets.token_hex(32)}\n")
    team = Team(free_port(), free_port(), directory)
    server = EmbeddedServer(directory / "server")
    try:
        server.start(listen=f"127.0.0.1:{team.postgres_port}")
        _as_the_image_leaves_it(server)
        script = directory / "roles.sql"
        script.write_text(team.here((ROOT / compose()["configs"]["roles"]["file"]).read_text()))
        psql = [bundled_programs()[0].path("psql"), "--no-psqlrc", "--quiet", "-v", "ON_ERROR_STOP=1"]
        team.admin_url = server.admin_url().replace("/tuner?", "/postgres?")
        subprocess.run([*psql, "-d", team.admin_url, "-f", script], check=True)
        yield team
    finally:
        server.destroy()


def _as_the_image_leaves_it(server: EmbeddedServer) -> None:
    """Make the embedded server like the image's new one: a superuser `postgres`, passwords over TCP, no more."""
    for database, statements in {
        "template1": [
            "DROP DATABASE tuner",
            *(f"DROP {what} {role}" for what in ("OWNED BY", "ROLE") for role in ("tuner_reader", "tuner")),
        ],
        "postgres": ["CREATE ROLE postgres LOGIN SUPERUSER PASSWORD 'known'"],
    }.items():
        connection = psycopg2.connect(server.admin_url().replace("/tuner?", f"/{database}?"))
        connection.autocommit = True
        with connection.cursor() as cursor:
            for statement in statements:
                cursor.execute(statement)
            cursor.execute("SHOW hba_file")
            [access] = cursor.fetchone()
            with open(access, "a") as file:
                file.write("host all all all scram-sha-256\n")
            cursor.execute("SELECT pg_reload_conf()")
        connection.close()


def test_the_services_find_params_together(team: Team) -> None:
    assert team.is_healthy("postgres", PGPORT=str(team.postgres_port))
    team.run("setup")
    team.run("worker-cpu", "create", "digits", "--trials", "3", "--epochs", "2")
    with team.dashboard() as dashboard:
        assert team.is_healthy("dashboard")
        team.run("worker-cpu")
        client = Client(team.dashboard_port)
        assert client.ask("/api/studies").status == 401
        headers = {
            "Authorization": f"Bearer {team.secret('dashboard_token')}",
            "Host": f"localhost:{team.dashboard_port}",
        }
        [study] = json.loads(client.ask("/api/studies", headers=headers).body)["study_summaries"]
        assert study["study_name"] == "digits"
        detail = json.loads(client.ask(f"/api/studies/{study['study_id']}", headers=headers).body)
        assert len(detail["trials"]) == 3
        assert {trial["state"] for trial in detail["trials"]} <= {"Complete", "Pruned"}
        dashboard.send_signal(signal.SIGTERM)
        grace_period_s = int(SERVICES["dashboard"]["stop_grace_period"].removesuffix("s"))
        assert dashboard.wait(timeout=grace_period_s) == 0
    assert not team.is_healthy("dashboard")


def test_the_dashboards_role_can_read_and_not_write(team: Team) -> None:
    team.run("setup")
    url = team.url("tuner_reader", team.secret("reader_password"))
    connection = psycopg2.connect(url)
    with connection.cursor() as cursor:
        cursor.execute("SELECT count(*) FROM trials, tuner_studies")
        cursor.execute("SET SESSION CHARACTERISTICS AS TRANSACTION READ WRITE")
        connection.commit()
        with pytest.raises(psycopg2.errors.InsufficientPrivilege):
            cursor.execute("DELETE FROM studies")
    connection.close()
    check_is_refused_all(url)


def test_the_workers_role_is_no_superuser(team: Team) -> None:
    connection = psycopg2.connect(team.url("tuner", team.secret("postgres_password")))
    with connection.cursor() as cursor:
        cursor.execute("SELECT rolsuper OR rolcreaterole OR rolcreatedb FROM pg_roles WHERE rolname = current_user")
        assert cursor.fetchone() == (False,)
    connection.close()


@pytest.mark.parametrize("password", ["known", ""])
def test_the_superuser_cannot_get_in_over_the_network(team: Team, password: str) -> None:
    with pytest.raises(psycopg2.OperationalError, match="password"):
        psycopg2.connect(team.url("postgres", password))


def test_what_removes_it_all_by_hand_leaves_no_role(team: Team) -> None:
    team.run("setup")
    [line] = re.findall(r"`(DROP DATABASE [^`]+)`", (ROOT / "docs" / "operations.md").read_text())
    connection = psycopg2.connect(team.admin_url)
    connection.autocommit = True
    with connection.cursor() as cursor:
        for statement in line.rstrip(";").split("; "):
            cursor.execute(statement)
        cursor.execute("SELECT rolname FROM pg_roles WHERE rolname IN ('tuner', 'tuner_reader')")
        assert cursor.fetchall() == []
    connection.close()
