"""What a comparison looks like in MLflow's page and in its report, seen in a real browser.

With INITFLOW_SCREENSHOTS the folder of the docs' images, they are taken again, of a comparison on
the real MNIST.
"""

import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import mlflow
import pytest
from playwright.sync_api import expect

from initflow.experiments.comparisons.overview import SECTIONS
from initflow.tracking import mlflow_page
from tests.browser import SCREENSHOTS, SIZE, browser, screenshot, served, visitor
from tests.conftest import MNIST, new_store
from tests.reporting.test_webpage import everything
from tests.test_end_to_end import run

pytestmark = pytest.mark.end_to_end

PARENT = "mlflow.parentRunId"
FIGURES = ("accuracies", "learning_curves", "signals_by_layer")
BOTH = SIZE | {"height": 1150}  # a window that shows the view's first two sections
ALL = SIZE | {"height": 5000}  # one that shows every chart
READING = {"width": 1000, "height": 1150}
SMALL = ("--dataset", "digits", "--epochs", "1", "--eval-every", "5")
ONE = ("--threads", "1", "--log-model", "false")
# The one that is looked at: its first scheme diverges with relu.
COMPARISON = (
    "--inits", "normal:std=0.5,xavier,he", "--activations", "tanh,relu", "--seeds", "3",
    "--hidden", "50x5", *SMALL,
)  # fmt: skip
# The file of a scheme, whose path is its name; of it alone the single training is.
NAMED = "<img src=x onerror=alert(1)>[click](javascript:alert(2)) **b** http:evil.py"
FILL = "def fill(weight):\n    weight.fill_(0.01)\n"
HOSTILE = [
    "<script>alert(1)</script>",
    "</script></title></style></textarea><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    '"><svg onload=alert(1)>',
    "' onmouseover='alert(1)' autofocus onfocus='alert(1)",
    "javascript:alert(1)",
    "<iframe srcdoc='<script>parent.alert(1)</script>'></iframe>",
    "<base href=http://evil.example><link rel=stylesheet href=//evil.example/x.css>",
    "<meta http-equiv=refresh content='0;url=http://evil.example'>",
    "{{ 7 * 7 }}{% raw %}<!--",
    "&lt;b&gt;&#60;script&#62;",
    "right\u202eto\u2066left\u200b \x1b[31mred",
]
SHOWN = (
    "--inits", "pytorch,xavier,he", "--activations", "tanh,relu", "--seeds", "5",
    "--hidden", "100x5", "--epochs", "1", "--eval-every", "50", "--lr", "0.05",
)  # fmt: skip


def told(folder, *words):
    """Run the command to its end, and return what it printed."""
    data = {"INITFLOW_DATA_DIR": str(MNIST), "LOGNAME": "reader"} if SCREENSHOTS else {}
    done = run(folder, "initflow", *words, *ONE, OMP_NUM_THREADS="1", **data)
    assert done.returncode == 0, done.stderr
    return done.stdout


class Comparison:
    """What the store holds of a comparison, and what it printed."""

    def __init__(self, folder, printed):
        client = mlflow.MlflowClient(f"sqlite:///{folder}/mlflow.db")
        self.folder, self.printed = folder, printed
        (parent,) = re.findall(r"viewStateShareKey=(\w+)", printed)
        self.parent = client.get_run(parent)
        self.experiment = self.parent.info.experiment_id
        self.runs = client.search_runs([self.experiment], f"tags.`{PARENT}` = '{parent}'")
        self.ids = [run.info.run_id for run in self.runs]
        self.names = {run.info.run_name for run in self.runs}
        (self.group_tag,) = {
            tag for run in self.runs for tag in run.data.tags if tag.startswith(mlflow_page.GROUP)
        }
        self.groups = {run.data.tags[self.group_tag] for run in self.runs}
        self.artifacts = Path(urlsplit(self.parent.info.artifact_uri).path)
        result = json.loads((self.artifacts / "comparison.json").read_text())
        self.sentence = result["sentences"][0]
        tags = client.get_experiment(self.experiment).tags
        self.views = {
            json.loads(value)["name"]
            for key, value in tags.items()
            if key.startswith(mlflow_page.VIEW)
        }

    def parts(self):
        """The sections of the parent's own metrics, each with the names in it."""
        parts = {}
        for key in self.parent.data.metrics:
            section, _, name = key.rpartition("/")
            parts.setdefault(section, []).append(name)
        return parts


