from __future__ import annotations

import csv
import io
import json
import math
import re
from typing import TYPE_CHECKING, Any

import optuna
import pytest
import sqlalchemy
from dashboards import STUDY_NAME, TOKEN, a_study, guarded
from optuna.artifacts import FileSystemArtifactStore, upload_artifact
from optuna.trial import TrialState, create_trial
from optuna_dashboard import wsgi

from storage import StorageError, UnreachableError, open_engine, open_storage
from tuner.dashboard.tries import OF_ONE_CLIENT

if TYPE_CHECKING:
    pass


READING_ROUTES = {
    "/",
    "/dashboard<:re:(/.*)?>",
    "/favicon.ico",
    "/static/<filename:path>",
    "/incompatible-rdb-schema",
    "/api/meta",
    "/api/studies",
    "/api/studies/<study_id:int>",
    "/api/studies/<study_id:int>/param_importances",
    "/api/studies/<study_id:int>/plot/<plot_type>",
    "/csv/<study_id:int>",
    "/artifacts/<study_id:int>/<artifact_id:re:[0-9a-fA-F-]+>",
    "/artifacts/<study_id:int>/<trial_id:int>/<artifact_id:re:[0-9a-fA-F-]+>",
}
EDITING_ROUTES = {
    ("POST", "/api/studies"),
    ("POST", "/api/studies/<study_id:int>/<trial_id:int>/skip"),
    ("POST", "/api/studies/<study_id:int>/preference"),
    ("POST", "/api/studies/<study_id:int>/preference/<history_id>"),
    ("POST", "/api/trials/<trial_id:int>/user-attrs"),
    ("PUT", "/api/studies/<study_id:int>/<trial_id:int>/note"),
    ("PUT", "/api/studies/<study_id:int>/note"),
    ("PUT", "/api/studies/<study_id:int>/preference_feedback_component"),
    ("DELETE", "/api/studies/<study_id:int>"),
    ("DELETE", "/api/studies/<study_id:int>/preference/<history_id>"),
}
NEVER_OFFERED_ROUTES = {
    ("POST", "/api/studies/<study_id:int>/rename"),
    ("POST", "/api/trials/<trial_id:int>/tell"),
    ("POST", "/incompatible-rdb-schema"),
    ("POST", "/api/artifacts/<study_id:int>"),
    ("POST", "/api/artifacts/<study_id:int>/<trial_id:int>"),
    ("DELETE", "/api/artifacts/<study_id:int>/<artifact_id:re:[0-9a-fA-F-]+>"),
    ("DELETE", "/api/artifacts/<study_id:int>/<trial_id:int>/<artifact_id:re:[0-9a-fA-F-]+>"),
    ("POST", "/api/llm/generate_plotly_graph_query"),
    ("POST", "/api/llm/re_generate_plotly_graph_query"),
    ("POST", "/api/llm/trial_filter_query"),
}
PLOTS = ("contour", "slice", "parallel_coordinate", "rank", "edf", "timeline")
"""What optuna-dashboard draws by plotly, on the server."""
CHANGING_ROUTES = sorted(EDITING_ROUTES | NEVER_OFFERED_ROUTES)


def dashboard_of(database: str, *, allow_edit: bool = False) -> Any:
    return wsgi(open_storage(database, read_only=not allow_edit))


def filled(rule: str) -> str:
    """A URL that a route's rule matches."""
    return re.sub(r"<[^>]*>", "1", rule)


# --- what is shown


