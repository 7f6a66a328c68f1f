"""Networks on their way through training: what is measured of each, alone or in a stack."""

import math
import statistics
import time
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from initflow.core import machine
from initflow.core.configurations import TrainConfig
from initflow.diagnostics import measure, record
from initflow.diagnostics.signals import QUANTITIES
from initflow.initializers.activations import ACTIVATIONS
from initflow.initializers.plugins import find
from initflow.training import datasets, model, propagation, trainer
from tests import elsewhere

SETTINGS = {
    "dataset": "digits",
    "hidden": "16,8",
    "epochs": 2,
    "eval_every": 7,
    "probe": 50,
    "normalize": "standard",
}
MIXED = (
    {"init": "he", "activation": "relu", "seed": 0},
    {"init": "xavier:gain=1.5", "activation": "relu", "seed": 0, "lr": 0.02, "gamma": 0.5},
    {"init": "he", "activation": "tanh", "seed": 0},
    {"init": "orthogonal", "activation": "tanh", "seed": 5},
    {"init": "he", "activation": "relu", "seed": 5, "momentum": 0.0},
    {"init": "he", "activation": "relu", "seed": 5, "momentum": 0.5, "nesterov": False},
)
# The second and the fourth diverge, at steps of their own; the third before its first update.
DIVERGING = (
    {"init": "he", "activation": "linear", "lr": 0.01},
    {"init": "normal", "activation": "linear", "lr": 0.05},
    {"init": "normal:std=1e30", "activation": "linear"},
    {"init": "he", "activation": "linear", "lr": 50.0, "seed": 1},
    {"init": "he", "activation": "tanh", "lr": 0.05, "seed": 1},
)


@pytest.fixture(autouse=True)
def _one_thread():
    """Several would wait for each other where tests run beside these."""
    with machine.threads(1):
        yield


def configs(different, **settings):
    return [TrainConfig(**(SETTINGS | own | settings)) for own in different]


def trained(asked, *, one_by_one=False, **options):
    """A record of each of the settings, trained as one stack or each by itself."""
    splits = datasets.load(asked[0])
    records = [record.start(config, find(config.init), splits) for config in asked]
    for together in [[one] for one in records] if one_by_one else [records]:
        record.train_together(together, splits, **options)
    return records


def assert_same(records, others):
    """All that a record holds, but for the time it took, bit for bit."""
    for one, other in zip(records, others, strict=True):
        assert one.history == other.history
        assert one.losses == other.losses
        assert (one.step, one.diverged_at) == (other.step, other.diverged_at)
        assert one.signals == other.signals
        for state, twin in (
            (one.trained, other.trained),
            (one.initial.state(), other.initial.state()),
        ):
            assert model.weights_sha256(state) == model.weights_sha256(twin)
        for ours, theirs in zip(one.received, other.received, strict=True):
            assert torch.equal(ours.view(torch.int32), theirs.view(torch.int32))  # NaN too
        assert bool(one.reading) == bool(other.reading)
        if one.reading:
            assert one.reading.verdict == other.reading.verdict
            assert one.reading.metrics() == other.reading.metrics()


@pytest.mark.parametrize("validation", [0, 100])
def test_a_network_in_a_stack_is_measured_as_alone(validation):
    """Every number of every step: other seeds, schemes, rates and activations beside it."""
    asked = configs(MIXED, validation=validation)
    together, alone = trained(asked), trained(asked, one_by_one=True)
    assert_same(together, alone)
    assert all(one.is_exact for one in together + alone)
    updates = trainer.iterations(TrainConfig(epochs=2), 1_437 - validation)
    for one in together:
        assert one.step == len(one.losses) == updates
        assert one.diverged_at is None
        steps = [step for step, _ in one.history["accuracy/test"]]
        assert steps == sorted({*range(0, updates, 7), updates})
    assert len({model.weights_sha256(one.trained) for one in together}) == len(MIXED)


def test_so_it_is_with_two_threads():
    """Which round differently from one, but the same in a stack."""
    asked = configs(MIXED[1:4], probe=0, epochs=1, eval_every=500)
    with machine.threads(2):
        assert_same(trained(asked), trained(asked, one_by_one=True))


def test_the_order_in_a_stack_changes_nothing():
    """Neighbours share what they can; who is no neighbour does without."""
    asked = configs(MIXED)
    shuffled = [asked[i] for i in (3, 0, 5, 2, 4, 1)]
    found = {one.config: one for one in trained(shuffled)}
    assert_same([found[config] for config in asked], trained(asked))


