"""What is expected of recurrent kernels, against PyTorch's own, drawn many times."""

import pytest
import torch
from torch import nn

from initflow.models import batches, graph
from initflow.models.moments.expectations import theory
from initflow.models.moments.rules import NoRuleError

DRAWS, UNITS, TIMES = 24, 128, 6
STD = {16: 1.5, UNITS: 1.2}  # of recurrent modules by fan-in, times √fan-in; of biases 0.1


def sequences(*, batch_first=True):
    x = torch.randn(5, TIMES, 16, generator=torch.Generator().manual_seed(0))
    return x if batch_first else x.transpose(0, 1)


class Model(nn.Module):
    """A recurrent module, and a linear layer on what ``read`` takes of what it gives."""

    def __init__(self, kind, read, **settings):
        super().__init__()
        self.inner = kind(16, UNITS, **{"batch_first": True} | settings)
        self.head, self.read = nn.Linear(UNITS, 8), read

    def forward(self, x):
        return self.head(self.read(*self.inner(x)))


def last(output, _states):
    return output[:, -1]


def draw(model, seed):
    """By plain torch, each gate alike."""
    g = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        std = 0.1
        if parameter.dim() > 1:
            fan_in = parameter.shape[1]
            std = (STD[fan_in] if "weight_" in name else 1.0) / fan_in**0.5
        nn.init.normal_(parameter, 0, std, g)


def variances(_node, weight, bias, rows=slice(None)):
    """Those that are drawn from: of a weight that takes inputs, of the recurrent ones, biases."""
    fan_in = weight.shape[1]
    if rows == slice(None):
        return 1 / fan_in, 0.0 if bias is None else 0.01
    return STD[fan_in] ** 2 / fan_in, 0.0


def expected(model, x, gradient):
    """Forward at the model's end, and backward at its start."""
    recorded = graph.of_batch(model, batches.given(model, x))
    (out,) = recorded.outputs
    its = theory(recorded, {out: gradient}, variances)
    return its.of_node(out).forward, its.of_node(recorded.nodes[0]).backward


def simulated(model, x, gradient):
    forward, backward = [], []
    for seed in range(DRAWS):
        draw(model, seed)
        given = x.clone().requires_grad_()
        out = model(given)
        (by_input,) = torch.autograd.grad((out * gradient).sum(), given)
        forward.append(out.detach().square().mean())
        backward.append(by_input.square().mean())
    return [
        (torch.stack(way).mean(), torch.stack(way).std() / DRAWS**0.5)
        for way in (forward, backward)
    ]