@pytest.mark.slow
def test_a_read_only_connection_is_enough_for_every_page_of_a_study(database: str) -> None:
    study_id = a_study(database)
    with guarded(dashboard_of(database)) as client:
        for path in (
            "/dashboard",
            f"/dashboard/studies/{study_id}/trials",
            "/static/bundle.js",
            "/favicon.ico",
            "/api/meta",
            "/api/studies",
            f"/api/studies/{study_id}/param_importances",
            f"/csv/{study_id}",
            *(f"/api/studies/{study_id}/plot/{plot}" for plot in PLOTS),
        ):
            assert client.ask(path).status == 200, path
            assert client.ask(path, "HEAD").status == 200, path
        detail = json.loads(client.ask(f"/api/studies/{study_id}").body)
    assert [trial["state"] for trial in detail["trials"]] == ["Complete", "Complete", "Pruned", "Running"]
    assert [len(trial["intermediate_values"]) for trial in detail["trials"]] == [3, 3, 2, 1]
    assert [trial["number"] for trial in detail["best_trials"]] == [1]


def test_nan_and_infinite_reports_leave_the_study_readable(database: str) -> None:
    study = optuna.create_study(storage=open_storage(database), study_name="odd")
    for value in (math.nan, math.inf, -math.inf):
        study.add_trial(create_trial(state=TrialState.COMPLETE, value=1.0, intermediate_values={0: value}))
    study.add_trial(create_trial(state=TrialState.COMPLETE, value=math.inf))
    with guarded(dashboard_of(database)) as client:
        answer = client.ask(f"/api/studies/{study._study_id}")
    trials = json.loads(answer.body, parse_constant=pytest.fail)["trials"]
    shown = [point["value"] for trial in trials for point in trial["intermediate_values"]]
    assert shown == ["nan", "inf", "-inf"]
    assert trials[3]["values"] == ["inf"]


@pytest.mark.filterwarnings("ignore:Choices for a categorical distribution:UserWarning")
@pytest.mark.parametrize("choices", [[[16], [16, 8], None], [{"depth": 1}, {"depth": [2]}]])
def test_a_study_whose_choices_are_lists_can_be_opened(database: str, choices: list[Any]) -> None:
    url = open_engine(database).url.render_as_string(hide_password=False)
    study = optuna.create_study(storage=optuna.storages.RDBStorage(url), study_name="shapes")
    for choice in [*choices, choices[0]]:
        distributions = {
            "shape": optuna.distributions.CategoricalDistribution(choices),
            "lr": optuna.distributions.FloatDistribution(0, 1),
        }
        params = {"shape": choice, "lr": len(study.trials) / 4}
        study.add_trial(create_trial(params=params, distributions=distributions, value=len(study.trials)))
    with guarded(dashboard_of(database)) as client:
        for path in ("/api/studies/{}/param_importances", "/csv/{}"):
            assert client.ask(path.format(study._study_id)).status == 200, path
        detail = json.loads(client.ask(f"/api/studies/{study._study_id}").body)
    shown = [param["param_external_value"] for trial in detail["trials"] for param in trial["params"]]
    assert str(choices[1]) in shown


def test_the_export_has_attributes_of_any_size(database: str) -> None:
    csv.field_size_limit(131_072)  # as every process begins
    history = "=" + "x" * 200_000
    study_id = a_study(database, history=history)
    with guarded(dashboard_of(database)) as client:
        answer = client.ask(f"/csv/{study_id}")
    assert answer.status == 200
    assert answer.body.decode().count(f"'{history}") == 4


def test_the_export_has_no_cell_that_a_spreadsheet_would_run(database: str) -> None:
    formulas = {
        "dde": "=cmd|'/c calc'!A0",
        "plus": "+1+1",
        "minus": "-1+1",
        "at": "@SUM(1)",
        "tab": "\t=1",
        "wide": "\uff1d1",
        "=name": "two\nlines",
    }
    study_id = a_study(database, **formulas, number="-0.5", text="a=b")
    with guarded(dashboard_of(database)) as client:
        answer = client.ask(f"/csv/{study_id}")
    rows = list(csv.DictReader(io.StringIO(answer.body.decode(), newline="")))
    assert len(rows) == 4
    for name, formula in formulas.items():
        assert rows[0][f"UserAttribute {name}"] == (formula if name == "=name" else f"'{formula}")
    assert rows[0]["UserAttribute number"] == "-0.5"
    assert rows[0]["UserAttribute text"] == "a=b"
    assert rows[1]["Value"] == "0.9"
    assert answer.headers["Content-Disposition"] == f"attachment; filename=study-{study_id}.csv"
    assert int(answer.headers["Content-Length"]) == len(answer.body)


