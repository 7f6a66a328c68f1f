"""Watching a training: what is logged and when, and what is left alone."""

import contextlib
import copy
import gc
import io
import logging
import pickle
import re
import threading
import weakref

import mlflow
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mlflow.utils import validation
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import initflow
from initflow import errors
from initflow.diagnostics import recorder
from initflow.diagnostics.observing import hooks
from initflow.diagnostics.observing import recurrent as unrolling
from initflow.diagnostics.observing.calls import added_up
from initflow.diagnostics.recorder import Recorder
from initflow.diagnostics.signals import (
    BY_TIME,
    QUANTITIES,
    Cosine,
    Firing,
    Layer,
    Moments,
    signals,
)
from initflow.tracking import runs, unsent
from tests.diagnostics.test_inspection import Net, cnn, hooks_on, normal, squared


def steps(batches):
    """The values by key at each step; every batch has one step."""
    found = {}
    for metrics, _ in batches:
        if metrics:
            (step,) = {metric.step for metric in metrics}
            assert step not in found
            found[step] = {metric.key: metric.value for metric in metrics}
    return found


def train(net, batches, optimizer=None, loss=squared):
    """A step for each batch."""
    optimizer = optimizer or torch.optim.SGD(net.parameters(), 0.1)
    for x in batches:
        optimizer.zero_grad()
        loss(net(x)).backward()
        optimizer.step()


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))


def data(n=1, shape=(8, 4)):
    return [normal(*shape, seed=seed) for seed in range(n)]


def by_hand(net, passes):
    """What mlp() does in ``passes``: (inputs, loss) each, as one step."""
    one, two = net[0], net[2]
    zs, hs, outs = [], [], []
    weights = [one.weight, two.weight]
    total = 0
    for x, loss in passes:
        zs.append(x @ one.weight.T + one.bias)
        hs.append(torch.relu(zs[-1]))
        outs.append(hs[-1] @ two.weight.T + two.bias)
        total = total + loss(outs[-1])
    grads = torch.autograd.grad(total, [*weights, *zs, *outs])
    w1, w2, *rest = grads
    z, h, out, dz, dout = map(torch.cat, (zs, hs, outs, rest[: len(zs)], rest[len(zs) :]))
    firing = Firing.of(h, (z > 0).double(), 1.0)
    return signals(
        {
            "0": Layer(
                weights[0],
                Moments.of(z),
                Moments.of(dz),
                w1,
                Moments.of(h),
                firing,
                cosine=added_up(map(Cosine.of, zs)),
            ),
            "2": Layer(
                weights[1],
                Moments.of(out),
                Moments.of(dout),
                w2,
                cosine=added_up(map(Cosine.of, outs)),
            ),
        }
    ).metrics()


def updates(before, after):
    """How much each weight of ``after`` is apart from that of ``before``."""
    found = {}
    for (name, old), new in zip(before.named_parameters(), after.parameters(), strict=True):
        if old.dim() > 1:
            x, y = old.detach().double().numpy(), new.detach().double().numpy()
            ratio = np.sqrt(np.mean((y - x) ** 2) / np.mean(x**2))
            found[f"update_ratio/{name.removesuffix('.weight')}"] = ratio
    return found


def test_every_so_many_steps(logged):
    """In one batch of metrics each, with the values that the step had before its update."""
    net, batches, expected = mlp(), data(7), {}
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    with initflow.watch(net, every=3):
        for step, x in enumerate(batches):
            before = copy.deepcopy(net)
            train(net, [x], optimizer)
            if step % 3 == 0:
                expected[step] = by_hand(before, [(x, squared)]) | updates(before, net)
    found = steps(logged)
    assert list(found) == [0, 3, 6]
    assert len(logged) == 3
    for step, values in expected.items():
        assert found[step] == pytest.approx(values, rel=1e-4, abs=1e-12)


def test_chosen_quantities(logged):
    """Only those are logged, one or several."""
    for quantities in ("weight_variance", ["weight_variance", "dead_fraction"]):
        with initflow.watch(net := mlp(), quantities=quantities):
            train(net, data())
    first, second = (list(steps([batch])[0]) for batch in logged)
    assert first == ["weight_variance/0", "weight_variance/2"]
    assert second == ["weight_variance/0", "dead_fraction/0", "weight_variance/2"]


def test_all_forwards_of_an_update_are_one_step(logged):
    """Accumulated gradients, two passes in one loss, a gradient cleared in between."""
    net, (a, b, c) = mlp(), data(3)
    half = lambda outputs: squared(outputs) / 2  # noqa: E731
    expected, before = by_hand(net, [(a, half), (b, half), (c, squared)]), copy.deepcopy(net)
    with initflow.watch(net, every=1):
        (half(net(a)) + half(net(b))).backward()
        net.zero_grad()
        squared(net(c)).backward()
        torch.optim.SGD(net.parameters(), 0.1).step()
        net.zero_grad()
    expected |= updates(before, net)
    assert steps(logged) == {0: pytest.approx(expected, rel=1e-4)}


def test_evaluation_in_between(logged):
    """Is neither a step nor a part of one, with and without gradients recorded."""
    (net, (x, other)), expected = (mlp(), data(2)), []
    with initflow.watch(net, every=1):
        for _ in range(2):
            with torch.no_grad():
                net(10 * other)
            with torch.inference_mode():
                net(10 * other)
            net.eval()
            net(10 * other)
            net.train()
            before = copy.deepcopy(net)
            train(net, [x])
            expected.append(by_hand(before, [(x, squared)]) | updates(before, net))
            net(10 * other)
    assert steps(logged) == {n: pytest.approx(expected[n], rel=1e-4) for n in (0, 1)}


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda ps: torch.optim.Adam(ps, fused=True),
        lambda ps: torch.optim.Adam(ps, foreach=True),
        lambda ps: torch.optim.SGD(ps, 0.1, foreach=False),
        torch.optim.AdamW,
    ],
)
def test_steps_are_seen_whatever_updates(logged, optimizer):
    """Fused and stacked optimizers as well."""
    net = mlp()
    with initflow.watch(net, every=2):
        train(net, data(5), optimizer(net.parameters()))
    assert list(steps(logged)) == [0, 2, 4]


