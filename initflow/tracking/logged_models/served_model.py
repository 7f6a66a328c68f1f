"""How MLflow calls a network that initflow logged, also in ``mlflow models serve``.

A copy of this file lies in each logged model, so that it is loaded where initflow is not installed:
it needs MLflow, PyTorch and NumPy alone.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
from mlflow.exceptions import MlflowException
from mlflow.models import Model
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE

PIXELS = "pixels"  # the number of them, in the metadata of a logged model


class InputError(MlflowException):
    """Images that are none; its message stays one line.

    MLflow's server would put the whole input before it.
    """

    @property
    def message(self) -> str:
        return self._message

    @message.setter
    def message(self, text: str) -> None:
        self._message = getattr(self, "_message", text)


class Classifier:
    """The network as MLflow's flavor for PyTorch loads it, for images of any type of number."""

    def __init__(self, wrapped: Any, pixels: int) -> None:
        self._wrapped = wrapped
        self.pixels = pixels

    def get_raw_model(self) -> Any:
        """The module."""
        return self._wrapped.get_raw_model()

    def predict(self, data: Any, params: dict[str, Any] | None = None) -> Any:
        """(n, classes) float32, the logits of n images; a frame with its index where one is given.

        ``data``: an array, list or DataFrame of numbers, (n, pixels) or with as many pixels in more
        axes, or a DataFrame with a column of lists. Others are an :class:`InputError`.
        """
        logits = self._wrapped.predict(self._images(data), params)
        return type(data)(logits, index=data.index) if _is_frame(data) else logits

    def _images(self, data: Any) -> np.ndarray[Any, np.dtype[np.float32]]:
        expected = f"this model takes images of {self.pixels} pixels, as numbers of shape "
        expected += f"(n, {self.pixels})"
        if _is_frame(data) and data.shape[1] == 1 < self.pixels:
            data = data.iloc[:, 0].tolist()
        try:
            images = np.array(data, dtype=np.float32, order="C")  # PyTorch wants it writable
        except (TypeError, ValueError) as error:
            what = "lists of several lengths" if "inhomogeneous" in str(error) else "other values"
            raise InputError(f"{expected}, not {what}", INVALID_PARAMETER_VALUE) from error
        if images.ndim > 2:
            images = images.reshape(len(images), -1)
        if images.ndim != 2 or images.shape[1] != self.pixels:
            raise InputError(f"{expected}, not {images.shape}", INVALID_PARAMETER_VALUE)
        return images


def _is_frame(data: Any) -> bool:
    """By what it has, as pandas itself is not needed here."""
    return hasattr(data, "iloc") and hasattr(data, "columns")


def _load_pyfunc(path: str, model_config: dict[str, Any] | None = None) -> Classifier:
    """Called by MLflow with the folder of the model's data."""
    flavor = mlflow.pytorch
    if hasattr(flavor, "_EXPORTED_TORCH_MODEL_FILE_NAME"):
        wrapped = flavor._load_pyfunc(path, model_config)  # noqa: SLF001
    else:  # older versions of MLflow load no such archive
        # By its name, as torch is loaded where a model is, not where one is written.
        load = importlib.import_module("torch.export").load
        module = load(Path(path, "model.pt2")).module()
        wrapped = flavor._PyTorchWrapper(module, device="cpu")  # noqa: SLF001
    saved = Model.load(str(Path(path).parent)).metadata or {}
    return Classifier(wrapped, int(saved[PIXELS]))
