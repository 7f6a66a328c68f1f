"""Recurrent layers gate by gate and time step by time step, against loops over single sequences."""

import copy
from collections import defaultdict

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - as all PyTorch code calls it
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_sequence, pad_packed_sequence

import initflow
from initflow.diagnostics.observing import recurrent
from initflow.diagnostics.signals import MomentsByTime
from initflow.models.layers import GATES
from tests.diagnostics.test_inspection import Layer, Net, Part, matches, normal, weighted


def sigmoid(z):
    a = 1 / (1 + torch.exp(-z))
    return z, a, a * (1 - a)


def tanh(z):
    a = (torch.exp(z) - torch.exp(-z)) / (torch.exp(z) + torch.exp(-z))
    return z, a, 1 - a**2


def relu(z):
    return z, z * (z > 0), (z > 0).float()


def lstm_step(layers, x, h, state):
    """The next states, by sums written gate by gate; ``x`` and ``h`` are what each gate gets."""
    i, f, o = (layers[g].gave(*sigmoid(x[g] + h[g])) for g in ("input", "forget", "output"))
    g = layers["cell"].gave(*tanh(x["cell"] + h["cell"]))
    c = f * state[1] + i * g
    return [o * tanh(c)[1], c]


def gru_step(layers, x, h, state):
    r, z = (layers[g].gave(*sigmoid(x[g] + h[g])) for g in ("reset", "update"))
    n = layers["new"].gave(*tanh(x["new"] + r * h["new"]))
    return [(1 - z) * n + z * state[0]]


def rnn_step(act):
    return lambda layers, x, h, _: [layers["hidden"].gave(*act(x["hidden"] + h["hidden"]))]


def step_of(module):
    if isinstance(module, (nn.LSTM, nn.LSTMCell)):
        return lstm_step
    if isinstance(module, (nn.GRU, nn.GRUCell)):
        return gru_step
    return rnn_step(tanh if module.nonlinearity == "tanh" else relu)


class Twin:
    """One layer in one direction of a recurrent module, over one sequence after the other."""

    def __init__(self, module, ending=""):
        names = GATES[type(module)]
        self.step, self.n = step_of(module), module.hidden_size
        weights = getattr(module, f"weight_ih{ending}"), getattr(module, f"weight_hh{ending}")
        self.of_inputs, self.of_hidden = weights
        self.biases = [0 * weights[0][:, 0]] * 2
        if module.bias:
            self.biases = [getattr(module, f"bias_{to}{ending}") for to in ("ih", "hh")]
        self.projection = getattr(module, f"weight_hr{ending}", None)
        rows = {name: (at * self.n, (at + 1) * self.n) for at, name in enumerate(names)}
        self.rows = {name: slice(*ends) for name, ends in rows.items()}
        self.layers = {name: Layer(Part(*ends, *weights)) for name, ends in rows.items()}
        self.hidden = defaultdict(list)  # by time step

    def __call__(self, x, state, at=0):
        """One time step of one sequence, whose states are vectors."""
        of_x, of_h = (
            {g: (w[r] @ v + b[r]).unsqueeze(0) for g, r in self.rows.items()}
            for w, v, b in zip(
                (self.of_inputs, self.of_hidden), (x, state[0]), self.biases, strict=True
            )
        )
        state = [one[0] for one in self.step(self.layers, of_x, of_h, state)]
        if self.projection is not None:
            state[0] = self.projection @ state[0]
        state[0].retain_grad()
        self.hidden[at].append(state[0])
        return state

    def quantities(self, prefix):
        found = {}
        for gate, layer in self.layers.items():
            has_tanh = gate in ("cell", "new", "hidden")
            found[f"{prefix}.{gate}"] = layer.quantities(1.0 if has_tanh else 0.25)
        return found

    def by_time(self):
        def stacked(tensors):
            return np.stack([t.detach().double().numpy() for t in tensors])

        found = defaultdict(list)
        for at in sorted(self.hidden):
            states, gradients = self.hidden[at], [h.grad for h in self.hidden[at]]
            found["hidden_signal_variance"].append(stacked(states).var(0).mean())
            found["hidden_second_moment"].append((stacked(states) ** 2).mean())
            there = [torch.zeros_like(h) if h is None else h for h in gradients]
            there = [torch.zeros_like(s) if g is None else g for s, g in zip(states, gradients)]  # noqa: B905
            found["hidden_gradient_second_moment"].append((stacked(there) ** 2).mean())
        return dict(found)


