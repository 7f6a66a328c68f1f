"""The page: complete, escaped, and in need of nothing else."""

import math
import re
from html.parser import HTMLParser

import jinja2
import pytest

from initflow.reporting import webpage
from initflow.reporting.seed_statistics import Cell, Difference, Row
from initflow.reporting.webpage import (
    Column,
    Command,
    Links,
    Listing,
    Picture,
    Section,
    Table,
    Text,
    colophon,
    comparison_sections,
    interval,
    p_value,
    page,
    percent,
    whole,
)

# The head of a PNG, all that a page reads of it: 300 by 150 pixels.
PNG = b"\x89PNG\r\n\x1a\n" + b"\0\0\0\rIHDR" + (300).to_bytes(4) + (150).to_bytes(4)
HOSTILE = """<script>alert(1)</script>" onerror='x' {{ 7 * 7 }} & <b>"""
ROWS = [
    Row(Cell("he", "relu"), 10, 0.98204, 0.00081, 0.98147, 0.98262, 631, 1263, 0),
    Row(Cell("normal:std=0.5", "relu"), 1, 0.5, None, None, None, 12345, None, 9),
    Row(Cell("random", "tanh"), 0, None, None, None, None, None, None, 7),
]
DIFFERENCES = [
    Difference("relu", "he", "xavier", 10, 0.00183, 0.0011, 0.00254, 0.00002, 0.00004),
    Difference("tanh", "xavier", "he", 8, 0.0005, -0.00021, 0.00121, 0.0417, 0.2504),
]


class Reader(HTMLParser):
    """Collects the tags with their attributes, and the text of what can be seen."""

    VOID = frozenset({"meta", "img", "wbr"})

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.texts = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append((tuple(self.open), data))

    def all(self, name):
        return [attributes for tag, attributes in self.tags if tag == name]

    def text(self, *within):
        inside = (data for tags, data in self.texts if set(within) <= set(tags))
        return "".join(data for data in inside if data.strip() or not within)


PICTURES = {"accuracies": PNG, "learning_curves": PNG, "signals_by_layer": PNG}


def comparison(
    *,
    rows=ROWS,
    differences=DIFFERENCES,
    pictures=PICTURES,
    title="two schemes on digits",
    sentences=("he is best.", "The others are not."),
    warnings=(),
    **ending,
):
    ending = {
        "configuration": {"lr": "0.1", "hidden": "300,100"},
        "environment": {"torch": "2.15.0"},
        "command": "mlflow run . -e compare -P init=he,normal:std=0.5",
        **ending,
    }
    sections = [*comparison_sections(rows, differences, pictures), *colophon(**ending)]
    return page(title=title, lead=sentences, sections=sections, warnings=warnings)


def everything(text):
    """A page with ``text`` wherever text can be given."""
    blocks = [
        Table(text, [Column(text), Column(text, number=True)], [(text, text)], text),
        Picture(PNG, text, text),
        Text(text),
        Listing([text]),
        Links([(text, text), (text, f"https://example.org/{text}")]),
        Command(text),
    ]
    sections = [Section(text, blocks), Section(text, blocks, folded=True)]
    return page(title=text, lead=[text], sections=sections, warnings=[text])


def test_what_comes_from_outside_is_text_and_nothing_else():
    """It adds no tag and no attribute, and is read as it was written."""
    plain, hostile = Reader(everything("text")), Reader(everything(HOSTILE))
    assert [(tag, list(attributes)) for tag, attributes in hostile.tags if tag != "wbr"] == [
        (tag, list(attributes)) for tag, attributes in plain.tags if tag != "wbr"
    ]
    assert hostile.text("h1") == HOSTILE
    assert hostile.text("pre") == HOSTILE * 2
    assert {image["alt"] for image in hostile.all("img")} == {HOSTILE}
    assert HOSTILE in hostile.text("td")


def test_the_scheme_specs_and_warnings_of_a_comparison_are_escaped():
    """Plugins name themselves, and errors say anything."""
    row = Row(Cell(HOSTILE, "relu"), 0, None, None, None, None, None, None, 1)
    text = comparison(
        rows=[row], sentences=[HOSTILE], configuration={HOSTILE: HOSTILE}, warnings=[HOSTILE]
    )
    reader = Reader(text)
    assert not reader.all("script")
    assert not reader.all("b")
    assert not any(name.startswith("on") for _, attributes in reader.tags for name in attributes)
    assert reader.text("aside").strip() == HOSTILE


@pytest.mark.parametrize("address", ["javascript:alert(1)", "data:text/html,x", "file:///x", ""])
def test_only_addresses_of_the_web_become_links(address):
    """Escaping alone would let a script be an address."""
    text = comparison(links=[("run", address), ("paper", "https://example.org/?a=1&b=2")])
    reader = Reader(text)
    assert [link["href"] for link in reader.all("a")] == ["https://example.org/?a=1&b=2"]
    assert f"run: {address}".strip() in reader.text("li")


