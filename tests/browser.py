"""`initflow ui` and a headless Chromium that looks at it, as a user would; its screenshots."""

import contextlib
import io
import os
import re
import shutil
import signal
import subprocess
import time
import urllib.request
from pathlib import Path

import psutil
import pytest
from PIL import Image
from playwright.sync_api import expect, sync_playwright

from tests.test_end_to_end import environment, free_port

TIMEOUT_S = 60
SIZE = {"width": 1440, "height": 900}
SCREENSHOTS = os.environ.get("INITFLOW_SCREENSHOTS")  # a folder
NAMES = ("chromium", "chromium-browser", "google-chrome")
# MLflow's assistant opens by itself at the first visit, and takes a quarter of the page.
NO_ASSISTANT = """
if (location.protocol === "http:") {  // an empty page has no storage
    localStorage.setItem("mlflow.assistant.fab.autoOpenedOnFirstLoad_v1", "true");
    localStorage.setItem("mlflow.assistant.panelOpen_v1", "false");
}
"""

expect.set_options(timeout=TIMEOUT_S * 1000)


@contextlib.contextmanager
def served(folder):
    """The address that `initflow ui` prints, when it answers; in the end Ctrl-C ends it all."""
    port = free_port()
    with (
        Path(folder, "ui.log").open("w+") as log,
        subprocess.Popen(
            ["initflow", "ui", "--port", str(port)],
            cwd=folder,
            env=environment(folder),
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        ) as ui,
    ):
        printed = Path(log.name)
        try:
            wait(lambda: answers(port) or ui.poll() is not None)
            assert listening(ui.pid) == {"127.0.0.1"}
            first, *_ = printed.read_text().splitlines()
            (address,) = re.findall(rf"http://127\.0\.0\.1:{port}/\S*", first)
            yield address
        finally:
            ui.send_signal(signal.SIGINT)
            code = ui.wait(TIMEOUT_S)
        assert code == 128 + signal.SIGINT, printed.read_text()
        wait(lambda: not alive(ui.pid))
        assert not answers(port)


def wait(done):
    """Until ``done`` says so."""
    deadline = time.monotonic() + TIMEOUT_S
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def answers(port):
    """Whether MLflow's page is there."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health"):
            return True
    except OSError:
        return False


def listening(process):
    """The addresses at which it, or what it started, waits for connections."""
    first = psutil.Process(process)
    return {
        connection.laddr.ip
        for one in (first, *first.children(recursive=True))
        for connection in one.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }


def alive(session):
    """Whether any process is left of those that the first of the session started."""
    try:
        os.killpg(session, 0)
    except ProcessLookupError:
        return False
    return True


@contextlib.contextmanager
def browser():
    """A headless Chromium; without one the test is skipped, or in CI fails."""
    executable = next(filter(None, map(shutil.which, NAMES)), None)
    with sync_playwright() as playwright:
        if not executable and not Path(playwright.chromium.executable_path).is_file():
            missing = "no Chromium is installed"
            if os.environ.get("CI"):
                pytest.fail(missing)
            pytest.skip(missing)
        chromium = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@contextlib.contextmanager
def visitor(chromium, *, size=SIZE, scheme="light"):
    """A page of somebody who comes for the first time; an error in its scripts fails the test."""
    context = chromium.new_context(viewport=size, color_scheme=scheme)
    context.set_default_timeout(TIMEOUT_S * 1000)
    context.add_init_script(NO_ASSISTANT)
    errors = []
    context.on("weberror", lambda error: errors.append(str(error.error)))
    page = context.new_page()
    yield page
    context.close()
    assert errors == []


def screenshot(page, name):
    """The page as it is, in the folder that INITFLOW_SCREENSHOTS names, if it names one."""
    if SCREENSHOTS:
        page.mouse.move(0, 0)  # nothing is hovered over
        taken = Image.open(io.BytesIO(page.screenshot(animations="disabled")))
        few = taken.convert("RGB").quantize(256, dither=Image.Dither.NONE)  # a third of the size
        few.save(Path(SCREENSHOTS, f"{name}.png"), optimize=True)
