"""The examples of the Python reference, ``docs/api.md``: of each public function one.

What stands in a function, named like the public one with ``_`` for a dot, is the example as a user
writes it. A test runs each by itself. What a ``print`` has behind it is what it prints, ``...``
standing for any text.
"""


def train() -> None:
    import initflow as inf

    result = inf.train(init="xavier", activation="tanh", dataset="digits", epochs=1)
    print(result)  # <Training: xavier, tanh, 64-100-10, digits>
    print(result.conclusions)  # ['It ended at ...% test accuracy after 15 iterations.', ...]
    print(result.last("accuracy/test"))  # 0...
    table = result.to_pandas()  # a row for each step at which something was logged
    print(table[["step", "accuracy/test"]].dropna())
    result.figure("learning_curves").savefig("learning_curves.png")


def compare() -> None:
    import initflow as inf

    comparison = inf.compare(
        inits=["zero", "he"], activations=["relu"], seeds=2, dataset="digits", epochs=1
    )
    print(*comparison.conclusions)  # he beats zero by ... points over 2 seeds.
    print(comparison.to_pandas()[["init", "accuracy_mean"]])
    comparison.figure("accuracies").savefig("accuracies.png")


def read() -> None:
    import mlflow

    import initflow as inf

    with mlflow.start_run() as run:  # of any script
        mlflow.log_param("lr", 0.1)
        for step, loss in enumerate([0.9, 0.5, 0.3]):
            mlflow.log_metric("val_loss", loss, step)

    logged = inf.read(run.info.run_id)
    print(logged.params)  # {'lr': '0.1'}
    print(logged.metrics)  # {'val_loss': 0.3}
    losses = logged.history["val_loss"]  # a table with a row for each value
    print(len(losses))  # 3
    logged.figure("metrics").savefig("metrics.png")


def compare_runs() -> None:
    import mlflow

    import initflow as inf

    mine = mlflow.create_experiment("mine")  # of any script
    for lr, losses in {0.1: [0.31, 0.35, 0.33], 0.01: [0.52, 0.47, 0.55]}.items():
        for loss in losses:
            with mlflow.start_run(experiment_id=mine):
                mlflow.log_param("lr", lr)
                mlflow.log_metric("val_loss", loss)

    comparison = inf.compare_runs(experiment="mine", by="lr", metric="val_loss")
    print(*comparison.conclusions)  # lr=0.1 beats lr=0.01 by 0.18... over 6 runs.
    print(comparison.to_pandas()[["group", "n", "mean", "low", "high"]])
    comparison.figure("values").savefig("values.png")


def trainability() -> None:
    import initflow as inf

    result = inf.trainability(
        dataset="digits", points=4, depths=[3, 10, 30], width=20, lrs=[0.1], updates=60, seeds=2
    )
    print(result.conclusions[1])  # Networks train deepest at σ_w² = ... (theory: 1.76).
    print(result.to_pandas().groupby(["depth", "sigma_w2"])["accuracy"].mean())
    result.figure("trainability").savefig("trainability.png")


def tune() -> None:
    import initflow as inf

    if __name__ == "__main__":  # which workers need, who read the script again
        tuning = inf.tune(inits=["xavier", "he"], trials=2, seeds=2, dataset="digits", epochs=1)
        print(tuning.conclusions[0])  # Each at its best: ...
        trials = tuning.to_pandas()
        print(trials.groupby("init")["accuracy"].max())


def rates() -> None:
    import initflow as inf

    result = inf.rates(inits=["he"], rates=5, updates=30, seeds=2, hidden="20", dataset="digits")
    print(result.conclusions[0])  # he: stable up to lr ...
    print(result.to_pandas().groupby("lr")["accuracy"].mean())


def reproduce() -> None:
    from pathlib import Path

    import initflow as inf

    Path("mine.toml").write_text("""
        title = "A table with one row"
        source = "Made up."
        notes = []
        settings = { dataset = "digits", hidden = "100", epochs = 1 }
        rows = [{ name = "He", init = "he", activation = "relu", published = { 10 = 89.0 } }]
    """)
    result = inf.reproduce(table="mine.toml", seeds=2)
    print(result)  # <Reproduction: A table with one row, 2 seeds>
    print(result.to_pandas())


