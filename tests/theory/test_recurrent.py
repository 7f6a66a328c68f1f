"""The mean field of recurrent layers, against closed forms and wide layers drawn many times."""

import functools
import math

import pytest
import torch

from initflow.theory import recurrent
from initflow.theory.recurrent import Layer, backward, forward

UNITS, FEATURES, TIMES, SEQUENCES, DRAWS = 240, 12, 12, 6, 40
# Standard deviations of each gate's input and recurrent weights, times √fan-in, and of the bias.
GATES = {
    "rnn_tanh": [(1.0, 1.3, 0.2)],
    "rnn_relu": [(1.0, 1.2, 0.2)],
    "lstm": [(1.0, 1.5, 0.3), (2.0, 0.8, 0.2), (1.4, 1.8, 0.1), (0.7, 1.1, 0.4)],
    "gru": [(1.0, 1.5, 0.3), (2.0, 0.8, 0.2), (1.4, 1.8, 0.1)],
}
FORGET = 0.7  # the mean of an LSTM's forget gate's biases
# How far off, beyond three standard errors of the draws' mean, as a share: forward and backward.
TOLERANCES = {
    "rnn_tanh": (0.02, 0.05),
    "rnn_relu": (0.05, 0.10),
    "lstm": (0.02, 0.10),
    "gru": (0.02, 0.06),
}


def stream(seed):
    return torch.Generator().manual_seed(seed)


@functools.cache
def sequences():
    """Of other sizes at each time step, which hang together; the first inputs are 0."""
    x = torch.randn(SEQUENCES, TIMES, FEATURES, generator=stream(0)).double()
    x = x * torch.linspace(1.5, 0.5, TIMES)[:, None] + 0.3
    x[:, :1] = 0
    return x


def layer(kind):
    """Of :data:`GATES`, in the sums that a layer is given by."""
    of_inputs, own, bias = (
        torch.tensor(x).double().square() for x in zip(*GATES[kind], strict=True)
    )
    of_inputs, own, bias = of_inputs / FEATURES, own / UNITS, 2 * bias
    if kind == "gru":
        of_inputs = torch.cat([of_inputs, torch.zeros(1)])
        own = torch.stack([own[0], own[1], 0 * own[2], own[2]])
        bias = torch.stack([bias[0], bias[1], bias[2] / 2, bias[2] / 2])
    mean = torch.zeros_like(own)
    if kind == "lstm":
        mean[1] = FORGET
    return Layer(kind, UNITS, of_inputs, own, mean, bias)


def drawn(kind, seed):
    """One layer drawn, by its equations: pre-activations and states, (times, sequences, units)."""
    g = stream(seed)
    normal = lambda *size: torch.randn(*size, generator=g).double()  # noqa: E731
    w = [s / FEATURES**0.5 * normal(UNITS, FEATURES) for s, _, _ in GATES[kind]]
    u = [s / UNITS**0.5 * normal(UNITS, UNITS) for _, s, _ in GATES[kind]]
    b = [s * normal(UNITS) for _, _, s in GATES[kind]]
    c = [s * normal(UNITS) for _, _, s in GATES[kind]]
    if kind == "lstm":
        b[1] += FORGET
    inputs = sequences().clone().requires_grad_()
    h = cell = torch.zeros(SEQUENCES, UNITS).double()
    gates, hidden, cells = [], [], []
    for x in inputs.unbind(1):
        of_x = [x @ each.T + bias for each, bias in zip(w, b, strict=True)]
        of_h = [h @ each.T + bias for each, bias in zip(u, c, strict=True)]
        if kind == "gru":
            r, z = of_x[0] + of_h[0], of_x[1] + of_h[1]
            n = of_x[2] + torch.sigmoid(r) * of_h[2]
            now = [r, z, n]
            h = (1 - torch.sigmoid(z)) * torch.tanh(n) + torch.sigmoid(z) * h
        else:
            now = [one + other for one, other in zip(of_x, of_h, strict=True)]
        if kind == "lstm":
            i, f, g_, o = now
            cell = torch.sigmoid(f) * cell + torch.sigmoid(i) * torch.tanh(g_)
            h = torch.sigmoid(o) * torch.tanh(cell)
        elif kind.startswith("rnn"):
            h = getattr(torch, kind[4:])(now[0])
        gates.append(now)
        hidden.append(h)
        cells.append(cell)
    return inputs, gates, hidden, cells


