"""A scheme with its study, and the run above those of its trials."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from initflow.errors import OutageError
from initflow.experiments.tuning.batches import TRIAL
from initflow.experiments.tuning.searches import PendingTrial
from initflow.experiments.tuning.studies import Study
from initflow.reporting import trials
from initflow.reporting.seed_statistics import Cell
from initflow.reporting.trials import Trial, Tuned
from initflow.tracking import mlflow_page, runs


@dataclass
class SchemeStudy:
    """``running`` are the trials that workers are at, by their numbers."""

    init: str
    cell: Cell
    study: Study
    run: runs.Run
    running: dict[int, PendingTrial] = field(default_factory=dict)

    def interrupt(self, numbers: Sequence[int]) -> None:
        """Leave trials that nobody works on any more to be tried again, and close their runs."""
        self.study.interrupt(numbers)
        for number in numbers:
            del self.running[number]
        lost = set(map(str, self.study.interrupted()))
        for found in self.runs_below() if lost else ():
            if found.tags.get(TRIAL) in lost and not runs.is_orphan(found):
                self.run.mark_orphaned(found)

    def runs_below(self) -> list[runs.Found]:
        """Those below its own; none where MLflow does not answer: the next start sees to them."""
        try:
            return self.run.below()
        except OutageError:
            return []

    def log_course(self, row: Tuned, found: Sequence[Trial]) -> None:
        """The course of its trials, and their end."""
        finished = [(one.number, one.accuracy) for one in found if one.outcome == "finished"]
        self.run.log_history(
            {
                "trials/accuracy": [(n, accuracy) for n, accuracy in finished if accuracy],
                "trials/best": trials.best_so_far(found),
            }
        )
        best = row.best
        if best and best.accuracy is not None:
            ends = {"best/lr": best.lr}
            if best.gamma is not None:
                ends["best/gamma"] = best.gamma
            ends |= {"best/accuracy/validation": best.accuracy}
            if row.tested.mean is not None:
                ends["best/accuracy/test"] = row.tested.mean
            self.run.log_metrics(len(found), ends)
        below, links = self.runs_below(), []
        for text, part in (("its trials side by side", "trial"), ("its tests", "tuned")):
            of_part = [one for one in below if one.tags["initflow.tuning"] == part]
            ids = [one.id for one in of_part if not runs.is_orphan(one)]
            if 1 < len(ids) <= mlflow_page.LINKED:
                address = mlflow_page.comparison_address(self.run.experiment_id, ids)
                links.append(f"[{text}]({address})")
        setting = trials.in_words(best.lr, best.gamma, digits=4) if best else "none finished"
        counts = ", ".join(f"{n} {outcome}" for outcome, n in row.counts.items() if n)
        self.run.describe(
            f"The trials of {self.cell}: {counts}. The best setting: {setting}.", " · ".join(links)
        )

    def log_figures(self) -> None:
        """Optuna's of the study."""
        for name, png in self.study.figures().items():
            self.run.log_bytes(f"{name}.png", png)