def test_networks_that_diverge_leave_the_others_as_they_are():
    """Each has the step at which it did, and what was finite until then."""
    asked = configs(DIVERGING)
    together = trained(asked)
    assert_same(together, trained(asked, one_by_one=True))
    first, *lost, last = together
    assert first.diverged_at is last.diverged_at is None
    steps = [one.diverged_at for one in lost]
    assert steps[1] == 0
    assert all(0 < step < 30 for step in (steps[0], steps[2]))
    assert len(set(steps)) == 3
    healthy = configs(DIVERGING[i] for i in (0, 4))
    assert_same([first, last], trained(healthy))
    for one in together:
        assert one.step == (30 if one.diverged_at is None else one.diverged_at)
        for points in one.history.values():
            assert all(math.isfinite(value) for _, value in points)
            assert [step for step, _ in points] == sorted({step for step, _ in points})


def test_a_stack_in_which_all_diverge_ends_there():
    """Without an error, and without the steps that nobody would make."""
    told = []
    asked = configs([DIVERGING[1], DIVERGING[2]])
    records = trained(asked, progress=lambda *what: told.append(what))
    assert all(one.diverged_at is not None for one in records)
    assert told[-1] == ("training", sum(one.step for one in records), 60)
    assert all(one.trained for one in records)


def test_the_history_is_what_measuring_the_network_gives():
    """At the start and at the end, computed again; the rate and the losses in between."""
    (config,) = configs([{"init": "he", "activation": "tanh", "seed": 4, "gamma": 0.5}])
    splits = datasets.load(config)
    _, one = trained([configs([MIXED[0]])[0], config])
    widths = (64, 16, 8, 10)
    parameters = model.initialize(
        widths, find("he"), ACTIVATIONS["tanh"], bias_init="pytorch", seed=4
    )
    assert torch.equal(one.initial.flat, parameters.flat)
    probe = measure.probe(splits.train, 50)
    for at, step in ((0, 0), (-1, 30)):
        (evaluation,) = measure.evaluate(parameters, [ACTIVATIONS["tanh"]], splits.test)
        (seen,) = measure.observe(parameters, [ACTIVATIONS["tanh"]], probe, keeping=True)
        assert one.history["accuracy/test"][at] == (step, evaluation.accuracy)
        assert one.history["loss/test"][at] == (step, evaluation.loss)
        for key, value in seen.signals.metrics().items():
            assert one.history[key][at] == (step, value)
        assert one.signals[at] == (step, seen.signals)
        for tensor, (name, value) in zip(
            (t for pair in zip(parameters.weights, parameters.biases, strict=True) for t in pair),
            one.trained.items(),
            strict=True,
        ):
            assert tensor[0].shape == value.shape, name
            tensor[0].copy_(value)
    received = seen.preactivations[:-1]
    assert all(torch.equal(x, y) for x, y in zip(one.received, received, strict=True))
    assert one.history["lr"] == [(0, 0.1), (7, 0.1), (14, 0.1), (21, 0.05), (28, 0.05), (30, 0.05)]
    ends = [0, 7, 14, 21, 28, 30]
    means = [statistics.fmean(one.losses[i:j]) for i, j in pairwise(ends)]
    assert [value for _, value in one.history["loss/train"][1:]] == means
    peaks = [max(map(statistics.fmean, windows(one.losses[:end]))) for end in ends[1:]]
    assert [value for _, value in one.history["loss/peak"][1:]] == peaks
    assert one.history["loss/peak"][0] == one.history["loss/train"][0]
    # Of the first batch, before the first update: what the first update's loss is.
    assert one.history["loss/train"][0][1] == pytest.approx(one.losses[0], rel=1e-6)
    assert {key.partition("/")[0] for key in one.history} >= set(QUANTITIES) - {
        "branch_ratio",
        "update_ratio",
    }
    assert one.last("lr") == 0.05
    assert one.last("nothing") is None


def windows(losses):
    """Five successive ones, or all where there are fewer."""
    return [losses[at : at + 5] for at in range(max(1, len(losses) - 4))]


