"""Any model looked into once: what was measured of its layers, as a table, figure and sentences."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from initflow.diagnostics import inspection
from initflow.diagnostics.signals import QUANTITIES, Signals
from initflow.reporting.formats import counted
from initflow.reporting.results import Drawings, Result


@dataclass(frozen=True, repr=False)
class Inspection(Result, Signals):
    """What came of :func:`initflow.inspect`.

    - ``layers``: the quantities of each layer, by its name in forward order: variances and mean
      squares over all inputs and units, and shares from 0 to 1.
    - ``metrics()``: the same by metric key, ``quantity/layer``.
    - ``by_time``: those of recurrent layers at each time step.
    - ``sizes``: the ``units`` of each layer, and how many ``numbers`` it gave in all.
    - ``nonfinite``: how many entries are NaN or infinite, by ``tensor/layer``.
    - ``not_measured``: the modules that hold weights and are none of these layers, with why.
    """

    model: str = ""

    @property
    def title(self) -> str:
        return f"{self.model}, {counted(len(self.layers), 'layer')}"

    @property
    def conclusions(self) -> Sequence[str]:
        """How the signal and the gradient travel, and where most units are dead or saturated."""
        travels = [
            self._travel("preactivation_second_moment", "the pre-activations' mean square"),
            self._travel("gradient_second_moment", "the gradient's mean square", backward=True),
        ]
        flat = [self._most("dead_fraction", "Dead units")]
        flat.append(self._most("saturated_fraction", "Saturated activations"))
        return [*filter(None, [*travels, *flat])]

    def problems(self) -> list[str]:
        """What is not finite, and what was not measured."""
        lines = [
            f"{count:,} values are NaN or infinite: {key}" for key, count in self.nonfinite.items()
        ]
        if self.not_measured:
            named = ", ".join(f"{name} ({kind})" for name, kind in self.not_measured.items())
            lines.append(f"not measured: {named}")
        return lines

    def drawings(self) -> Drawings:
        from initflow.reporting import model_figures  # noqa: PLC0415 - matplotlib takes a second

        draw = partial(model_figures.signals_by_layer, self, self.title)
        return {"signals_by_layer": draw}

    def numbers(self) -> Iterable[Mapping[str, object]]:
        """A row for each layer, with all quantities that any of them has."""
        measured = dict.fromkeys(key for values in self.layers.values() for key in values)
        columns = sorted(measured, key=[*QUANTITIES, *measured].index)
        for layer, values in self.layers.items():
            yield {"layer": layer} | {quantity: values.get(quantity) for quantity in columns}

    def _travel(self, quantity: str, what: str, *, backward: bool = False) -> str:
        """From the first layer that has it to the last, or back."""
        known = [
            (layer, values[quantity])
            for layer, values in self.layers.items()
            if values.get(quantity)
        ]
        if len(known) < 2:
            return ""
        (first, start), (last, end) = known[:: -1 if backward else 1][:: len(known) - 1]
        return f"From {first} to {last}, {what} goes from {start:.3g} to {end:.3g}."

    def _most(self, quantity: str, what: str) -> str:
        """Where most of a layer's are, if anywhere."""
        shares = {layer: values.get(quantity, 0.0) for layer, values in self.layers.items()}
        layer = max(shares, key=lambda layer: shares[layer], default="")
        return f"{what}: at most {shares[layer]:.1%}, in {layer}." if shares.get(layer) else ""


def inspect(model: nn.Module, batch: object, loss: Callable[..., Tensor]) -> Inspection:
    r"""Measure each layer of ``model`` on one ``batch``, with the gradients of ``loss``.

    ``model`` is a ``torch.nn.Module``, ``loss`` a function that gives one number as a tensor, and
    ``batch`` what a DataLoader gives:

    - a tensor: the loss is ``loss(model(batch))``;
    - a tuple or list (inputs, \*targets): it is ``loss(model(inputs), *targets)``. Inputs that
      are a tuple themselves are the model's arguments, one by one, and those that are a mapping
      its arguments by name;
    - a mapping: the entries that ``model.forward`` has parameters for are given to it by name,
      and the others to the loss, ``loss(model(...), **others)``.

    The model is measured in the mode that it is in, training or evaluation; its parameters,
    their gradients, its buffers and torch's random state are left as they were.

    Returns an :class:`Inspection`: numbers by layer (``metrics()``, ``to_pandas()``), sentences on
    them (``conclusions``) and ``figures()``. Raises :class:`SettingError` for what is no model,
    batch or loss, or where they do not go together.
    """
    found = inspection.inspect(model, batch, loss)
    return Inspection(**vars(found), model=type(model).__name__)
