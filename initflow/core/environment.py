"""What the bits of a run's numbers depend on, without any secret: to record, show and compare.

What never changes in a process is looked up once; the rest is read each time, and is cheap.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import re
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch

import initflow
from initflow.core import machine, paths, repository
from initflow.core.repository import UNKNOWN
from initflow.core.secrets import without_credentials
from initflow.errors import LONGEST, shortened

# The only environment variables that are recorded: they choose kernels and how sums are split.
VARIABLES = (
    "ATEN_CPU_CAPABILITY",
    "CUBLAS_WORKSPACE_CONFIG",
    "DNNL_DEFAULT_FPMATH_MODE",
    "DNNL_MAX_CPU_ISA",
    "GLIBC_TUNABLES",
    "MKL_CBWR",
    "MKL_DYNAMIC",
    "MKL_ENABLE_INSTRUCTIONS",
    "MKL_NUM_THREADS",
    "NVIDIA_TF32_OVERRIDE",
    "OMP_DYNAMIC",
    "OMP_NUM_THREADS",
    "ONEDNN_DEFAULT_FPMATH_MODE",
    "ONEDNN_MAX_CPU_ISA",
    "OPENBLAS_CORETYPE",
    "OPENBLAS_NUM_THREADS",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
)
TAGGED = ("source_sha256", "python", "torch", "blas", "cpu_capability", "threads", "deterministic")
# The parts of an environment, each with a prefix of its names in a comparison, and with what stands
# for a name that one side does not have.
PARTS = {
    "facts": ("", UNKNOWN),
    "variables": ("variable ", "not set"),
    "packages": ("package ", "not installed"),
}
# What a processor's flags say of its arithmetic, on x86 and on ARM.
ARITHMETIC = r"s?sse|avx|fma|f16c|amx|asimd|sve|sme(?!p)|bf16|i8mm|fphp"


@dataclass(frozen=True)
class Environment:
    """What numbers were, or would be, computed with.

    ``facts`` stand in the order in which a difference is worth naming; ``packages`` are the
    installed distributions, their normalized names with their versions, sorted; ``variables``
    are those of :data:`VARIABLES` that are set.
    """

    facts: Mapping[str, str]
    packages: Mapping[str, str]
    variables: Mapping[str, str]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


class Change(NamedTuple):
    """A fact, variable or package that was another ``then`` than ``now``."""

    what: str
    then: str
    now: str


def current(device: str) -> Environment:
    """The environment of this process now, on the resolved ``device`` (cpu, cuda:N)."""
    facts = {
        "initflow": initflow.__version__,
        "source_sha256": source_sha256(),
        **_build(),
        "device": device,
        **_gpu(device),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        **_cpu(),
        "threads": str(torch.get_num_threads()),
        "interop_threads": str(torch.get_num_interop_threads()),
        **_settings(device),
        "python": platform.python_version(),
        "system": _system(),
        "git_commit": repository.current().commit,
        "git_tree": repository.current().tree,
    }
    return Environment(facts, dict(_packages()), _variables())


def differences(then: Mapping[str, Any], now: Environment) -> list[Change]:
    """What is not as it was: facts first, in their order, then variables, then packages.

    ``then`` is what :meth:`Environment.as_json` returned, perhaps read from somebody's file:
    whatever its types, each difference is printable text in one line of bounded length.
    """
    here = now.as_json()
    found = []
    for part, (prefix, absent) in PARTS.items():
        there = then.get(part) if isinstance(then, Mapping) else None
        there = there if isinstance(there, Mapping) else {}
        gone = sorted(n for n in there if isinstance(n, str) and n not in here[part])
        for name in [*here[part], *gone]:
            before, after = there.get(name, absent), here[part].get(name, absent)
            if before != after:
                found.append(Change(prefix + _line(name), _line(before), _line(after)))
    return found


def tags() -> dict[str, str]:
    """The few tags that each MLflow run gets; no other program is started for them."""
    facts = {
        "source_sha256": source_sha256(),
        **_build(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": str(torch.get_num_threads()),
        "deterministic": _deterministic(),
        "python": platform.python_version(),
    }
    named = {f"initflow.env.{name}": facts[name] for name in TAGGED}
    return {"initflow.version": initflow.__version__, **named}


def shown(device: str) -> dict[str, str]:
    """What a result was computed with, as a report shows it."""
    installed = _packages()
    chip = processor() if device == "cpu" else torch.cuda.get_device_name(device)
    return {
        "initflow": initflow.__version__,
        **{name: installed.get(name, UNKNOWN) for name in ("torch", "mlflow", "numpy", "scipy")},
        "Python": platform.python_version(),
        "system": platform.platform(),
        "device": f"{device} ({chip})",
        "threads": str(torch.get_num_threads()),
    }


def processor() -> str:
    """The CPU's name, as far as it is known."""
    return _cpuinfo().get("model name") or platform.processor() or platform.machine()


