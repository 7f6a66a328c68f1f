"""The files of a logged model: those that MLflow and PyTorch would write, made faster."""

import re
import shutil
import zipfile

import mlflow.pytorch
import numpy as np
import pytest
import torch
from mlflow.models import Model, ModelSignature
from mlflow.types import Schema, TensorSpec
from safetensors.torch import save

from initflow.initializers.activations import ACTIVATIONS
from initflow.tracking import runs
from initflow.tracking.logged_models import model_files, served_model
from initflow.tracking.outbox import Entry
from initflow.training import model

ONES = (1.0,) * 6
SIZED = ("input_example.json", "serving_input_example.json", "code/initflow_model.py")
CASES = {
    "relu": ((6, 4, 3), "relu", 0.0, 1.0),
    "deep, normalized": ((6, 5, 5, 2), "tanh", 0.1, 0.3),
    "of each feature": ((6, 4, 3), "gelu", (0.5,) * 6, ONES),
    "without hidden layers": ((6, 3), "relu", 0.0, 1.0),
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache of this test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model_files._hollow.cache_clear()
    model_files._common.cache_clear()
    yield tmp_path / "cache"
    model_files._hollow.cache_clear()
    model_files._common.cache_clear()


def network(widths, seed=0):
    """Weights by name."""
    generator = torch.Generator().manual_seed(seed)
    names = model.layer_names(len(widths) - 1)
    state = {}
    for name, fan_in, fan_out in zip(names, widths, widths[1:], strict=False):
        state[f"{name}.weight"] = torch.randn(fan_out, fan_in, generator=generator)
        state[f"{name}.bias"] = torch.randn(fan_out, generator=generator)
    return state


# Weights are put into archives of newer versions alone, and older ones of MLflow write none.
of_archives = pytest.mark.needs("torch>=2.9", "mlflow>=3.7")


def entry(case, state):
    widths, activation, mean, std = CASES[case]
    values = {"activation": activation, "mean": mean, "std": std, "pixels": widths[0]}
    return Entry("model", "run", values, save(state))


def module_of(case, state):
    _, activation, mean, std = CASES[case]
    return model.to_module(state, ACTIVATIONS[activation], mean=mean, std=std)


def saved_by_mlflow(case, state, folder):
    """As it was done before, network by network; every file by its path."""
    widths = CASES[case][0]
    module = module_of(case, state)
    loader = folder.parent / f"{model_files.LOADER}.py"
    shutil.copyfile(served_model.__file__, loader)
    its = Model(
        "/place",
        run_id="run",
        model_uuid="m-1",
        model_id="m-1",
        metadata={"input": f"pixels in [0, 1], as numbers of shape (n, {widths[0]})", "pixels": 6},
    )
    inputs, outputs = (
        Schema([TensorSpec(np.dtype(np.float32), (-1, n))]) for n in (widths[0], widths[-1])
    )
    mlflow.pytorch.save_model(
        module,
        folder,
        mlflow_model=its,
        code_paths=[str(loader)],
        input_example=np.zeros((2, widths[0]), dtype=np.float32),
        signature=ModelSignature(inputs, outputs),
        pip_requirements=[
            f"{lib.__name__}=={lib.__version__.partition('+')[0]}" for lib in (mlflow, torch)
        ],
    )
    its.signature = ModelSignature(outputs=outputs)
    its.flavors["python_function"]["loader_module"] = model_files.LOADER
    its.save(str(folder / "MLmodel"))
    found = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def members(archive, tmp_path):
    path = tmp_path / "read.pt2"
    path.write_bytes(archive)
    with zipfile.ZipFile(path) as file:
        return [(info.filename, file.read(info)) for info in file.infolist()]


def without_caller(found):
    """Members, but for MLflow's own frame in the graph's stack traces, and a digest of it all."""
    frame = re.compile(
        rb'File \\"[^"]*mlflow/pytorch/__init__.py\\", line \d+, in save_model.*?\(\\n  '
    )
    return [
        (name, frame.sub(b"", content))
        for name, content in found
        if not name.endswith("serialization_id")
    ]


def without_own(text):
    """MLmodel, but for when it was made and how large the archive is."""
    own = ("utc_time_created", "model_size_bytes")
    return [line for line in text.decode().splitlines() if not line.startswith(own)]


@of_archives
@pytest.mark.parametrize("case", CASES)
def test_the_files_are_those_that_mlflow_writes(case, tmp_path):
    """Byte for byte, of a second network of the architecture, too; the archive by its members."""
    first, second = network(CASES[case][0]), network(CASES[case][0], seed=1)
    for at, state in enumerate((first, second)):
        ours = model_files.of(entry(case, state)).of("/place", "m-1", "run")
        theirs = saved_by_mlflow(case, state, tmp_path / f"model{at}")
        assert ours.keys() == theirs.keys()
        own = ours.pop(model_files.ARCHIVE)
        assert own == model_files.exported(module_of(case, state), CASES[case][0][0])
        archives = [members(one, tmp_path) for one in (own, theirs.pop(model_files.ARCHIVE))]
        assert without_caller(archives[0]) == without_caller(archives[1])
        text = ours.pop("MLmodel")
        size = len(own) + sum(len(ours[name]) for name in SIZED)
        assert f"model_size_bytes: {size}\n".encode() in text
        assert without_own(text) == without_own(theirs.pop("MLmodel"))
        assert ours == theirs
    assert model_files._hollow.cache_info().misses == 1


@of_archives
def test_an_archive_of_the_cache_is_that_of_an_export(cache, monkeypatch):
    """It is read by the next process, without an export."""
    state = network((6, 4, 3))
    before = model_files.of(entry("relu", state)).others
    model_files._hollow.cache_clear()
    model_files._common.cache_clear()
    monkeypatch.setattr(torch.export, "export", None)
    assert model_files.of(entry("relu", state)).others == before
    (kept,) = cache.rglob("*.pt2")
    assert kept.parent.parent.parent == cache


@of_archives
@pytest.mark.parametrize("damage", ["cut off", "changed", "empty", "a folder", "no place"])
def test_a_damaged_cache_is_made_anew(cache, damage):
    """Whatever happened to it, and also where there is no place for one."""
    state = network((6, 4, 3))
    before = model_files.of(entry("relu", state)).others
    (kept,) = cache.rglob("*.pt2")
    content = kept.read_bytes()
    if damage == "a folder":
        kept.unlink()
        kept.mkdir()
    elif damage == "no place":
        shutil.rmtree(cache)
        cache.write_text("")
    else:
        kept.write_bytes(
            {"cut off": content[:-1], "changed": content[:-1] + b"\0", "empty": b""}[damage]
        )
    model_files._hollow.cache_clear()
    model_files._common.cache_clear()
    assert model_files.of(entry("relu", state)).others == before
    if damage not in ("a folder", "no place"):
        assert kept.read_bytes() == content


@of_archives
def test_another_version_of_torch_is_exported_each_time(monkeypatch, tmp_path):
    """Where weights that are put back do not give the archive that was exported."""
    real = model_files.exported

    def other(module, pixels):
        return real(module, pixels) + b"more"

    monkeypatch.setattr(model_files, "exported", other)
    state = network((6, 4, 3))
    archive = model_files.of(entry("relu", state)).others[model_files.ARCHIVE]
    assert archive.endswith(b"more")
    tensors = [content for _, content in members(archive.removesuffix(b"more"), tmp_path)]
    assert all(tensor.numpy().tobytes() in tensors for tensor in state.values())


def carried(client, run_id, folder):
    """All that MLflow has of a run, but for ids and times."""
    run = client.get_run(run_id)
    own = ("initflow.key", "mlflow.parentRunId")
    (output,) = run.outputs.model_outputs
    logged = client.get_logged_model(output.model_id)
    place = client.download_artifacts(run_id, "", str(folder))
    files = {p.name: p.read_bytes() for p in sorted(type(folder)(place).rglob("*")) if p.is_file()}
    return {
        "status": run.info.status,
        "params": run.data.params,
        "tags": {key: value for key, value in run.data.tags.items() if key not in own},
        "history": {
            key: sorted((m.step, m.value) for m in client.get_metric_history(run_id, key))
            for key in run.data.metrics
        },
        "last": run.data.metrics,
        "data": [
            (one.dataset.name, one.dataset.digest, one.dataset.schema, one.dataset.source)
            for one in run.inputs.dataset_inputs
        ],
        "step": output.step,
        "model": (
            logged.name,
            logged.status,
            logged.params,
            sorted((m.key, m.value, m.step) for m in logged.metrics),
            logged.source_run_id == run_id,
        ),
        "files": files,
    }


def test_a_run_that_is_written_at_once_carries_what_another_does(store, tmp_path):
    """Each thing that can be written to one; and nothing of it is there when it is refused."""
    from initflow.core.configurations import TrainConfig
    from initflow.training import datasets

    splits = datasets.load(TrainConfig(dataset="digits"))
    client = mlflow.MlflowClient()
    settings = {"name": "a", "description": "of it", "params": {"p": "1"}, "tags": {"t": "x"}}
    found = []
    with runs.start(name="parent", description="", params={}, tags={}) as parent:
        for opening in (parent.nested, parent.nested_at_once):
            with opening(**settings) as run:
                run.log_json("config", {"a": 1})
                run.log_data(splits)
                run.set_tags({"later": 2})
                state = network((6, 4, 3))
                values = {"mean": 0.0, "std": 1.0, "pixels": 6, "step": 20}
                model_id = run.log_model(state, "relu", **values)
                history = {"loss": [(0, 2.0), (20, 1.0)], "accuracy/test": [(20, float("nan"))]}
                run.log_history(history | {"layers": [(2, 3.0)]}, model_id)
            folder = tmp_path / f"files{len(found)}"
            folder.mkdir()
            one = carried(client, runs.with_ids(run.id), folder)
            nan = one["history"].pop("accuracy/test"), one["last"].pop("accuracy/test")
            assert np.isnan(nan[1])
            found.append(one)
    assert repr(found[0]) == repr(found[1])
    assert found[0]["status"] == "FINISHED"


def test_what_is_refused_of_a_run_costs_nothing_else(store):
    """It is FAILED, as it is one that is written bit by bit; what MLflow takes of it is there."""
    client = mlflow.MlflowClient()
    with runs.start(name="parent", description="", params={}, tags={}) as parent:
        settings = {"name": "bad", "description": "", "params": {"p" * 300: "1"}, "tags": {}}

        def write():
            with parent.nested_at_once(**settings) as run:
                run.log_text("kept.txt", "kept")
                run.log_history({"loss": [(0, 2.0)]})

        with pytest.raises(runs.TrackingError):
            write()
        (found,) = parent.below()
    assert found.status == "FAILED"
    assert found.metrics == {"loss": 2.0}
    assert [file.path for file in client.list_artifacts(found.id)] == ["kept.txt"]