@pytest.fixture(scope="module")
def chromium():
    with browser() as chromium:
        yield chromium


@pytest.fixture(scope="module")
def comparison(chromium, tmp_path_factory):
    """The last of what is in a store beside a smaller comparison and a single training.

    A browser that is missing is told of before they start.
    """
    folder = tmp_path_factory.mktemp("store")
    new_store(folder)
    (folder / NAMED).write_text(FILL)
    others = [
        ("compare", "--inits", "he,orthogonal", "--activations", "relu", "--seeds", "2", *SMALL),
        ("train", "--init", f"{NAMED}:fill", *SMALL),
    ]
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda words: told(folder, *words), others))
    return Comparison(folder, told(folder, "compare", *(SHOWN if SCREENSHOTS else COMPARISON)))


@pytest.fixture(scope="module")
def ui(comparison):
    """The address that `initflow ui` printed."""
    with served(comparison.folder) as address:
        yield address


@pytest.fixture(scope="module")
def server(ui):
    return ui.partition("/#")[0]


@pytest.fixture
def page(chromium):
    with visitor(chromium) as page:
        yield page


def sections(page):
    """The headings of the charts' sections, in order."""
    return page.get_by_test_id("experiment-view-compare-runs-section-header")


def chart(page, section, title):
    """The chart of this title in this section; the page makes those that are in view."""
    heading = sections(page).filter(has_text=re.compile(rf"^\s*{re.escape(section)}\s*\("))
    grid = page.get_by_test_id("draggable-chart-cards-grid")
    part = page.locator("div").filter(has=heading).filter(has=grid).last  # the innermost
    cards = part.get_by_test_id("experiment-view-compare-runs-card")
    return cards.filter(has=page.get_by_text(title, exact=True))


def widen_the_list(page):
    """Draw the line between runs and charts to the right, until the groups' names are whole."""
    part = page.locator(".react-resizable").first.bounding_box()
    x, y = part["x"] + part["width"] + 2, part["y"] + 160
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + 50, y, steps=5)
    page.mouse.up()


def test_the_parents_charts_are_the_mean_curves_and_the_variance_by_depth(page, server, comparison):
    """One of each scheme, in a section of its own for each quantity."""
    address = mlflow_page.run_address(
        comparison.experiment, comparison.parent.info.run_id, charts=True
    )
    page.goto(mlflow_page.absolute(server, address), wait_until="commit")
    expect(page.get_by_role("heading", name=comparison.parent.info.run_name)).to_be_visible()
    parts = comparison.parts()
    assert {"accuracy_by_iteration", "signal_by_layer"} <= set(parts)
    page.set_viewport_size(ALL)
    for section, names in parts.items():
        heading = re.compile(rf"^\s*{section}\s*\({len(names)}\)")
        expect(sections(page).filter(has_text=heading)).to_be_visible()
    for section in ("accuracy_by_iteration", "signal_by_layer"):
        for name in parts[section]:
            expect(chart(page, section, name).locator(".js-line").first).to_be_attached()
    page.set_viewport_size(SIZE)
    screenshot(page, "mlflow_parent")


