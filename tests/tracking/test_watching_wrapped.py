"""Watching a model that is compiled, wrapped, copied, or trained in lower precision."""

import contextlib
import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

import initflow
from initflow.diagnostics.observing.calls import added_up
from initflow.diagnostics.signals import Cosine, Firing, Layer, Moments, signals
from tests.diagnostics.test_inspection import cnn, data_parallel, hooks_on, normal, squared
from tests.tracking.test_watching import data, mlp, scaler, steps, train, updates

# Dynamo's.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


class Graphs:
    """A backend that runs what it is given as it is, and counts the runs."""

    def __init__(self):
        self.runs = 0

    def __call__(self, graph, _inputs):
        def run(*arguments):
            self.runs += 1
            return graph.forward(*arguments)

        return run


def part(net, compiled):
    """Its first layer is compiled: not in place, so that it goes by another name."""
    net[0] = compiled(net[0])
    return net


def in_place(module, backend):
    """With a forward of its own: of PyTorch's, older versions compile none in place."""

    class Own(type(module)):
        def forward(self, x):
            return super().forward(x)

    module.__class__ = Own
    module.compile(backend=backend)


# What is called, of a model and of what compiles with a backend.
COMPILED = {
    "compiled": lambda net, backend: torch.compile(net, backend=backend),
    "in place": lambda net, backend: in_place(net, backend) or net,
    "a part": lambda net, backend: part(net, lambda its: torch.compile(its, backend=backend)),
    "a part in place": lambda net, backend: in_place(net[0], backend) or net,
    "a wrapped one": lambda net, backend: torch.compile(data_parallel(net), backend=backend),
}


@pytest.fixture
def fresh():
    """Nothing is compiled yet, and nothing stays."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("when", ["before", "before, as it is called", "after a step"])
@pytest.mark.parametrize("way", COMPILED)
def test_a_compiled_model(logged, fresh, way, when):
    """Is measured as it was written at the watched steps, and runs compiled at the others."""
    reference = mlp()
    with initflow.watch(reference, every=2):
        train(reference, data(6))
    expected = steps(logged)
    logged.clear()

    net, backend = mlp(), Graphs()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    (first, *others), called = data(6), net
    if when != "after a step":
        called = COMPILED[way](net, backend)
    with initflow.watch(called if when == "before, as it is called" else net, every=2):
        train(called, [first], optimizer)
        if when == "after a step":
            called = COMPILED[way](net, backend)
        train(called, others, optimizer)
        assert backend.runs == 3
    train(called, data(2), optimizer)
    assert backend.runs == 5
    assert steps(logged) == expected
    train(reference, data(2))
    assert all(map(torch.equal, net.parameters(), reference.parameters()))
    assert not hooks_on(net)


def functional(net):
    values = dict(net.named_parameters())
    return torch.func.vmap(lambda one: torch.func.functional_call(net, values, one))


# What is called of a model, in ways that the model itself is not.
UNSEEN = {
    "a function": lambda net: torch.compile(lambda x: net(x) * 1, backend="eager"),
    "what holds it": lambda net: torch.compile(nn.Sequential(net, nn.Tanh()), backend="eager"),
    "its layers": lambda net: lambda x: net[2](net[1](net[0](x))),
    "a replica": lambda net: net._replicate_for_data_parallel().forward,
    "functional": functional,
}


@pytest.mark.parametrize("way", UNSEEN)
@pytest.mark.parametrize("n", [1, 2, 9])
def test_what_is_not_seen_is_told(logged, fresh, caplog, way, n):
    """Once, and never left empty without a word."""
    net = mlp()
    called = UNSEEN[way](net)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    with initflow.watch(net, every=1):
        train(called, data(n), optimizer)
    (told,) = [tag.value for _, tags in logged for tag in tags]
    assert told.startswith("step 0: RuntimeError: the model is updated, and no forward of it ")
    assert len([record for record in caplog.records if record.name == "initflow"]) == 1
    assert not steps(logged)


def test_what_is_seen_no_more_is_told(logged, fresh):
    """Also where some steps were."""
    net = mlp()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    with initflow.watch(net, every=1):
        train(net, data(2), optimizer)
        train(torch.compile(lambda x: net(x) * 1, backend="eager"), data(9), optimizer)
    assert list(steps(logged)) == [0, 1]
    (told,) = [tag.value for _, tags in logged for tag in tags]
    assert told.startswith("step 1: RuntimeError: the model is updated")


def test_several_optimizers_and_a_trained_nothing_are_not_told_of(logged, caplog):
    """One step of each after every forward; weights that are loaded; another model's updates."""
    net, other = mlp(), mlp()
    optimizers = [torch.optim.SGD([parameter], 0.1) for parameter in net.parameters()]
    with initflow.watch(net, every=1):
        net.load_state_dict(other.state_dict())
        train(other, data(9))
    with initflow.watch(net, every=1):
        for x in data(9):
            squared(net(x)).backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    assert list(steps(logged)) == list(range(9))
    assert not caplog.records