def verify() -> None:
    import initflow as inf

    result = inf.train(init="he", dataset="digits", epochs=1)
    verification = inf.verify(result)  # or by its id: inf.verify(result.run_id)
    print(verification.verdict)  # identical
    print(list(verification.to_pandas()["verdict"]))  # ['identical', ...]


def export() -> None:
    import initflow as inf

    result = inf.train(init="he", dataset="digits", epochs=1)
    print(inf.export(result, to="he-on-digits"))  # initflow verify he-on-digits
    print(inf.verify("he-on-digits").verdict)  # identical


def initialize() -> None:
    import torch

    import initflow as inf

    model = torch.nn.Sequential(
        torch.nn.Linear(64, 100), torch.nn.ReLU(), torch.nn.LSTM(100, 20), torch.nn.Linear(20, 10)
    )
    report = inf.initialize(model[:2], "auto", seed=0, bias="zeros")
    print(report.filled[0].scheme)  # he
    report = inf.initialize(model, "orthogonal", only=torch.nn.LSTM, forget_bias=1.0)
    print(repr(report))  # <Initialization: Sequential, 8 matrices, orthogonal>
    table = report.to_pandas()  # a row for each matrix, and for what was left alone
    print(table["name"][0])  # 2.l0.input.input


def inspect() -> None:
    import torch

    import initflow as inf

    model = torch.nn.Sequential(torch.nn.Linear(8, 50), torch.nn.ReLU(), torch.nn.Linear(50, 3))
    images, labels = torch.randn(32, 8), torch.arange(32) % 3
    found = inf.inspect(model, (images, labels), torch.nn.functional.cross_entropy)
    print(found)  # <Inspection: Sequential, 2 layers>
    print(found.conclusions[0])  # From 0 to 2, the pre-activations' mean square goes ...
    print(found.metrics()["dead_fraction/0"])  # 0...
    found.figure("signals_by_layer").savefig("signals_by_layer.png")


def watch() -> None:
    import mlflow
    import torch

    import initflow as inf

    model = torch.nn.Sequential(torch.nn.Linear(8, 50), torch.nn.ReLU(), torch.nn.Linear(50, 3))
    images, labels = torch.randn(32, 8), torch.arange(32) % 3
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    with mlflow.start_run() as run, inf.watch(model, every=10):
        for _ in range(30):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()

    logged = mlflow.MlflowClient().get_metric_history(run.info.run_id, "update_ratio/0")
    print([metric.step for metric in logged])  # [0, 10, 20]


def lightning_callback() -> None:
    import mlflow
    from lightning.pytorch import Trainer
    from lightning.pytorch.demos.boring_classes import BoringModel  # or a module of your own

    import initflow as inf

    with mlflow.start_run() as run:
        trainer = Trainer(max_epochs=1, callbacks=[inf.lightning_callback(every=10)])
        trainer.fit(BoringModel())
    print("gradient_variance/layer" in mlflow.get_run(run.info.run_id).data.metrics)  # True


def transformers_callback() -> None:
    import mlflow
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

    import initflow as inf

    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=50))
    texts = [{"input_ids": ids, "labels": ids} for ids in torch.randint(50, (16, 8))]
    trainer = Trainer(
        model,
        TrainingArguments("out", report_to="none", max_steps=2),
        train_dataset=texts,
        callbacks=[inf.transformers_callback(every=1)],
    )
    with mlflow.start_run() as run:
        trainer.train()
    print("gradient_variance/lm_head" in mlflow.get_run(run.info.run_id).data.metrics)  # True


def diagnose() -> None:
    import initflow as inf

    diagnosis = inf.diagnose(
        inits=["xavier", "he"], activations=["relu"], bias_init="zeros", dataset="digits"
    )
    print(diagnosis.to_pandas()[["init", "forward", "backward"]])
    print(*diagnosis.conclusions)  # xavier relu: ...
    diagnosis.figure("schemes_by_layer").savefig("schemes_by_layer.png")


