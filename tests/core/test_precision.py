"""TF32 is what the setting says while something runs on CUDA, and then what it was before."""

import pytest
import torch

from initflow.core import environment, machine
from initflow.errors import SettingError

backends = torch.backends
READ = {
    "all": lambda: backends.fp32_precision,
    "cudnn": lambda: backends.cudnn.fp32_precision,
    "matmul": lambda: backends.cuda.matmul.fp32_precision,
    "conv": lambda: backends.cudnn.conv.fp32_precision,
    "rnn": lambda: backends.cudnn.rnn.fp32_precision,
    "matmul of the CPU": lambda: backends.mkldnn.matmul.fp32_precision,
    "conv of the CPU": lambda: backends.mkldnn.conv.fp32_precision,
    "old": lambda: backends.cuda.matmul.allow_tf32,
    "old cudnn": lambda: backends.cudnn.allow_tf32,
    "old products": torch.get_float32_matmul_precision,
}
new_names = pytest.mark.needs("torch>=2.9")
USED = ("matmul", "conv", "rnn")  # what kernels on CUDA go by


def said():
    """All that PyTorch says of it, and where it raises an error instead."""

    def one(read):
        try:
            return read()
        except RuntimeError:
            return "mixed"

    return {name: one(read) for name, read in READ.items()}


def of_cuda(name, value):
    return lambda: setattr(getattr(backends.cudnn, name), "fp32_precision", value)


# What a process may have set before.
PROCESSES = {
    "nothing": lambda: None,
    "products, the old way": lambda: setattr(backends.cuda.matmul, "allow_tf32", True),
    "products, the new way": lambda: setattr(backends.cuda.matmul, "fp32_precision", "tf32"),
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "all": lambda: setattr(backends, "fp32_precision", "tf32"),
    "all exact": lambda: setattr(backends, "fp32_precision", "ieee"),
    "all of cudnn exact": lambda: setattr(backends.cudnn, "fp32_precision", "ieee"),
    "all of the CPU's": lambda: setattr(backends.mkldnn, "fp32_precision", "bf16"),
    "no cudnn": lambda: setattr(backends.cudnn, "allow_tf32", False),
    "no convolution": of_cuda("conv", "ieee"),
    "no recurrent one": of_cuda("rnn", "ieee"),
    "the CPU's": lambda: setattr(backends.mkldnn.matmul, "fp32_precision", "bf16"),
}


@pytest.fixture(params=PROCESSES)
def before(request):
    """What PyTorch says in such a process."""
    try:
        PROCESSES[request.param]()
        yield said()
    finally:
        backends.fp32_precision = backends.mkldnn.fp32_precision = "none"
        torch.set_float32_matmul_precision("highest")
        backends.cudnn.allow_tf32 = True
        backends.cuda.matmul.fp32_precision = backends.mkldnn.matmul.fp32_precision = "none"
    assert said()["conv"] == said()["rnn"] == "tf32"


@new_names
@pytest.mark.parametrize(("allowed", "expected"), [(False, "ieee"), (True, "tf32")])
def test_it_is_what_is_said_and_then_what_it_was(before, allowed, expected):
    """Whatever the process had set, the old way, the new way or not at all; after an error too."""
    with machine.tf32("cuda:0", allowed=allowed):
        assert {said()[name] for name in USED} == {expected}
        facts = environment._settings("cuda:0")
    assert facts["cuda_float32"] == f"matmul {expected}, conv {expected}"
    assert said() == before
    with (
        pytest.raises(ZeroDivisionError),
        machine.tf32("cuda:0", allowed=not allowed),
        machine.tf32("cuda:0", allowed=allowed),
    ):
        _ = said()["matmul"] == expected and 1 / 0
    assert said() == before


@new_names
@pytest.mark.parametrize("wider", [backends, backends.cudnn], ids=["all", "cudnn"])
def test_what_follows_a_wider_setting_goes_on_to(wider):
    """When that is changed later; what had the same value by itself, as convolutions, keeps it."""
    try:
        wider.fp32_precision = "tf32"
        with machine.tf32("cuda:0", allowed=False):
            assert said()["matmul"] == said()["conv"] == "ieee"
        wider.fp32_precision = "ieee"
        assert (said()["matmul"], said()["conv"]) == ("ieee", "tf32")
    finally:
        wider.fp32_precision = "none"


@new_names
def test_old_names_can_be_read_meanwhile():
    """As compilers and models do; PyTorch raises where the new names say something else."""
    for allowed in (False, True):
        with machine.tf32("cuda:0", allowed=allowed):
            assert said()["old"] == said()["old cudnn"] == allowed
            assert said()["old products"] == ("high" if allowed else "highest")
            with backends.cudnn.flags(enabled=False, allow_tf32=allowed):
                assert said()["conv"] == ("tf32" if allowed else "none")


@new_names
def test_nothing_changes_for_the_cpu(before):
    """Where what a process has set stays its own affair, and is recorded."""
    with machine.tf32("cpu", allowed=False):
        assert said() == before


def test_older_versions_of_pytorch_have_the_old_names_alone(monkeypatch):
    """Before 2.9."""

    class Matmul:
        allow_tf32 = property(lambda _: torch.get_float32_matmul_precision() != "highest")

    monkeypatch.setattr(backends.cuda, "matmul", Matmul())
    for allowed, expected in ((False, "ieee"), (True, "tf32")):
        with machine.tf32("cuda:0", allowed=allowed):
            assert torch.get_float32_matmul_precision() == ("high" if allowed else "highest")
            assert backends.cudnn.allow_tf32 == allowed
            facts = environment._settings("cuda:0")
        assert facts["cuda_float32"] == f"matmul {expected}, conv {expected}"
        assert facts["onednn_float32"] == "matmul ieee, conv ieee"
    assert torch.get_float32_matmul_precision() == "highest"
    assert backends.cudnn.allow_tf32
    monkeypatch.undo()
    if machine.has_new_names():
        backends.mkldnn.matmul.fp32_precision = "none"


@pytest.mark.parametrize(
    ("device", "override", "message"),
    [
        ("cuda:0", None, None),
        ("cuda:0", "1", None),
        ("cpu", None, "tf32 must be false with device=cpu, not 'true': it is for CUDA, by device="),
        ("cuda:0", "0", "tf32 must be false where the environment says NVIDIA_TF32_OVERRIDE=0"),
    ],
)
def test_where_there_is_none_it_is_refused(monkeypatch, device, override, message):
    """In one line that says what would be right; that it is not asked for is right everywhere."""
    monkeypatch.delenv("NVIDIA_TF32_OVERRIDE", raising=False)
    if override is not None:
        monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", override)
    machine.check_tf32(device, tf32=False)
    if message is None:
        machine.check_tf32(device, tf32=True)
        return
    with pytest.raises(SettingError, match=message):
        machine.check_tf32(device, tf32=True)
