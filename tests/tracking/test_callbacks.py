"""Watching where others have the loop: the real Trainers of Lightning and of Hugging Face."""

import contextlib
import copy
import gc
import sys
from types import SimpleNamespace

import mlflow
import pytest
import torch
from lightning import pytorch as lightning
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

import initflow
from initflow.diagnostics.observing import hooks
from initflow.errors import SettingError
from tests.conftest import ROOT, python
from tests.diagnostics.test_inspection import normal, squared
from tests.test_readme import example
from tests.tracking.test_watching import updates

# The packages' own, and dynamo's.
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings(
        "ignore::lightning.fabric.utilities.rank_zero.LightningDeprecationWarning"
    ),
]
IMAGES = normal(40, 4)  # 10 batches of 4


@pytest.fixture(autouse=True, scope="module")
def _quick_collections():
    """Accelerate collects garbage after each training: not among all that is imported."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Dropout(0.3), nn.Linear(6, 3))


def history(run_id, key):
    return [(m.step, m.value) for m in mlflow.MlflowClient().get_metric_history(run_id, key)]


def steps(run_id):
    """All that was watched, by step, under the names of inspect()."""
    found = {}
    run = mlflow.get_run(run_id)
    assert "initflow.watch_failed" not in run.data.tags
    for key in run.data.metrics:
        if "/net." in key:
            for step, value in history(run_id, key):
                found.setdefault(step, {})[key.replace("/net.", "/")] = value
    return found


def looked_at(net, batch):
    """The net as it is, and its signals with the random numbers that the training draws next."""
    net = copy.deepcopy(net)
    return net, initflow.inspect(copy.deepcopy(net), batch, squared).metrics()


def expected(seen, after):
    """Of every third step, from what was looked at before each, and the net at the end."""
    nets = [*(net for net, _ in seen), after]
    return {
        step: pytest.approx(metrics | updates(net, nets[step + 1]))
        for step, (net, metrics) in enumerate(seen)
        if step % 3 == 0
    }


def new_run():
    return mlflow.MlflowClient().create_run("0").info.run_id


# --- Lightning


class Lit(lightning.LightningModule):
    """Its own forward is not called."""

    def __init__(self, net=None, fails_at=None, *, is_manual=False):
        super().__init__()
        self.net = net or mlp()
        self.fails_at, self.automatic_optimization = fails_at, not is_manual

    def training_step(self, batch, index):
        if index == self.fails_at:
            raise ZeroDivisionError
        for _ in range(0 if self.automatic_optimization else 2):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(squared(self.net(batch)))
            optimizer.step()
        loss = squared(self.net(batch))
        self.log("loss", loss)
        return loss

    def validation_step(self, batch, _index):
        self.net(10 * batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class Looking(lightning.Callback):
    """At each batch at once, before it is trained on."""

    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, _trainer, lit, batch, _index):
        self.seen.append(looked_at(lit.net, batch))


def fit(lit, *callbacks, ckpt_path=None, **settings):
    trainer = lightning.Trainer(
        **{"accelerator": "cpu", "max_epochs": 1, "logger": False} | settings,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=[*callbacks],
    )
    torch.manual_seed(1)
    loaders = DataLoader(IMAGES, 4), DataLoader(IMAGES, 20)
    trainer.fit(lit, *loaders, ckpt_path=ckpt_path)
    assert "training_step" not in vars(trainer.strategy)
    return trainer


def nothing_is_observed():
    return not (hooks._of_modules or hooks._of_scalers or hooks._in_place)


@pytest.mark.parametrize("whose", ["logger", "logger before active", "active", "id", "autolog"])
def test_lightning_logs_into_a_run(store, whose):
    """The one that is given, else the logger's, else the active one; which ends as it would."""
    looking, logger, run_id = Looking(), MLFlowLogger(tracking_uri=store), None
    active = mlflow.start_run() if "active" in whose else contextlib.nullcontext()
    if whose == "id":
        run_id = new_run()
    if whose == "autolog":
        mlflow.pytorch.autolog(log_models=False, checkpoint=False, log_every_n_step=1)
    try:
        with active as run:
            callback = initflow.lightning_callback(every=3, run_id=run_id)
            loggers = [CSVLogger("csv"), logger] if "logger" in whose else False
            lit = Lit()
            fit(lit, looking, callback, logger=loggers, log_every_n_steps=1)
    finally:
        mlflow.pytorch.autolog(disable=True)
    its = logger.run_id if loggers else run_id or (run or mlflow.last_active_run()).info.run_id
    assert steps(its) == expected(looking.seen, lit.net)
    assert mlflow.get_run(its).info.status == ("RUNNING" if run_id else "FINISHED")
    if loggers:  # its metrics stand at the same steps
        assert [step for step, _ in history(its, "loss")] == list(range(10))
    if whose == "autolog":
        assert history(its, "loss")


