"""What travels through a network, measured: signals, gradients, and the verdict on them.

A network and a batch in, quantities by layer out, of our stacks and of any PyTorch module. What is
measured is drawn by :mod:`initflow.reporting` and logged by :mod:`initflow.tracking`.
"""
