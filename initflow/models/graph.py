"""What a model's forward does, as a graph of operations: which tensor comes of which.

With a batch, a real forward is recorded, function by function, whatever decides what it calls;
without one, torch.fx traces the model. Operations are named as torch spells them (``linear``,
``relu``, ``add``), however they were called: as module, function, method or operator, in place or
not. What is computed of parameters alone (a parametrized weight) is a constant, and no operation.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

from initflow.errors import SettingError, cause
from initflow.models import batches, layers

INPUT, PART = "input", "getitem"
# Operators by other names, and the sides that they are called from.
SAME = {
    "radd": "add",
    "iadd": "add",
    "rmul": "mul",
    "imul": "mul",
    "isub": "sub",
    "multiply": "mul",
}
SAME |= {"itruediv": "div", "truediv": "div", "divide": "div", "subtract": "sub"}
# Functions of torch.nn.functional that are made of others, which are looked into.
COMPOSED = {"multi_head_attention_forward"}
# What torch.fx cannot look into, as it asks for sizes.
LEAVES = {
    nn.RNN: "rnn",
    nn.LSTM: "lstm",
    nn.GRU: "gru",
    nn.RNNCellBase: "rnn_cell",
    nn.MultiheadAttention: "multi_head_attention_forward",
    nn.modules.batchnorm._BatchNorm: "batch_norm",  # noqa: SLF001
    nn.modules.instancenorm._InstanceNorm: "instance_norm",  # noqa: SLF001
}


@dataclass(frozen=True, eq=False)
class Node:
    """One operation: ``function`` of ``arguments`` and ``keywords``, in which nodes are tensors.

    Other tensors in them are constants: parameters, buffers and what comes of these. ``shape`` is
    that of what it gives, None where that is no single tensor, or was traced without a batch.
    ``module`` is the name of the innermost module that calls it, "" for the model itself. ``call``
    does it again, on other tensors; ``value`` is what an ``input`` gives, where there is a batch.
    Of an operation that gives several tensors, each is a ``getitem`` of it.
    """

    function: str
    arguments: tuple[Any, ...] = ()
    keywords: Mapping[str, Any] = field(default_factory=dict)
    shape: tuple[int, ...] | None = None
    module: str = ""
    call: Callable[..., Any] | None = None
    value: Tensor | None = None

    @functools.cached_property
    def sources(self) -> list[Node]:
        """The nodes that it takes, in order."""
        return list(_nodes((self.arguments, dict(self.keywords))))

    @property
    def constants(self) -> list[Tensor]:
        """The tensors that it takes and that are no nodes: parameters, and what comes of these."""
        return list(batches.tensors((self.arguments, self.keywords)))

    def __repr__(self) -> str:
        return f"<{self.function} {self.shape or ''} in '{self.module}'>"


@dataclass(frozen=True)
class Graph:
    """The operations of one forward in the order in which they are done; ``outputs`` come last."""

    nodes: Sequence[Node]
    outputs: Sequence[Node]

    @functools.cached_property
    def places(self) -> Mapping[Node, int]:
        """Where each node stands among the others."""
        return {node: place for place, node in enumerate(self.nodes)}

    @functools.cached_property
    def users(self) -> Mapping[Node, Sequence[Node]]:
        """The nodes that take what a node gives."""
        found: dict[Node, list[Node]] = {node: [] for node in self.nodes}
        for node in self.nodes:
            for source in dict.fromkeys(node.sources):
                found[source].append(node)
        return found


def name_of(function: Callable[..., Any] | str) -> str:
    """A function as torch spells it: ``relu_``, ``Tensor.relu`` and ``F.relu`` are ``relu``."""
    name = function if isinstance(function, str) else str(getattr(function, "__name__", ""))
    if name == "__get__":  # a property, such as x.T
        name = str(getattr(getattr(function, "__self__", None), "__name__", ""))
    name = re.sub(r"^_+|_+$", "", name.partition(".")[0])
    return SAME.get(name, name)


def of_batch(model: nn.Module, batch: batches.Batch) -> Graph:
    """That of one forward on ``batch``; the model and torch's random state are left as they were.

    A batch that the model does not take is a :class:`SettingError`.
    """
    layers.check(model)
    recorder = _Recorder(_inputs(batch))
    names = {module: name for name, module in model.named_modules()}
    with (
        batches.undisturbed(model),
        torch.no_grad(),
        batches.refused(f"model takes no batch of {batch.form}"),
        recorder.naming(names),
        recorder,
    ):
        result = model(*batch.arguments, **batch.by_name)
    if recorder.error:
        raise recorder.error
    return Graph(recorder.nodes, list(dict.fromkeys(recorder.known(result))))


class _Recorder(TorchFunctionMode):
    """Notes every torch function that is called on what comes of the inputs."""

    def __init__(self, inputs: Iterable[Tensor]) -> None:
        super().__init__()
        self.nodes: list[Node] = []
        self.error: Exception | None = None
        self._of: dict[int, tuple[Tensor, Node]] = {}  # holds tensors, so that no id comes again
        self._modules: list[str] = []
        for x in inputs:
            self._add(x, Node(INPUT, shape=tuple(x.shape), value=x))

    @contextlib.contextmanager
    def naming(self, names: Mapping[nn.Module, str]) -> Iterator[None]:
        """Know which module calls."""

        def enter(module: nn.Module, _args: object) -> None:
            self._modules.append(names.get(module, ""))

        def leave(_module: nn.Module, _args: object, _output: object) -> None:
            self._modules.pop()

        before = register_module_forward_pre_hook(enter)
        after = register_module_forward_hook(leave, always_call=True)
        try:
            yield
        finally:
            before.remove()
            after.remove()

    def known(self, value: object) -> Iterator[Node]:
        """The nodes of all tensors in ``value``."""
        for x in batches.tensors(value):
            if id(x) in self._of:
                yield self._of[id(x)][1]

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = name_of(func)
        if name in COMPOSED and isinstance(func, FunctionType):
            with self:
                return _looked_into(func)(*args, **kwargs)
        result = func(*args, **kwargs)
        try:
            self._note(name, func, args, kwargs, result)
        except Exception as error:  # noqa: BLE001 - raised when the forward is done
            self.error = self.error or error
        return result

    def _note(
        self,
        name: str,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        result: object,
    ) -> None:
        given = [x for x in batches.tensors(result) if x.numel()]
        if not given or not any(True for _ in self.known((args, dict(kwargs)))):
            return
        module = self._modules[-1] if self._modules else ""
        arguments, keywords = _replaced(args, self._node), _replaced(dict(kwargs), self._node)
        if isinstance(result, Tensor):
            self._add(result, Node(name, arguments, keywords, tuple(result.shape), module, func))
            return
        whole = Node(name, arguments, keywords, None, module, func)
        self.nodes.append(whole)
        for i, x in enumerate(given):
            self._add(x, Node(PART, (whole, i), shape=tuple(x.shape), module=module))

    def _add(self, x: Tensor, node: Node) -> None:
        self.nodes.append(node)
        self._of[id(x)] = (x, node)

    def _node(self, x: Tensor) -> object:
        return self._of[id(x)][1] if id(x) in self._of else x


@functools.cache
def _looked_into(function: FunctionType) -> Callable[..., Any]:
    """The same function, but that it does not ask whether somebody overrides it as a whole."""
    names = {**function.__globals__, "has_torch_function": lambda *_: False}
    copy = FunctionType(
        function.__code__, names, function.__name__, function.__defaults__, function.__closure__
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def of_structure(model: nn.Module) -> Graph:
    """That of ``model`` as torch.fx traces it, without any batch, and so without shapes.

    Raises :class:`SettingError` where torch.fx cannot, as a batch is needed then.
    """
    layers.check(model)
    try:
        with batches.undisturbed(model):
            traced = _Tracer().trace(model)
    except Exception as error:  # whatever a forward does with what is no tensor
        raise SettingError(
            f"model cannot be traced without a batch, give one: {cause(error)}"
        ) from error
    nodes: dict[fx.Node, object] = {}
    found: list[Node] = []
    outputs: list[Node] = []
    modules = dict(model.named_modules())
    for each in traced.nodes:
        if each.op == "output":
            outputs = list(_nodes(_fx_replaced(each.args, nodes)))
            break
        made = _converted(each, model, modules, nodes)
        nodes[each] = made
        if isinstance(made, Node):
            found.append(made)
    return Graph(found, outputs)


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:  # noqa: ARG002
        return isinstance(m, (*LEAVES, nn.utils.parametrize.ParametrizationList))


def _converted(
    node: fx.Node, model: nn.Module, modules: Mapping[str, nn.Module], nodes: Mapping[fx.Node, Any]
) -> object:
    """A node of ours, or a constant."""
    target = node.target
    if node.op == "placeholder":
        return Node(INPUT)
    if node.op == "get_attr":
        return functools.reduce(getattr, str(target).split("."), model)
    arguments, keywords = _fx_replaced(node.args, nodes), _fx_replaced(node.kwargs, nodes)
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    module = str(stack[-1][0] if isinstance(stack[-1], tuple) else stack[-1]) if stack else ""
    call = target if callable(target) else None
    if node.op == "call_module":
        called = modules[str(target)]
        if isinstance(called, nn.utils.parametrize.ParametrizationList):
            return _of_parameters(called)
        name = next(name for kind, name in LEAVES.items() if isinstance(called, kind))
        return Node(name, arguments, keywords, None, str(target), called)
    if not any(True for _ in _nodes((arguments, keywords))) and callable(target):
        return target(*arguments, **keywords)  # of parameters alone
    name = name_of(target)
    if node.op == "call_method":
        call = getattr(Tensor, str(target), None)
    return Node(name, arguments, dict(keywords), None, module, call)


@torch.no_grad()
def _of_parameters(parametrized: nn.Module) -> Tensor:
    """The weight that is made, without what its making changes, as a spectral norm's estimate."""
    with batches.undisturbed(parametrized):
        weight: Tensor = parametrized()
    return weight


def _fx_replaced(value: Any, nodes: Mapping[fx.Node, Any]) -> Any:
    return fx.node.map_arg(value, lambda node: nodes[node])


def _inputs(batch: batches.Batch) -> Iterator[Tensor]:
    yield from batches.tensors((batch.arguments, dict(batch.by_name)))


def _nodes(value: object) -> Iterator[Node]:
    for each in batches.leaves(value):
        if isinstance(each, Node):
            yield each


def _replaced(value: Any, replace: Callable[[Tensor], object]) -> Any:
    if isinstance(value, Tensor):
        return replace(value)
    if isinstance(value, (tuple, list)):
        return tuple(_replaced(each, replace) for each in value)
    if isinstance(value, Mapping):
        return {name: _replaced(each, replace) for name, each in value.items()}
    return value