def test_watching_around_a_fit_that_mlflow_logs(store):
    """By the with: what the training_step calls is measured, into the same run."""
    lit = Lit()
    mlflow.pytorch.autolog(log_models=False, checkpoint=False, log_every_n_step=1)
    try:
        with mlflow.start_run() as run, initflow.watch(lit.net, name="net", every=3):
            fit(lit)
    finally:
        mlflow.pytorch.autolog(disable=True)
    assert list(steps(run.info.run_id)) == [0, 3, 6, 9]
    assert history(run.info.run_id, "loss")


def test_lightning_trains_as_without_it(store):
    """To the bit, with what is random."""
    ends = []
    for callbacks in ([], [initflow.lightning_callback(every=2, run_id=new_run())]):
        lit = Lit()
        fit(lit, *callbacks)
        assert nothing_is_observed()
        ends.append([*lit.state_dict().values(), torch.get_rng_state()])
    assert all(map(torch.equal, *ends))


@pytest.mark.parametrize(
    ("settings", "trained", "logged"),
    [
        ({"accumulate_grad_batches": 2}, {}, [0, 2, 4]),
        ({"precision": "bf16-mixed"}, {}, [0, 2, 4, 6, 8]),
        ({}, {"is_manual": True}, [0, 2, 4, 6, 8]),
        ({"max_epochs": 2, "limit_train_batches": 3}, {}, [0, 2, 4]),
        ({}, {"net": torch.compile(mlp(), backend="eager")}, [0, 2, 4, 6, 8]),
        ({"barebones": True, "logger": None}, {}, [0, 2, 4, 6, 8]),
    ],
)
def test_lightning_trains_in_other_ways(store, settings, trained, logged):
    """Accumulating, in lower precision, optimizing by hand, compiled."""
    run_id = new_run()
    fit(Lit(**trained), initflow.lightning_callback(every=2, run_id=run_id), **settings)
    found = steps(run_id)
    assert list(found) == logged
    assert len({frozenset(values) for values in found.values()}) == 1
    assert {"activation_variance/0", "gradient_variance/3"} < set(found[0])


def test_lightning_with_a_module_that_is_compiled_whole(store):
    """Its training_step is: it runs as it was written at the watched steps."""
    found, graphs = [], []
    for compiles in (False, True):
        lit, run_id = Lit(), new_run()
        lit.log = lambda *_: None  # which makes dynamo give up

        def backend(graph, _inputs):
            return lambda *inputs: graphs.append(1) or graph.forward(*inputs)

        model = torch.compile(lit, backend=backend) if compiles else lit
        fit(model, initflow.lightning_callback(every=2, run_id=run_id), limit_val_batches=0)
        found.append(steps(run_id))
    torch._dynamo.reset()
    assert found[0] == found[1]
    assert len(found[0]) == 5 <= len(graphs)


def test_lightning_goes_on_from_a_checkpoint(store, tmp_path):
    """With the numbers of the steps that follow."""
    run_id = new_run()
    callback = initflow.lightning_callback(every=2, run_id=run_id)
    fit(Lit(), callback, limit_train_batches=3).save_checkpoint(tmp_path / "it.ckpt")
    assert list(steps(run_id)) == [0, 2]
    fit(Lit(), callback, ckpt_path=tmp_path / "it.ckpt", max_epochs=2, limit_train_batches=3)
    assert list(steps(run_id)) == [0, 2, 4]