def by_hand(module, sequences, states, masks=None):
    """What ``module`` gives for each of ``sequences``, its states at the end, and the twins.

    ``states`` are (layers, sequences, units) each; ``masks`` multiply what goes to the second
    layer.
    """
    twins, ends = {}, []
    ways = ("", "_reverse") if module.bidirectional else ("",)
    inputs = sequences
    for k in range(module.num_layers):
        gave = [[[] for _ in x] for x in inputs]
        for way in ways:
            twin = twins[f"l{k}{way}"] = Twin(module, f"_l{k}{way}")
            last = []
            for n, x in enumerate(inputs):
                state = [one[len(ends)][n] for one in states]
                for t in range(len(x))[:: -1 if way else 1]:
                    state = twin(x[t], state, t)
                    gave[n][t].append(state[0])
                last.append(state)
            ends.append(last)
        inputs = [torch.stack([torch.cat(h) for h in x]) for x in gave]
        if masks is not None and k == 0:
            inputs = [x * mask for x, mask in zip(inputs, masks, strict=True)]
    finals = [
        torch.stack([torch.stack([state[at] for state in last]) for last in ends])
        for at in range(len(states))
    ]
    return inputs, finals, twins


def outputs_of(net, x, *states):
    """All that a recurrent module gives, so that each part of it has a gradient."""
    output, last = net.rnn(x, *states)
    if isinstance(output, nn.utils.rnn.PackedSequence):
        output, _ = pad_packed_sequence(output, batch_first=True)
    last = last if isinstance(last, tuple) else (last,)
    return torch.cat([one.flatten() for one in (output, *last)])


def check(found, twins):
    """Whether layers, by gate, and hidden states, by time, are what the loops give."""
    expected = {}
    for name, twin in twins.items():
        expected |= twin.quantities(name)
    assert matches(found.layers, **expected)
    assert list(found.by_time) == list(twins)
    for name, twin in twins.items():
        for quantity, series in twin.by_time().items():
            assert found.by_time[name][quantity] == pytest.approx(series, rel=1e-4, abs=1e-12)
    assert not found.not_measured


TWO_WAY = {"num_layers": 2, "bidirectional": True}
CASES = [
    (nn.RNN, {}),
    (nn.RNN, {"nonlinearity": "relu", **TWO_WAY}),
    (nn.LSTM, {}),
    (nn.LSTM, {"batch_first": True, **TWO_WAY}),
    (nn.LSTM, {"bias": False}),
    (nn.LSTM, {"proj_size": 2, **TWO_WAY}),
    (nn.LSTM, {"proj_size": 2, "bias": False}),
    (nn.GRU, {}),
    (nn.GRU, {"batch_first": True, "bias": False}),
    (nn.GRU, TWO_WAY),
]


def zeros(module, n):
    """The states that a module starts from."""
    ways = module.num_layers * (1 + module.bidirectional)
    states = [torch.zeros(ways, n, module.proj_size or module.hidden_size)]
    if isinstance(module, nn.LSTM):
        states.append(torch.zeros(ways, n, module.hidden_size))
    return states