@functools.cache
def source_sha256() -> str:
    """The hash of the package's modules, which differs in an edited checkout of one version.

    With those of the plugins that come with it, so that a checkout and its wheel have the same.
    """
    digest, package = hashlib.sha256(), Path(initflow.__file__).parent
    modules = {file.relative_to(package).as_posix(): file for file in package.rglob("*.py")}
    for home in paths.shipped_plugins():
        for file in home.glob("src/*.py"):
            modules[f"shipped/plugins/{home.name}/src/{file.name}"] = file
    try:
        for name, file in sorted(modules.items()):
            content = file.read_bytes()
            digest.update(f"{name} {len(content)}\n".encode() + content)
    except OSError:
        return UNKNOWN
    return digest.hexdigest()


@functools.cache
def _build() -> dict[str, str]:
    """PyTorch and the libraries that it was built with."""
    config, version = torch.__config__.show(), torch.version
    # The other lines also say what was found here: a device, the kernels that the CPU gets.
    build = hashlib.sha256(_found(r"Build settings: (.*)", config).encode()).hexdigest()
    made = {"git": version.git_version, "CUDA": version.cuda, "HIP": version.hip}
    named = [f"{name} {value}" for name, value in made.items() if value]
    return {
        "torch": torch.__version__,
        "torch_build": ", ".join([*named, f"settings {build}"]),
        "blas": _found(r"Math Kernel Library Version (\S+)", config, "MKL ")
        or _found(r"BLAS_INFO=(\w+)", config)
        or UNKNOWN,
        "lapack": _found(r"LAPACK_INFO=(\w+)", config) or UNKNOWN,
        "onednn": _found(r"MKL-DNN v(\S+)", config) or "none",
    }


@functools.cache
def _gpu(device: str) -> dict[str, str]:
    """Nothing for the CPU."""
    if device == "cpu":
        return {}
    its = torch.cuda.get_device_properties(device)
    try:
        driver = Path("/proc/driver/nvidia/version").read_text()  # Linux only
    except OSError:
        driver = ""
    return {
        "gpu": f"{its.name}, compute capability {its.major}.{its.minor}, "
        f"{its.multi_processor_count} multiprocessors",
        "gpu_driver": _found(r"Kernel Module.*? (\d+\.[\d.]+)", driver) or UNKNOWN,
        "cudnn": str(torch.backends.cudnn.version()),  # type: ignore[no-untyped-call]
    }


@functools.cache
def _cpuinfo() -> dict[str, str]:
    """The first processor's entries in Linux's /proc/cpuinfo; none on other systems."""
    try:
        first = Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


@functools.cache
def _cpu() -> dict[str, str]:
    """The processor and its instructions: libraries choose their kernels by more than its name."""
    info = _cpuinfo()
    kinds = ("cpu family", "model", "CPU implementer", "CPU part")
    flags = (info.get("flags") or info.get("Features") or "").split()
    more = [f"{kind} {info[kind]}" for kind in kinds if kind in info]
    instructions = sorted(flag for flag in flags if re.match(ARITHMETIC, flag))
    return {
        "cpu": ", ".join([processor(), *more]),
        "cpu_instructions": " ".join(instructions) or UNKNOWN,
    }