def test_an_export_of_no_study_is_not_found(database: str) -> None:
    with guarded(dashboard_of(database)) as client:
        assert client.ask("/csv/4711").status == 404


def test_an_artifact_is_saved_not_shown(database: str, tmp_path: Any) -> None:
    study_id = a_study(database)
    page = tmp_path / "page.html"
    page.write_text("<script>alert(1)</script>")
    (tmp_path / "store").mkdir()
    store = FileSystemArtifactStore(tmp_path / "store")
    storage = open_storage(database)
    study = optuna.load_study(study_name=STUDY_NAME, storage=storage)
    artifact_id = upload_artifact(artifact_store=store, file_path=str(page), study_or_trial=study)
    with guarded(wsgi(storage, artifact_store=store)) as client:
        answer = client.ask(f"/artifacts/{study_id}/{artifact_id}")
    assert answer.body == page.read_bytes()
    assert answer.headers["Content-Disposition"] == "attachment"
    assert "sandbox" in answer.headers["Content-Security-Policy"]
    assert answer.headers["Access-Control-Allow-Origin"] is None


def test_a_fault_inside_is_told_without_a_traceback(database: str) -> None:
    study_id = a_study(database)
    with guarded(dashboard_of(database)) as client:
        engine = open_engine(database)
        with engine.begin() as connection:
            connection.execute(sqlalchemy.text("DROP TABLE studies CASCADE"))
        engine.dispose()
        for path in ("/api/studies", f"/csv/{study_id}"):
            answer = client.ask(path)
            assert answer.status == 500, path
            assert answer.headers["X-Content-Type-Options"] == "nosniff"
            assert not re.search(rb"Traceback|psycopg2|SELECT|\.py", answer.body), path


# --- routes


def test_every_route_of_optuna_dashboard_has_been_looked_at() -> None:
    found = {(route.method, route.rule) for route in wsgi(optuna.storages.InMemoryStorage()).routes}
    assert found == {("GET", rule) for rule in READING_ROUTES} | set(CHANGING_ROUTES)


def test_a_read_only_dashboard_refuses_every_change(database: str) -> None:
    study_id = a_study(database)
    # its connection could write: it is the guard that refuses
    with guarded(dashboard_of(database, allow_edit=True)) as client:
        before = client.ask(f"/api/studies/{study_id}").body
        for method, rule in CHANGING_ROUTES:
            answer = client.change(filled(rule), method, {"body": "x", "version": 1, "study_name": "x"})
            assert answer.status == 405, rule
            assert answer.headers["Allow"] == "GET, HEAD"
            assert "--allow-edit" in answer.reason()
        for method in ("PATCH", "OPTIONS", "TRACE", "CONNECT", "PROPFIND", "get", "post"):
            assert client.change("/api/studies", method).status == 405, method
        assert client.ask(f"/api/studies/{study_id}").body == before


def test_a_read_only_connection_refuses_what_would_slip_past_the_guard(database: str) -> None:
    study_id = a_study(database)
    with pytest.raises(StorageError, match="read-only"):
        open_storage(database, read_only=True).delete_study(study_id)


def test_a_page_that_optuna_dashboard_does_not_have_is_not_found(database: str) -> None:
    with guarded(dashboard_of(database)) as client:
        for path in (
            "/api/llm/trial_filter_query",
            "//evil.example/",
            "/static/../_app.py",
            "/static/%2e%2e/_app.py",
            "/api/studies/1/new",
            "/api/studies/%d9%a1",
        ):
            assert client.ask(path).status == 404, path


# --- changes