@pytest.mark.filterwarnings("ignore:LSTM with projections:UserWarning")  # oneDNN has none
@pytest.mark.parametrize("form", ["batch", "given states", "unbatched", "packed", "packed states"])
@pytest.mark.parametrize(("kind", "options"), CASES)
def test_each_gate_at_each_time(kind, options, form):
    """Of batches, single and packed sequences of different lengths, in both directions."""
    torch.manual_seed(1)
    rnn = kind(4, 3, **options)
    lengths = {"unbatched": [5]}.get(form, [5, 3, 3, 1] if "packed" in form else [5, 5])
    sequences = [normal(n, 4, seed=at) for at, n in enumerate(lengths)]
    states = zeros(rnn, len(lengths))
    if form == "unbatched":
        batch = (sequences[0],)
    elif "packed" in form:
        batch = (pack_sequence(sequences),)
    else:
        batch = (torch.stack(sequences, 0 if rnn.batch_first else 1),)
    if "states" in form:
        states = [normal(*one.shape, seed=9) for one in states]
        batch = (*batch, tuple(states) if len(states) > 1 else states[0])
    net = Net(lambda net, _: outputs_of(net, *batch), rnn=rnn)
    found = initflow.inspect(net, sequences[0], weighted)
    gave, finals, twins = by_hand(rnn, sequences, states)
    output = nn.utils.rnn.pad_sequence(gave, batch_first=True)
    output = output if rnn.batch_first or "packed" in form else output.transpose(0, 1)
    weighted(torch.cat([one.flatten() for one in (output, *finals)])).backward()
    check(found, {f"rnn.{name}": twin for name, twin in twins.items()})


@pytest.mark.parametrize("kind", [nn.RNNCell, nn.LSTMCell, nn.GRUCell])
def test_cells(kind):
    """The time is how often one was called before in the forward; one that stops counts not on."""

    def forward(net, x):
        state, gave = None, []
        for at in range(len(x)):
            rows = x[at][: 3 - at]
            if state is not None:
                state = tuple(s[: 3 - at] for s in state) if lstm else state[: 3 - at]
            state = net.cell(rows, state)
            gave.append(state[0] if lstm else state)
        return torch.cat([one.flatten() for one in gave])

    lstm = kind is nn.LSTMCell
    net, x = Net(forward, cell=kind(4, 3)), normal(3, 3, 4)
    found = initflow.inspect(net, x, weighted)
    twin = Twin(net.cell)
    gave = [[], [], []]
    for n in range(3):
        state = [torch.zeros(3)] * (1 + lstm)
        for at in range(3 - n):
            state = twin(x[at, n], state, at)
            gave[at].append(state[0])
    weighted(torch.cat([torch.stack(one).flatten() for one in gave])).backward()
    check(found, {"cell": twin})


def test_dropout_between_layers():
    """Is drawn once more as it was, whatever is drawn since; and the random state is left alone."""
    rnn = nn.LSTM(4, 3, num_layers=2, dropout=0.5)
    net = Net(lambda net, x: F.dropout(outputs_of(net, F.dropout(x, 0.5)), 0.1), rnn=rnn)
    x = normal(5, 2, 4)
    torch.manual_seed(3)
    found = initflow.inspect(net, x, weighted)
    before = F.dropout(x, 0.5)
    mask = F.dropout(torch.ones(5, 2, 3), 0.5)
    gave, finals, twins = by_hand(rnn, list(before.transpose(0, 1)), zeros(rnn, 2), mask.unbind(1))
    outputs = [torch.stack(gave, 1), *finals]
    weighted(F.dropout(torch.cat([one.flatten() for one in outputs]), 0.1)).backward()
    check(found, {f"rnn.{name}": twin for name, twin in twins.items()})


@pytest.mark.parametrize(
    "forward",
    [
        lambda net, x: net.rnn(x)[1],
        lambda net, x: net.rnn(x)[0].relu_()[:, -2:],
        lambda net, x: net.rnn(x)[0].mul_(2),
    ],
)
def test_only_the_last_state_and_changes_in_place(forward):
    """Gradients come through what is used, also where an output is changed in place."""
    rnn = nn.GRU(4, 3, batch_first=True)
    net, x = Net(forward, rnn=rnn), normal(2, 5, 4)
    found = initflow.inspect(net, x, weighted)
    gave, finals, twins = by_hand(rnn, list(x), zeros(rnn, 2))
    stand_in = Net(None)
    stand_in.rnn = lambda _: (torch.stack(gave), *finals)
    weighted(forward(stand_in, x)).backward()
    check(found, {f"rnn.{name}": twin for name, twin in twins.items()})


