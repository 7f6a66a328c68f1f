"""The plane of σ_w² and σ_b²: the run, its numbers, its sentences and figure, bad settings."""

import json
import math
from pathlib import Path

import mlflow
import pandas as pd
import pytest
import torch

import initflow as inf
from initflow.reporting.pictures.planes import Mark
from initflow.theory.infinite_width import MeanField, mean_field

pytestmark = pytest.mark.usefixtures("whole_figures")

ACTIVATIONS = inf.initializers.ACTIVATIONS


def shown(**settings):
    """A small plane."""
    return inf.phase(**{"points": 9, "progress": False} | settings)


def artifact(result, name):
    """The path of a file of its run."""
    uri = mlflow.get_run(result.run_id).info.artifact_uri
    return Path(uri.removeprefix("file://")) / name


def test_the_run_has_every_number(store):
    """A row a cell, which pandas reads with its infinities; what the theory says at each."""
    result = shown(activation="tanh", inits="he,lecun", bias_init="zeros", sigma_w2_low=0)
    table = pd.read_csv(artifact(result, "phase.csv"))
    assert len(table) == 81
    for at in (4, 40, 80):
        row = table.iloc[at].to_dict()
        expected = mean_field(ACTIVATIONS["tanh"], row.pop("sigma_w2"), row.pop("sigma_b2"))
        assert row == pytest.approx(vars(expected), rel=1e-6, abs=1e-9)
    assert math.isinf(table[(table.sigma_w2 == 0.5) & (table.sigma_b2 == 0)].xi_c.item())
    written = json.loads(artifact(result, "phase.json").read_text())
    line = written["critical_line"]
    assert (line["sigma_w2"][0], line["sigma_b2"][0]) == (pytest.approx(1), 0)
    (he,) = [one for one in written["schemes"] if one["init"] == "he"]
    assert he["q_star"] == pytest.approx(0.61796, rel=2e-5)
    assert he["chi_1"] == pytest.approx(1.10553, rel=1e-5)
    metrics = mlflow.get_run(result.run_id).data.metrics
    assert metrics["chi_1/he"] == he["chi_1"]
    assert metrics["chi_1/lecun"] == pytest.approx(1)
    assert "xi_c/lecun" not in metrics  # it is infinite
    assert artifact(result, "phase.png").stat().st_size > 10_000


def test_each_scheme_is_told_its_side_of_the_line(store):
    """Ordered, chaotic, critical and without bound; and outside of the part that is shown."""
    by_init = {
        one["init"]: one["phase"]
        for one in shown(inits="he,lecun,pytorch,normal", bias_init="zeros").numbers()
    }
    assert by_init == {
        "he": "chaotic",
        "lecun": "critical",
        "pytorch": "ordered",
        "normal": "chaotic",
    }
    relu = shown(activation="relu", inits="he,normal,lecun", bias_init="zeros", width=50)
    assert relu.as_json()["numbers"][1]["q_star"] == "inf"
    critical, he, normal, lecun, outside = relu.conclusions
    assert critical == "relu is critical (χ₁ = 1) at σ_w² = 2, at every σ_b²."
    assert he.startswith("he (σ_w² = 2, σ_b² = 0) is critical: gradients neither grow nor shrink")
    assert "is unbounded: gradients grow, × χ₁ = 25 a layer, as the signal does" in normal
    assert lecun.endswith("critical is σ_w² = 2 (× 2).")
    assert outside == "Outside of this part of the plane: normal."
    gelu = shown(activation="gelu", inits="he")
    assert gelu.conclusions[1].endswith("; no σ_w² is critical at this σ_b².")
    low = shown(activation="gelu", inits="zero", sigma_b2_high=0.1)
    assert low.conclusions[0].startswith("gelu has no critical line at these σ_b²")
    assert "× χ₁ = 0 a layer" in low.conclusions[1]


def test_what_has_no_place_is_named(store, tmp_path):
    """A scheme that states no variance, and one that fills the network as a whole."""
    (tmp_path / "mine.py").write_text(
        "def silent(weight, generator): weight.normal_(generator=generator)\n"
        "def whole(network, generator): pass\n"
        "def biased(weight, bias, generator): weight.zero_()\n"
    )
    names = [f"{tmp_path}/mine.py:{name}" for name in ("silent", "whole", "biased")]
    result = shown(inits=["he", "zero", "identity", "constant", *names], width=1)
    assert [one["init"] for one in result.numbers()] == ["he", "zero"]
    identity, constant, silent, whole, biased = result.conclusions[-5:]
    for name, said in (("identity", identity), ("constant", constant)):
        assert (
            said
            == f"{name} is not marked: its weights are not drawn with mean 0, as theory has them."
        )
    assert silent.endswith("silent is not marked: it states no variance.")
    assert whole.endswith("whole is not marked: it fills the network as a whole, by what it sees.")
    assert biased.endswith("biased is not marked: it states no variance.")


def test_any_function_has_its_plane(store):
    """By its place, with whose it is; it is the built-in one's."""
    settings = {"points": 2, "inits": "he", "sigma_b2_low": 0.1}
    own, built_in = shown(activation="torch:relu", **settings), shown(activation="relu", **settings)
    for name, found in vars(own.plane.fields).items():
        assert torch.allclose(found, getattr(built_in.plane.fields, name), rtol=1e-5), name
    tags = mlflow.get_run(own.run_id).data.tags
    assert tags["initflow.activation"].startswith("torch ")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"activation": "tanhh"}, r"activation must be one of .*, not 'tanhh' \(did you mean"),
        ({"activation": "torch:nothing"}, "activation 'torch:nothing': .*nothing"),
        ({"activation": "torch:pi"}, "activation 'torch:pi' must name a function, not float"),
        ({"activation": "no.py:f"}, "activation 'no.py:f': there is no file 'no.py'"),
        ({"activation": "torch:cumsum"}, "activation must take a tensor in double precision"),
        ({"activation": "torch:log"}, "activation must give finite numbers; log gives"),
        ({"activation": "torch:zeros_like"}, "activation must not be 0 everywhere"),
        ({"inits": "hee"}, "init.* must be one of .*not 'hee'"),
        ({"inits": "he,he"}, "inits must be schemes between commas, none twice, not 'he,he'"),
        ({"sigma_w2_low": 4}, "sigma_w2_low must be below sigma_w2_high, not '4' with sig.*=4$"),
        ({"sigma_b2_high": 0}, "sigma_b2_low must be below sigma_b2_high, not '0' with sig.*=0$"),
        ({"sigma_w2_high": -1}, "sigma_w2_high must be a number from 0 to 1e6, not '-1'"),
        ({"sigma_w2_high": "nan"}, "sigma_w2_high must be a number from 0 to 1e6, not 'nan'"),
        ({"points": 1}, "points must be a whole number, at least 2 and at most 1000, not '1'"),
        ({"width": 0}, "width must be a whole number, at least 1"),
        ({"bias_init": "ones"}, "bias_init must be one of pytorch, zeros"),
    ],
)
def test_wrong_settings_are_one_line(store, settings, said):
    """Before a run is made."""
    with pytest.raises(inf.SettingError, match=said) as caught:
        shown(**settings)
    assert "\n" not in str(caught.value)
    assert not mlflow.search_runs(search_all_experiments=True, output_format="list")


def test_a_scheme_without_weights_is_told_what_is_critical():
    """There is no factor that makes it so."""
    field = MeanField(0.0, 0.0, 1.0, 0.0, 0.0)
    assert Mark("zero", 0.0, 0.0, field, 1.0).sentence().endswith("; critical is σ_w² = 1.")