def test_updates_by_hand_and_of_others(logged):
    """Parameters changed in place make a step; another model's optimizer does not."""
    net, other = mlp(), mlp()
    with initflow.watch(net, every=1):
        for x in data(3):
            train(other, [x])
            squared(net(x)).backward()
            train(other, [x], torch.optim.Adam(other.parameters(), fused=True))
            squared(net(x)).backward()
            with torch.no_grad():
                for parameter in net.parameters():
                    parameter.sub_(0.1 * parameter.grad)
    assert list(steps(logged)) == [0, 1, 2]


def encoder():
    torch.manual_seed(0)
    block = nn.TransformerEncoderLayer(8, 2, dim_feedforward=16, batch_first=True)
    return nn.TransformerEncoder(block, num_layers=2)


def recurrent():
    """With dropout between layers, and a cell."""

    def forward(net, x):
        h, state = net.gru(net.lstm(x)[0])[0], None
        for at in range(h.shape[1]):
            state = net.cell(h[:, at], state)
        return state[0]

    torch.manual_seed(0)
    return Net(
        forward,
        lstm=nn.LSTM(8, 6, 2, batch_first=True, dropout=0.3, bidirectional=True),
        gru=nn.GRU(12, 6, batch_first=True),
        cell=nn.LSTMCell(6, 4),
    )


@pytest.mark.parametrize(
    ("build", "shape"),
    [(mlp, (8, 4)), (cnn, (5, 1, 8, 8)), (encoder, (3, 5, 8)), (recurrent, (3, 5, 8))],
)
def test_the_training_is_left_alone(logged, build, shape):
    """Weights, statistics and random numbers after it are the same to the bit."""
    ends = []
    for watched in (False, True):
        torch.manual_seed(0)
        net = nn.Sequential(build(), nn.Dropout())
        with initflow.watch(net, every=2) if watched else contextlib.nullcontext():
            train(net, data(6, shape), torch.optim.Adam(net.parameters()))
        ends.append([*net.state_dict().values(), torch.get_rng_state()])
    assert all(map(torch.equal, *ends))
    assert list(steps(logged)) == [0, 2, 4]
    assert not any(tags for _, tags in logged)


def frozen():
    """An encoder that is not trained: PyTorch takes a shorter way through it."""
    return nn.Sequential(encoder().eval().requires_grad_(requires_grad=False), nn.Linear(8, 3))


def test_the_fast_path_of_a_frozen_encoder_is_left_alone(logged):
    """It gives other bits than the usual one; what is trained behind it is measured."""
    ends = []
    for watched in (False, True):
        torch.manual_seed(0)
        net, gave = frozen(), []
        net[0].register_forward_hook(lambda _, __, output, gave=gave: gave.append(output))
        with initflow.watch(net, every=2) if watched else contextlib.nullcontext():
            train(net, data(3, (3, 5, 8)))
        ends.append([*gave, *net.state_dict().values()])
    assert all(map(torch.equal, *ends))
    assert "weight_gradient_variance/1" in steps(logged)[2]


def test_hidden_states_over_time(logged):
    """Some time steps have keys of their own, as chosen, and an update its size."""
    names = ["hidden_gradient_second_moment", "update_ratio"]
    with initflow.watch(net := recurrent(), quantities=names, name="α"):
        train(net, data(2, (3, 15, 8)))
    (values,) = steps(logged).values()
    assert {f"{names[0]}/_.gru.l0.time_{at:03}" for at in (0, 14, 29, 43, 57, 71, 86, 100)} == {
        key for key in values if ".gru" in key and "hidden" in key
    }
    assert {f"update_ratio/_.gru.l0.{gate}" for gate in ("reset", "update", "new")} == {
        key for key in values if ".gru" in key and "update_ratio" in key
    }
    assert all(0 < value < 1 for value in values.values())


def test_a_module_that_turns_out_not_to_be_measured_is_told_of_once(logged, monkeypatch, caplog):
    """With why; in one tag with those that are known from the start."""
    monkeypatch.setitem(unrolling.STEPS, "gru", lambda _, h, state: (h, [0.5 * state[0]]))
    net = Net(lambda net, x: net.act(net.gru(x)[0]), gru=nn.GRU(4, 4), act=nn.PReLU())
    net.fc = nn.Linear(4, 4)
    net._function[0] = lambda net, x: net.fc(net.act(net.gru(x)[0]))
    with initflow.watch(net, every=1):
        train(net, data(3))
    tags = [tag.value for _, tags in logged for tag in tags]
    assert tags[0] == "act (PReLU)"
    assert tags[1].startswith("act (PReLU), gru (GRU: unrolled it gives other outputs, ")
    assert len(tags) == len(caplog.records) == 2
    assert all("preactivation_variance/fc" in values for values in steps(logged).values())


def test_batch_norms_and_dropouts_twin(logged):
    """A CNN in training gives, step for step, what looking at the batch at once gives."""
    torch.manual_seed(0)
    net, expected = nn.Sequential(cnn(), nn.Dropout()), {}
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    with initflow.watch(net, every=1):
        for step, x in enumerate(data(3, (5, 1, 8, 8))):
            before = copy.deepcopy(net)
            expected[step] = initflow.inspect(before, x, squared).metrics()
            train(net, [x], optimizer)
            expected[step] |= updates(before, net)
    exact = {n: {k: v for k, v in its.items() if "update" in k} for n, its in expected.items()}
    found = steps(logged)
    for step, values in expected.items():
        assert found[step] == values | {k: pytest.approx(v) for k, v in exact[step].items()}