def test_the_saved_view_shows_its_own_runs_in_groups_with_bands(page, ui, comparison):
    """Where it was said to be: accuracy first, a line and a band for each group; listed by name."""
    view = comparison.parent.info.run_id
    address = mlflow_page.runs_address(comparison.experiment, view)
    assert ui.partition("/#")[2] == address.removeprefix("#")
    assert f"/{address}\n" in comparison.printed
    page.goto(ui, wait_until="commit")
    rows = page.get_by_role("row").filter(has_text="Group:")
    expect(rows).to_have_count(len(comparison.groups))
    for group in comparison.groups:
        row = rows.filter(has=page.get_by_text(f"Group: {group}", exact=True))
        colour = mlflow_page.colour(comparison.group_tag, group)
        expect(row).to_contain_text(colour)  # the name of its colour's button
    expect(page.get_by_text(f"{len(comparison.runs)} matching runs")).to_be_visible()
    expect(sections(page).first).to_have_text(re.compile(r"^\s*accuracy\s*\("))
    accuracy = page.get_by_test_id("experiment-view-compare-runs-card").first
    expect(accuracy.get_by_text("accuracy/test", exact=True)).to_be_visible()
    for group in comparison.groups:
        expect(accuracy.get_by_text(f"{group} (accuracy/test)", exact=True)).to_be_attached()
    bands = accuracy.locator(".fills path.js-fill")
    expect(bands).to_have_count(len(comparison.groups))
    page.set_viewport_size(ALL)
    for section in SECTIONS:
        for metric in section.metrics:
            drawn = chart(page, section.name, metric).locator("path.js-line")
            expect(drawn.nth(len(comparison.groups) - 1)).to_be_attached()
            ticks = chart(page, section.name, metric).locator(".ytick text").all_text_contents()
            assert len(set(ticks)) == len(ticks) > 1, metric  # each can be told from the others
    page.set_viewport_size(BOTH)
    if SCREENSHOTS:
        widen_the_list(page)
    screenshot(page, "mlflow_view")
    page.get_by_test_id("saved-views-trigger").click()
    for name in comparison.views:
        expect(page.get_by_role("menu").get_by_text(name, exact=True)).to_be_visible()
    assert comparison.parent.info.run_name in comparison.views


def test_the_runs_one_by_one(page, server, comparison):
    """Parallel coordinates with what differs, and below them every run by its name."""
    address = mlflow_page.comparison_address(comparison.experiment, comparison.ids)
    page.goto(mlflow_page.absolute(server, address), wait_until="commit")
    title = f"Comparing {len(comparison.runs)} Runs from 1 Experiment"
    expect(page.get_by_role("heading", name=title)).to_be_visible()
    plot = page.locator(".parcoords")
    for axis in ("activation", "init", "seed", mlflow_page.ACCURACY):
        expect(plot.get_by_text(axis, exact=True)).to_be_visible()
    for name in comparison.names:
        expect(page.get_by_text(name, exact=True).first).to_be_attached()
    screenshot(page, "mlflow_runs")


def test_the_description_leads_on_and_the_runs_below_have_names(page, server, comparison):
    """Each link with one click, however long the description; the runs told apart by name."""
    address = mlflow_page.run_address(comparison.experiment, comparison.parent.info.run_id)
    page.goto(mlflow_page.absolute(server, address), wait_until="commit")
    assert len(comparison.names) == len(comparison.runs)
    below = page.get_by_role("link", name=re.compile(r" seed \d$"))
    expect(below).to_have_count(10)  # the page's first
    assert set(below.all_inner_texts()) < comparison.names
    with page.expect_popup() as opened:
        page.get_by_role("link", name="Mean curves with bands").click()
    rows = opened.value.get_by_role("row").filter(has_text="Group:")
    expect(rows).to_have_count(len(comparison.groups))
    with page.expect_popup() as opened:
        page.get_by_role("link", name="run by run").click()
    title = f"Comparing {len(comparison.runs)} Runs from 1 Experiment"
    expect(opened.value.get_by_role("heading", name=title)).to_be_visible()


def test_the_figures_and_the_report_among_the_artifacts(page, server, comparison):
    """Each is shown by a click on its name."""
    address = mlflow_page.run_address(comparison.experiment, comparison.parent.info.run_id)
    page.goto(
        mlflow_page.absolute(server, address.replace("?", "/artifacts?")), wait_until="commit"
    )
    for name in FIGURES:
        page.get_by_text(f"{name}.png", exact=True).first.click()
        shown = page.locator(f"img[alt*='{name}'], img[src*='{name}']")
        expect(shown).to_be_visible()
    page.get_by_text("report.html", exact=True).first.click()
    report = page.frame_locator("iframe")
    expect(report.get_by_text(comparison.sentence)).to_be_visible()