def test_the_peak_is_the_highest_mean_of_five_losses_whatever_the_checkpoints():
    """Also where these are nearer to each other than five updates."""
    for eval_every in (1, 2, 3, 30):
        (one,) = trained(configs([{"lr": 1.5}], eval_every=eval_every))
        for step, peak in one.history["loss/peak"][1:]:
            assert peak == max(map(statistics.fmean, windows(one.losses[:step])))
        assert peak > one.losses[0]


def test_without_a_probe_no_signals_are_measured():
    """And the training is the same."""
    with_probe, without = (trained(configs(MIXED[:2], probe=probe)) for probe in (50, 0))
    for one, other in zip(with_probe, without, strict=True):
        assert other.signals == []
        assert other.reading is None
        assert set(other.history) == {
            "accuracy/test",
            "accuracy/train",
            "loss/peak",
            "loss/test",
            "loss/train",
            "lr",
        }
        assert one.losses == other.losses


def test_each_measurement_is_told_once_when_it_is_in_the_record():
    """What is told, put together, is the history; progress counts the steps of all networks."""
    told, progress = [], []

    def measured(one, step, values):
        told.append((one, step, values))
        for key, value in values.items():
            assert one.history[key][-1] == (step, value)

    records = trained(
        configs(MIXED[:3]), on_measured=measured, progress=lambda *what: progress.append(what)
    )
    for one in records:
        again = {}
        for _, step, values in (what for what in told if what[0] is one):
            for key, value in values.items():
                again.setdefault(key, []).append((step, value))
        assert again == one.history
    assert progress == [("training", 3 * step, 90) for step in (0, 7, 14, 21, 28, 30)]


def test_what_was_measured_stays_when_it_is_interrupted():
    """In the records of all networks of the stack."""
    asked = configs(MIXED[:3])
    splits = datasets.load(asked[0])
    records = [record.start(config, find(config.init), splits) for config in asked]

    def interrupt(_, done, of):
        if done > of / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        record.train_together(records, splits, progress=interrupt)
    whole = trained(asked)
    for one, other in zip(records, whole, strict=True):
        assert one.step == 21
        assert one.losses == other.losses[:21]
        for key, points in one.history.items():
            assert points == other.history[key][: len(points)]
        assert one.last("accuracy/test") == other.history["accuracy/test"][3][1]
        assert one.trained == {}


def test_the_time_is_shared_and_without_what_telling_takes():
    """The shares of a stack add up to less than it took, and logging is nobody's."""
    told = []

    def slow(*_):
        told.append(time.sleep(0.02))

    started = time.perf_counter()
    records = trained(configs(MIXED[:3], probe=0), on_measured=slow)
    took = time.perf_counter() - started
    shares = [one.seconds for one in records]
    assert len(told) == 18
    assert max(shares) == pytest.approx(min(shares))
    assert 0 < sum(shares) < took - 18 * 0.02


def test_a_record_says_whether_its_bits_are_those_of_the_network_alone(monkeypatch):
    """They are here; where an operation on several networks rounds differently they are not."""
    asked = configs(MIXED, probe=0, epochs=1)
    assert all(one.is_exact for one in trained(asked))
    off = propagation._Operation(
        propagation._linear.each,
        lambda biases, x, weights, out: out.copy_(
            (biases.unsqueeze(1) + x.expand(len(out), -1, -1) @ weights.mT) * (1 + 2**-20)
        ),
    )
    monkeypatch.setattr(propagation, "_linear", off)
    assert all(one.is_exact for one in trained(asked))  # found by trying, and not used
    monkeypatch.setattr(propagation._Operation, "_is_exact", lambda *_: True)
    records = trained(asked)
    assert not any(one.is_exact for one in records)
    assert [one.diverged_at for one in records] == [None] * len(asked)
    assert all(one.is_exact for one in trained(asked[:1]))  # alone it is itself


@pytest.mark.parametrize("wrong", ["_weight_gradient", "_input_gradient"])
def test_a_gradient_that_rounds_differently_is_seen_too(monkeypatch, wrong):
    """Though the losses of the first batch are the same."""
    right = getattr(propagation, wrong)

    def together(*stacks):
        right.together(*stacks)
        stacks[-1].mul_(1 + 2**-20)

    monkeypatch.setattr(propagation, wrong, propagation._Operation(right.each, together))
    monkeypatch.setattr(propagation._Operation, "_is_exact", lambda *_: True)
    assert not any(one.is_exact for one in trained(configs(MIXED, probe=0, epochs=1)))


