"""Any ``nn.Module``: which weights it holds, and how it is called on a batch.

A model of the user's comes in; what there is to fill, to measure and to predict goes out. Nothing
here runs a training, and nothing is written.
"""
