"""The trainable depth as a part of the page of a result: its picture, and tables of the edges."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from initflow.reporting.pictures.trainability_statistics import FAR, Plane, edge_rows
from initflow.reporting.webpage import Section, Table, columns, pictured


def sections(planes: Sequence[Plane], pictures: Mapping[str, bytes]) -> list[Section]:
    """The picture of the trainable depth, and a table of the edges at each learning rate."""
    picture = pictured(
        pictures.get("trainability"),
        "Accuracy on training images as colour over σ_w² and depth, with the measured edge as dots "
        "and theory's as a line. The table below has the numbers.",
        "A depth is trained where the accuracy is at least half way between guessing and the best "
        "of all. The line is c · ξ with the c whose area to the dots is smallest, over the "
        "logarithm of the depth.",
    )
    tables = [
        Table(
            f"Edges at learning rate {plane.lr:g}, in hidden layers",
            columns(numbers=("σ_w²", "ξ", "c · ξ", "measured", "diverged", "unstable")),
            [
                (f"{row.sigma_w2:g}", *row.told, str(row.diverged), str(row.unstable))
                for row in edge_rows(plane)
            ],
            "ξ: the layers over which what training needs is lost e-fold, by theory; measured: of "
            "the mean accuracy over the seeds, < or > where it lies beyond the depths trained. "
            f"Unstable: networks whose loss ended at more than {FAR:g} times that of guessing.",
        )
        for plane in planes
    ]
    return [Section("Trainable depth", [*picture, *tables])]
