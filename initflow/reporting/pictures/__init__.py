"""The pictures of the theory: the plane of variances, trainable depth, learning rates, spectra.

For each what its numbers come to, in words and as figures; nothing here knows how they were had.
"""
