"""Training again from what was recorded: the same bits or, where not, whether it is rounding."""

import json
import math
from dataclasses import replace

import pytest
import torch

from initflow.errors import DataError, ReplayError
from initflow.experiments.replay import provenance, recorded, retraining
from initflow.experiments.replay.retraining import (
    DIFFERENT,
    EXIT_CODES,
    IDENTICAL,
    TOLERABLE,
    sentence,
)
from initflow.initializers.plugins import find
from initflow.training import datasets, model
from tests.initializers.test_finder import project
from tests.replaying import config, elsewhere, evidence, reader, stated, trained

# A network whose accuracy of the last bit decides whether, and when, it diverges.
CHAOTIC = {"hidden": "100x10", "epochs": 5, "lr": 0.2, "eval_every": 500}


def replayed(kept, init=None, plugins_dir=None, **own):
    """What comes of training it again, on its own images and by its own scheme, if by no other."""
    settings = replace(kept.provenance.config, **own)
    scheme = find(init or settings.init, plugins_dir or settings.plugins_dir)
    return retraining.replay(kept, scheme, datasets.load(settings), "cpu")


def verdicts(found):
    return [part.verdict for part in found.parts]


def hopeless(record, step, _):
    return record.config.lr == 0.01 and step >= 10


STACK = (
    config(),
    config(init="normal:std=0.5", activation="tanh", lr=0.02, gamma=0.5),
    config(activation="tanh", seed=3, momentum=0.5, nesterov=False),
    config(activation="linear", lr=20.0),
    config(lr=0.01),
)


@pytest.mark.parametrize("member", range(len(STACK)))
def test_a_network_of_a_stack_is_had_again_by_itself(member):
    """To the bit, also one that diverged or was pruned; from its files alone."""
    kept = evidence(*STACK, member=member, give_up=hopeless)
    kept = recorded.gathered(reader(provenance.files(kept)), "it")
    found = replayed(kept)
    assert (found.verdict, set(verdicts(found))) == (IDENTICAL, {IDENTICAL})
    assert found.outcomes[0] == found.outcomes[1]
    assert found.differences == []
    outcome, updates = kept.provenance.outcome, kept.provenance.updates
    assert outcome == ("finished", "finished", "finished", "diverged", "pruned")[member]
    assert updates == {"finished": 30, "pruned": 10}.get(outcome, updates)
    assert sentence(found, "it").startswith("Identical: trained again, it has the same initial w")


@pytest.mark.parametrize(
    "own",
    [
        {"validation": 100, "normalize": "standard", "seed": 7},
        {"momentum": 0.0, "bias_init": "zeros"},
        {"init": "orthogonal", "hidden": "30x4"},
        {"log_model": False, "batch_size": 64},
        {"hidden": "30,40", "parametrization": "mup", "base_width": 10},
        {"probe": 50},  # which it was watched on, and is not again
        {"updates": 7},
        {"lr": 1e4, "epochs": 4, "schedule": "cosine"},  # which diverges
    ],
    ids=str,
)
def test_any_settings_are_had_again(own):
    """Images held out, plain descent, QR, hashes alone, a training that ends early."""
    assert replayed(evidence(config(**own))).verdict == IDENTICAL


def test_a_trial_is_had_again_without_the_test_images():
    """Which it has not seen, and which could end it."""
    kept = evidence(config(validation=100), tested=False)
    assert not kept.provenance.tested
    assert replayed(kept).verdict == IDENTICAL


PLUGIN = "def fill(weight, generator):\n    weight.normal_(0.0, 0.125, generator=generator)\n"


def test_a_plugin_is_had_again_and_told_where_it_changed(tmp_path):
    """What its source was then and is now comes before the environment."""
    home = project(tmp_path / "plugins", "mine", {"mine": "mine:fill"})
    (home / "mine.py").write_text(PLUGIN)
    kept = evidence(config(init="mine", plugins_dir=tmp_path / "plugins"))
    assert replayed(kept).differences == []
    (home / "mine.py").write_text(PLUGIN + "# the same\n")
    found = replayed(elsewhere(kept))
    assert [one.what for one in found.differences] == ["source of the scheme", "cpu_capability"]
    assert found.differences[0].then == kept.provenance.source
    assert (found.verdict, found.causes) == (IDENTICAL, ["cpu_capability"])
    (home / "mine.py").write_text(PLUGIN.replace("0.125", "0.1251"))
    found = replayed(kept)
    assert (found.verdict, found.causes) == (DIFFERENT, [])
    other = replayed(kept, init=f"{home / 'mine.py'}:fill", plugins_dir=tmp_path)
    assert [one.what for one in other.differences] == [
        "scheme",
        "provider of the scheme",
        "source of the scheme",
    ]