@functools.cache
def _system() -> str:
    """Without the kernel's version: it changes no number, the C library's functions may."""
    return " ".join(filter(None, [platform.system(), platform.machine(), *platform.libc_ver()]))


def _settings(device: str) -> dict[str, str]:
    """What PyTorch lets one set that changes bits on this kind of device."""
    backends: Any = torch.backends  # its modules make up some attributes as they are requested
    found = {
        "deterministic": _deterministic(),
        "default_dtype": str(torch.get_default_dtype()).removeprefix("torch."),
        "flush_denormal": _flag(sys.float_info.min / 2 == 0.0),
        "onednn_enabled": _flag(backends.mkldnn.enabled),
        "onednn_deterministic": _flag(backends.mkldnn.deterministic),
        "onednn_float32": _precisions("cpu"),
    }
    if device != "cpu":
        found |= {
            "cuda_float32": _precisions(device),
            "cudnn_enabled": _flag(backends.cudnn.enabled),
            "cudnn_deterministic": _flag(backends.cudnn.deterministic),
            "cudnn_benchmark": _flag(backends.cudnn.benchmark),
        }
    return found


def _deterministic() -> str:
    return ("off", "warn only", "on")[torch.get_deterministic_debug_mode()]


def _precisions(device: str) -> str:
    """Read by PyTorch's new names, as the old ones raise where a user has set the new ones."""
    backends: Any = torch.backends
    if not machine.has_new_names():
        tf32 = device != "cpu" and backends.cuda.matmul.allow_tf32
        bf16 = device == "cpu" and torch.get_float32_matmul_precision() == "medium"
        matmul = "tf32" if tf32 else "bf16" if bf16 else "ieee"
        conv = "tf32" if device != "cpu" and backends.cudnn.allow_tf32 else "ieee"
        return f"matmul {matmul}, conv {conv}"
    matmul, conv = (
        (backends.mkldnn.matmul, backends.mkldnn.conv)
        if device == "cpu"
        else (backends.cuda.matmul, backends.cudnn.conv)
    )
    text = f"matmul {matmul.fp32_precision}, conv {conv.fp32_precision}"
    return text.replace("none", "ieee")  # nothing chosen is exact, too


@functools.cache
def _packages() -> dict[str, str]:
    """Read from the head of each one's metadata: to parse it all takes 20 times longer."""
    found: dict[str, str] = {}
    for distribution in metadata.distributions():
        texts = map(distribution.read_text, ("METADATA", "PKG-INFO", ""))
        try:
            head = next(filter(None, texts), "").partition("\n\n")[0]
        except (OSError, ValueError):
            continue
        name, version = _found(r"^Name: (\S+)", head), _found(r"^Version: (\S+)", head)
        # The first on the path is the one that is imported.
        found.setdefault(re.sub(r"[-_.]+", "-", name).lower(), version or UNKNOWN)
    found.pop("", None)
    return dict(sorted(found.items()))


def _variables() -> dict[str, str]:
    """Those that are set. A long one is not cut: half an address would show its password."""
    return {
        name: _line(without_credentials(value)) if len(value) <= LONGEST else "(too long)"
        for name in VARIABLES
        if (value := os.environ.get(name)) is not None
    }


def _found(pattern: str, text: str, before: str = "") -> str:
    """What the pattern's group is in ``text``, after ``before``; empty where it is not there."""
    found = re.search(pattern, text, re.MULTILINE)
    return before + found[1] if found else ""


def _flag(value: object) -> str:
    return str(bool(value)).lower()


def _line(value: object) -> str:
    if not isinstance(value, str):
        return "(no text)"
    return "".join(c if c.isprintable() else "�" for c in shortened(value))