def test_copies_and_saved_models_are_not_watched(logged):
    """A copy made while watching is a model like any other."""
    net, (x, *_) = mlp(), data()
    with initflow.watch(net, every=1):
        train(net, [x])
        for copied in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):  # noqa: S301
            train(copied, data(3))
            assert torch.is_tensor(copied(x))
        squared(net(x)).backward()
        copy.deepcopy(net)
        pickle.dumps(net)
    assert list(steps(logged)) == [0, 1]


def test_hooks_are_gone_after_it(logged):
    """From modules and parameters, and from a result that lives on."""
    net = cnn()
    with initflow.watch(net, every=1):
        outputs = net(normal(5, 1, 8, 8))
        squared(outputs).backward(retain_graph=True)
    assert not hooks_on(net)
    squared(outputs).backward()
    assert len(logged) == 1


class Break(BaseException):
    """As KeyboardInterrupt is, not an Exception."""


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, Break])
@pytest.mark.parametrize("where", ["forward", "layer", "backward", "body"])
def test_hooks_are_gone_whatever_happens(logged, error, where):
    """And the error comes through."""

    def fail(*_):
        raise error("mine")

    def forward(net, x):
        h = net.act(net.fc1(x))
        if where == "forward":
            fail()
        if where == "backward":
            h.register_hook(fail)
        return net.fc2(h)

    net = Net(forward, fc1=nn.Linear(4, 4), act=nn.ReLU(), fc2=nn.Linear(4, 2))
    if where == "layer":
        net.fc1.register_forward_hook(fail)

    def body():
        with initflow.watch(net, every=1):
            loss = squared(net(*data()))
            loss.backward()
            fail()

    with pytest.raises(error, match="mine"):
        body()
    assert not [hook for hook in hooks_on(net) if fail not in getattr(hook, "values", list)()]
    assert len(steps(logged)) == (where in ("backward", "body"))


def test_an_error_that_is_dealt_with(logged):
    """A step that failed leaves nothing behind in those that follow."""
    net, (x, wrong) = mlp(), [*data(), normal(2, 5)]
    expected, before = by_hand(net, [(x, squared)]), copy.deepcopy(net)
    with initflow.watch(net, every=1):
        with pytest.raises(RuntimeError):
            net(wrong)
        assert not torch.overrides._get_current_function_mode_stack()
        train(net, [x])
    expected |= updates(before, net)
    assert steps(logged) == {0: pytest.approx(expected, rel=1e-4)}


def test_what_mlflow_refuses_ends_no_training(logged, monkeypatch, caplog):
    """It is told of once; an error of the user's own comes through as it is."""
    net = mlp()

    def refuse(*_, **__):
        raise mlflow.MlflowException("no")

    def body(error=None):
        with initflow.watch(net, every=1):
            train(net, data(5))
            if error:
                raise error

    monkeypatch.setattr(mlflow.MlflowClient, "log_batch", refuse)
    body()
    with pytest.raises(KeyError):
        body(KeyError())
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 2
    assert all(
        re.fullmatch(r"watching failed, .*: step 0: MLflow at .* failed: no", t) for t in told
    )
    assert not hooks_on(net)


def test_nothing_is_kept_alive(logged):
    """Neither the model after it, nor a step's tensors during it."""
    net, alive = mlp(), []
    layer = net[0]
    layer.register_forward_hook(lambda _, __, output: alive.append(weakref.ref(output)))
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    gc.collect()
    gc.disable()
    try:
        with initflow.watch(net, every=2):
            for step, x in enumerate(data(4)):
                train(net, [x], optimizer)
                assert alive.pop()() is None
                assert sum(type(one) is Recorder for one in gc.get_objects()) == 1 - step % 2
        alive = [weakref.ref(net), weakref.ref(layer), weakref.ref(layer.weight)]
    finally:
        gc.enable()
    del net, layer, optimizer
    gc.collect()
    assert [ref() for ref in alive] == [None] * 3


def test_nonfinite_values_are_tagged_once(logged):
    """With the first step that has some; its finite values are logged."""
    net, batches = mlp(), data(6)
    batches[4][0, 0] = torch.inf
    with initflow.watch(net, every=2):
        train(net, batches + data(2))
    found = steps(logged)
    assert list(found) == [0, 2, 4, 6]
    assert set(found[2]) > set(found[4]) > set(found[6])
    assert {"weight_variance/0", "weight_variance/2"} <= set(found[4])
    (tags,) = [tags for _, tags in logged if tags]
    tags = {tag.key: tag.value for tag in tags}
    assert tags["initflow.nonfinite_at_step"] == "4"
    assert tags["initflow.nonfinite"].startswith("preactivation/0: 6, ")


def test_a_long_list_of_nonfinite_tensors_is_cut(logged):
    """To what a person reads."""
    net = nn.Sequential(*(nn.Linear(4, 4) for _ in range(20)))
    with initflow.watch(net):
        train(net, [torch.full((2, 4), torch.nan)])
    ((_, tags),) = [batch for batch in logged if batch[1]]
    (text,) = [tag.value for tag in tags if tag.key == "initflow.nonfinite"]
    assert text.count(", ") == 10
    assert text.endswith(", …")
    assert len(text) < 300


def test_a_real_run(store):
    """The metrics and tags are in the run that was active at the start."""
    net, batches = mlp(), data(3)
    batches[2][0, 0] = torch.nan
    with mlflow.start_run() as run, initflow.watch(net, every=2):
        train(net, batches)
    client = mlflow.MlflowClient()
    found = client.get_run(run.info.run_id)
    assert {key.split("/")[0] for key in found.data.metrics} == set(QUANTITIES) - {"branch_ratio"}
    history = client.get_metric_history(run.info.run_id, "weight_variance/0")
    assert [metric.step for metric in history] == [0, 2]
    assert found.data.tags["initflow.nonfinite_at_step"] == "2"