def phase() -> None:
    import initflow as inf

    found = inf.phase(activation="tanh", inits=["he", "lecun"], bias_init="zeros", points=21)
    print(found.to_pandas()[["init", "q_star", "chi_1", "phase"]])  # 0 ... chaotic
    found.figure("phase").savefig("phase.png")


def initializer() -> None:
    import torch

    import initflow as inf

    @inf.initializer(variance=lambda fan_in, gain: gain**2 / fan_in)
    def mine(
        weight: torch.Tensor, fan_in: int, generator: torch.Generator, *, gain: float = 1.0
    ) -> None:
        weight.normal_(0.0, gain / fan_in**0.5, generator=generator)

    report = inf.initialize(torch.nn.Linear(100, 50), mine)
    print(report.filled[0].scheme, report.filled[0].stated)  # mine 0.01


def initializers_find() -> None:
    import torch

    import initflow as inf

    scheme = inf.initializers.find("normal:std=0.05")
    at = inf.initializers.Place(fan_in=784, fan_out=100)
    print(scheme.spec, scheme.values, scheme.variance(at))  # normal:std=0.05 {...} 0.0025...
    weight = torch.empty(100, 784)
    scheme.fill_layer(weight, torch.zeros(100), at, torch.Generator().manual_seed(0))
    print(weight.std())  # tensor(0.0...)


def initializers_Activation() -> None:  # noqa: N802 - as the class is
    import torch

    import initflow as inf

    hardtanh = inf.initializers.Activation.of(torch.nn.functional.hardtanh)
    print(hardtanh.saturates, hardtanh.steepest)  # True 1.0
    print(hardtanh.derivative(torch.tensor([-2.0, 0.0, 0.5])))  # tensor([0., 1., 1.])


def testing_assert_initializer_contract() -> None:
    import initflow as inf

    # For the tests of a plugin: it raises an AssertionError that lists what is wrong.
    inf.testing.assert_initializer_contract("xavier:gain=2")


def testing_check() -> None:
    import torch

    import initflow as inf

    def careless(weight: torch.Tensor) -> None:
        torch.nn.init.normal_(weight)  # from PyTorch's global generator

    for row in inf.testing.check(careless):
        if not row.passed:
            print(row.rule, row.meaning)  # global state draws from the generator it is given, ...


def theory_gain() -> None:
    import torch

    import initflow as inf

    print(inf.theory.gain("tanh"))  # 1.5925...
    print(inf.theory.gain(torch.nn.functional.hardtanh))  # 1.3920...
    print(inf.theory.gain(lambda x: x * torch.sigmoid(1.702 * x)))  # 1.5394...
    layer = torch.nn.Linear(256, 256)
    torch.nn.init.normal_(layer.weight, std=inf.theory.gain("tanh") / 256**0.5)


def theory_mean_field() -> None:
    import initflow as inf

    tanh = inf.initializers.ACTIVATIONS["tanh"]
    deep = inf.theory.mean_field(tanh, sigma_w2=1.5, sigma_b2=0.05)
    print(deep.q_star, deep.chi_1)  # 0.4180... 0.9386...
    print(deep.xi_c)  # 15.79...


def theory_variance_map() -> None:
    import torch

    import initflow as inf

    tanh = inf.initializers.ACTIVATIONS["tanh"]
    q = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    print(inf.theory.variance_map(tanh, q, sigma_w2=1.0, sigma_b2=0.0))  # tensor([0.2737, ...)


def theory_correlation_map() -> None:
    import torch

    import initflow as inf

    relu = inf.initializers.ACTIVATIONS["relu"]
    c = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    after = inf.theory.correlation_map(relu, c, q=1.0, sigma_w2=2.0, sigma_b2=0.0)
    print(after)  # tensor([0.3183, 0.6090, 1.0000], ...)


def theory_fixed_point() -> None:
    import initflow as inf

    tanh = inf.initializers.ACTIVATIONS["tanh"]
    print(inf.theory.fixed_point(tanh, sigma_w2=1.5, sigma_b2=0.05))  # 0.4180...
    print(inf.theory.fixed_point(tanh, sigma_w2=1.0, sigma_b2=0.0))  # 0.0


