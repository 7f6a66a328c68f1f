"""Models of published tables that are none of the built-in ones, by place.

A table's file names one as ``model = "initflow.models.published_models:normalized_cnn"``.
"""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

Shape = tuple[int, ...]


def normalized_cnn(shape: Shape, classes: int) -> nn.Module:
    """Two convolutions and two fully connected layers, with batch normalization; for 28 × 28.

    Convolutions of 10 and 20 channels, 5 × 5 without padding, each pooled 2 by 2, normalized and
    then rectified; 50 units, normalized and rectified; the classes. It is the network of the table
    ``normalized-cnn``, and starts with the scales of the normalizations that PyTorch drew when that
    was made, from U(0, 1).
    """
    channels, *_ = shape
    model = nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(channels, 10, 5),
            pool1=nn.MaxPool2d(2),
            norm1=nn.BatchNorm2d(10),
            relu1=nn.ReLU(),
            conv2=nn.Conv2d(10, 20, 5),
            pool2=nn.MaxPool2d(2),
            norm2=nn.BatchNorm2d(20),
            relu2=nn.ReLU(),
            flat=nn.Flatten(),
            fc1=nn.Linear(320, 50),
            norm3=nn.BatchNorm1d(50),
            relu3=nn.ReLU(),
            fc2=nn.Linear(50, classes),
        )
    )
    for module in model:
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            nn.init.uniform_(module.weight)
    return model