def test_a_wrapped_model(logged):
    """The wrapper or what it wraps: the same names and numbers as without."""
    found = []
    for wrap, inner in ((False, False), (True, False), (True, True)):
        net = mlp()
        called = data_parallel(net) if wrap else net
        with initflow.watch(net if inner else called, every=2):
            train(called, data(5))
        found.append(steps(logged))
        logged.clear()
    assert found[0] == found[1] == found[2]
    assert list(found[0]) == [0, 2, 4]


def test_an_average_of_the_weights_is_another_model(logged):
    """It is updated, evaluated, called with gradients, and trained by nobody: none of it counts."""
    found = []
    for averaged in (False, True):
        torch.manual_seed(0)
        net = cnn()
        batches = data(6, (5, 1, 8, 8))
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        with initflow.watch(net, every=2):
            ema = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
            for x in batches:
                if averaged:
                    with torch.no_grad():
                        ema(x)
                    ema(10 * x)
                train(net, [x], optimizer)
                if averaged:
                    ema.update_parameters(net)
            if averaged:
                update_bn(batches, ema)
        assert not hooks_on(ema)
        found.append((steps(logged), net.state_dict()))
        logged.clear()
    (alone, its), (beside, others) = found
    assert alone == beside
    assert list(alone) == [0, 2, 4]
    assert all(map(torch.equal, its.values(), others.values()))


def observed_by_hand(net, batches, loss, dtype):
    """The signals of mlp() in one step of several batches, from what its modules give."""
    outputs = {name: [] for name in ("0", "1", "2")}

    def keep(name):
        def hook(_module, _inputs, output):
            output.retain_grad()
            outputs[name].append(output)

        return hook

    net = copy.deepcopy(net)
    for name, module in net.named_children():
        module.register_forward_hook(keep(name))
    for x in batches:
        with torch.autocast("cpu", dtype) if dtype else contextlib.nullcontext():
            value = loss(net(x))
        value.backward()
    cosines = [added_up(map(Cosine.of, outputs[name])) for name in ("0", "2")]
    z, h, out = (torch.cat(its).detach() for its in outputs.values())
    dz, _, dout = (torch.cat([one.grad for one in its]) for its in outputs.values())
    firing = Firing.of(h, (z > 0).double(), 1.0)
    one, two = net[0].weight, net[2].weight
    return signals(
        {
            "0": Layer(
                one,
                Moments.of(z),
                Moments.of(dz),
                one.grad,
                Moments.of(h),
                firing,
                cosine=cosines[0],
            ),
            "2": Layer(two, Moments.of(out), Moments.of(dout), two.grad, cosine=cosines[1]),
        }
    ).metrics()


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("is_scaled", [False, True])
@pytest.mark.parametrize("accumulated", [1, 3])
def test_mixed_precision_and_accumulation(logged, dtype, is_scaled, accumulated):
    """Autocast, a scaled loss and accumulated gradients, each alone and all together."""
    ends = []
    for watched in (False, True):
        net, expected = mlp(), {}
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        its = scaler(scale=2.0**10 if is_scaled else 1.0)
        with initflow.watch(net, every=2) if watched else contextlib.nullcontext():
            for step in range(4):
                batches = [normal(8, 4, seed=10 * step + n) for n in range(accumulated)]
                loss = lambda outputs: squared(outputs.float()) / accumulated  # noqa: E731
                before = copy.deepcopy(net)
                if watched and step % 2 == 0:
                    expected[step] = observed_by_hand(net, batches, loss, dtype)
                for x in batches:
                    with torch.autocast("cpu", dtype) if dtype else contextlib.nullcontext():
                        value = loss(net(x))
                    its.scale(value).backward()
                its.step(optimizer)
                its.update()
                optimizer.zero_grad()
                if step in expected:
                    expected[step] |= updates(before, net)
        ends.append([*net.parameters()])
    found = steps(logged)
    assert list(found) == [0, 2]
    for step, values in expected.items():
        assert found[step] == pytest.approx(values, rel=1e-4, abs=1e-12)
    assert all(map(torch.equal, *ends))