def test_the_page_needs_nothing_else():
    """No file, no script, no font from anywhere; and it says so to the browser."""
    text = comparison()
    reader = Reader(text)
    assert not {"script", "link", "iframe", "object", "embed", "base", "form"} & {
        tag for tag, _ in reader.tags
    }
    for _, attributes in reader.tags:
        assert not {"srcset", "background", "poster", "action", "href", "style"} & set(attributes)
    assert {tag for tag, attributes in reader.tags if "src" in attributes} == {"img"}
    assert all(image["src"].startswith("data:image/png;base64,") for image in reader.all("img"))
    assert not re.search(r"url\(|@import|https?:|expression\(", reader.text("style"))
    assert "http" not in text.replace("http-equiv", "")
    (policy,) = [m["content"] for m in reader.all("meta") if "http-equiv" in m]
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def test_the_page_says_what_it_is():
    """To browsers, phones and readers aloud: one main heading, then one a section."""
    reader = Reader(comparison())
    assert not reader.open
    assert reader.all("html") == [{"lang": "en"}]
    assert {"charset": "utf-8"} in reader.all("meta")
    assert any(m.get("name") == "viewport" for m in reader.all("meta"))
    assert reader.text("title") == reader.text("h1") == "two schemes on digits"
    assert len(reader.all("h1")) == 1
    headings = [data for tags, data in reader.texts if tags[-1:] == ("h2",)]
    assert headings == [
        "Accuracy",
        "Differences",
        "Learning curves",
        "Signals at step 0",
        "Configuration",
        "Environment",
        "Make it again",
    ]


def test_the_sentence_comes_first():
    """Before any figure or table; what went wrong follows."""
    text = comparison(warnings=["one seed diverged"])
    order = ["he is best.", "The others are not.", "one seed diverged", "<img", "<table"]
    assert sorted(order, key=text.index) == order


def test_pictures_are_in_the_page_with_their_size_and_what_they_show():
    """At a pixel density that stays sharp."""
    images = Reader(comparison()).all("img")
    assert len(images) == 3
    for image in images:
        assert image["src"].startswith("data:image/png;base64,iVBOR")
        assert (image["width"], image["height"]) == ("200", "100")
        assert len(image["alt"]) > 40
    assert len({image["alt"] for image in images}) == 3


def test_every_number_of_the_rows_is_there():
    """In the order of the columns, and a dash where there is none."""
    cells = webpage.accuracy_table(ROWS).rows
    assert cells == [
        ("he", "relu", "10", "98.20", "98.15 to 98.26", "0.08", "631", "1,263", "0"),
        ("normal:std=0.5", "relu", "1", "50.00", "–", "–", "12,345", "–", "9"),
        ("random", "tanh", "0", "–", "–", "–", "–", "–", "7"),
    ]
    body = Reader(comparison()).text("tbody")
    for row in cells:
        assert "".join(row) in body


def test_every_number_of_the_differences_is_there():
    """What may be chance is grey."""
    table = webpage.difference_table(DIFFERENCES)
    assert table.rows == [
        ("he", "xavier", "relu", "10", "0.18", "0.11 to 0.25", "< 0.001", "< 0.001"),
        ("xavier", "he", "tanh", "8", "0.05", "−0.02 to 0.12", "0.042", "0.25"),
    ]
    assert table.faint == {1}
    reader = Reader(comparison())
    assert [row.get("class") for row in reader.all("tr") if row] == ["faint"]
    for row in table.rows:
        assert "".join(row) in reader.text("tbody")


def test_tables_are_made_for_being_read_aloud_and_by_columns():
    """Captions, headings with what they are of, and numbers aligned with their column's name."""
    reader = Reader(comparison())
    assert len(reader.all("caption")) == len(reader.all("table")) == 4
    assert {heading["scope"] for heading in reader.all("th")} == {"row", "col"}
    numbers = [column for column in reader.all("th") if column.get("class") == "number"]
    assert len(numbers) == 7 + 5
    assert len([cell for cell in reader.all("td") if cell.get("class")]) == 7 * 3 + 5 * 2


def test_settings_and_the_command_can_be_copied_as_they_are():
    """The configuration waits folded."""
    reader = Reader(comparison())
    assert reader.text("details", "tbody") == "lr0.1hidden300,100torch2.15.0"
    assert reader.text("pre") == "mlflow run . -e compare -P init=he,normal:std=0.5"


@pytest.mark.parametrize(("pairs", "folded"), [(16, 2), (17, 3)])
def test_many_differences_wait_folded(pairs, folded):
    """Sixteen schemes have 120 pairs."""
    reader = Reader(comparison(differences=DIFFERENCES[:1] * pairs))
    assert len(reader.all("details")) == folded
    assert (f"all {pairs} pairs" in reader.text("h2")) == (folded == 3)


def test_what_is_not_there_has_no_section():
    """Of a single scheme there are no differences."""
    reader = Reader(comparison(differences=[], pictures={**PICTURES, "signals_by_layer": None}))
    assert not {"Differences", "Signals at step 0"} & {data for _, data in reader.texts}
    assert not reader.all("aside")


def test_a_name_the_template_does_not_know_is_an_error(monkeypatch):
    """Instead of an empty place in the page."""
    loader = jinja2.DictLoader({"page.html": "{{ titel }}"})
    monkeypatch.setattr(webpage, "PackageLoader", lambda *_: loader)
    with pytest.raises(jinja2.UndefinedError, match="titel"):
        page(title="title", lead=[], sections=[])


def test_numbers_are_written_for_people():
    """In few digits, with a true minus, and never as -0.00."""
    assert [percent(x) for x in (0.975, 1.0, -0.0123, -0.00001, None)] == [
        "97.50",
        "100.00",
        "−1.23",
        "0.00",
        "–",
    ]
    assert interval(0.9745, 0.97631) == "97.45 to 97.63"
    assert interval(None, 0.5) == "–"
    assert [whole(n) for n in (0, 999, 12345, None)] == ["0", "999", "12,345", "–"]
    assert [p_value(p) for p in (0.0, 0.00099, 0.001, 0.0494, 0.0996, 0.25, 1.0, math.nan)] == [
        "< 0.001",
        "< 0.001",
        "0.001",
        "0.049",
        "0.10",
        "0.25",
        "1.00",
        "–",
    ]
