"""What the guard adds to optuna-dashboard's page: buttons that it would refuse are hidden, and a refusal is shown."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from wsgiref.headers import Headers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

SCRIPT_PATH = "/tuner.js"

# By their labels and icons in optuna-dashboard 0.21 (dated 2026-11); one that is called otherwise later is shown, and
# says why it does nothing.
_NEVER = ('[aria-label="rename study"]', '[aria-label="delete artifact"]')
_EDITS = (
    'button:has(svg[data-testid="AddBoxIcon"])',  # creates a study
    '[aria-label="delete study"]',
    '[aria-label="skip trial"]',
    'button:has(svg[data-testid="EditIcon"])',  # opens the editor of a note
)
_STYLE = """
<style>
{hidden} {{ display: none !important; }}
#tuner-read-only, #tuner-refused {{ position: fixed; bottom: 8px; z-index: 99999; padding: 6px 12px; border-radius: 4px;
  font: 13px sans-serif; color: white; }}
#tuner-read-only {{ right: 8px; background: #555; opacity: 0.85; pointer-events: none; }}
#tuner-refused {{ left: 50%; bottom: 56px; transform: translateX(-50%); background: #b00020; }}
</style>
<script src="{script}"></script>
"""
_NOTICE = "<div id=\"tuner-read-only\">read-only: 'tuner dashboard --allow-edit' lets studies be changed</div>\n"
# The page tells no reason for most of what is refused. Its answers are passed on as they are.
SCRIPT = """\
(() => {
  const ask = window.fetch;
  let end = 0;
  const show = (text) => {
    let box = document.getElementById("tuner-refused");
    if (box === null) {
      box = document.createElement("div");
      box.id = "tuner-refused";
      box.setAttribute("role", "alert");
      document.body.append(box);
    }
    box.textContent = text;
    clearTimeout(end);
    end = setTimeout(() => box.remove(), 15000);
  };
  window.fetch = async (...args) => {
    const answer = await ask(...args);
    if (answer.status === 405 || answer.status === 403) {
      answer.clone().json().then((body) => body.reason && show(body.reason), () => {});
    }
    return answer;
  };
})();
"""


def script(start_response: StartResponse) -> Iterable[bytes]:
    """Answer with the script."""
    body = SCRIPT.encode()
    headers = [("Content-Type", "text/javascript; charset=utf-8"), ("Content-Length", str(len(body)))]
    start_response("200 OK", headers)
    return [body]


def page(
    app: WSGIApplication, environ: WSGIEnvironment, start_response: StartResponse, *, allow_edit: bool
) -> Iterable[bytes]:
    """Answer with optuna-dashboard's page and what is added to it; no browser keeps it for a dashboard started anew."""
    started: list[tuple[str, list[tuple[str, str]]]] = []
    chunks: list[bytes] = []

    def start_later(status: str, headers: list[tuple[str, str]], _exc_info: Any = None, /) -> Callable[[bytes], object]:
        started.append((status, headers))
        return chunks.append

    whole = {name: value for name, value in environ.items() if name not in _CONDITIONS}
    answer = app({**whole, "REQUEST_METHOD": "GET"}, start_later)
    try:
        chunks.extend(answer)
    finally:
        if hasattr(answer, "close"):
            answer.close()
    status, given = started[-1]
    headers, body = Headers(given), b"".join(chunks)
    if status.startswith("200 ") and (headers["Content-Type"] or "").startswith("text/html"):
        body = _added(body.decode(), allow_edit=allow_edit).encode()
        for name in ("Last-Modified", "ETag", "Accept-Ranges"):
            del headers[name]
        headers["Cache-Control"] = "no-store"
        headers["Content-Length"] = str(len(body))
    start_response(status, headers.items())
    return [] if environ["REQUEST_METHOD"] == "HEAD" else [body]


_CONDITIONS = ("HTTP_IF_MODIFIED_SINCE", "HTTP_IF_NONE_MATCH", "HTTP_RANGE")


def _added(html: str, *, allow_edit: bool) -> str:
    hidden = _NEVER if allow_edit else (*_NEVER, *_EDITS)
    html = html.replace("<head>", "<head>" + _STYLE.format(hidden=", ".join(hidden), script=SCRIPT_PATH), 1)
    return html if allow_edit else html.replace("</body>", _NOTICE + "</body>", 1)
