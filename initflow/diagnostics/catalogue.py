"""Every scheme there is, as values to show: what it is, who offers it, or why it is broken."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from initflow.core.configurations import NetworkConfig, training
from initflow.errors import PluginError, SettingError
from initflow.initializers import plugins
from initflow.initializers.activations import ACTIVATIONS
from initflow.initializers.built_in import BUILT_IN
from initflow.initializers.scheme import Scheme, places
from initflow.initializers.signature import Value
from initflow.training import datasets
from initflow.training.model import Parameters, initialize, layer_names
from initflow.training.splits import Splits


@dataclass(frozen=True)
class SchemeLayer:
    """A layer of a network: the variance stated of its weights, and the real deviations.

    Only what is stated is known of a layer that was not filled.
    """

    name: str
    fan_in: int
    fan_out: int
    stated_variance: float | None
    weight_std: float | None = None
    bias_std: float | None = None


@dataclass(frozen=True)
class SchemeEntry:
    """One scheme, with the ``layers`` of a network.

    ``fills`` is "layer" or "network", by which it goes. Of a broken one only its name, its
    provider and the cause are known.
    """

    name: str
    provider: str
    fills: str | None = None
    sets_biases: bool = False
    arguments: dict[str, Value] = field(default_factory=dict)
    description: str = ""
    layers: tuple[SchemeLayer, ...] = ()
    broken: str | None = None

    def as_json(self) -> dict[str, object]:
        return dataclasses.asdict(self)


def entries(config: NetworkConfig) -> list[SchemeEntry]:
    """All schemes, built-in ones first, with what they state of the network of ``config``."""
    widths = _widths(config)
    listed = [_entry(scheme, config, widths) for scheme in BUILT_IN.values()]
    for plugin, scheme in plugins.load_all(config.plugins_dir):
        if isinstance(scheme, PluginError):
            listed.append(SchemeEntry(plugin.name, plugin.origin, broken=str(scheme)))
        else:
            listed.append(_entry(scheme, config, widths))
    return listed


def filled(spec: str, config: NetworkConfig) -> SchemeEntry:
    """The scheme that ``spec`` names, and what it makes of the network of ``config``.

    Images are loaded only for a scheme that sees them. Raises what training would.
    """
    scheme = plugins.find(spec, config.plugins_dir)
    seen = datasets.load(training(config, init=spec)) if scheme.kind == "network" else None
    parameters = initialize(
        _widths(config, seen),
        scheme,
        ACTIVATIONS[config.activation],
        bias_init=config.bias_init,
        seed=config.seed,
        data=seen.train if seen else None,
    )
    return _entry(scheme, config, parameters.widths, parameters)


def _widths(config: NetworkConfig, seen: Splits | None = None) -> tuple[int, ...]:
    """Those of the network, for which nothing is loaded where the data is a published set."""
    if seen:
        return datasets.widths(seen.pixels, config.hidden, seen.classes)
    pixels, classes = datasets.size(training(config), datasets.load)
    return datasets.widths(pixels, config.hidden, classes)


def _entry(
    scheme: Scheme,
    config: NetworkConfig,
    widths: tuple[int, ...],
    parameters: Parameters | None = None,
) -> SchemeEntry:
    """The scheme with what it states of the network and, of ``parameters``, the deviations."""
    layers_at = places(widths, ACTIVATIONS[config.activation])
    layers, broken = [], None
    for i, (name, at) in enumerate(zip(layer_names(len(layers_at)), layers_at, strict=True)):
        variance = None
        try:
            variance = scheme.variance(at)
        except SettingError:  # made for other activation functions
            pass
        except PluginError as error:
            broken = str(error)
        filled = (parameters.weights[i], parameters.biases[i]) if parameters else ()
        deviations = (tensor.std(correction=0).item() for tensor in filled)
        layers.append(SchemeLayer(name, at.fan_in, at.fan_out, variance, *deviations))
    return SchemeEntry(
        scheme.spec,
        scheme.provider,
        scheme.kind,
        scheme.fills_biases,
        scheme.values,
        scheme.description,
        tuple(layers),
        broken,
    )