def fails(message, *args, **kwargs):
    with pytest.raises(errors.SettingError) as caught, initflow.watch(*args, **kwargs):
        pytest.fail("it began")
    assert str(caught.value) == message


def test_wrong_settings(logged):
    """One line each, before anything is watched."""
    net = mlp()
    number = "every must be a whole number of at least 1, not"
    for every, shown in ((0, "0"), (2.5, "2.5"), (True, "True"), ("9", "'9'")):
        fails(f"{number} {shown}", net, every=every)
    names = ", ".join([*QUANTITIES, *BY_TIME])
    fails(
        f"quantity must be one of {names}, not 'dead_fractions' (did you mean 'dead_fraction'?)",
        net,
        quantities=["weight_variance", "dead_fractions"],
    )
    for name, shown in ((5, "5"), ("", "''")):
        fails(f"name must be text to stand before layers' names, not {shown}", net, name=name)
    fails("model must be a torch.nn.Module, not builtin_function_or_method", torch.relu)
    lazy = "model must have its weights; LazyLinear is lazy: call it on a batch first"
    fails(lazy, nn.LazyLinear(3))
    assert not hooks_on(net)
    assert not logged


def test_no_active_run(store):
    """Is said when it starts, with what to do."""
    fails(
        "watch needs an active MLflow run: open one around it, with mlflow.start_run(): …, or give "
        "run_id",
        mlp(),
    )


def test_a_run_by_its_id(store):
    """It gets what the active one does not, and is left as it was: open, closed, or another's."""
    client = mlflow.MlflowClient()
    theirs = client.create_run("0").info.run_id
    with mlflow.start_run() as ended:
        pass
    with mlflow.start_run() as active:
        for run_id in (theirs, ended.info.run_id):
            with initflow.watch(mlp(), run_id=run_id) as _, initflow.watch(net := mlp()):
                pass
            with initflow.watch(net, run_id=run_id):
                train(net, data(2))
        assert mlflow.active_run().info.run_id == active.info.run_id
    for run_id, status in ((theirs, "RUNNING"), (ended.info.run_id, "FINISHED")):
        run = client.get_run(run_id)
        assert run.info.status == status
        assert set(QUANTITIES) - {"branch_ratio"} == {key.split("/")[0] for key in run.data.metrics}
    assert not client.get_run(active.info.run_id).data.metrics


def test_a_wrong_id_of_a_run(store):
    """One line, before the training begins; there need be no active run for it."""
    client = mlflow.MlflowClient()
    deleted = client.create_run("0").info.run_id
    client.delete_run(deleted)
    for run_id in (5, "", " ", "no/such ' id"):
        fails(f"run_id must be the id of an MLflow run, not {run_id!r}", mlp(), run_id=run_id)
    at = f"run_id must be the id of a run in MLflow at {store}, which has no"
    fails(f"{at} '{'0' * 32}'", mlp(), run_id="0" * 32)
    gone = f"run_id must be the id of a run that is there: '{deleted}' was deleted"
    fails(gone, mlp(), run_id=deleted)


def test_an_id_is_taken_as_it_is_while_the_server_is_away(logged, monkeypatch):
    """As all is that cannot be asked then: what is written waits for it."""

    def away(_):
        raise errors.OutageError("away")

    monkeypatch.setattr(runs, "read_run", away)
    with initflow.watch(net := mlp(), run_id="some"):
        train(net, data())
    assert steps(logged)


def test_two_models_of_one_run_are_told_apart_by_name(store):
    """As a generator and a discriminator."""
    first, second = (nn.Sequential(nn.Linear(3, 2)) for _ in range(2))
    with (
        mlflow.start_run() as run,
        initflow.watch(first, name="g"),
        initflow.watch(second, name="d"),
    ):
        for model in (first, second):
            model(torch.randn(4, 3)).sum().backward()
    metrics = mlflow.get_run(run.info.run_id).data.metrics
    assert {"weight_variance/g.0", "weight_variance/d.0"} <= set(metrics)


def test_names_of_any_letters_are_logged(store):
    """In those that MLflow takes."""
    model = nn.Sequential()
    model.add_module("häuser & co", nn.Linear(3, 2))
    with mlflow.start_run() as run, initflow.watch(model):
        model(torch.randn(4, 3)).sum().backward()
    assert "weight_variance/h_user _ co" in mlflow.get_run(run.info.run_id).data.metrics


def test_transforms_of_torch_func_go_on_unmeasured(store):
    """Gradients of each image by itself, in the middle of a watched training."""
    model = nn.Sequential(nn.Linear(3, 2))
    parameters = {name: value.detach() for name, value in model.named_parameters()}

    def loss(parameters, x):
        return torch.func.functional_call(model, parameters, (x,)).sum()

    with mlflow.start_run(), initflow.watch(model, every=1):
        each = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, torch.randn(4, 3))
    assert each["0.weight"].shape == (4, 2, 3)


@pytest.mark.parametrize("quantities", [[], 5])
def test_quantities_are_some_names(store, quantities):
    """None of them is not all of them."""
    with (
        mlflow.start_run(),
        pytest.raises(errors.SettingError, match="quantit"),
        initflow.watch(nn.Linear(3, 2), quantities=quantities),
    ):
        pass


class OwnScaler(torch.amp.GradScaler):
    """As someone's subclass."""


class OverridingScaler(torch.amp.GradScaler):
    """As someone's that scales by itself."""

    def scale(self, outputs):
        if self._scale is None:
            self._lazy_init_scale_growth_tracker(outputs.device)
        return self._scale * outputs


def scaler(kind=torch.amp.GradScaler, scale=65536.0):
    return kind("cpu", init_scale=scale, growth_interval=2)


def wide():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 10))


