"""What README, CONTRIBUTING and docs/ say, held against the files, the command line and real runs."""

from __future__ import annotations

import dataclasses
import re
import shlex
import tomllib
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
import pytest
import torch
import typer
from optuna.trial import TrialState

from tuner.cli.app import make_app
from tuner.cli.options import StudyOptions
from tuner.slot.attempt import TrialObjective, run_attempt
from tuner.slot.checked_trial import CheckedTrial
from tuner.slot.preflight import preflight
from tuner.study.joining import plan
from tuner.study.registry import find_objective

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [path for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md") if path.exists()] + DOCS
FOLDERS = ("storage", "tuner", "objectives", "tests", "benchmarks", "docs", "docker", ".ci", ".github")
EVERY_COMMAND = "Options of every command"

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)


def code(text: str) -> list[str]:
    """What the text shows as code: blocks, fenced or indented, and what is in backticks, line by line."""
    blocks = re.findall(r"^```\w*\n(.*?)^```$", text, re.M | re.S)
    rest = re.sub(r"^```\w*\n.*?^```$", "", text, flags=re.M | re.S)
    indented = [line for line in rest.splitlines() if line.startswith("    ")]
    return [line for block in blocks for line in block.splitlines()] + indented + re.findall(r"`([^`\n]+)`", rest)


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def sections(text: str, level: int) -> dict[str, str]:
    """The text under each heading of this level, by heading."""
    parts = re.split(rf"^#{{{level}}} (.+)$", text, flags=re.M)
    return {heading: re.split(rf"^#{{1,{level}}} ", part, flags=re.M)[0] for heading, part in _pairs(parts[1:])}


def _pairs(items: list[str]) -> Iterator[tuple[str, str]]:
    return zip(items[::2], items[1::2], strict=True)


# --- the files


@each_page
def test_every_path_that_is_named_is_there(page: Path) -> None:
    for line in code(page.read_text()):
        for named in re.findall(rf"(?<![\w./-])(?:{'|'.join(map(re.escape, FOLDERS))})/[\w./-]*\w", line):
            assert (ROOT / named).exists(), f"{page.name} names {named}"
        for named in re.findall(r"(?<![\w./-])test_\w+\.py", line):
            assert list((ROOT / "tests").rglob(named)), f"{page.name} names {named}"


@each_page
def test_every_name_that_is_said_to_be_in_a_file_is_there(page: Path) -> None:
    """As in: `storage/coordination/claims.py` (`claim`, `closed`)."""
    for path, names in re.findall(r"`([\w/]+\.py)` \(((?:`\w+`(?:, )?)+)\)", page.read_text()):
        source = (ROOT / path).read_text()
        for name in re.findall(r"\w+", names):
            assert re.search(rf"^ *(?:def|class) {name}\b|^{name}\b.* = ", source, re.M), f"no {name} in {path}"


@each_page
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), f"{page.name} links {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", there.read_text(), re.M)
            assert anchor in map(slug, headings), f"{page.name} links {target}"


def test_the_readme_is_short_and_leads_to_every_page() -> None:
    readme = (ROOT / "README.md").read_text()
    assert len(readme.splitlines()) < 180
    assert "](docs/README.md)" in readme
    index = (ROOT / "docs/README.md").read_text()
    assert set(re.findall(r"\]\((\w[\w-]*\.md)", index)) == {path.name for path in DOCS} - {"README.md"}


# --- the command line


def commands() -> dict[str, Any]:
    """The commands as they are called, such as `db start`."""
    found: dict[str, Any] = {}
    for name, command in typer.main.get_command(make_app()).commands.items():  # type: ignore[attr-defined]
        inner = getattr(command, "commands", {})
        found |= {f"{name} {its}": of_group for its, of_group in inner.items()} or {name: command}
    return found


def options(command: Any) -> dict[str, str | None]:
    """The options of a command, and the panel that each is shown in."""
    return {
        name: getattr(param, "rich_help_panel", None)
        for param in command.params
        for name in (*param.opts, *param.secondary_opts)
        if name.startswith("--")
    }


COMMANDS = commands()
PAGE = (ROOT / "docs/command-line.md").read_text() if (ROOT / "docs/command-line.md").exists() else ""


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_of_a_command_is_on_the_page_of_the_command_line(name: str) -> None:
    shared = sections(PAGE, 2)[EVERY_COMMAND]
    of_panels = sections(PAGE, 3)
    [own] = [text for heading, text in of_panels.items() if re.search(rf"`tuner {name}\b", heading)]
    [group] = [text for text in sections(PAGE, 2).values() if re.search(rf"^### .*`tuner {name}\b", text, re.M)]
    for option, panel in options(COMMANDS[name]).items():
        where = shared if panel == EVERY_COMMAND else of_panels.get(panel or "", own) + group.partition("### ")[0]
        assert re.search(rf"`{option}\b", where), f"{option} of {name} is not where it belongs"