def test_lightning_fails(store):
    """The error comes through; what was recorded is there, and nothing stays behind."""
    run_id = new_run()
    callback = initflow.lightning_callback(every=2, run_id=run_id)
    with pytest.raises(ZeroDivisionError):
        fit(Lit(fails_at=5), callback)
    assert nothing_is_observed()
    assert list(steps(run_id)) == [0, 2, 4]
    fit(Lit(), callback)
    assert len(history(run_id, "weight_variance/net.0")) == 3 + 5


# --- Hugging Face


class Net(nn.Module):
    """With the loss inside, as transformers' models have it."""

    def __init__(self):
        super().__init__()
        self.net = mlp()

    def forward(self, x):
        return {"loss": squared(self.net(x))}


class LookingTrainer(Trainer):
    """At each batch at once, before it is trained on."""

    def compute_loss(self, model, inputs, **others):
        self.seen = [*getattr(self, "seen", []), looked_at(self.model.net, inputs["x"])]
        if self.args.run_name == f"fails at {len(self.seen)}":
            raise ZeroDivisionError
        return super().compute_loss(model, inputs, **others)


def trainer(*callbacks, **settings):
    arguments = TrainingArguments(
        **{"output_dir": "out", "save_strategy": "no", "report_to": "none"} | settings,
        use_cpu=True,
        disable_tqdm=True,
        optim="sgd",
        learning_rate=0.1,
        num_train_epochs=1,
        logging_steps=1,
        per_device_train_batch_size=4,
    )
    images = [{"x": x} for x in IMAGES]
    return LookingTrainer(Net(), arguments, train_dataset=images, callbacks=[*callbacks])


@pytest.mark.parametrize("whose", ["report_to", "report_to in active", "active", "id"])
def test_transformers_logs_into_a_run(store, whose):
    """The one that is given, else the active one, which the Trainer may have opened."""
    run_id = new_run() if whose == "id" else None
    with mlflow.start_run() if "active" in whose else contextlib.nullcontext() as run:
        callback = initflow.transformers_callback(every=3, run_id=run_id)
        its = trainer(callback, report_to="mlflow" if "report_to" in whose else "none")
        its.train()
    logged = run_id or (run or mlflow.last_active_run()).info.run_id
    assert steps(logged) == expected(its.seen, its.model.net)
    assert mlflow.get_run(logged).info.status == ("RUNNING" if run_id else "FINISHED")
    if "report_to" in whose:
        assert [step for step, _ in history(logged, "loss")] == list(range(1, 11))
    assert nothing_is_observed()


def test_transformers_trains_as_without_it(store):
    """To the bit, with what is random."""
    ends = []
    for callbacks in ([], [initflow.transformers_callback(every=2, run_id=new_run())]):
        its = trainer(*callbacks)
        its.train()
        ends.append([*its.model.state_dict().values(), torch.get_rng_state()])
    assert all(map(torch.equal, *ends))


@pytest.mark.parametrize(
    ("settings", "logged"),
    [
        ({"gradient_accumulation_steps": 2}, [0, 2, 4]),
        ({"bf16": True}, [0, 2, 4, 6, 8]),
        ({"torch_compile": True, "torch_compile_backend": "eager"}, [0, 2, 4, 6, 8]),
    ],
)
def test_transformers_trains_in_other_ways(store, settings, logged):
    """Accumulating, in lower precision, compiled."""
    run_id = new_run()
    trainer(initflow.transformers_callback(every=2, run_id=run_id), **settings).train()
    found = steps(run_id)
    assert list(found) == logged
    assert {"activation_variance/0", "gradient_variance/3"} < set(found[0])


def test_transformers_goes_on_from_a_checkpoint(store):
    """With the numbers of the steps that follow."""
    run_id = new_run()
    saving = {"save_strategy": "steps", "save_steps": 5}
    callback = initflow.transformers_callback(every=2, run_id=run_id)
    trainer(callback, **saving, max_steps=5).train()
    assert list(steps(run_id)) == [0, 2, 4]
    trainer(callback, **saving).train(resume_from_checkpoint="out/checkpoint-5")
    assert list(steps(run_id)) == [0, 2, 4, 6, 8]


