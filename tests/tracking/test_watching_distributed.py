"""A distributed training that is watched: two processes, by gloo on the CPU."""

import json
import os
import subprocess

import mlflow
import pytest
import torch

from initflow.tracking.watching import watch
from tests import warm
from tests.conftest import ROOT

pytestmark = pytest.mark.end_to_end

PROGRAM = """
import contextlib, hashlib, json, os
import mlflow, torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
import initflow

rank = int(os.environ["RANK"])
torch.distributed.init_process_group(
    "gloo", init_method=f"file://{os.environ['MEETING']}", rank=rank, world_size=2
)


def trained(watched):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Dropout(0.5), nn.Linear(6, 3))
    model = net if watched == "alone" else DistributedDataParallel(net)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    torch.manual_seed(1 + rank)
    run = mlflow.start_run() if watched and rank == 0 else contextlib.nullcontext()
    target = model if watched == "wrapper" else net
    with run as run, initflow.watch(target, every=2) if watched else contextlib.nullcontext():
        for _ in range(5):
            optimizer.zero_grad()
            for is_last in (False, True):
                is_kept = not is_last and model is not net
                with model.no_sync() if is_kept else contextlib.nullcontext():
                    model(torch.randn(8, 4)).square().mean().backward()
            optimizer.step()
    values = [*net.state_dict().values(), torch.get_rng_state()]
    bits = hashlib.sha256(b"".join(value.numpy().tobytes() for value in values)).hexdigest()
    return bits, run.info.run_id if run else None


found = {watched: trained(watched) for watched in ("", "wrapper", "inner", "alone")}
assert (mlflow.active_run() is None) and not initflow.diagnostics.observing.hooks._of_modules
torch.distributed.destroy_process_group()
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """What each process found: the bits after each training, and the ids of the runs."""
    folder = tmp_path_factory.mktemp("both")
    uri = f"sqlite:///{folder}/mlflow.db"
    mlflow.set_tracking_uri(uri)
    mlflow.search_experiments()
    shared = os.environ | {
        "PATH": f"{warm.folder()}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "MLFLOW_TRACKING_URI": uri,
        "MEETING": str(folder / "meeting"),
        "OMP_NUM_THREADS": "1",
    }
    started = [
        subprocess.Popen(
            [warm.folder() / "python", "-c", PROGRAM],
            cwd=folder,
            env=shared | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [one.communicate(timeout=120) for one in started]
    assert not any(one.returncode for one in started), said
    yield [json.loads(output) for output, _ in said]
    mlflow.set_tracking_uri(None)


def test_the_training_is_left_alone(both):
    """Its bits are the same in both processes, also with accumulation; only their draws differ."""
    for found in both:
        bits = {watched: bits for watched, (bits, _) in found.items()}
        assert bits[""] == bits["wrapper"] == bits["inner"] != bits["alone"]
    assert both[0][""] != both[1][""]


def test_rank_0_logs(both):
    """Its part of each batch, under the names of the model itself; the other needs no run."""
    zero, one = both
    assert [run_id for _, run_id in one.values()] == [None] * 4
    client, found = mlflow.MlflowClient(), []
    assert len(client.search_runs(["0"])) == 3
    for watched in ("wrapper", "inner", "alone"):
        run_id = zero[watched][1]
        tags = client.get_run(run_id).data.tags
        assert not {"initflow.watch_failed", "initflow.not_measured"} & set(tags)
        keys = sorted(client.get_run(run_id).data.metrics)
        found.append(
            {
                key: [(metric.step, metric.value) for metric in history]
                for key in keys
                if (history := client.get_metric_history(run_id, key))
            }
        )
    assert found[0] == found[1]
    first = [{key: history[0] for key, history in run.items()} for run in found]
    # The other's gradients are in nothing but the update.
    assert {key for key in first[0] if first[0][key] != first[2][key]} == {
        "update_ratio/0",
        "update_ratio/3",
    }
    assert {key.split("/")[1] for key in found[0]} == {"0", "3"}
    assert [step for step, _ in found[0]["gradient_variance/0"]] == [0, 2, 4]


def test_whose_process_logs(monkeypatch):
    """Rank 0's, by the group or by torchrun before there is one; a rank of nobody's is none."""
    monkeypatch.setenv("RANK", "1")
    assert watch.is_main_process()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "some")
    assert not watch.is_main_process()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    for rank in (0, 1):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        assert watch.is_main_process() == (rank == 0)
