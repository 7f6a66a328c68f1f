"""A diagnosis with the spectrum of the Jacobian: what it says, logs and draws."""

import json
from pathlib import Path

import mlflow
import pytest

import initflow as inf
from initflow.core.configurations import DiagnoseConfig
from initflow.errors import SettingError

pytestmark = pytest.mark.usefixtures("whole_figures")

SETTINGS = {
    "inits": "he,orthogonal,identity",
    "activations": "linear,relu",
    "depth": 6,
    "width": 20,
    "bias_init": "zeros",
    "dataset": "digits",
    "probe": 50,
    "threads": 1,
}


def artifact(run, name):
    return mlflow.artifacts.download_artifacts(run_id=run.info.run_id, artifact_path=name)


def test_a_diagnosis_has_the_spectrum_of_each_network(store):
    """Metrics, all singular values, a figure of each network and of all, and a sentence on each."""
    diagnosis = inf.diagnose(**SETTINGS, spectrum=True)
    assert not diagnosis.problems()
    assert list(diagnosis.figures()) == ["schemes_by_layer", "spectrum"]
    said = [line for line in diagnosis.conclusions if "singular values" in line]
    assert len(said) == 6
    assert said[2].startswith("orthogonal linear: 95 % of the Jacobian's singular values")
    assert ["dynamical isometry" in line for line in said] == [
        False,
        False,
        True,
        False,
        True,
        False,
    ]
    table = diagnosis.to_pandas()
    assert table["condition_number/hidden"][2] == pytest.approx(1, abs=1e-4)
    runs = mlflow.search_runs(search_all_experiments=True, output_format="list")
    runs = {run.info.run_name: run for run in runs}
    parent = runs.pop("diagnose 64-20x6-10 digits seed 0")
    assert Path(artifact(parent, "spectrum.png")).stat().st_size > 10_000
    for name, run in runs.items():
        assert Path(artifact(run, "spectrum.png")).stat().st_size > 10_000
        of_file = json.loads(Path(artifact(run, "spectrum.json")).read_text())
        metrics = run.data.metrics
        assert metrics["ntk_largest_eigenvalue"] == of_file["ntk_largest_eigenvalue"] > 0
        jacobians = of_file["jacobians"]
        assert list(jacobians) == ["hidden", "input_output", *(f"fc{n}" for n in range(1, 8))]
        hidden = jacobians["hidden"]["measured"]
        assert metrics["largest_singular_value/hidden"] == hidden["largest_singular_value"]
        # ReLU leaves some directions out, and no metric is infinite.
        is_infinite = hidden["condition_number"] == "inf"
        assert is_infinite == ("relu" in name)
        assert is_infinite == ("condition_number/hidden" not in metrics)
        assert ("not_predicted" in jacobians["hidden"]) == name.startswith("identity")
        rows = Path(artifact(run, "spectrum.csv")).read_text().splitlines()
        # 16 images: 20 of hidden, 10 of the whole, 20 of each of six layers, 10 of the last.
        assert len(rows) == 1 + 16 * (20 + 10 + 6 * 20 + 10)


def test_without_it_there_is_none(store):
    """It is only measured where it is asked for."""
    diagnosis = inf.diagnose(**SETTINGS | {"inits": "he", "activations": "relu"})
    (run,) = [
        run
        for run in mlflow.search_runs(search_all_experiments=True, output_format="list")
        if run.info.run_name.startswith("he relu")
    ]
    assert "spectrum" not in diagnosis.figures()
    assert not [key for key in run.data.metrics if "singular" in key or "ntk" in key]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"spectrum": "perhaps"}, "spectrum must be true or false, not 'perhaps'"),
        ({"spectrum": True, "model": "cnn"}, "spectrum=true is for model=mlp, not for 'cnn'"),
    ],
)
def test_a_wrong_setting_is_an_error(settings, message):
    """In one line that says what would be right."""
    with pytest.raises(SettingError, match=message):
        DiagnoseConfig(**settings)