def test_calls_add_up_and_frozen_weights_have_no_gradient():
    """Two calls in one forward are pooled, time step by time step."""
    net = Net(lambda net, x: outputs_of(net, x) + outputs_of(net, 2 * x), rnn=nn.GRU(4, 3))
    net.rnn.weight_hh_l0.requires_grad_(requires_grad=False)
    x = normal(5, 2, 4)
    found = initflow.inspect(net, x, weighted)
    _, _, once = by_hand(net.rnn, list(x.transpose(0, 1)), zeros(net.rnn, 2))
    _, _, twice = by_hand(net.rnn, list(2 * x.transpose(0, 1)), zeros(net.rnn, 2))
    states = [np.stack([*a, *b]) for a, b in zip(*map(hidden, (once, twice)), strict=True)]
    assert found.by_time["rnn.l0"]["hidden_second_moment"] == pytest.approx(
        [(h**2).mean() for h in states]
    )
    values = found.layers["rnn.l0.new"]
    assert "weight_gradient_variance" not in values
    assert values["gradient_variance"] > 0


def hidden(twins):
    return [[h.detach().numpy() for h in of] for of in twins["l0"].hidden.values()]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_precisions(dtype):
    """Half precision is unrolled in single, and near enough to what the kernel gave."""
    torch.manual_seed(0)
    net = Net(outputs_of, rnn=nn.LSTM(4, 8, 2).to(dtype))
    found = initflow.inspect(net, normal(20, 2, 4).to(dtype), weighted)
    assert not found.not_measured
    values = found.layers["rnn.l1.cell"]
    exact = initflow.inspect(net.double(), normal(20, 2, 4).to(dtype).double(), weighted)
    assert values == pytest.approx(exact.layers["rnn.l1.cell"], rel=0.05)


def test_autocast():
    """As in training with mixed precision."""
    net = Net(outputs_of, rnn=nn.LSTM(4, 8))

    def loss(outputs):
        return weighted(outputs.float())

    with torch.autocast("cpu", torch.bfloat16):
        found = initflow.inspect(net, normal(20, 2, 4), loss)
    exact = initflow.inspect(net, normal(20, 2, 4), loss)
    values, others = found.layers["rnn.l0.cell"], exact.layers["rnn.l0.cell"]
    assert values["gradient_variance"] == pytest.approx(others["gradient_variance"], rel=0.05)


def test_a_parametrized_weight():
    """Measured is the one that is applied; its gradient is nobody's."""
    rnn = parametrizations.weight_norm(nn.LSTM(4, 3), "weight_hh_l0")
    found = initflow.inspect(Net(outputs_of, rnn=rnn), normal(5, 2, 4), weighted)
    weights = torch.cat([rnn.weight_ih_l0[:3], rnn.weight_hh_l0[:3]], 1)
    values = found.layers["rnn.l0.input"]
    assert values["weight_variance"] == pytest.approx(weights.var(correction=0).item(), rel=1e-5)
    assert "weight_gradient_variance" not in values


def test_a_kernel_that_gives_something_else_is_named(monkeypatch):
    """With by how much; the rest of the model is measured."""

    def wrong(x, h, state):
        gates, (hidden, cell) = recurrent._lstm(x, h, state)
        return gates, [1.5 * hidden, cell]

    net = Net(lambda net, x: net.fc(net.rnn(x)[0]), rnn=nn.LSTM(4, 3), fc=nn.Linear(3, 2))
    monkeypatch.setitem(recurrent.STEPS, "lstm", wrong)
    found = initflow.inspect(net, normal(5, 2, 4), weighted)
    assert list(found.layers) == ["fc"]
    assert found.not_measured["rnn"].startswith("LSTM: unrolled it gives other outputs, 0.")
    assert not found.by_time