@functools.cache
def simulated(kind):
    """Means over the draws and their standard errors, by what they are of, (…, times)."""
    found = {}
    for seed in range(DRAWS):
        inputs, gates, hidden, cells = drawn(kind, seed)
        # What arrives: at the last time step and, half as large, the same at one before.
        arriving = torch.randn(SEQUENCES, UNITS, generator=stream(1000 + seed)).double()
        loss = ((hidden[-1] + hidden[5] / 2) * arriving).sum()
        flat = [x for now in gates for x in now]
        slopes = torch.autograd.grad(loss, [inputs, *hidden, *flat])
        by_input, by_hidden, by_gates = slopes[0], slopes[1 : TIMES + 1], slopes[TIMES + 1 :]
        n = len(GATES[kind])
        square = lambda tensors: torch.stack([x.square().mean() for x in tensors]).detach()  # noqa: E731
        of_draw = {
            "preactivations": square(flat).view(TIMES, n).T,
            "hidden": square(hidden),
            "pairs": torch.stack([(a * b).mean() for a, b in zip(hidden, hidden[2:])]).detach(),  # noqa: B905
            "mean": torch.stack([x.mean() for x in hidden]).detach(),
            "cell": square(cells),
            "gradient by gates": square(by_gates).view(TIMES, n).T,
            "gradient by hidden": square(by_hidden),
            "gradient by inputs": by_input.square().mean((0, 2)),
            "pairs by inputs": (by_input[:, 1:] * by_input[:, :-1]).mean((0, 2)),
        }
        for name, value in of_draw.items():
            found.setdefault(name, []).append(value)
    stacked = {name: torch.stack(values) for name, values in found.items()}
    return {name: (x.mean(0), x.std(0) / DRAWS**0.5) for name, x in stacked.items()}


@functools.cache
def expected(kind):
    x = sequences()
    gone = forward(layer(kind), x @ x.mT)
    arriving = torch.zeros(SEQUENCES, TIMES, TIMES).double()
    arriving[:, -1, -1], arriving[:, 5, 5] = 1, 1 / 4
    arriving[:, 5, -1] = arriving[:, -1, 5] = 1 / 2
    back = backward(gone, arriving)
    diagonal = lambda x, at=0: x.diagonal(at, 1, 2).mean(0)  # noqa: E731
    return {
        "preactivations": gone.preactivations.mean(1),
        "hidden": diagonal(gone.hidden),
        "pairs": diagonal(gone.hidden, 2),
        "mean": gone.mean.mean(0),
        "cell": None if gone.cell is None else gone.cell.mean(0),
        "gradient by gates": back.preactivations.mean(1),
        "gradient by hidden": back.hidden.mean(0),
        "gradient by inputs": diagonal(back.inputs),
        "pairs by inputs": diagonal(back.inputs, 1),
    }


@pytest.mark.parametrize("kind", recurrent.KINDS)
@pytest.mark.parametrize("what", ["preactivations", "hidden", "pairs", "mean", "cell"])
def test_forward_is_the_mean_over_draws_of_a_wide_layer(kind, what):
    """At each time step, within the draws' own error and a stated share."""
    own = expected(kind)[what]
    if what == "cell" and kind != "lstm":
        assert own is None
        return
    mean, error = simulated(kind)[what]
    scale = mean.abs() if what != "mean" else simulated(kind)["hidden"][0].sqrt()
    apart = (own - mean).abs() - 3 * error
    assert (apart <= TOLERANCES[kind][0] * scale).all(), (apart / scale).max()


@pytest.mark.parametrize("kind", recurrent.KINDS)
@pytest.mark.parametrize("what", ["by gates", "by hidden", "by inputs"])
def test_backward_is_the_mean_over_draws_of_a_wide_layer(kind, what):
    """From gradients that arrive at two time steps and are the same there."""
    own = expected(kind)[f"gradient {what}"]
    mean, error = simulated(kind)[f"gradient {what}"]
    apart = (own - mean).abs() - 3 * error
    assert (apart <= TOLERANCES[kind][1] * mean).all(), (apart / mean).max()