@pytest.mark.parametrize("kind", [torch.amp.GradScaler, OwnScaler, OverridingScaler])
def test_gradients_are_those_of_the_loss(logged, kind):
    """Not of a scaled one: with a scale that changes, they are the same to the bit."""
    found = []
    for its in (scaler(kind), scaler(kind, 1.0), None):
        net = wide()
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        with initflow.watch(net, every=1):
            for x in data(5, (8, 20)):
                optimizer.zero_grad()
                loss = squared(net(x))
                if its:
                    its.scale(loss).backward()
                    its.step(optimizer)
                    its.update()
                else:
                    loss.backward()
                    optimizer.step()
        found.append(steps(logged))
        logged.clear()
    assert found[0] == found[1] == found[2]
    assert list(found[0]) == list(range(5))
    assert not hooks_on(net)


def passes(net, batches, its):
    """The same step in several ways; ``its`` scales or is None."""
    scale = its.scale if its else lambda loss: loss
    a, b, c = (squared(net(x)) for x in batches)
    yield lambda: [scale(a).backward(), b.backward(), scale(c).backward()]
    yield lambda: sum(scale([a, b, c])).backward()
    yield lambda: [loss.backward() for loss in scale((a, (b, c)))[1]] + [scale(a).backward()]
    yield lambda: torch.autograd.backward(scale([a, b, c]))
    yield lambda: torch.autograd.grad(scale(a), [net[0].weight, net[2].weight])


@pytest.mark.parametrize("way", range(5))
def test_losses_scaled_and_not_in_one_step(logged, way):
    """Each backward pass has its own: accumulated, summed, in lists."""
    found = []
    for its in (scaler(), None):
        net = wide()
        with initflow.watch(net, every=1):
            [*passes(net, data(3, (8, 20)), its)][way]()
        found += steps(logged).values()
        logged.clear()
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_a_gan_with_one_scaler(logged):
    """Two models watched, a generator's loss through both, and watchings that end in disorder."""
    found = []
    for its in (scaler(), scaler(scale=1.0)):
        one, two = wide(), nn.Sequential(nn.Linear(10, 4), nn.Tanh(), nn.Linear(4, 1))
        first = initflow.watch(one, name="g")
        first.__enter__()
        with initflow.watch(two, name="d", every=1):
            its.scale(squared(two(one(*data(shape=(8, 20))).detach()))).backward()
            its.scale(squared(two(one(*data(shape=(8, 20)))))).backward()
            first.__exit__(None, None, None)
            its.scale(squared(two(*data(shape=(8, 10))))).backward()
        assert "scale" not in vars(OwnScaler)
        assert torch.amp.GradScaler.scale.__module__ == "torch.amp.grad_scaler"
        assert not hooks_on(one) + hooks_on(two)
        found.append([{metric.key: metric.value for metric in metrics} for metrics, _ in logged])
        logged.clear()
    assert len(found[0]) == 2
    assert found[0] == [pytest.approx(values, rel=1e-6) for values in found[1]]


def test_scaled_gradients_of_half_precision(logged):
    """Those that are 0 without a scale are told apart from 0 with one."""
    net = nn.Sequential(nn.Linear(4, 4, dtype=torch.float16), nn.Tanh())
    tiny = lambda outputs: (outputs.float() * 1e-9).sum()  # noqa: E731
    with initflow.watch(net, every=1):
        scaler().scale(tiny(net(data()[0].half()))).backward()
    (values,) = steps(logged).values()
    slopes = 1 - net(data()[0].half()).double() ** 2
    assert values["gradient_variance/0"] == pytest.approx(
        1e-18 * slopes.var(correction=0).item(), 0.1
    )
    assert 0 < values["weight_gradient_variance/0"] < 1e-15


@pytest.mark.filterwarnings("ignore:torch.utils.checkpoint:UserWarning")
def test_scaled_gradients_through_a_reentrant_checkpoint(logged):
    """The weights' are measured, in a backward pass within the other."""
    found = []
    for its in (scaler(), scaler(scale=1.0)):
        net = Net(
            lambda net, x: checkpoint(net.body, net.first(x), use_reentrant=True),
            first=nn.Linear(20, 20),
            body=wide(),
        )
        torch.manual_seed(1)
        net.first.reset_parameters()
        with initflow.watch(net, every=1):
            its.scale(squared(net(*data(shape=(8, 20))))).backward()
        found += steps(logged).values()
        logged.clear()
    assert found[0] == pytest.approx(found[1], rel=1e-6)
    assert "weight_gradient_variance/body.0" in found[0]


def test_a_scaled_loss_that_failed(logged):
    """Leaves no scale behind for those that follow it."""
    found = []
    x, y = data(2, (8, 20))

    def fail(_):
        raise KeyError

    for scale in (65536.0, 1.0):
        net = wide()
        with initflow.watch(net, every=1):
            outputs = net(x)
            loss = scaler(scale=scale).scale(squared(outputs))
            outputs.register_hook(fail)
            with pytest.raises(KeyError):
                loss.backward()
            squared(net(y)).backward()
        found += steps(logged).values()
        logged.clear()
    assert found[0] == pytest.approx(found[1], rel=1e-6)


LONG = "w" * 300
USUAL = ["fc1", "a_b", "a_b 2", "_", "x_y"]
ODD = ["α", "β", "a,b", "a=b", "/", " ", ".", "..", "x/y", "new\nline", "\ud800", LONG, f"v{LONG}"]


def of_names(names):
    net = nn.Sequential()
    for name in names:
        net._modules[name] = nn.Linear(4, 4)
    return net


