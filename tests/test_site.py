"""The site that `make docs` has built, in a real browser: small and large, light and dark."""

import functools
import http.server
import threading

import pytest

from tests.browser import browser
from tests.conftest import ROOT

pytestmark = pytest.mark.end_to_end

SITE = ROOT / "build" / "docs"
PAGES = ("", "choosing/", "theory/", "tutorials/first-comparison/", "api/", "commands/")


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves files, and says nothing."""

    def log_message(self, *args):
        pass


@pytest.mark.skipif(not (SITE / "index.html").exists(), reason="make docs has not built the site")
def test_pages_fit_a_phone_and_load_nothing_from_elsewhere():
    """No page is wider than the window, in either scheme of colours, and all it needs is there."""
    handler = functools.partial(Quiet, directory=SITE)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    home = f"http://127.0.0.1:{server.server_port}/"
    try:
        with browser() as chromium:
            for scheme in ("light", "dark"):
                size = {"width": 360, "height": 780}
                page = chromium.new_page(viewport=size, color_scheme=scheme)
                asked, answers = [], []
                page.on("request", lambda one, asked=asked: asked.append(one.url))
                page.on(
                    "response", lambda one, answers=answers: answers.append((one.status, one.url))
                )
                for name in PAGES:
                    page.goto(home + name)
                    assert page.evaluate("document.documentElement.scrollWidth") == 360, name
                assert not [url for url in asked if not url.startswith((home, "data:"))]
                assert not [url for status, url in answers if status >= 400]
    finally:
        server.shutdown()
        server.server_close()