def test_transformers_fails(store):
    """Which the callback is not told of: watching ends with it, or at the next training."""
    run_id = new_run()
    its = trainer(initflow.transformers_callback(every=2, run_id=run_id), run_name="fails at 6")
    with pytest.raises(ZeroDivisionError):
        its.train()
    its.train()
    assert nothing_is_observed()
    assert len(history(run_id, "weight_variance/net.0")) == 3 + 5
    its.seen = []
    with pytest.raises(ZeroDivisionError):
        its.train()
    assert not nothing_is_observed()
    del its
    gc.collect()
    assert nothing_is_observed()
    assert len(history(run_id, "weight_variance/net.0")) == 3 + 5 + 3


# --- Both


def lightning_begins(callback):
    fit(Lit(), callback)


def transformers_begins(callback):
    trainer(callback).train()


OF = {
    "lightning": (initflow.lightning_callback, lightning_begins),
    "transformers": (initflow.transformers_callback, transformers_begins),
}


@pytest.mark.parametrize("package", OF)
def test_mistakes_are_told(store, package):
    """A wrong setting where it is given, no run or a wrong one before the training begins."""
    callback, begin = OF[package]
    with pytest.raises(SettingError, match=r"^every must be a whole number of at least 1, not 0$"):
        callback(every=0)
    with pytest.raises(SettingError, match=r"^quantity must be one of "):
        callback(quantities="dead")
    with pytest.raises(SettingError, match=rf"^{package}_callback needs an MLflow run: .*run_id$"):
        begin(callback())
    with pytest.raises(SettingError, match=r"^run_id must be .*, which has no 'abc'$"):
        begin(callback(run_id="abc"))
    assert not mlflow.search_runs(["0"]).size


@pytest.mark.parametrize("package", OF)
def test_the_settings_are_those_of_watch(store, package):
    """Some quantities, under a name."""
    callback, begin = OF[package]
    run_id = new_run()
    begin(callback(quantities=["weight_variance"], name="g", run_id=run_id))
    metrics = mlflow.get_run(run_id).data.metrics
    assert set(metrics) == {"weight_variance/g.net.0", "weight_variance/g.net.3"}


@pytest.mark.parametrize(
    ("heading", "names"),
    [
        (
            "## Lightning",
            {"Trainer": lightning.Trainer, "MLFlowLogger": MLFlowLogger, "module": Lit()}
            | {"loader": DataLoader(IMAGES, 4)},
        ),
        (
            "## Hugging Face's Trainer",
            {"Trainer": Trainer, "TrainingArguments": TrainingArguments, "model": Net()}
            | {"dataset": [{"x": x} for x in IMAGES]},
        ),
    ],
)
def test_the_examples(store, heading, names):
    """Of the page, as they stand."""
    page = (ROOT / "docs" / "watching.md").read_text()
    exec(example(page, heading), names | {"inf": initflow, "mlflow": mlflow})  # noqa: S102
    (run,) = mlflow.search_runs(search_all_experiments=True, output_format="list")
    assert list(steps(run.info.run_id)) == [0]


def test_other_processes_log_nothing(store):
    """They need no run."""
    other = SimpleNamespace(is_global_zero=False, is_world_process_zero=False)
    initflow.lightning_callback().on_train_start(other, Lit())
    initflow.transformers_callback().on_train_begin(None, other, None, model=Net())
    assert nothing_is_observed()


@pytest.mark.parametrize("package", OF)
def test_a_package_that_is_not_there(monkeypatch, package):
    """One line says what to install; an error within it is its own."""
    callback, _ = OF[package]
    monkeypatch.delitem(
        sys.modules, f"initflow.tracking.watching.{package}_callback", raising=False
    )
    for name in [one for one in sys.modules if one.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    said = rf"^{package}_callback needs the package {package}: pip install 'initflow\[{package}\]'$"
    with pytest.raises(SettingError, match=said):
        callback()


def test_they_are_loaded_only_when_they_are_asked_for():
    """Neither with the package, nor with what watches."""
    program = (
        "import sys, initflow as inf\n"
        "inf.watch, inf.train, inf.lightning_callback, inf.transformers_callback\n"
        "print({'lightning', 'transformers', 'accelerate'} & sys.modules.keys())"
    )
    assert python(program) == "set()\n"
