"""`tuner report` and `importance`, on a study whose texts would run in a page, in a real browser without a network."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import chromium
import optuna
import pytest
from chromium import a_page
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.trial import TrialState, create_trial

from storage import open_storage

if TYPE_CHECKING:
    from pathlib import Path

    from command import Tuner

ATTACK = "</script><script>window.hit=1</script><img src=x onerror='window.hit=1'><a href='https://a.example'>a</a>"
KINDS = {
    f"lr {ATTACK}": FloatDistribution(1e-4, 1e-1, log=True),
    "kind": CategoricalDistribution([f"a {ATTACK}", "b"]),
    "late": FloatDistribution(0, 1),
}


def fill(study: optuna.Study) -> None:
    """Eight complete trials, two pruned and one that failed, with the attack in whatever is text."""
    for number in range(11):
        late = {"late": number / 10} if number % 2 else {}
        params = dict(zip(KINDS, [10 ** (-1 - number / 4), [f"a {ATTACK}", "b"][number % 3 == 0]], strict=False)) | late
        state = {8: TrialState.PRUNED, 9: TrialState.PRUNED, 10: TrialState.FAIL}.get(number, TrialState.COMPLETE)
        values = [0.5 + number / 20] * len(study.directions) if state == TrialState.COMPLETE else None
        study.add_trial(
            create_trial(
                state=state,
                values=values,
                params=params,
                distributions={name: KINDS[name] for name in params},
                user_attrs={"failure": ATTACK, "failure_message": ATTACK} if state == TrialState.FAIL else {},
                intermediate_values={1: 0.4 + number / 20, **({} if values is None else {2: values[0]})},
            )
        )


@pytest.mark.slow
@pytest.mark.skipif(chromium.executable() is None, reason="no Chromium or Chrome is installed")
def test_a_report_is_read_without_a_network_and_runs_nothing_that_somebody_wrote(
    tuner: Tuner, database: str, tmp_path: Path
) -> None:
    storage = open_storage(database)
    study = optuna.create_study(study_name=ATTACK, storage=storage, direction="maximize")
    fill(study)
    place = tmp_path / "page.html"
    done = tuner("report", ATTACK, "-o", place, "--json")
    assert (done.code, done.stderr) == (0, "")
    facts = done.json()
    assert (facts["best"]["number"], facts["best"]["runner_up"], facts["n_trials"]) == (7, pytest.approx(0.8), 11)
    assert (facts["audit"]["pruned"], facts["audit"]["epochs_saved"], facts["audit"]["might_have_won"]) == (2, 2, 2)
    assert facts["importances"][0]["left_out"] == ["late"]
    assert "below 20" in facts["importances"][0]["caveat"]
    assert place.stat().st_size <= 6_000_000
    assert not re.search(r"""(?:src|href)=["']?(?:https?:)?//""", place.read_text().split("</style>")[0])
    with a_page() as page:
        told: list[Any] = []
        page.on("console", lambda message: told.append(message.text) if message.type != "trace" else None)
        page.on("pageerror", lambda error: told.append(str(error)))
        page.on("request", lambda request: told.append(request.url) if request.url.startswith("http") else None)
        page.context.set_offline(True)
        for scheme, width in (("light", 1280), ("dark", 400)):
            page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
            page.set_viewport_size({"width": width, "height": 900})
            if scheme == "light":
                page.goto(place.as_uri())
            page.wait_for_selector(f"html[data-drawn={scheme}]", state="attached")
            assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate("window.hit") is None
        assert page.locator("h1").text_content() == ATTACK
        assert page.locator("a[href^='http'], svg a, img").count() == 0
        drawn = page.locator(".plot .main-svg").count()
        assert drawn >= 2 * page.locator(".plot").count() > 10
        assert told == []
    storage.engine.dispose()


@pytest.mark.slow
def test_studies_of_every_kind_have_a_report(tuner: Tuner, database: str, tmp_path: Path) -> None:
    storage = open_storage(database)
    optuna.create_study(study_name="empty", storage=storage)
    fill(optuna.create_study(study_name="two", storage=storage, directions=["maximize", "minimize"]))
    assert tuner("report", "empty").stdout == f"wrote {tmp_path / 'report.html'}\n"
    assert "The study has no trials yet" in (tmp_path / "report.html").read_text()
    assert "no study named 'none'" in tuner("report", "none").error()
    facts = json.loads(tuner("report", "two", "--json", "-o", "two.html").stdout)
    assert (facts["best"], facts["audit"], len(facts["importances"])) == (None, None, 2)
    assert "No single trial is the best of 2 objectives" in (tmp_path / "two.html").read_text()
    shown = tuner("importance", "two").stdout.splitlines()
    assert shown[0] == "value 0, by fANOVA over 8 complete trials"
    assert sum("below 20" in line for line in shown) == 2
    assert "there are no complete trials" in tuner("importance", "empty").error()
    storage.engine.dispose()