def test_a_hostile_name_is_text_in_mlflows_page(page, server, comparison):
    """In the description that we write no link, no markup, no image is made of it."""
    client = mlflow.MlflowClient(f"sqlite:///{comparison.folder}/mlflow.db")
    condition = f"params.init = '{NAMED}:fill'"
    (hostile,) = client.search_runs([comparison.experiment], condition)
    dialogs, asked = watched(page)
    address = mlflow_page.run_address(comparison.experiment, hostile.info.run_id)
    page.goto(mlflow_page.absolute(server, address), wait_until="commit")
    said = page.get_by_text(re.compile(r"network with relu, initialized by")).first
    expect(said).to_contain_text(f"initialized by {NAMED}:fill, on")
    assert not page.locator("img[src=x], a[href^=javascript], a[href*=evil]").count()
    assert not said.locator("strong, b, em, a, img").count()
    assert dialogs == []
    assert not [url for url in asked if not url.startswith((server, "data:", "blob:"))]


def watched(page):
    """What scripts say and what is asked for, from now on."""
    dialogs, asked = [], []
    page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
    page.on("request", lambda request: asked.append(request.url))
    return dialogs, asked


def test_hostile_names_are_text_in_a_report(page, tmp_path):
    """Wherever a page of ours has text: nothing runs, nothing is asked for, all can be read."""
    dialogs, asked = watched(page)
    plain = tmp_path / "plain.html"
    plain.write_text(everything("text"))
    page.goto(plain.as_uri())
    elements = page.locator(":not(wbr)").count()
    for n, text in enumerate(HOSTILE):
        report = tmp_path / f"{n}.html"
        report.write_text(everything(text), encoding="utf-8")
        page.goto(report.as_uri())
        page.locator("details").evaluate_all("all => all.forEach(one => one.open = true)")
        assert page.locator(":not(wbr)").count() == elements
        for where in ("h1", ".lead", "aside li", "td", "caption", "pre"):
            assert page.locator(where).first.evaluate("one => one.textContent") == text
        for link in page.locator("a").all():
            assert link.get_attribute("href").startswith("https://example.org/")
        page.mouse.move(300, 300)
        page.keyboard.press("Tab")
    assert dialogs == []
    assert {urlsplit(url).scheme for url in asked} <= {"file", "data"}
    assert len([url for url in asked if url.startswith("file")]) == len(HOSTILE) + 1


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_report_alone(chromium, comparison, scheme):
    """It needs nothing, fits a telephone as well as a wide screen, and can be unfolded."""
    with visitor(chromium, scheme=scheme) as page:
        asked, said = [], []
        page.on("request", lambda request: asked.append(urlsplit(request.url).scheme))
        page.on("console", lambda message: said.append(message.text))
        page.goto((comparison.artifacts / "report.html").as_uri())
        for width in (360, 1600):
            page.set_viewport_size({"width": width, "height": 900})
            expect(page.get_by_role("heading", level=1)).to_be_in_viewport()
            expect(page.get_by_text(comparison.sentence)).to_be_in_viewport()
            assert page.evaluate("document.documentElement.scrollWidth") <= width
        pictures = page.locator("img")
        expect(pictures).to_have_count(len(FIGURES))
        assert all(pictures.evaluate_all("all => all.map(one => one.naturalWidth)"))
        for name in ("Configuration", "Environment"):
            table = page.locator("details").filter(has_text=name).get_by_role("table")
            expect(table).to_be_hidden()
            page.get_by_text(name, exact=True).click()
            expect(table).to_be_visible()
            page.get_by_text(name, exact=True).click()
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (background == "rgb(255, 255, 255)") == (scheme == "light")
        assert set(asked) <= {"file", "data"}
        assert said == []
        page.set_viewport_size(READING)
        page.evaluate("scrollTo(0, 0)")
        screenshot(page, f"report_{scheme}")