# How what it gives is read, and the settings of the module.
CASES = {
    "tanh": (nn.RNN, last, {}),
    "relu": (nn.RNN, last, {"nonlinearity": "relu"}),
    "lstm": (nn.LSTM, last, {}),
    "gru": (nn.GRU, last, {}),
    "without biases": (nn.LSTM, last, {"bias": False}),
    "the mean over time": (nn.GRU, lambda output, _: output.mean(1), {}),
    "of a relu's": (nn.RNN, lambda output, _: output.mean(1), {"nonlinearity": "relu"}),
    "every time step": (nn.LSTM, lambda output, _: output, {}),
    "times first": (nn.LSTM, lambda output, _: output[-1], {"batch_first": False}),
    "the last state": (nn.GRU, lambda _, state: state[-1], {}),
    "an LSTM's": (nn.LSTM, lambda _, states: states[0][-1], {}),
    "two layers": (nn.LSTM, last, {"num_layers": 2}),
    "two of an RNN": (nn.RNN, last, {"num_layers": 2}),
    "dropout": (nn.GRU, last, {"num_layers": 2, "dropout": 0.4}),
    "the first layer's state": (nn.LSTM, lambda _, states: states[0][0], {"num_layers": 2}),
    "both ways out": (
        nn.GRU,
        lambda output, state: torch.cat([output[:, -1], state[0]]),
        {"num_layers": 2},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_what_a_kernel_gives_and_gets_back(name):
    """The mean over draws, within three of its standard errors and 4 % forward, 8 % backward."""
    kind, read, settings = CASES[name]
    torch.manual_seed(0)
    model, x = (
        Model(kind, read, **settings),
        sequences(**{k: v for k, v in settings.items() if k == "batch_first"}),
    )
    draw(model, 0)
    gradient = torch.randn(model(x).shape, generator=torch.Generator().manual_seed(1))
    ways = zip(
        expected(model, x, gradient), simulated(model, x, gradient), (0.04, 0.08), strict=True
    )
    for own, (mean, error), share in ways:
        assert own.value is not None, own.reason
        assert abs(own.value - mean) < 3 * error + share * mean, (own.value / mean, error / mean)


def cell_state(_output, states):
    return states[1][-1]


class Packed(nn.Module):
    """Takes sequences of several lengths."""

    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.GRU(16, 8, batch_first=True), nn.Linear(8, 2)

    def forward(self, x):
        packed = nn.utils.rnn.pack_padded_sequence(x, [6, 6, 5, 4, 1], batch_first=True)
        return self.head(self.inner(packed)[1][-1])


class Started(nn.Module):
    """Has a first state of its own."""

    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.RNN(16, 8, batch_first=True), nn.Linear(8, 2)

    def forward(self, x):
        return self.head(self.inner(x, torch.ones(1, 5, 8))[0])


def identity():
    model = Model(nn.RNN, last, nonlinearity="relu")
    nn.init.eye_(model.inner.weight_hh_l0)
    return model


def with_biases():
    model = Model(nn.RNN, last)
    nn.init.ones_(model.inner.bias_ih_l0)
    return model


def of_both_directions():
    model = Model(nn.LSTM, last, bidirectional=True)
    model.head = nn.Linear(2 * UNITS, 8)
    return model


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported")
@pytest.mark.parametrize(
    ("build", "said"),
    [
        (of_both_directions, "no rule for both directions of lstm in inner"),
        (
            lambda: Model(nn.LSTM, lambda o, _: nn.functional.pad(o, (0, UNITS - 4)), proj_size=4),
            "no rule for the projections of lstm in inner",
        ),
        (Packed, "no rule for packed sequences, which gru in inner takes"),
        (Started, "no rule for first states other than 0 of rnn_tanh in inner"),
        (identity, "no rule for recurrent weights like the identity in rnn_relu in inner"),
        (with_biases, "no rule for biases whose mean is not 0 in rnn_tanh in inner"),
    ],
)
def test_what_has_no_rule_is_told(build, said):
    """In one line, at the layer itself and at those behind it."""
    model = build()
    recorded = graph.of_batch(model, batches.given(model, sequences()))
    its = theory(recorded, None)
    assert its.of_layers()["head"].forward.reason == said
    (whole,) = [
        n
        for n in recorded.nodes
        if n.shape is None and n.module == "inner" and n.function in said.split()
    ]
    with pytest.raises(NoRuleError, match=said):
        its.forward_through_time(whole)


def test_the_cell_state_at_the_end_is_predicted_forward_alone():
    """Its mean square against draws; the gradient that it gets has no rule."""
    model, x = Model(nn.LSTM, cell_state), sequences()
    gradient = torch.ones(5, 8)
    forward, backward = expected(model, x, gradient)
    mean, error = simulated(model, x, gradient)[0]
    assert abs(forward.value - mean) < 3 * error + 0.04 * mean
    assert backward.reason == "no rule for the gradient of the cell state of lstm in inner"


def test_a_forget_gates_bias_is_kept():
    """Of a mean of 1, as many set it: against draws in which it is left alone."""
    model, x = Model(nn.LSTM, last), sequences()
    gradient, values = torch.ones(5, 8), []
    without, _ = expected(model, x, gradient)
    for seed in range(DRAWS):
        draw(model, seed)
        with torch.no_grad():
            model.inner.bias_ih_l0[UNITS : 2 * UNITS] += 1
        values.append(model(x).detach().square().mean())
    forward, _ = expected(model, x, gradient)
    mean, error = torch.stack(values).mean(), torch.stack(values).std() / DRAWS**0.5
    assert abs(forward.value - mean) < 3 * error + 0.04 * mean
    assert forward.value > 1.1 * without.value