def test_an_editor_can_write_a_note_and_delete_a_study(database: str) -> None:
    study_id = a_study(database)
    with guarded(dashboard_of(database, allow_edit=True), allow_edit=True) as client:
        assert client.change(f"/api/studies/{study_id}/note", "PUT", {"body": "fine", "version": 1}).status == 204
        assert json.loads(client.ask(f"/api/studies/{study_id}").body)["note"]["body"] == "fine"
        assert client.change(f"/api/studies/{study_id}", "DELETE").status == 204
    assert open_storage(database).get_all_studies() == []


@pytest.mark.parametrize(("method", "rule"), sorted(EDITING_ROUTES))
def test_every_edit_on_offer_reaches_optuna_dashboard(method: str, rule: str) -> None:
    with guarded(wsgi(optuna.storages.InMemoryStorage()), allow_edit=True) as client:
        answer = client.change(filled(rule), method, {})
    # about a study that is not there
    assert answer.status in (400, 404, 500)
    assert b"not offered" not in answer.body


def test_an_editor_is_not_offered_what_would_break_a_study(database: str) -> None:
    a_study(database)
    with guarded(dashboard_of(database, allow_edit=True), allow_edit=True) as client:
        for method, rule in sorted(NEVER_OFFERED_ROUTES):
            answer = client.change(filled(rule), method, {"study_name": "x", "state": "Fail"})
            assert (answer.status, "not offered" in answer.reason()) == (403, True), rule
        # bottle drops bytes that are not UTF-8 and slashes at the end
        for path in ("/api/studies/1/re%ffname", "/api/studies/1/rename/", "/api/trials/%d9%a1/tell"):
            assert client.change(path, "POST", {"study_name": "x", "state": "Fail"}).status == 403, path
    assert [study.study_name for study in open_storage(database).get_all_studies()] == [STUDY_NAME]


@pytest.mark.slow
@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1"},
        {"Origin": "http://127.0.0.1:1"},
        {"Origin": "http://[::1"},
        {"Origin": ""},
        {"Origin": "", "Referer": "http://evil.example/?x=http://127.0.0.1"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ],
    ids=str,
)
def test_a_change_that_another_site_asks_for_is_refused(database: str, headers: dict[str, str]) -> None:
    study_id = a_study(database)
    with guarded(dashboard_of(database, allow_edit=True), allow_edit=True) as client:
        assert client.change(f"/api/studies/{study_id}", "DELETE", **headers).status == 403
        assert client.ask(f"/api/studies/{study_id}").status == 200


def test_a_change_without_a_body_and_without_an_origin_is_refused(database: str) -> None:
    study_id = a_study(database)
    with guarded(dashboard_of(database, allow_edit=True), allow_edit=True) as client:
        assert client.ask(f"/api/studies/{study_id}", "DELETE").status == 403
        assert client.ask(f"/api/studies/{study_id}/1/skip", "POST").status == 403
        # an old browser may send a Referer only
        referer = {"Referer": f"http://{client.host}/dashboard"}
        assert client.ask(f"/api/studies/{study_id}", "DELETE", headers=referer).status == 204


# --- who may ask


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:{port}", "127.0.0.1", "127.0.0.1:1", "127.0.0.1:{port}@evil.example", ""],
)
def test_a_foreign_host_is_refused(database: str, host: str) -> None:
    with guarded(dashboard_of(database)) as client:
        answer = client.ask("/api/studies", headers={"Host": host.format(port=client.port)})
    assert answer.status == 421
    assert "--allowed-host" in answer.reason()


def test_an_allowed_host_is_answered_whatever_its_case(database: str) -> None:
    with guarded(dashboard_of(database), hosts=frozenset({"tuner.example"})) as client:
        assert client.ask("/api/studies", headers={"Host": "Tuner.Example"}).status == 200


