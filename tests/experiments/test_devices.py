"""Every command on a device that is not the CPU: nothing is mixed, and the numbers are as near."""

import json

import mlflow
import pytest
import torch
from torch import nn

import initflow
from initflow.core.configurations import (
    CompareConfig,
    DiagnoseConfig,
    RatesConfig,
    TrainConfig,
    TuneConfig,
    VerifyConfig,
)
from initflow.diagnostics import coordinates, curvature, record
from initflow.experiments import train
from initflow.experiments.comparisons.compare import compare
from initflow.experiments.comparisons.rates import rates
from initflow.experiments.replay import retraining
from initflow.experiments.tuning.tune import tune
from initflow.experiments.untrained import diagnose as diagnosing
from initflow.experiments.untrained.diagnose import diagnose
from initflow.experiments.verify import verify
from initflow.tracking import runs
from tests import elsewhere

SMALL = {"dataset": "digits", "hidden": "12,8", "epochs": 1, "eval_every": 10, "threads": 1}
WHOLE = "initflow_lsuv:lsuv"  # sees images, and fills the whole network


@pytest.fixture(
    params=[
        pytest.param(elsewhere.DEVICE, marks=elsewhere.possible),
        pytest.param("cuda:0", marks=pytest.mark.gpu),
    ]
)
def device(request, store, monkeypatch):
    """That ``device=auto`` finds."""
    if request.param == elsewhere.DEVICE:
        elsewhere.be_found(monkeypatch)
    return request.param


@elsewhere.possible
def test_it_tells_what_a_gpu_would_not_do():
    """Or the others would show nothing."""
    there = torch.ones(3, device=elsewhere.DEVICE)
    assert isinstance(there, elsewhere.Elsewhere)
    with pytest.raises(RuntimeError, match="not all tensors are on the same device"):
        there + torch.ones(3)
    with pytest.raises(RuntimeError):
        there.numpy()
    with pytest.raises(TypeError):
        torch.from_numpy(there)
    assert (there + 1).cpu().tolist() == (2 * there).tolist() == [2.0, 2.0, 2.0]


def test_a_network_trains_there_as_here(device):
    """From the same bits, with all that is measured, predicted and drawn."""
    config = {**SMALL, "init": WHOLE, "activation": "gelu", "validation": 100}
    there, here = (train.train(TrainConfig(**config, device=asked)) for asked in ("auto", "cpu"))
    runs = [mlflow.get_run(result.run_id) for result in (there, here)]
    assert [run.data.params["resolved.device"] for run in runs] == [device, "cpu"]
    tag = "initflow.initial_weights_sha256"
    assert runs[0].data.tags[tag] == runs[1].data.tags[tag]
    assert there.history.keys() == here.history.keys()
    for key, points in here.history.items():
        assert there.history[key] == [
            (step, pytest.approx(value, rel=1e-3, abs=1e-6)) for step, value in points
        ]
    files = [
        {file.path for file in mlflow.MlflowClient().list_artifacts(run.info.run_id)}
        for run in runs
    ]
    assert files[0] == files[1]
    assert "received.png" in files[0]


def test_a_comparison_trains_there(device):
    """Stacks of networks."""
    config = CompareConfig(**SMALL, inits="he,zero", activations="relu", seeds=1)
    result = compare(config)
    members = result.members
    assert len(members) == 2
    assert not any(member.is_exact for member in members)
    run = mlflow.get_run(members[0].run_id)
    assert run.data.params["resolved.device"] == device
    assert run.data.tags["initflow.bit_identical_to_alone"] == "false"


def test_a_diagnosis_is_made_there(device):
    """Of untrained networks."""
    result = diagnose(DiagnoseConfig(dataset="digits", inits=f"he,{WHOLE}", depth=3, width=9))
    assert len(result.readings) == 4


def test_a_tuning_is_made_there(device):
    """With its trials, pruned and not, and its tests."""
    config = TuneConfig(**SMALL, inits="he", trials=3, batch=3, seeds=2, study="there")
    (row,) = tune(config).rows
    assert row.counts["finished"] + row.counts["pruned"] == 3


@pytest.mark.parametrize("init", ["he", WHOLE])
def test_a_run_is_verified_there_and_from_there(device, init):
    """The same numbers there, and as near as rounding allows on the CPU."""
    run = train.train(TrainConfig(**SMALL, init=init, probe=0))
    assert verify(run.run_id, VerifyConfig()).replay.verdict == "identical"
    assert verify(run.run_id, VerifyConfig(device="cpu")).replay.verdict != "different"


@pytest.mark.parametrize("tf32", [False, True])
def test_tf32_is_recorded_and_used_again(device, monkeypatch, tf32):
    """Param, configuration and facts say what was used, whatever the process has set."""
    used = []

    def train_together(*args, **options):
        record.train_together(
            *args,
            **options
            | {"on_measured": lambda *_: used.append(torch.backends.cuda.matmul.fp32_precision)},
        )

    monkeypatch.setattr(retraining, "train_together", train_together)
    expected = "tf32" if tf32 else "ieee"
    try:
        torch.set_float32_matmul_precision("highest" if tf32 else "high")
        run = train.train(TrainConfig(**SMALL, tf32=tf32, probe=0))
        assert mlflow.get_run(run.run_id).data.params["tf32"] == str(tf32).lower()
        kept = json.loads(runs.read_artifact(run.run_id, "replay.json", 2**20))
        assert kept["config"]["tf32"] == str(tf32).lower()
        fact = f"matmul {expected}, conv {expected}"
        assert kept["environment"]["facts"]["cuda_float32"] == fact
        replay = verify(run.run_id, VerifyConfig()).replay
        assert (replay.verdict, replay.differences) == ("identical", [])
        assert used
        assert set(used) == {expected}
        verify(run.run_id, VerifyConfig(device="cpu"))  # which has none, and is not refused
    finally:
        torch.set_float32_matmul_precision("highest")


@elsewhere.possible
@pytest.mark.parametrize("tf32", [False, True])
def test_what_is_measured_without_training_goes_by_the_setting_too(store, monkeypatch, tf32):
    """In a diagnosis, and what a range of learning rates is held against."""
    elsewhere.be_found(monkeypatch)
    used = []

    def use(result):
        used.append(torch.backends.cuda.matmul.fp32_precision)
        return result

    read = diagnosing.read
    monkeypatch.setattr(diagnosing, "read", lambda *args, **given: use(read(*args, **given)))
    diagnose(DiagnoseConfig(dataset="digits", inits="he", depth=2, width=9, tf32=tf32))
    assert used
    before = len(used)
    monkeypatch.setattr(curvature, "largest_eigenvalue", lambda *_: use(1.0))
    monkeypatch.setattr(coordinates, "changes", lambda *_: use([]))
    small = {"dataset": "digits", "inits": "he", "rates": 2, "seeds": 1, "updates": 2}
    rates(RatesConfig(**small, over="width", widths="8,12", hidden=8, tf32=tf32))
    assert len(used) == before + 4  # both of two widths
    assert set(used) == {"tf32" if tf32 else "ieee"}


@pytest.mark.gpu
def test_a_model_is_watched_there(store):
    """One of the user's own; autograd has no threads for a device that is none."""
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).cuda()
    with mlflow.start_run() as run, initflow.watch(model, every=1):
        model(torch.rand(8, 4).cuda()).square().mean().backward()
    metrics = mlflow.get_run(run.info.run_id).data.metrics
    assert metrics["gradient_variance/2"] > 0