@pytest.mark.parametrize("name", [None, "..", "g/α"])
def test_names_are_told_apart_always(store, name):
    """Each layer has a key of its own that MLflow takes, the same at every step."""
    net = of_names([*ODD, *USUAL])
    variances = [p.detach().double().var(correction=0).item() for p in list(net.parameters())[::2]]
    with mlflow.start_run() as run, initflow.watch(net, every=1, name=name):
        train(net, data(2), torch.optim.SGD(net.parameters(), 0.0))
    metrics = mlflow.get_run(run.info.run_id).data.metrics
    found = {key: value for key, value in metrics.items() if key.startswith("weight_variance/")}
    assert sorted(found.values()) == pytest.approx(sorted(variances), rel=1e-6)
    if name is None:
        assert set(USUAL) <= {key.partition("/")[2] for key in found}
    history = mlflow.MlflowClient().get_metric_history(run.info.run_id, next(iter(found)))
    assert [metric.step for metric in history] == [0, 1]


letters = st.sampled_from([*"ab_ ./,=\n0α", "\ud800", "w" * 200])
few_names = st.lists(st.lists(letters, max_size=4).map("".join), max_size=8)


@given(few_names, few_names)
@settings(max_examples=200, deadline=None)
def test_key_names(names, late):
    """Distinct and valid; what can stay does, and what is known keeps what it has."""
    found = runs.key_names(names)
    later = runs.key_names(late, found)
    assert list(found) == list(dict.fromkeys(names))
    assert list(later) == list(dict.fromkeys(late))
    both = {**found, **later}
    assert all(both[name] == found[name] for name in found)
    assert len(set(both.values())) == len(both)
    for name in both.values():
        validation._validate_metric_name(f"q/{name}")
        assert len(name) < 200
    for name in found:
        if re.fullmatch(r"[\w.-]{1,150}", name, re.ASCII) and name.strip("."):
            assert found[name] == name


def test_layers_that_come_later_have_keys_of_their_own(logged):
    """And those that were there keep theirs."""
    net = of_names(["a=b", "fc"])
    with initflow.watch(net, every=1, quantities="weight_variance"):
        train(net, data())
        net._modules |= {"a_b": nn.Linear(4, 4), "a,b": nn.Linear(4, 4)}
        train(net, data())
        train(net, data())
    first, *_, last = steps(logged).values()
    assert list(first) == ["weight_variance/a_b", "weight_variance/fc"]
    assert set(first) < set(last)
    assert len(last) == 4


def test_a_model_that_is_a_layer_with_one_of_its_name(logged):
    """They are told apart too."""

    class Outer(nn.Linear):
        def forward(self, x):
            return super().forward(self.outer(x))

    net = Outer(4, 4)
    net.outer = nn.Linear(4, 4)
    with initflow.watch(net, quantities="weight_variance"):
        train(net, data())
    (values,) = steps(logged).values()
    assert set(values) == {"weight_variance/outer", "weight_variance/outer_"}


def written(net, x):
    """What becomes of a model that is written down, in all of torch's ways."""
    traced = torch.jit.trace(net, x)
    yield traced.code
    yield torch.jit.script(net).code
    yield torch.jit.script(nn.Sequential(net)).code
    for strict in (False, True):
        yield torch.export.export(net, (x,), strict=strict).graph_module.code
    yield torch.fx.symbolic_trace(net).code
    yield torch.fx.symbolic_trace(nn.Sequential(net)).code
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield str(net(x))
    for model in (net, nn.Sequential(net)):
        yield torch.compile(model, backend="eager", fullgraph=True)(x)
    file = io.BytesIO()
    torch.save(net, file)
    yield len(file.getvalue())
    for copied in (copy.copy(net), copy.deepcopy(net), pickle.loads(pickle.dumps(net))):  # noqa: S301
        yield {name: str(value) for name, value in vars(copied).items() if name != "_parameters"}
    yield torch.func.vmap(net)(x)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning")
@pytest.mark.parametrize("when", ["before", "after a forward", "after a step"])
def test_a_watched_model_is_written_down_as_if_it_were_not(logged, when):
    """Scripted, traced, exported, compiled, copied and saved, at any time of a step."""
    (x,) = data()
    expected = list(map(str, written(mlp(), x)))
    torch._dynamo.reset()
    net = mlp()
    with initflow.watch(net, every=1):
        if when != "before":
            loss = squared(net(x))
        if when == "after a step":
            loss.backward()
        net.zero_grad()
        assert list(map(str, written(net, x))) == expected
        squared(net(x)).backward()
    (values,) = steps(logged).values()
    loss = by_hand(mlp(), [(x, squared)] * (1 + (when == "after a step")))
    assert values == pytest.approx(loss, rel=1e-4)
    assert not hooks_on(net)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo's
def test_a_forward_of_which_a_part_is_compiled(logged):
    """Without a break in it for what watches; the layers around it are measured."""
    compiled = torch.compile(lambda h: torch.relu(h) * 2, backend="eager", fullgraph=True)
    net = Net(lambda net, x: net.b(compiled(net.a(x))), a=nn.Linear(4, 4), b=nn.Linear(4, 2))
    with initflow.watch(net, every=1):
        train(net, data(2))
    for values in steps(logged).values():
        assert {"gradient_variance/a", "gradient_variance/b"} < set(values)


class Tokens(nn.Module):
    """A head on what is not measured, with a normalization."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(9, 8)
        self.lstm = nn.LSTM(8, 8, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.other = parametrizations.orthogonal(nn.Bilinear(8, 8, 8), "weight")
        self.cell = nn.GRUCell(8, 8)
        self.bag = parametrizations.weight_norm(nn.EmbeddingBag(9, 8))
        self.head = parametrizations.weight_norm(nn.Linear(8, 3))
        self.scale = nn.Parameter(torch.ones(()))
        self.act = nn.PReLU()
        self.own = parametrizations.weight_norm(Own())

    def forward(self, x):
        h, _ = self.lstm(self.norm(self.embed(x)))
        return self.head(self.act(self.attention(h, h, h)[0])) * self.scale


class Own(nn.Module):
    """Weights in a way of its own."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 2))