def with_loss(kept, iteration, factor):
    """As if the loss of one iteration had been another one."""
    losses = kept.losses.clone()
    losses[iteration] *= factor
    return stated(replace(kept, losses=losses), losses=provenance.losses_sha256(losses))


@pytest.mark.parametrize("iteration", [0, 7, 29])
@pytest.mark.parametrize("is_elsewhere", [False, True])
def test_a_loss_that_differs_is_named_with_its_iteration_and_size(iteration, is_elsewhere):
    """Wherever it is; no other machine explains a hundredth."""
    before = evidence(config())
    kept = with_loss(before, iteration, 1.01)
    found = replayed(elsewhere(kept) if is_elsewhere else kept)
    assert (found.verdict, EXIT_CODES[found.verdict]) == (DIFFERENT, 1)
    assert verdicts(found) == [IDENTICAL, DIFFERENT, IDENTICAL, IDENTICAL]
    gap = found.parts[1].gap
    then, now = kept.losses[iteration].item(), before.losses[iteration].item()
    assert (gap.first, gap.then, gap.now) == (f"iteration {iteration}", then, now)
    assert (gap.at, gap.largest) == (f"iteration {iteration}", abs(then - now))
    why = "rounding does not explain it" if is_elsewhere else "nothing that rounds differently has"
    assert f"the losses differ first at iteration {iteration}, " in sentence(found, "it")
    assert why in sentence(found, "it")


@pytest.mark.parametrize("is_elsewhere", [False, True])
def test_a_last_bit_is_tolerated_only_where_something_rounds_differently(is_elsewhere):
    """On the same machine with the same settings there is no reason for it."""
    kept = with_loss(evidence(config()), 7, 1 + 2**-23)
    found = replayed(elsewhere(kept) if is_elsewhere else kept)
    expected = TOLERABLE if is_elsewhere else DIFFERENT
    assert (found.verdict, found.parts[1].verdict) == (expected, expected)
    assert EXIT_CODES[found.verdict] == (3 if is_elsewhere else 1)


def rounded(record):
    """Start it as a machine would whose last bits differ."""
    for weight in record.initial.weights:
        weight.mul_(1 + 2**-23)


def one_weight(record):
    record.initial.weights[0][0, 3, 20] += 1e-3


def test_what_rounding_does_is_within_tolerance():
    """Weights and losses that are off by so much, named at the first place where they are."""
    kept = evidence(config(activation="tanh", init="xavier"), change=rounded)
    found = replayed(elsewhere(kept))
    assert found.verdict == TOLERABLE
    assert verdicts(found) == [TOLERABLE, TOLERABLE, TOLERABLE, IDENTICAL]
    initial, losses, final = (part.gap for part in found.parts[:3])
    assert initial.first == "fc1.weight[0, 0]"
    assert 0 < initial.largest < 1e-6
    assert 0 < losses.largest < 1e-5
    assert 0 < final.largest < 1e-4
    assert found.causes == ["cpu_capability"]
    said = sentence(found, "it")
    assert said.startswith("Within tolerance, but not identical: the initial weights differ first")
    assert "(not as it was: cpu_capability)." in said
    assert replayed(kept).verdict == DIFFERENT
    json.dumps(found.as_json(), allow_nan=False)


@pytest.mark.parametrize(
    ("own", "change"),
    [
        ({"seed": 1}, lambda _: None),
        ({"lr": 0.1001}, lambda _: None),
        ({"momentum": 0.9001}, lambda _: None),
        ({"gamma": 0.961}, lambda _: None),
        ({"batch_size": 101}, lambda _: None),
        ({}, one_weight),
    ],
    ids=["seed", "lr", "momentum", "gamma", "batch size", "one weight"],
)
@pytest.mark.parametrize("activation", ["tanh", "relu"])
@pytest.mark.parametrize("log_model", [True, False])
def test_another_setting_is_not_taken_for_rounding(own, change, activation, log_model):
    """However little it is another one; also where only hashes of the weights were kept."""
    kept = evidence(config(activation=activation, log_model=log_model, **own), change=change)
    pretended = stated(elsewhere(kept), config=config(activation=activation, log_model=log_model))
    if change is one_weight and not log_model:
        pretended = elsewhere(kept)
    found = replayed(pretended)
    assert found.verdict == DIFFERENT
    assert EXIT_CODES[found.verdict] == 1


def test_where_rounding_alone_decides_nothing_is_held_against_it(monkeypatch):
    """Two trainings that only rounding parts, one of which diverges long before the other."""
    for seed in range(8):  # on another machine it may be another one
        own = CHAOTIC | {"seed": seed}
        kept = evidence(config(**own), change=rounded)
        found = replayed(elsewhere(kept))
        assert found.verdict == TOLERABLE
        then, now = found.outcomes
        if then != now:
            break
    assert then != now
    assert f"From iteration {found.chaos:,} on, rounding alone decides" in sentence(found, "it")
    other = stated(elsewhere(kept), config=config(**own | {"lr": 0.3}))
    assert replayed(other).verdict == DIFFERENT
    monkeypatch.setattr(retraining, "CHAOS", 1e-3)
    assert 0 < replayed(elsewhere(kept)).chaos < found.chaos