def test_asking_whether_it_is_exact_changes_nothing():
    """Neither parameters nor what the training makes of them."""
    splits = datasets.load(configs(MIXED)[0])
    networks = [record.start(c, find(c.init), splits).initial for c in configs(MIXED)]
    recipes = [trainer.Recipe.of(config) for config in configs(MIXED)]
    hashes = []
    for asked in (False, True):
        stack = model.Parameters.stack(networks, "cpu")
        population = trainer.Trainer(stack, recipes, splits.train)
        before = stack.flat.clone()
        assert not asked or all(population.exact(100))
        assert torch.equal(stack.flat, before)
        for _ in population.train(batch_size=100, eval_every=500):
            pass
        hashes.append([model.weights_sha256(stack.state(member)) for member in range(6)])
    assert hashes[0] == hashes[1]


def test_networks_that_are_not_finite_are_exact_all_the_same():
    """What is not a number has bits too."""
    assert all(one.is_exact for one in trained(configs(DIVERGING, probe=0)))


def work_there(config, members, seeds):
    """What a device that is not the CPU does in a training of networks of two activations."""
    splits = datasets.load(config)
    chosen = [
        replace(config, activation=("relu", "tanh")[at % 2], seed=at % seeds)
        for at in range(members)
    ]
    records = [record.start(one, find("he"), splits) for one in chosen]
    there, done = splits.to(torch.device(elsewhere.DEVICE)), []
    with elsewhere.work() as work:
        record.train_together(
            records, there, on_measured=lambda *_: done.append(replace(elsewhere.DONE))
        )
    looks = sorted({(one.operations, one.reads) for one in done})
    between = [(after[0] - before[0], after[1] - before[1]) for before, after in pairwise(looks)]
    return work, between


@elsewhere.possible
@pytest.mark.parametrize(
    "own",
    [
        {},
        {"momentum": 0.0, "weight_decay": 0.01},
        {"optimizer": "adam", "lr": 0.001, "clip": 1.0},
        {"validation": 100},
    ],
    ids=str,
)
def test_a_whole_training_is_as_many_operations_for_many_networks(monkeypatch, own):
    """From the stacking over each evaluation to the end; what is read is so at evaluations."""
    elsewhere.be_found(monkeypatch)
    config = TrainConfig(**SETTINGS | {"probe": 0} | own)
    few, between = work_there(config, 2, 1)
    for members, seeds in ((2, 2), (8, 2), (40, 10)):
        many, same = work_there(config, members, 1 if config.validation else seeds)
        assert (many, same) == (few, between)
    # The losses since the last one and two evaluated sets; or three, with images held out.
    reads = {reads for _, reads in between}
    assert reads == {3 + bool(config.validation)}
    # The untrained losses, the first evaluation, and the trained networks.
    assert few.reads == (len(between) + 1) * reads.pop() + 2


@elsewhere.possible
@pytest.mark.parametrize("tf32", [False, True])
@pytest.mark.parametrize("of_process", ["high", "highest"])
def test_tf32_is_used_where_the_setting_says_so_alone(monkeypatch, tf32, of_process):
    """On a device that is not the CPU, at each look; whatever it was, it is that again."""

    def used():
        backends = torch.backends
        modules = (backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn)
        return [one.fp32_precision for one in modules]

    elsewhere.be_found(monkeypatch)
    seen = []
    config = TrainConfig(dataset="digits", hidden=8, tf32=tf32, updates=2)
    splits = datasets.load(config)
    try:
        torch.set_float32_matmul_precision(of_process)
        before = used()
        for device in (elsewhere.DEVICE, "cpu"):
            one = record.start(config, find("he"), splits)
            record.train_together(
                [one],
                splits.to(torch.device(device)),
                on_measured=lambda *_: seen.append(used()),
            )
            expected = ["tf32" if tf32 else "ieee"] * 3 if device != "cpu" else before
            assert seen.pop(0) == seen.pop() == expected
            assert used() == before
            seen.clear()
    finally:
        torch.set_float32_matmul_precision("highest")


def test_on_a_device_bound_by_launching_nothing_is_called_exact(monkeypatch):
    """Whatever comes out once: its kernels promise nothing."""
    monkeypatch.setattr(machine, "is_launch_bound", lambda _: True)
    assert not any(one.is_exact for one in trained(configs(MIXED[:2], probe=0, epochs=1)))
    assert not trained(configs(MIXED[:1], probe=0, epochs=1))[0].is_exact