def test_the_page_of_the_command_line_has_no_other_options() -> None:
    main = typer.main.get_command(make_app())
    known = {"--help", *options(main)}.union(*map(options, COMMANDS.values()))
    assert set(re.findall(r"(?<![\w-])--[a-z][\w-]*", PAGE)) == known
    assert {
        name for heading in sections(PAGE, 3) for name in re.findall(r"`tuner ([a-z]+(?: [a-z][a-z0-9]+)?)", heading)
    } == set(COMMANDS)


@each_page
def test_every_command_that_is_shown_is_one(page: Path) -> None:
    of_main = options(typer.main.get_command(make_app()))
    for line in code(page.read_text()):
        for shown in re.findall(r"(?:^|&& |run --rm worker-cpu |\$\()tuner( [^#|;&)]*)", line.strip()):
            words = shlex.split(shown)
            name = next((name for name in (" ".join(words[:2]), *words[:1]) if name in COMMANDS), None)
            if name is None:
                assert words[0] in {"COMMAND", "db"} or words[0] in {"--help", *of_main}, (
                    f"{page.name} shows tuner {shown}"
                )
                continue
            given = {word.partition("=")[0] for word in words if word.startswith("--")}
            assert given <= {"--help", *options(COMMANDS[name])}, f"{page.name} shows tuner {shown}"


# --- the snippets

FOR_USERS = [ROOT / "README.md", *(page for page in DOCS if page.name != "python.md")]  # test_python.py runs that


def fenced(page: Path, language: str) -> list[str]:
    """The fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.M | re.S)


def parsed(line: str) -> dict[str, Any]:
    """The values of a command line's options and arguments, as the command itself would get them."""
    group: Any = typer.main.get_command(make_app())
    words = shlex.split(line)
    while words and words[0] in getattr(group, "commands", {}):
        group = group.commands[words.pop(0)]
    return group.make_context("tuner", words).params


@pytest.mark.parametrize("page", FOR_USERS, ids=lambda path: path.name)
def test_every_command_line_that_is_shown_is_taken(page: Path) -> None:
    for line in re.findall(r"^    (?:pip install \. && )?tuner ([^\n#]*)", page.read_text(), re.M):
        if not line.startswith("COMMAND"):
            assert parsed(re.sub(r"[\[\]]| [>|] .*", "", line).strip()), line


def shown_objectives() -> dict[str, tuple[str, str]]:
    """The file's source and the command line under it, of each objective in the pages for users, by file."""
    found = {}
    for page in FOR_USERS:
        blocks = re.findall(
            r"^```python\n# (\w+\.py)\n(.*?)^```\n\n    tuner (run [^\n]*)$", page.read_text(), re.M | re.S
        )
        found |= {name: (source, command) for name, source, command in blocks}
    return found


SHOWN = shown_objectives()


def test_every_python_block_is_a_file_with_the_line_that_runs_it_or_is_run_by_itself() -> None:
    blocks = [block for page in FOR_USERS for block in fenced(page, "python")]
    assert sum(block.startswith("# ") for block in blocks) == len(SHOWN) == 11
    assert [block for block in blocks if not block.startswith("# ")] == fenced(ROOT / "README.md", "python")[:1]
    for block in [block for page in FOR_USERS for block in fenced(page, "toml")]:
        assert tomllib.loads(block)


@pytest.mark.parametrize("name", SHOWN)
def test_an_objective_that_is_shown_runs(name: str, tmp_path: Path) -> None:
    text, command = SHOWN[name]
    if "lightning" in name:
        pytest.importorskip("lightning", reason="the extra lightning is not installed")
        warnings.simplefilter("ignore")  # its own, of loaders without workers: within this test alone
    if "transformers" in name:
        pytest.importorskip("transformers", reason="the extra transformers is not installed")
        warnings.simplefilter("ignore")
    given = parsed(command)
    target = given["objective"]
    assert target.partition(":")[0] == name
    (tmp_path / name).write_text(text)
    source = find_objective(f"{tmp_path}/{target}")
    kind = source.load()
    wanted = StudyOptions(
        **{field.name: given[field.name] for field in dataclasses.fields(StudyOptions) if field.name in given}
    )
    spec, built = plan(source, kind, **wanted.plan())
    objective = built or kind
    what = TrialObjective.load(spec.model_copy(update={"epochs": 1}), objective, tmp_path, torch.device("cpu"))
    if what.data is not None:
        assert preflight(objective, what.spec, what.data, what.device) == []
    study = optuna.create_study(direction=spec.direction)
    outcome = run_attempt(what, CheckedTrial(study, study.ask()._trial_id, lambda: None))
    assert outcome.state == TrialState.COMPLETE, outcome.message


# --- the style


def test_an_example_of_style_is_what_the_code_says() -> None:
    blocks = re.findall(r"^```python\n# (\S+\.py)\n(.*?)^```$", (ROOT / "CONTRIBUTING.md").read_text(), re.M | re.S)
    assert len(blocks) == 3
    for path, excerpt in blocks:
        assert excerpt in (ROOT / path).read_text(), path
