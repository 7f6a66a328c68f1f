"""A device that is none: its tensors lie on the CPU, and refuse to meet those of the CPU.

What a training does on a GPU can so be followed on a machine without one: where devices are mixed,
or numpy is handed what lies on the other one, that fails here as it does there. Of a GPU's kernels
and of its graphs it says nothing.
"""

import contextlib
import re
from dataclasses import dataclass, replace

import pytest
import torch
from torch.utils import backend_registration
from torch.utils._pytree import tree_leaves, tree_map_only

from initflow.core import environment, machine
from initflow.experiments.replay import recorded

DEVICE = "privateuseone:0"  # the one that PyTorch keeps free for such
aten = torch.ops.aten
BETWEEN = (aten.copy_.default, aten._to_copy.default)  # may have tensors of both devices
NO_TENSORS = (aten._local_scalar_dense.default, aten.equal.default, aten.is_nonzero.default)


@dataclass
class Work:
    """What was done there: operations, and those among them that read numbers from there."""

    operations: int = 0
    reads: int = 0


DONE = Work()  # until now


@contextlib.contextmanager
def work():
    """What is done there meanwhile."""
    before, seen = replace(DONE), Work()
    yield seen
    seen.operations = DONE.operations - before.operations
    seen.reads = DONE.reads - before.reads


class Elsewhere(torch.Tensor):
    """A tensor there, whose numbers are those of ``inner``."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
        )

    def __init__(self, inner):
        self.inner = inner

    def tolist(self):
        DONE.operations += 1
        DONE.reads += 1
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [one for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)]
        there = {id(one.inner): one for one in tensors if isinstance(one, cls)}
        here = [one for one in tensors if not isinstance(one, cls) and one.dim()]
        if there and here and operation not in BETWEEN:
            raise RuntimeError(f"{operation}: not all tensors are on the same device")
        stays = torch.device(kwargs.get("device") or DEVICE) == torch.device(DEVICE)
        if operation is aten.copy_.default:
            stays = isinstance(args[0], cls)
        if "device" in kwargs:
            kwargs = {**kwargs, "device": torch.device("cpu")}
        result = operation(
            *tree_map_only(cls, lambda one: one.inner, args),
            **tree_map_only(cls, lambda one: one.inner, kwargs),
        )
        DONE.operations += 1
        if (there and not stays) or operation in NO_TENSORS:
            DONE.reads += 1
        if not stays or operation in NO_TENSORS:
            return result
        # What was written into is the same tensor as before.
        return tree_map_only(
            torch.Tensor, lambda one: there[id(one)] if id(one) in there else cls(one), result
        )


def _registered():
    """What makes tensors there, of none and of the CPU's."""
    library = torch.library.Library("aten", "IMPL")
    for operation in (aten.empty.memory_format, aten.empty_strided.default, aten.copy_.default):

        def carry_out(*args, operation=operation, **kwargs):
            return Elsewhere.__torch_dispatch__(operation, (), args, kwargs)

        library.impl(operation, carry_out, "PrivateUse1")
    return library


# Tests that need the device are marked so, as older versions of PyTorch do not have it.
possible = pytest.mark.needs("torch>=2.10")
if hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
    backend_registration._setup_privateuseone_for_python_backend()
    _LIBRARY = _registered()


def be_found(patch):
    """Let ``device=auto`` be this one."""
    patch.setattr(machine, "device", lambda asked: "cpu" if asked == "cpu" else DEVICE)
    patch.setattr(machine, "working_memory", lambda _: 2**30)
    patch.setattr(environment, "_gpu", lambda device: {} if device == "cpu" else {"gpu": "?"})
    patch.setattr(torch.cuda, "get_device_name", lambda _: "Elsewhere")
    patch.setattr(recorded, "DEVICE", re.compile(f"cpu|{DEVICE}"))
