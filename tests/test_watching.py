"""Watching a training: what is logged and when, and what is left alone."""

import contextlib
import copy
import gc
import pickle
import re
import weakref

import mlflow
import pytest
import torch
from torch import nn

import initflow
from initflow import errors, track
from initflow.signals import QUANTITIES, Firing, Layer, Moments, signals
from tests.test_inspection import Net, cnn, hooks_on, normal, squared


@pytest.fixture
def logged(monkeypatch):
    """A run that is active; each batch of metrics or tags that it gets, in order."""
    batches = []
    monkeypatch.setenv("INITFLOW_CONTEXT_TAGS", "false")  # which are tested elsewhere

    def log_batch(self, run_id, metrics=(), params=(), tags=()):
        batches.append((metrics, tags))

    monkeypatch.setattr(track, "active", lambda: track.Run("id", "0", ()))
    monkeypatch.setattr(mlflow.MlflowClient, "log_batch", log_batch)
    return batches


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
            "0": Layer(weights[0], Moments.of(z), Moments.of(dz), w1, Moments.of(h), firing),
            "2": Layer(weights[1], Moments.of(out), Moments.of(dout), w2),
        }
    ).metrics()


def test_every_so_many_steps(logged):
    """In one batch of metrics each, with the values that the step had before its update."""
    net, batches, expected = mlp(), data(7), {}
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    with initflow.watch(net, every=3):
        for step, x in enumerate(batches):
            if step % 3 == 0:
                expected[step] = by_hand(net, [(x, squared)])
            train(net, [x], optimizer)
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
    expected = by_hand(net, [(a, half), (b, half), (c, squared)])
    with initflow.watch(net, every=1):
        (half(net(a)) + half(net(b))).backward()
        net.zero_grad()
        squared(net(c)).backward()
        torch.optim.SGD(net.parameters(), 0.1).step()
        net.zero_grad()
    assert steps(logged) == {0: pytest.approx(expected, rel=1e-4)}


def test_evaluation_in_between(logged):
    """Is neither a step nor a part of one, with and without gradients recorded."""
    net, (x, other) = mlp(), data(2)
    expected = by_hand(net, [(x, squared)])
    with initflow.watch(net, every=1):
        for _ in range(2):
            with torch.no_grad():
                net(10 * other)
            with torch.inference_mode():
                net(10 * other)
            net.eval()
            net(10 * other)
            net.train()
            train(net, [x])
            net(10 * other)
    found = steps(logged)
    assert list(found) == [0, 1]
    assert found[0] == pytest.approx(expected, rel=1e-4)


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


@pytest.mark.parametrize(
    ("build", "shape"),
    [(mlp, (8, 4)), (cnn, (5, 1, 8, 8)), (encoder, (3, 5, 8))],
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


def test_batch_norms_and_dropouts_twin(logged):
    """A CNN in training gives, step for step, what looking at the batch at once gives."""
    torch.manual_seed(0)
    net, expected = nn.Sequential(cnn(), nn.Dropout()), {}
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    with initflow.watch(net, every=1):
        for step, x in enumerate(data(3, (5, 1, 8, 8))):
            expected[step] = initflow.inspect(copy.deepcopy(net), x, squared).metrics()
            train(net, [x], optimizer)
    assert steps(logged) == expected


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
    expected = by_hand(net, [(x, squared)])
    with initflow.watch(net, every=1):
        with pytest.raises(RuntimeError):
            net(wrong)
        assert not torch.overrides._get_current_function_mode_stack()
        train(net, [x])
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
    gc.disable()
    try:
        with initflow.watch(net, every=2):
            for x in data(4):
                train(net, [x], optimizer)
                assert alive.pop()() is None
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
    assert {key.split("/")[0] for key in found.data.metrics} == set(QUANTITIES)
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
    names = ", ".join(QUANTITIES)
    fails(
        f"quantity must be one of {names}, not 'dead_fractions' (did you mean 'dead_fraction'?)",
        net,
        quantities=["weight_variance", "dead_fractions"],
    )
    fails("model must be a torch.nn.Module, not builtin_function_or_method", torch.relu)
    lazy = "model must have its weights; LazyLinear is lazy: call it on a batch first"
    fails(lazy, nn.LazyLinear(3))
    compiled = mlp()
    compiled.compile()
    fails(
        "model must not be compiled: fused kernels have no layers to look into; give the model "
        "as it was before compiling",
        compiled,
    )
    assert not hooks_on(net)
    assert not logged


def test_no_active_run(store):
    """Is said when it starts, with what to do."""
    fails("watch needs an active MLflow run: open one around it, with mlflow.start_run(): …", mlp())


def test_public_names():
    """They are found when asked for, and no others."""
    assert {"inspect", "watch"} <= set(initflow.__all__)
    with pytest.raises(AttributeError, match="module 'initflow' has no attribute 'look'"):
        _ = initflow.look


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
