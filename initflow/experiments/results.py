"""What the results of the commands can show besides: their run in MLflow, and a report of it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar

from initflow.core import environment
from initflow.core.settings import Settings
from initflow.experiments import failures
from initflow.experiments.failures import Failures, noted
from initflow.reporting import webpage
from initflow.reporting.results import Result
from initflow.tracking import mlflow_page, runs, ui

READABLE = 300  # characters of an address; a longer one is for clicking, not for reading


class TrackedResult(Result):
    """One of the settings ``config`` that is in a ``run``.

    ``failures`` is what could not be made of it, such as a figure. ``remark`` is a sentence on the
    data, where there is something odd to say of it.
    """

    config: Settings
    run: runs.Run
    failures: Failures
    remark: str

    @property
    def run_id(self) -> str:
        return runs.with_ids(self.run.id)

    def as_json(self) -> dict[str, object]:
        """Of the result what every one has, the id of its run, and its settings as text."""
        return {"run_id": self.run_id, "settings": self.configuration(), **super().as_json()}

    def configuration(self) -> dict[str, str]:
        return self.config.as_text()

    def problems(self) -> list[str]:
        return failures.lines(self.failures)

    def log_figures(self) -> dict[str, bytes]:
        """Draw and log all figures; the PNG files of those that could be drawn, by name."""
        return failures.log_figures(self.run, self.drawings(), self.failures)


class ReportedResult(TrackedResult):
    """One of many networks, whose run has a report.

    It is that of the ``command``, of whose settings those named in ``always`` are told even where
    they are the defaults. ``failed`` says by name why networks failed.
    """

    command: ClassVar[str]
    always: ClassVar[tuple[str, ...]]
    device: str
    failed: dict[str, str]

    @abstractmethod
    def sections(self, pictures: Mapping[str, bytes]) -> list[webpage.Section]:
        """Those of the report; ``pictures`` has the figures that could be drawn."""

    @abstractmethod
    def addresses(self) -> dict[str, str]:
        """Where MLflow's page shows what: addresses within it."""

    def as_json(self) -> dict[str, object]:
        """The same, with the networks that ``failed`` and the addresses to look at."""
        return {**super().as_json(), "failed": dict(self.failed), "links": self.links()}

    def links(self) -> dict[str, str]:
        """The same addresses, complete."""
        server = ui.server()
        return {
            what: runs.with_ids(mlflow_page.absolute(server, address))
            for what, address in self.addresses().items()
        }

    def warnings(self) -> list[str]:
        """What is not as one would expect."""
        lines = [self.remark] if self.remark else []
        return lines + [f"{name} failed: {reason}" for name, reason in self.failed.items()]

    def problems(self) -> list[str]:
        return [*self.warnings(), *super().problems()]

    def took(self) -> list[str]:
        """Sentences on what it took."""
        return []

    def closing_lines(self) -> list[str]:
        """What went wrong, what it took, and where to look."""
        links = self.links().items()
        readable = [f"{what}: {address}" for what, address in links if len(address) <= READABLE]
        return [*self.warnings(), *self.took(), *readable]

    def log_report(self) -> None:
        """The figures, and ``report.html`` with them."""
        pictures = self.log_figures()
        with noted(self.failures, "report.html"):
            ending = webpage.colophon(
                configuration=self.configuration(),
                environment=environment.shown(self.device),
                command=self.config.command(self.command, self.always, self.run.launcher),
                links=list(self.links().items()),
            )
            page = webpage.page(
                title=self.title,
                lead=self.conclusions,
                sections=[*self.sections(pictures), *ending],
                warnings=self.problems(),
            )
            self.run.log_text("report.html", page)