def test_without_the_token_nothing_is_shown(database: str) -> None:
    a_study(database)
    with guarded(dashboard_of(database), token=TOKEN) as client:
        for path in ("/", "/dashboard", "/api/studies", "/csv/1", "/static/bundle.js"):
            for headers in (
                {},
                {"Authorization": "Bearer wrong"},
                {"Authorization": f"Basic {TOKEN}"},
                {"Authorization": "Bearer \xff"},
                {"Cookie": f"tuner_dashboard_{client.port}={TOKEN}"},
                {"Cookie": f"tuner_dashboard_{client.port}="},
            ):
                answer = client.ask(path, headers=headers)
                assert answer.status == 401, (path, headers)
                assert answer.headers["WWW-Authenticate"] == "Bearer"
        for wrong in ("", "wrong", TOKEN[:-1], TOKEN + "0", "%ff", "%ed%a0%80"):
            answer = client.ask(f"/dashboard?token={wrong}")
            assert (answer.status, answer.headers["Set-Cookie"]) == (401, None), wrong


def test_a_token_that_changes_ends_the_sessions_of_the_last(database: str) -> None:
    now = [TOKEN]
    with guarded(dashboard_of(database), token=lambda: now[0]) as client:
        cookie = client.ask(f"/dashboard?token={TOKEN}").headers["Set-Cookie"].partition(";")[0]
        assert client.ask("/api/studies", headers={"Cookie": cookie}).status == 200
        now[0] = TOKEN[::-1]
        assert client.ask("/api/studies", headers={"Cookie": cookie}).status == 401
        assert client.ask("/api/studies", headers={"Authorization": f"Bearer {TOKEN}"}).status == 401
        assert client.ask("/api/studies", headers={"Authorization": f"Bearer {TOKEN[::-1]}"}).status == 200


def test_whether_the_database_is_there_is_told_to_everybody_and_nothing_else(database: str) -> None:
    away: list[Exception] = []

    def check() -> None:
        if away:
            raise away[0]

    with guarded(dashboard_of(database), token=TOKEN, check=check) as client:
        for host in (client.host, "10.1.2.3"):  # a probe of Kubernetes names the pod's address
            answer = client.ask("/healthz", headers={"Host": host})
            assert (answer.status, json.loads(answer.body)) == (200, {"database": "there"})
        away.append(UnreachableError("cannot reach PostgreSQL at postgresql://tuner:***@db/tuner"))
        answer = client.ask("/healthz")
        assert (answer.status, json.loads(answer.body)) == (503, {"database": "away"})
        assert answer.headers["Retry-After"] == "5"
        assert client.ask("/healthz", "HEAD").body == b""
        assert client.ask("/healthz", "POST").status == 405


def test_a_session_ends_by_signing_out_and_with_the_dashboard(database: str) -> None:
    with guarded(dashboard_of(database), token=TOKEN) as client:
        first, second = (
            client.ask(f"/dashboard?token={TOKEN}").headers["Set-Cookie"].partition(";")[0] for _ in range(2)
        )
        assert first != second
        out = client.ask("/sign-out", headers={"Cookie": first})
        assert (out.status, out.headers["Set-Cookie"].split("; ")[1]) == (200, "Max-Age=0")
        assert client.ask("/api/studies", headers={"Cookie": first}).status == 401
        assert client.ask("/api/studies", headers={"Cookie": second}).status == 200
    with guarded(dashboard_of(database), token=TOKEN) as client:
        value = second.partition("=")[2]
        assert client.ask("/api/studies", headers={"Cookie": f"tuner_dashboard_{client.port}={value}"}).status == 401