def theory_fixed_points() -> None:
    import torch

    import initflow as inf

    tanh = inf.initializers.ACTIVATIONS["tanh"]
    w = torch.tensor([1.0, 1.5, 3.0], dtype=torch.float64)
    b = torch.tensor(0.05, dtype=torch.float64)
    print(inf.theory.fixed_points(tanh, w, b))  # tensor([0.1936, 0.4180, 1.4280], ...)


def theory_mean_fields() -> None:
    import torch

    import initflow as inf

    tanh = inf.initializers.ACTIVATIONS["tanh"]
    w = torch.linspace(0.5, 4, 8, dtype=torch.float64)
    b = torch.tensor([0.0, 0.05], dtype=torch.float64)
    plane = inf.theory.mean_fields(tanh, w[:, None], b)
    print(plane.chi_1.shape)  # torch.Size([8, 2])
    print(plane.chi_1[-1])  # tensor([1.3627, 1.3424], ...)


def theory_critical_line() -> None:
    import torch

    import initflow as inf

    tanh, relu, gelu = (inf.initializers.ACTIVATIONS[name] for name in ("tanh", "relu", "gelu"))
    b = torch.tensor([0.0, 0.05], dtype=torch.float64)
    print(inf.theory.critical_line(tanh, b))  # tensor([1.0000, 1.7610], ...)
    print(inf.theory.critical_line(relu, b))  # tensor([2., 2.], ...)
    print(inf.theory.critical_line(gelu, b))  # tensor([nan, nan], ...)


def theory_expectation() -> None:
    import torch

    import initflow as inf

    q = torch.tensor([1.0, 4.0], dtype=torch.float64)
    print(inf.theory.expectation(torch.abs, q))  # tensor([0.7979, 1.5958], ...)


def theory_pair_expectation() -> None:
    import torch

    import initflow as inf

    c = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    q = torch.ones_like(c)
    print(inf.theory.pair_expectation(torch.relu, q, c))  # tensor([0.1592, 0.3045, 0.5000], ...)


def theory_second_moment() -> None:
    import torch

    import initflow as inf

    relu = inf.initializers.ACTIVATIONS["relu"]
    q = torch.tensor([1.0, 4.0], dtype=torch.float64)
    print(inf.theory.second_moment(relu, q))  # tensor([0.5000, 2.0000], ...)


def theory_slope_moment() -> None:
    import torch

    import initflow as inf

    hardtanh = inf.initializers.Activation.of(torch.nn.functional.hardtanh)
    q = torch.tensor(1.0, dtype=torch.float64)
    print(inf.theory.slope_moment(hardtanh, q))  # tensor(0.6827, ...)


def theory_product_moment() -> None:
    import torch

    import initflow as inf

    relu = inf.initializers.ACTIVATIONS["relu"]
    c = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    q = torch.ones_like(c)
    print(inf.theory.product_moment(relu, q, c))  # tensor([0.1592, 0.3045, 0.5000], ...)


def theory_slope_product_moment() -> None:
    import torch

    import initflow as inf

    relu = inf.initializers.ACTIVATIONS["relu"]
    c = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    q = torch.ones_like(c)
    print(inf.theory.slope_product_moment(relu, q, c))  # tensor([0.2500, 0.3333, 0.5000], ...)


def TrainConfig() -> None:  # noqa: N802 - as the class is
    from dataclasses import replace

    import initflow as inf

    config = inf.TrainConfig(init="xavier", activation="tanh", dataset="digits", epochs=1)
    print(config.command("train"))  # initflow train --init xavier ...
    result = inf.train(replace(config, seed=1))
    print(result)  # <Training: xavier, tanh, 64-100-10, digits>


def SettingError() -> None:  # noqa: N802 - as the class is
    import initflow as inf

    try:
        inf.train(init="xavierr", dataset="digits")
    except inf.SettingError as error:  # or inf.InitflowError, which all of them are
        print(error)  # init must be one of ..., not 'xavierr' (did you mean 'xavier'?)
