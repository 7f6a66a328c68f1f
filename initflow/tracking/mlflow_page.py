"""MLflow's page: the addresses in it, and a saved view of a comparison, as values.

A saved view is a tag of the experiment whose form is the page's own and nowhere documented;
what is said of it here was seen in the page of MLflow 3.17. Where another version does not know
it, the tag is ignored and nothing is lost. ``tests/test_browser.py`` opens what is made here.

An address begins with ``#``: it is relative to the page, so that a link in a description works
wherever the page is served.
"""

from __future__ import annotations

import base64
import functools
import itertools
import json
import math
import re
import zlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import quote, urlencode, urlsplit

ACCURACY = "accuracy/test"
COMPARED = (ACCURACY, "accuracy/validation")  # of which a run is compared by the one it has
GROUP = "initflow.group"  # tags that begin so name what the runs of one line share
COLOUR = "mlflow.runColor"  # the tag in which the page keeps the colour that a user gives a run
LOADED = 100  # runs that the page loads before it asks for a click
LINKED = 100  # run ids in a link of 4,200 characters, within a description
LONGEST = 5_000  # bytes of a view: what every store takes by MLflow's API; its own take more
LONGEST_NAME = 250
GROUPINGS = 200  # tags among which the one with the best colours is looked for
COLUMNS = (
    "metrics.`accuracy/test`",
    "params.`init`",
    "params.`activation`",
    "params.`seed`",
    "tags.`initflow.outcome`",
)
VIEW = "mlflow.sharedViewState."
# Of Markdown: what marks text up, what HTML and links by themselves have, and how lines begin.
_MARKS = re.compile(r"[\\`*\[\]~|]|(?<!\w)_|_(?!\w)")
_ENTITIES = re.compile(r"[<>&@]|:(?=//)|(?i:(?<=www)\.)")
_BEGIN = re.compile(r"^(?:(?=[#+=-])|\d+(?=[.)]\s))")
UNGROUPED = "Model metrics"  # the page's section of the metrics without a slash

# Among which the page chooses, in its order.
PALETTE = (
    0xA6630C, 0xC83243, 0xB45091, 0x8A63BF, 0x434A93, 0x137DAE, 0x04867D, 0x308613,
    0xFACB66, 0x1F272D, 0x445461, 0x5F7281, 0x8396A5, 0x93320B, 0xBE501E, 0xDE7921,
    0xF2BE88, 0x115026, 0x277C43, 0x3BA65E, 0x8DDDA8, 0x9E102C, 0xC82D4C, 0xE65B77,
    0xF792A6, 0x0E538B, 0x2272B4, 0x4299E0, 0x8ACAFF,
)  # fmt: skip
BACKGROUND = "#ffffff"

# The page opens in its mode for language models unless it is told otherwise.
_TRAINING = {"workflowType": "machine_learning"}
EXPERIMENTS = f"#/experiments?{urlencode(_TRAINING)}"


def runs_address(experiment_id: str, view: str | None = None) -> str:
    """The charts of the experiment's runs, as the saved view with the key ``view`` has them."""
    query = _TRAINING | {"compareRunsMode": "CHART"}
    if view:
        query |= {"viewStateShareKey": view}
    return f"#/experiments/{quote(experiment_id, safe='')}/runs?{urlencode(query)}"


def run_address(experiment_id: str, run_id: str, *, charts: bool = False) -> str:
    """The page of one run: its overview, or its charts."""
    tab = "/model-metrics" if charts else ""
    experiment, run = (quote(id_, safe="") for id_ in (experiment_id, run_id))
    return f"#/experiments/{experiment}/runs/{run}{tab}?{urlencode(_TRAINING)}"


def comparison_address(experiment_id: str, run_ids: Sequence[str]) -> str:
    """The comparison of exactly these runs, one by one.

    All ids are in the address, after its ``#``, which no server has to take: 256 of them open
    in a few seconds.
    """
    lists = {"runs": [*run_ids], "experiments": [experiment_id]}
    query = {key: json.dumps(ids, separators=(",", ":")) for key, ids in lists.items()}
    return f"#/compare-runs?{urlencode(query | _TRAINING, quote_via=quote)}"


def absolute(server: str, address: str) -> str:
    """``address`` on the page that ``server`` serves, without the credentials it may hold."""
    parts = urlsplit(server)
    host = parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}://{host}{parts.path.rstrip('/')}/{address}"


