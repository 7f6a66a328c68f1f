"""Proof: what a network's numbers follow from, trained again and compared bit for bit.

A trained network in, files out that anybody can verify; files in, a verdict out.
"""
