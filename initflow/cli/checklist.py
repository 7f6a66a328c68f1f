"""What ``initflow doctor`` shows of what was found, as plain lines that can be pasted anywhere.

Without rich, which may be what is missing.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from initflow.checkup.examination import Examination

Facts = Mapping[str, Any]
WIDTH = 80
LABEL = 10  # columns


def lines(found: Examination) -> list[str]:
    """A paragraph for each thing, and then what is broken, or that nothing is."""
    shown = [
        line
        for name, write in PARAGRAPHS.items()
        if found.parts[name]
        for label, text in write(found.parts[name])
        for line in _paragraph(label, text)
    ]
    broken = [f"Broken: {problem}" for problem in found.problems]
    return [*shown, "", *(broken or ["Nothing is broken."])]


def _paragraph(label: str, text: str) -> list[str]:
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=label.ljust(LABEL),
        subsequent_indent=" " * LABEL,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _versions(facts: Facts) -> Iterator[tuple[str, str]]:
    yield (
        "initflow",
        f"{facts['initflow']} with Python {facts['python']} on {facts['system']}",
    )
    packages = facts["packages"]
    yield (
        "packages",
        _listed(f"{name} {version or 'missing'}" for name, version in packages.items()),
    )
    others = facts["others_than_pinned"]
    told = f"all {facts['pinned']} packages are as pinned"
    if others:
        own = [name for name in packages if name in others]
        named = [f"{name} {others[name]['pinned']}" for name in own]
        more = len(others) - len(own)
        named += [f"and {more} more that these need"] if more else []
        told = f"not {len(others)} of {facts['pinned']} packages; pinned are {_listed(named)}"
    yield "pinned", f"{told}. {facts['promise']['sentence']}"
    extras = facts["missing_of_extras"]
    there = _listed(name for name, missing in extras.items() if not missing)
    absent = _listed(f"{name} ({_listed(its)})" for name, its in extras.items() if its)
    yield "extras", "; not installed: ".join(filter(None, [there or "none", absent]))


def _machine(facts: Facts) -> Iterator[tuple[str, str]]:
    cards = [f"cuda:{at} {one['name']}, {one['gib']:g} GiB" for at, one in enumerate(facts["cuda"])]
    none = "no CUDA device"
    if facts["has_nvidia_driver"] and not facts["cuda_of_torch"]:
        none = "an NVIDIA driver is there, but this PyTorch is built without CUDA"
    yield "devices", f"{'; '.join(cards) or none}; device=auto is {facts['device']}"
    variables = [f"{name}={value}" for name, value in facts["variables"].items()]
    parts = [
        f"{facts['processor']}, {facts['cpus']} cores, {facts['memory_gib']:g} GiB",
        f"PyTorch: threads {facts['threads']}, {facts['cpu_capability']}, {facts['blas']}",
        _listed(variables),
    ]
    yield "cpu", "; ".join(filter(None, parts))


def _store(facts: Facts) -> Iterator[tuple[str, str]]:
    says = {
        None: "not there yet, the first run makes it",
        True: "answers",
        False: "not usable, see below",
    }
    yield "MLflow", f"{facts['address']}: {says[facts['answers']]}"


def _outboxes(facts: Facts) -> Iterator[tuple[str, str]]:
    if not facts["left"]:
        yield "waiting", "nothing waits to be sent to MLflow"
    for left in facts["left"]:
        refused = f", of which {left['refused']:,} were refused" if left["refused"] else ""
        held = left["waiting"] + left["refused"]
        told = f"{held:,} {'entry' if held == 1 else 'entries'} for MLflow at {left['tracking']}"
        yield "waiting", f"{told}{refused}: 'initflow sync' sends what waits"


def _plugins(facts: Facts) -> Iterator[tuple[str, str]]:
    for kind, offered in facts.items():
        by_place: dict[str, list[str]] = {}
        for one in offered:
            by_place.setdefault(one["where"], []).append(one["name"])
        told = [f"{_listed(names)} ({where})" for where, names in by_place.items()]
        if told or kind == "schemes":
            yield kind, f"of plugins: {_listed(told) or 'none'}"


def _data(facts: Facts) -> Iterator[tuple[str, str]]:
    there = _listed(name for name, is_there in facts["there"].items() if is_there)
    absent = _listed(name for name, is_there in facts["there"].items() if not is_there)
    yield "data", f"{there or 'none there'}{f'; to be downloaded: {absent}' if absent else ''}"


def _folders(facts: Facts) -> Iterator[tuple[str, str]]:
    for at, (what, one) in enumerate(facts["folders"].items()):
        free = f"{one['free'] / 10**9:.3g} GB free{'' if one['is_writable'] else ', read-only'}"
        yield "" if at else "folders", f"{what}: {one['path']} ({free})"
    git = facts["git"]
    none = "not in a repository" if git["is_there"] else "is not installed, so runs have no commit"
    state = f"commit {git['commit'][:10]}, {git['tree'].partition(' ')[0]}"
    yield "git", none if git["commit"] == "none" else state


def _listed(words: Any) -> str:
    return ", ".join(words)


PARAGRAPHS: Mapping[str, Callable[[Facts], Iterator[tuple[str, str]]]] = {
    "versions": _versions,
    "machine": _machine,
    "store": _store,
    "outboxes": _outboxes,
    "plugins": _plugins,
    "data": _data,
    "folders": _folders,
}