def links(experiment_id: str, parent_id: str, run_ids: Sequence[str]) -> str:
    """The links of a comparison in one line of Markdown, for the top of its run's description.

    They must come first: of a description higher than 150 pixels the page lays a veil over the
    lower part, under which no link can be clicked. More runs than a description can hold are
    left to the saved view.
    """
    targets = {"Mean curves with bands": runs_address(experiment_id, parent_id)}
    if len(run_ids) <= LINKED:
        targets["run by run"] = comparison_address(experiment_id, run_ids)
    targets["charts of this run"] = run_address(experiment_id, parent_id, charts=True)
    return " · ".join(f"[{text}]({address})" for text, address in targets.items())


def plain(text: str) -> str:
    """``text`` as Markdown that the page shows as it is: no link, no markup, no HTML.

    Schemes and plugins are named by whoever made them. Of each line what would begin a heading, a
    list or a quotation is escaped too; what the page takes for a link by itself is broken.
    """
    text = _ENTITIES.sub(lambda found: f"&#{ord(found[0])};", _MARKS.sub(r"\\\g<0>", text))
    return "\n".join(_BEGIN.sub(r"\g<0>\\", line.strip()) for line in text.split("\n"))


@dataclass(frozen=True)
class ChartSection:
    """A part of the view: a line chart of each metric, in order, two side by side."""

    name: str
    metrics: Sequence[str]
    logarithmic: Collection[str] = ()


def saved_view(
    *,
    parent_id: str,
    name: str,
    group_tag: str,
    groups: Sequence[str],
    sections: Sequence[ChartSection],
    metrics: Iterable[str],
    runs: int,
    now_ms: int,
) -> tuple[str, str]:
    """The tag of the experiment, key and value, that is a saved view of a comparison.

    The view shows the ``runs`` runs below ``parent_id`` and no others, one line with a band for
    each of ``groups``, the values of the tag ``group_tag`` (see :func:`group_tag`). Its
    ``sections`` come first; those that the page makes of all other ``metrics`` are folded.
    """
    # Best first. Where not all runs are loaded, those of the lowest seeds, fair to all groups.
    by_accuracy = {"orderByKey": f"metrics.`{ACCURACY}`", "orderByAsc": False}
    by_seed = {"orderByKey": "params.`seed`", "orderByAsc": True}
    escaped = parent_id.replace("'", "''")
    state = {  # the rest takes the page's defaults
        "searchFilter": f"tags.`mlflow.parentRunId` = '{escaped}'",
        **(by_accuracy if runs <= LOADED else by_seed),
        "selectedColumns": [*COLUMNS],
        "runsHiddenMode": "SHOW_ALL",  # and not the first ten groups
        "groupBy": {
            "aggregateFunction": "average",
            "groupByKeys": [{"mode": "tag", "groupByData": group_tag}],
        },
        "isAccordionReordered": True,  # or the sections are sorted by name
        "compareRunCharts": [
            _chart(section, metric) for section in sections for metric in section.metrics
        ],
    }
    shown = {metric for section in sections for metric in section.metrics}
    rest = {metric.rpartition("/")[0] or UNGROUPED for metric in metrics if metric not in shown}
    others = sorted(rest - {section.name for section in sections})
    first = [_section(section.name, display=True) for section in sections]
    all_sections = [*first, *(_section(name, display=False) for name in others)]
    folded_groups = {_group_id(group_tag, group): False for group in groups}
    # From the most welcome to what cannot be left out; the page unfolds what it is not told of.
    candidates: Sequence[dict[str, object]] = (
        {"compareRunSections": all_sections, "groupsExpanded": folded_groups},
        {"compareRunSections": all_sections},
        {"compareRunSections": first},
    )
    for candidate in candidates:
        value = _value(name, state | candidate, now_ms)
        if len(value.encode()) <= LONGEST:
            break
    return VIEW + parent_id, value


def _section(name: str, *, display: bool) -> dict[str, object]:
    section = {"uuid": f"section {name}", "name": name, "display": display, "isReordered": True}
    wide = {"columns": 2, "cardHeight": 420}  # high enough for the legend of eight groups
    return section | wide if display else section


def _chart(section: ChartSection, metric: str) -> dict[str, object]:
    """A line chart; marked as the page's own, or it would make a second one of the metric."""
    return {
        "uuid": f"chart {metric}",
        "type": "LINE",
        "metricSectionId": f"section {section.name}",
        "isGenerated": True,
        "deleted": False,
        "displayName": metric,
        "metricKey": metric,
        "runsCountToCompare": 10,
        "lineSmoothness": 0,
        "xAxisKey": "step",
        "xAxisScaleType": "linear",
        "scaleType": "log" if metric in section.logarithmic else "linear",
        "range": {},
        "selectedXAxisMetricKey": "",
        "yAxisKey": "metric",
        "yAxisExpressions": [],
        "ignoreOutliers": False,
        "useGlobalXaxisKey": True,
        "useGlobalLineSmoothing": True,
    }