MISSED = {"tokens": "Tokens", "act": "PReLU", "own": "ParametrizedOwn"}
SEEN = ["embed", *(f"lstm.l0.{gate}" for gate in ("input", "forget", "cell", "output"))]
SEEN += [f"attention.{name}" for name in ("query", "key", "value", "out_proj")] + ["head"]


def test_what_is_not_measured_is_named_once(store, caplog):
    """In a tag and in the log, and in what looking into it gives."""
    net, x = Tokens(), torch.arange(9).view(1, 9)
    with mlflow.start_run() as run:
        with initflow.watch(net, every=1):
            train(net, [x, x])
        with initflow.watch(net, name="g α"):
            pass
    tags = mlflow.get_run(run.info.run_id).data.tags
    listed = ", ".join(f"{name} ({kind})" for name, kind in MISSED.items())
    assert tags["initflow.not_measured"] == listed
    assert tags["initflow.not_measured.g _"].startswith("g _.tokens (Tokens), g _.act (")
    messages = [record.getMessage() for record in caplog.records if record.name == "initflow"]
    assert messages[0] == f"not measured: {listed}"
    assert len(messages) == 2
    found = initflow.inspect(net, x, squared)
    assert found.not_measured == MISSED
    assert list(found.layers) == SEEN


def test_nothing_to_measure(logged, caplog):
    """Is said, and nothing else happens; a usual model has nothing to be told of."""
    net = nn.Sequential(nn.PReLU())
    with initflow.watch(net), initflow.watch(nn.Tanh(), name="act"):
        net(*data()).sum().backward()
    tags = {tag.key: tag.value for _, tags in logged for tag in tags}
    assert tags == {
        "initflow.not_measured": "0 (PReLU)",
        "initflow.not_measured.act": "act.tanh (Tanh)",
    }
    assert len(caplog.records) == 2
    with initflow.watch(cnn()):
        pass
    assert len(caplog.records) == len(logged) == 2


def test_the_log_tells_though_the_roots_level_is_high(logged, monkeypatch, caplog):
    """As MLflow leaves it, once it has made a database; one's own level for it is kept."""
    monkeypatch.setattr(logging.root, "level", logging.ERROR)
    own = logging.getLogger("initflow")
    for level, told in ((logging.NOTSET, 1), (logging.ERROR, 0)):
        own.setLevel(level)
        caplog.clear()
        with initflow.watch(nn.PReLU()):
            pass
        assert len(caplog.records) == told
    own.setLevel(logging.NOTSET)


def test_a_long_list_of_what_is_not_measured_is_cut(logged):
    """To what a person reads, whatever the names."""
    kind = type("T" * 400 + "\n", (nn.PReLU,), {})
    with initflow.watch(nn.ModuleList([kind(2) for _ in range(20)])):
        pass
    ((_, (tag,)),) = logged
    assert len(tag.value) <= 501
    assert "\n" not in tag.value


def generator():
    """DCGAN's first layer, as it is initialized."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.ConvTranspose2d(100, 64, 4, bias=False), nn.ReLU())
    nn.init.normal_(net[0].weight, 0.0, 0.02)
    return net


def test_dcgan(logged):
    """Its pre-activations have the second moment 100 · 0.02²."""
    with initflow.watch(generator()) as _, initflow.watch(net := generator(), name="b"):
        net(normal(64, 100, 1, 1)).sum().backward()
    (values,) = steps(logged).values()
    assert values["preactivation_second_moment/b.0"] == pytest.approx(0.040, rel=0.01)
    assert values["weight_variance/b.0"] == pytest.approx(0.0004, rel=0.01)


def test_a_run_that_is_deleted_meanwhile(store, caplog):
    """The training goes on to its end, and the log says what happened."""
    net = mlp()
    with mlflow.start_run() as run, initflow.watch(net, every=1):
        train(net, data(2))
        mlflow.MlflowClient().delete_run(run.info.run_id)
        train(net, data(9))
        mlflow.MlflowClient().restore_run(run.info.run_id)
    (told,) = [record.getMessage() for record in caplog.records if record.name == "initflow"]
    assert re.match(r"watching failed, and the training goes on: step 1: MLflow at ", told)


def test_a_step_that_fails_is_left_out_and_told(store, monkeypatch, caplog):
    """With the first reason, in a tag as well; the others are there."""
    real = Moments.of

    def broken(x, unit=-1):
        if len(x) == 7:
            raise ZeroDivisionError("odd")
        return real(x, unit)

    monkeypatch.setattr(Moments, "of", broken)
    net, batches = mlp(), data(6)
    batches[2] = batches[2][:7]
    with mlflow.start_run() as run, initflow.watch(net, every=1):
        train(net, batches)
    client = mlflow.MlflowClient()
    history = client.get_metric_history(run.info.run_id, "weight_variance/0")
    assert [metric.step for metric in history] == [0, 1, 3, 4, 5]
    tags = client.get_run(run.info.run_id).data.tags
    assert tags["initflow.watch_failed"] == "step 2: ZeroDivisionError: odd"
    assert len([record for record in caplog.records if record.name == "initflow"]) == 1


def test_a_step_without_an_end_takes_no_more_than_so_much(logged, monkeypatch, caplog):
    """An update through parameter.data goes unseen: what was kept is let go of, and it is told."""
    monkeypatch.setattr(recorder, "MOST_UNITS", 100)
    alive = weakref.WeakSet()

    class Call(recorder.Call):
        def __init__(self, *args):
            super().__init__(*args)
            alive.add(self)

    monkeypatch.setattr(recorder, "Call", Call)
    net, kept = mlp(), []
    with initflow.watch(net, every=1):
        for x in data(40):
            net(x).square().mean().backward()
            for parameter in net.parameters():
                parameter.data -= 0.01 * parameter.grad
                parameter.grad = None
            kept.append(len(alive))
        gc.collect()
        kept.append(len(alive))
    (told,) = [r.getMessage() for r in caplog.records if "watching failed" in r.getMessage()]
    assert "no update was seen" in told
    assert max(kept) < 60
    assert kept[-1] == 0


def test_it_gives_up_after_some_steps_that_fail(logged, monkeypatch):
    """A training that cannot be measured is not slowed down for nothing."""
    asked = []
    monkeypatch.setattr(Moments, "of", lambda *_: asked.append(1) or 1 / 0)
    with initflow.watch(mlp(), every=1) as _, initflow.watch(net := mlp(), every=2):
        train(net, data(20))
    assert 3 <= len(asked) < 20


class Mute(Exception):  # noqa: N818 - says nothing, not even when asked
    """An error of which there is nothing to be told."""

    def __str__(self):
        raise RuntimeError


@pytest.mark.parametrize("broken", ["set_tags", "log_metrics"])
@pytest.mark.parametrize("error", [MemoryError(), errors.TrackingError("gone"), Mute()])
def test_whatever_mlflow_answers(logged, monkeypatch, broken, error):
    """No error of it is one of the training's."""

    def fail(*_, **__):
        raise error

    monkeypatch.setenv("INITFLOW_CONTEXT_TAGS", "true")
    monkeypatch.setattr(runs.Run, broken, fail)
    monkeypatch.setattr(unsent, "flush", fail)
    net = mlp()
    with initflow.watch(net, every=1):
        train(net, data(3))
    assert not hooks_on(net)