def test_a_client_that_tries_tokens_is_shut_out_for_a_while_and_sessions_are_not(database: str) -> None:
    with guarded(dashboard_of(database), token=TOKEN) as client:
        cookie = client.ask(f"/dashboard?token={TOKEN}").headers["Set-Cookie"].partition(";")[0]
        right = {"Authorization": f"Bearer {TOKEN}"}
        for _ in range(OF_ONE_CLIENT // 2):
            # many in one URL are one try, and no token at all is none
            assert client.ask("/dashboard?" + "token=wrong&" * 9 + f"token={TOKEN}").status == 401
            assert client.ask("/api/studies", headers={"Authorization": "Bearer wrong"}).status == 401
            assert client.ask("/api/studies").status == 401
        for path, headers in ((f"/dashboard?token={TOKEN}", {}), ("/api/studies", right), ("/", right)):
            answer = client.ask(path, headers=headers)
            assert (answer.status, 0 < int(answer.headers["Retry-After"]) <= 61) == (429, True)
        for path in ("/api/studies", f"/api/studies?token={TOKEN}"):
            assert client.ask(path, headers={"Cookie": cookie}).status == 200
        assert client.ask("/api/studies", headers=right | {"X-Forwarded-For": "203.0.113.7"}).status == 200


def test_the_token_is_taken_as_a_bearer_token(database: str) -> None:
    with guarded(dashboard_of(database), token=TOKEN) as client:
        assert client.ask("/api/studies", headers={"Authorization": f"Bearer {TOKEN}"}).status == 200


def test_the_token_in_the_url_is_exchanged_for_a_cookie_and_goes_from_the_url(database: str) -> None:
    with guarded(dashboard_of(database), token=TOKEN) as client:
        answer = client.ask(f"/dashboard/studies/1?a=%0d%0a&token={TOKEN}")
        assert answer.status == 303
        assert answer.headers["Location"] == "/dashboard/studies/1?a=%0D%0A"
        cookie, *attributes = answer.headers["Set-Cookie"].split("; ")
        assert {"HttpOnly", "SameSite=Strict", "Path=/", "Max-Age=86400"} == set(attributes)
        assert TOKEN not in cookie
        assert client.ask("/api/studies", headers={"Cookie": f"other=\xff; {cookie}; more=1"}).status == 200
        again = client.ask(f"/dashboard?token={TOKEN}", headers={"Cookie": cookie})
        assert (again.status, again.headers["Location"]) == (303, "/dashboard")
        # no redirect to another host
        assert client.ask(f"//evil.example/?token={TOKEN}").headers["Location"] is None


def test_a_redirect_goes_nowhere_that_a_proxys_header_names(database: str) -> None:
    forged = {"X-Forwarded-Host": "evil.example", "X-Forwarded-Proto": "gopher", "Forwarded": "host=evil.example"}
    with guarded(dashboard_of(database)) as client:
        answer = client.ask("/", headers=forged)
        assert answer.headers["Location"] == f"http://{client.host}/dashboard"


def test_an_editor_needs_the_token_too(database: str) -> None:
    study_id = a_study(database)
    with guarded(dashboard_of(database, allow_edit=True), allow_edit=True, token=TOKEN) as client:
        path = f"/api/studies/{study_id}"
        assert client.change(path, "DELETE").status == 401
        assert client.change(f"{path}?token={TOKEN}", "DELETE").status == 303
        assert client.change(path, "DELETE", Authorization=f"Bearer {TOKEN}").status == 204


def test_every_answer_tells_the_browser_to_keep_to_itself(database: str) -> None:
    with guarded(dashboard_of(database)) as client:
        answers = [
            client.ask("/dashboard"),
            client.ask("/api/studies"),
            client.ask("/api/studies/4711"),
            client.ask("/nothing"),
            client.ask("/api/studies", "POST"),
            client.ask("/", headers={"Host": "evil.example"}),
        ]
    for answer in answers:
        assert "frame-ancestors 'none'" in answer.headers["Content-Security-Policy"]
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["Referrer-Policy"] == "same-origin"
        assert answer.headers["Cross-Origin-Resource-Policy"] == "same-origin"
    # merged with the page's own, in one header
    assert answers[0].headers.get_all("Content-Security-Policy") == [answers[0].headers["Content-Security-Policy"]]
    assert "script-src 'self'" in answers[0].headers["Content-Security-Policy"]
