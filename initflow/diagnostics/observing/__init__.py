"""What a running module does inside: when it is called, by which functions, on which tensors.

Nothing is left on a module or on its tensors, and what is computed once more is computed beside it.
:mod:`initflow.diagnostics.recorder` makes numbers of it.
"""