def test_an_interrupt_comes_through(logged, monkeypatch):
    """Also from within what watches; nothing is left behind."""

    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(runs.Run, "log_metrics", stop)
    net = mlp()
    with pytest.raises(KeyboardInterrupt), initflow.watch(net, every=1):
        train(net, data(3))
    assert not hooks_on(net)


def test_threads_that_share_a_model(logged):
    """One of them is recorded; none is harmed."""
    net, inside, go = mlp(), threading.Event(), threading.Event()
    results = []

    def wait(*_):
        if threading.current_thread() is other:
            inside.set()
            go.wait(30)

    handle = net[1].register_forward_hook(wait)
    other = threading.Thread(target=lambda: results.append(net(*data())))
    with initflow.watch(net, every=1):
        other.start()
        inside.wait(30)
        train(net, data(2))
        go.set()
        other.join()
        train(net, data(2))
    handle.remove()
    assert len(results) == 1
    assert not hooks_on(net)
    assert steps(logged)


def test_a_mode_that_a_forward_leaves_on(logged):
    """Stays on, and is not taken off in place of our own."""
    other = torch.overrides.BaseTorchFunctionMode()

    def forward(net, x):
        other.__enter__()
        return net.fc(x)

    net = Net(forward, fc=nn.Linear(4, 4))
    with initflow.watch(net, every=1):
        squared(net(*data())).backward()
        assert torch.overrides._get_current_function_mode_stack() == [other]
        other.__exit__(None, None, None)
    assert not hooks_on(net)
    assert steps(logged)


def test_an_interrupted_forward_leaves_no_mode(logged):
    """Whoever catches it goes on with the modes that were there."""
    net = mlp()

    def stop(*_):
        raise KeyboardInterrupt

    handle = net[2].register_forward_hook(stop)
    with initflow.watch(net, every=1):
        with pytest.raises(KeyboardInterrupt):
            net(*data())
        assert not torch.overrides._get_current_function_mode_stack()
        handle.remove()
        train(net, data(2))
    assert list(steps(logged)) == [0, 1]


def test_a_function_of_the_users_own_is_called_once(logged):
    """Though it goes by an activation's name, and by torch's rules for them."""
    called = []

    def relu(x):
        if torch.overrides.has_torch_function((x,)):
            return torch.overrides.handle_torch_function(relu, (x,), x)
        called.append(1)
        return x.clamp(0)

    net = Net(lambda net, x: relu(net.fc(x)), fc=nn.Linear(4, 4))
    with initflow.watch(net, every=1):
        squared(net(*data())).backward()
    assert len(called) == 1


def test_replicas_of_a_model_are_themselves(logged):
    """As DataParallel makes them: they compute with their own weights."""
    net = mlp()
    with initflow.watch(net):
        replica = net._replicate_for_data_parallel()
        replica._modules = {"0": nn.Linear(4, 2)}
        assert replica(*data()).shape == (8, 2)


def test_a_model_that_calls_copies_alone_is_told_of(logged, caplog):
    """As DataParallel does on several devices: there is nothing of the model's own to measure."""

    def forward(net, x):
        copied = copy.copy(net.fc)
        copied._parameters = dict(net.fc._parameters)
        return copied(x)

    net = Net(forward, fc=nn.Linear(4, 4))
    with initflow.watch(net, every=1):
        train(net, data(2))
    told = "step 0: RuntimeError: none of its layers was called: copies of a model have others"
    assert [tag.value for _, tags in logged for tag in tags] == [told]
    assert not steps(logged)


def test_a_forward_that_copies_its_own_layers(logged):
    """As meta-learning does: the copies are copies of what is not watched."""

    def forward(net, x):
        copies = [copy.deepcopy(net.fc), pickle.loads(pickle.dumps(net.fc))]  # noqa: S301
        assert not any(one._forward_hooks or one._forward_pre_hooks for one in copies)
        return net.fc(x) + sum(one(x) for one in copies)

    net = Net(forward, fc=nn.Linear(4, 4))
    with initflow.watch(net, every=1):
        squared(net(*data())).backward()
    assert steps(logged)


def test_a_model_that_cannot_be_looked_through(logged, caplog):
    """Is trained all the same, and what it fails with is told once."""
    net = mlp()
    net._modules[5] = nn.Linear(3, 3)
    with initflow.watch(net, every=1):
        for x in data(3):
            squared(net(x)).backward()
    (told,) = [record.getMessage() for record in caplog.records]
    assert told.startswith("watching failed, and the training goes on: step 0: TypeError: ")
    assert not hooks._of_modules