def _value(name: str, state: Mapping[str, object], now_ms: int) -> str:
    packed = base64.b64encode(zlib.compress(_compact(state).encode(), 9)).decode()
    times = {"createdAt": now_ms, "updatedAt": now_ms}
    return _compact({"name": name[:LONGEST_NAME], **times, "state": f"deflate;{packed}"})


def rewritten(view: str, change: Callable[[str], str]) -> str:
    """A saved view's value with its packed state as ``change`` makes it; another text as it is."""
    try:
        value = json.loads(view)
        packed = base64.b64decode(value["state"].removeprefix("deflate;"), validate=True)
        state = change(zlib.decompress(packed).decode())
        return _value(value["name"], json.loads(state), value["createdAt"])
    except (ValueError, KeyError, TypeError, AttributeError, zlib.error):
        return view


def made_at(view: str) -> int:
    """When the saved view with this value was made, in ms; 0 where it is not as we know them."""
    try:
        return int(json.loads(view)["createdAt"])
    except (ValueError, KeyError, TypeError, OverflowError):
        return 0


def _compact(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def group_names(cells: Sequence[tuple[str, str]]) -> list[str]:
    """A name for each (scheme, activation): the scheme's where all have one activation.

    The comma is for the colours: the page's checksum of what differs five letters before the
    end, as an argument does in "normal:std=0.1 relu", is the same whatever the tag.
    """
    alone = len({activation for _, activation in cells}) <= 1
    return [init if alone else f"{init}, {activation}" for init, activation in cells]


def group_tag(groups: Iterable[str]) -> str:
    """The tag to group by so that the page draws ``groups`` in colours that can be told apart.

    The page takes a group's colour from a checksum of the tag's name and value, and of eight
    groups two often get the same. The name is ours to choose: of many, this is the one with the
    most colours, and of these the one whose colours keep the greatest distance from each other and
    from the background.
    """
    groups = list(groups)

    def variety(tag: str) -> tuple[int, float]:
        colours = {colour(tag, group) for group in groups}
        pairs = itertools.combinations([*colours, BACKGROUND], 2)
        return len(colours), min((_distance(*pair) for pair in pairs), default=0.0)

    return max((f"{GROUP}.{n}" for n in range(1, GROUPINGS + 1)), key=variety)


def limits(groups: Sequence[str], runs: int) -> str:
    """Sentences on what of many ``runs`` in these ``groups`` the page cannot show; or nothing."""
    tag = group_tag(groups)
    n = len({colour(tag, group) for group in groups})
    told = []
    if n < len(groups):
        told.append(
            f"MLflow's page has {n} colours for these {len(groups)} groups; the table "
            "of this run and its picture of the accuracies tell them apart."
        )
    if runs > LOADED:
        told.append(
            f"MLflow's page loads {LOADED} of the {runs:,} runs, those of the lowest seeds, and "
            "more at a click; the means of all are metrics of this run."
        )
    return " ".join(told)


def run_tags(groups: Sequence[str]) -> list[dict[str, object]]:
    """For each of ``groups`` the tags of its runs: the group's name, and its colour."""
    tag = group_tag(groups)
    return [{tag: group, COLOUR: colour(tag, group)} for group in groups]


def colour(tag: str, group: str) -> str:
    """That in which the page draws the group of this value of the tag, as ``#rrggbb``.

    As the tag :data:`COLOUR` of a run it gives the run the colour of its group.
    """
    low = high = 0  # Fletcher's checksum, of UTF-16
    units = _group_id(tag, group).encode("utf-16-le")
    for first, second in zip(units[::2], units[1::2], strict=True):
        low = (low + first + 256 * second) % 255
        high = (high + low) % 255
    return f"#{PALETTE[(low | high << 8) % len(PALETTE)]:06x}"


def _group_id(tag: str, group: str) -> str:
    return f"tag.{tag}.{group}"


@functools.cache
def _distance(one: str, other: str) -> float:
    """How different two colours look, by the approximation known as redmean."""
    channels = bytes.fromhex(one[1:]), bytes.fromhex(other[1:])
    red = (channels[0][0] + channels[1][0]) / 2
    weights = (2 + red / 256, 4, 2 + (255 - red) / 256)
    parts = zip(weights, *channels, strict=True)
    return math.sqrt(sum(weight * (a - b) ** 2 for weight, a, b in parts))