def test_a_shadow_that_ends_before_the_others_is_infinitely_far_from_then_on(monkeypatch):
    """Or after them."""
    kept = evidence(config())
    (record,), splits = trained(config())
    ends = iter((20, 25, 30, 30))
    whole = retraining._train

    def cut_short(shadow, *rest):
        whole(shadow, *rest)
        del shadow.losses[next(ends) :]

    monkeypatch.setattr(retraining, "_train", cut_short)
    rounding = retraining._rounding(record, kept.provenance, splits, lambda *_: None)
    assert rounding.reach[19].isfinite()
    assert rounding.reach[20:].isinf().all()


def test_weights_that_were_not_kept_are_not_measured():
    """A hash that is another one is told; where all losses are the same, nothing excuses it."""
    kept = elsewhere(stated(evidence(config(log_model=False)), final="0" * 64))
    found = replayed(kept)
    assert found.verdict == DIFFERENT
    assert found.parts[2] == retraining.Part("final weights", DIFFERENT)
    assert "the final weights have another hash, and none were kept" in sentence(found, "it")


def test_a_training_that_ended_elsewhere_is_told():
    """With what became of it then and now."""
    kept = evidence(config(lr=0.01), give_up=hopeless)
    found = replayed(elsewhere(stated(kept, outcome="finished")))
    assert found.verdict == DIFFERENT
    assert found.outcomes == ("finished after 10 iterations", "finished after 30 iterations")


def test_other_images_are_an_error_before_anything_is_trained(monkeypatch):
    """With both digests; and so it is with another number of them."""
    kept = evidence(config())
    monkeypatch.setattr(retraining, "train_together", None)
    with pytest.raises(
        DataError, match=r"has the digest 70cb8757d0f9…, and the network was .*000…"
    ):
        replayed(stated(kept, digest="0" * 64))
    with pytest.raises(ReplayError, match="on 99 images of 64 pixels, and its configuration gives"):
        replayed(stated(kept, images=99))


def test_networks_that_round_differently_in_a_stack_have_a_cause():
    """Nothing of the environment, but what was recorded of them."""
    kept = with_loss(stated(evidence(config()), is_exact=False), 7, 1 + 2**-23)
    found = replayed(kept)
    assert found.verdict == TOLERABLE
    assert found.causes == ["it was trained in a stack that rounds differently from it alone"]


def test_the_commit_and_the_packages_are_no_cause():
    """They are told, and excuse nothing."""
    kept = with_loss(evidence(config()), 7, 1 + 2**-23)
    told = kept.provenance.environment
    other = {
        "facts": told["facts"] | {"git_commit": "0" * 40, "git_tree": "clean"},
        "packages": told["packages"] | {"click": "0.1"},
        "variables": told["variables"],
    }
    found = replayed(stated(kept, environment=other))
    assert {one.what for one in found.differences} >= {"git_commit", "package click"}
    assert (found.causes, found.verdict) == ([], DIFFERENT)


def test_numbers_that_are_not_finite_have_a_distance():
    """Infinite where only one is finite, none where both are the same."""
    one = {"fc1.weight": torch.tensor([[1.0, math.nan, math.inf]])}
    other = {"fc1.weight": torch.tensor([[1.5, math.nan, math.inf]])}
    lost = {"fc1.weight": torch.tensor([[1.0, 2.0, math.inf]])}
    assert retraining._distance(one, one) == 0
    assert retraining._distance(lost, one) == math.inf
    gap = retraining._gap(other, one)
    assert (gap.first, gap.largest, gap.at) == ("fc1.weight[0, 0]", 0.5, "fc1.weight[0, 0]")
    assert retraining._gap(lost, one).at == "fc1.weight[0, 1]"
    assert model.weights_sha256(one) == model.weights_sha256(dict(one))


def test_what_is_said_to_have_ended_early_is_not_trained_for_ever():
    """A folder of somebody's may claim a training that would take years: it ends soon after."""
    kept = evidence(config())
    endless = config(epochs=1_000_000)
    losses = kept.losses[:10]
    lie = stated(
        replace(kept, losses=losses),
        config=endless,
        outcome="diverged",
        updates=10,
        losses=provenance.losses_sha256(losses),
    )
    found = replayed(lie)
    assert found.verdict == DIFFERENT
    assert found.outcomes == ("diverged after 10 iterations", "finished after 11 iterations")