class OwnLSTM(nn.LSTM):
    """One that calls no kernel."""

    def forward(self, x):
        return x * self.weight_ih_l0.mean(), None


def test_a_module_that_computes_in_its_own_way_is_named():
    """Though it is of a type that is known."""
    net = Net(lambda net, x: net.fc(net.rnn(x)[0]), rnn=OwnLSTM(4, 3), fc=nn.Linear(4, 2))
    found = initflow.inspect(net, normal(5, 2, 4), weighted)
    assert found.not_measured == {"rnn": "OwnLSTM: computes in a way of its own"}
    assert list(found.layers) == ["fc"]


def test_nonfinite_gates_are_counted():
    """Each gate's own; an infinite input ends nothing."""
    x = normal(5, 2, 4)
    x[3, 1, 2] = torch.nan
    found = initflow.inspect(Net(outputs_of, rnn=nn.LSTM(4, 3)), x, weighted)
    assert found.nonfinite["preactivation/rnn.l0.forget"] == 2 * 3
    assert found.by_time["rnn.l0"]["hidden_second_moment"][:3] != [None] * 3
    assert found.by_time["rnn.l0"]["hidden_second_moment"][3:] == [None, None]


def test_some_time_steps_have_metrics():
    """Eight at most, evenly from the first to the last, by how much of the sequence is over."""
    every_fourth = [0, 4, 8, 12, 16, 20, 24, 28]
    for n, expected in ((1, [0]), (3, [0, 1, 2]), (8, [*range(8)]), (29, every_fourth)):
        found = initflow.inspect(Net(outputs_of, rnn=nn.RNN(4, 3)), normal(n, 2, 4), weighted)
        series = found.by_time["rnn.l0"]["hidden_second_moment"]
        keys = [key for key in found.metrics() if key.startswith("hidden_second_moment/rnn.l0.")]
        assert [found.metrics()[key] for key in keys] == [series[at] for at in expected]
        assert keys[0].endswith("time_000")
        assert n == 1 or keys[-1].endswith("time_100")


def test_moments_by_time_add_up():
    """As if they had been of one set, where a time has none, and where one is longer."""
    one, other = normal(6, 3), normal(4, 3, seed=1)
    times, its = torch.tensor([0, 0, 1, 1, 1, 2]), torch.tensor([0, 1, 4, 4])
    both = MomentsByTime.of(one, times, 3) + MomentsByTime.of(other, its, 5)
    whole = MomentsByTime.of(torch.cat([one, other]), torch.cat([times, its]), 5)
    for name in ("own_variance", "second_moment"):
        series = getattr(both, name)
        assert np.isnan(series[3])
        assert series == pytest.approx(getattr(whole, name), nan_ok=True)
    shifted = MomentsByTime.of(other, its, 5).shifted(2).second_moment
    assert np.isnan(shifted[:2]).all()
    assert shifted[2] == pytest.approx((other[0].double() ** 2).mean().item())


def test_what_goes_back_is_left_alone():
    """Gradients and outputs are the same to the bit, with what looks in between and without."""
    torch.manual_seed(0)
    rnn = nn.LSTM(4, 3, 2, dropout=0.3, bidirectional=True)
    found = []
    for looks in (False, True):
        net, x = copy.deepcopy(rnn), normal(5, 2, 4)
        torch.manual_seed(1)
        if looks:
            initflow.inspect(Net(outputs_of, rnn=net), x, weighted)
        weighted(outputs_of(Net(outputs_of, rnn=net), x)).backward()
        found.append([*(p.grad for p in net.parameters()), torch.get_rng_state()])
    assert all(map(torch.equal, *found))
