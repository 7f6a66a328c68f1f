"""The largest learning rate that gradient descent bears where the loss is a quadratic.

Along an eigenvector of the Hessian with eigenvalue λ > 0, a step is linear in where it stands, and
shrinks what it starts from while both roots z of a polynomial are less than 1 in size. At the
largest rate η one of them is -1:

- plain: z = 1 - ηλ, so η = 2/λ;
- with momentum β (Polyak 1964): z² - (1 + β - ηλ)z + β = 0, so η = 2(1 + β)/λ;
- in Nesterov's form: z² - (1 + β)(1 - ηλ)z + β(1 - ηλ) = 0, so η = 2(1 + β)/((1 + 2β)λ).

So far a quadratic. A network's Hessian moves: at rates somewhat above that of its start the loss
rises first, and the weights go to where it is flatter (Lewkowycz et al. 2020, "The large learning
rate phase of deep learning: the catapult mechanism", up to about twice the rate for a wide network
with the squared error, and more with ReLU).
"""

from __future__ import annotations


def largest_stable_rate(
    eigenvalue: float, momentum: float = 0.0, *, nesterov: bool = False
) -> float:
    """What SGD bears along an eigenvector of a positive ``eigenvalue``."""
    damping = 1 + 2 * momentum if nesterov else 1.0
    return 2 * (1 + momentum) / (damping * eigenvalue)