@pytest.mark.parametrize("kind", recurrent.KINDS)
def test_gradients_of_two_time_steps_hang_together_as_in_a_wide_layer(kind):
    """As a layer below needs to know."""
    own = expected(kind)["pairs by inputs"]
    mean, error = simulated(kind)["pairs by inputs"]
    of_one = simulated(kind)["gradient by inputs"][0][1:]
    assert ((own - mean).abs() <= 4 * error + TOLERANCES[kind][1] * of_one).all()


def test_a_relu_layer_in_closed_form():
    """E[relu(u)²] is half of u's variance, and so is its slope's."""
    one = torch.ones(1).double()
    layer = Layer("rnn_relu", 50, 0.1 * one, 0.03 * one, 0 * one, 0.2 * one)
    x = torch.tensor([[[2.0, 0.0], [0.0, 3.0]]]).double()
    gone = forward(layer, x)
    first = 0.1 * 2 + 0.2
    second = 0.1 * 3 + 0.2 + 0.03 * 50 * first / 2
    assert gone.preactivations.flatten().tolist() == pytest.approx([first, second], rel=1e-12)
    assert gone.mean.flatten().tolist() == pytest.approx(
        [math.sqrt(q / (2 * math.pi)) for q in (first, second)], rel=1e-12
    )
    arriving = torch.zeros(1, 2, 2).double()
    arriving[0, 1, 1] = 1
    back = backward(gone, arriving)
    assert back.hidden.flatten().tolist() == pytest.approx([0.03 * 50 / 2, 1], rel=1e-12)
    assert back.preactivations.flatten().tolist() == pytest.approx([0.03 * 50 / 4, 1 / 2])
    assert back.inputs.diagonal(dim1=1, dim2=2).flatten().tolist() == pytest.approx(
        [0.1 * 50 * 0.03 * 50 / 4, 0.1 * 50 / 2]
    )


def test_small_tanh_is_linear():
    """All of it is sums of products of weights then, the more of them the later."""
    one = torch.ones(1).double()
    layer = Layer("rnn_tanh", 40, 1e-8 * one, 0.02 * one, 0 * one, 0 * one)
    x = torch.ones(1, 5, 5).double()
    gone = forward(layer, x)
    own = [1e-8 * sum(0.8**n for n in range(t + 1)) for t in range(5)]
    assert gone.hidden.diagonal(dim1=1, dim2=2).flatten().tolist() == pytest.approx(own, rel=1e-5)
    arriving = torch.zeros(1, 5, 5).double()
    arriving[0, 4, 4] = 1
    expected = [0.8**t for t in reversed(range(5))]
    assert backward(gone, arriving).hidden.flatten().tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_many_sequences_are_those_of_each(kind, monkeypatch):
    """Gone through some at a time, twice the same; those without any signal stay without."""
    x = sequences()
    whole = forward(layer(kind), x @ x.mT)
    arriving = torch.eye(TIMES).double().expand(SEQUENCES, -1, -1)
    back = backward(whole, arriving)
    monkeypatch.setattr(recurrent, "ENTRIES", 1)
    parted = forward(layer(kind), x @ x.mT)
    assert torch.allclose(parted.hidden, whole.hidden, rtol=1e-9)
    assert torch.allclose(backward(parted, arriving).hidden, back.hidden, rtol=1e-9)
    none = torch.zeros(4).double()
    silent = forward(Layer(kind, 9, none, none, none, none), x @ x.mT)
    assert not silent.hidden.any()
    assert not backward(silent, 0 * arriving).inputs.any()


def test_over_many_time_steps_populations_are_smaller(monkeypatch):
    """They give the same within their own chance."""
    x = sequences()
    large = forward(layer("lstm"), x @ x.mT).hidden.diagonal(dim1=1, dim2=2).mean(0)[1:]
    monkeypatch.setattr(recurrent, "ALL_STEPS", 1)
    small = forward(layer("lstm"), x @ x.mT).hidden.diagonal(dim1=1, dim2=2).mean(0)[1:]
    assert 0 < (large / small).log().abs().max() < 0.08


def test_mistakes():
    """What is no such layer is told."""
    x = sequences()
    one = torch.ones(1).double()
    with pytest.raises(ValueError, match="kind must be one of rnn_tanh, rnn_relu, lstm, gru"):
        forward(Layer("rnn", 9, one, one, one, one), x @ x.mT)
    with pytest.raises(ValueError, match="the biases of an RNN must have the mean 0"):
        forward(Layer("rnn_tanh", 9, one, one, one, one), x @ x.mT)
