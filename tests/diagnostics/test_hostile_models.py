"""What watches a training never ends it, and changes none of its bits, whatever the model."""

import contextlib

import mlflow
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mlflow.utils import validation
from torch import nn
from torch.nn.utils import parametrizations, weight_norm
from torch.utils.checkpoint import checkpoint

import initflow
from initflow.tracking import runs
from tests.diagnostics.test_inspection import hooks_on


class Odd(Exception):  # noqa: N818 - it is the training's own
    """What a module of the training raises, and the training catches."""


class Tagged(torch.Tensor):
    """A tensor of one's own type, which stays so through all functions."""


class Refusing(torch.Tensor):
    """One that knows no function but those that training needs."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in {"vector_norm", "sum", "unique", "isfinite", "detach"}:
            raise Odd
        return super().__torch_function__(func, types, args, kwargs)


class Layer(nn.Linear):
    """A layer whose output is made into something by ``becomes``; what counts is ``first``."""

    def __init__(self, n, m, becomes):
        super().__init__(n, m)
        self.becomes = becomes

    def forward(self, x):
        return self.becomes(super().forward(x))


class First(nn.Module):
    """Of what an odd layer gives, a tensor that can be gone on with."""

    def __init__(self, width):
        super().__init__()
        self.width = width

    def forward(self, x):
        if isinstance(x, (tuple, list)):
            x = next((one for one in x if isinstance(one, torch.Tensor)), None)
        if isinstance(x, dict):
            x = x["it"]
        if not isinstance(x, torch.Tensor) or x.is_meta:
            return torch.ones(4, self.width, requires_grad=True)
        x = x.to_dense() if x.is_sparse else x
        x = x.dequantize() if x.is_quantized else x
        x = x.real if x.is_complex() else x
        x = x.float().as_subclass(torch.Tensor)
        return x.expand(4, self.width) if x.dim() < 2 else x


def quantized(x):
    return torch.quantize_per_tensor(x.detach(), 0.1, 0, torch.qint8)


BECOMES = {
    "itself": lambda x: x,
    "a tuple": lambda x: (x, None),
    "a dict": lambda x: {"it": x},
    "nothing": lambda _: None,
    "text": lambda _: "text",
    "complex": lambda x: x.to(torch.complex64),
    "whole numbers": lambda x: (x * 10).to(torch.int64),
    "bool": lambda x: x > 0,
    "sparse": lambda x: x.to_sparse(),
    "quantized": quantized,
    "a number": lambda x: x.sum(),
    "a vector": lambda x: x.sum(0),
    "meta": lambda x: x.to("meta"),
    "half": lambda x: x.half(),
    "bfloat": lambda x: x.bfloat16(),
    "double": lambda x: x.double(),
    "float8": lambda x: x.to(torch.float8_e4m3fn),
    "empty": lambda x: x[:0].sum(0).expand(4, -1) if x.numel() else x,
    "tagged": lambda x: x.as_subclass(Tagged),
    "refusing": lambda x: x.as_subclass(Refusing),
    "a view": lambda x: x.view(-1).view(x.shape),
    "detached": lambda x: x.detach(),
    "infinite": lambda x: x / 0,
    "nan": lambda x: x * torch.nan,
    "in place": lambda x: x.mul_(2),
    "nested": lambda x: (x, torch.nested.as_nested_tensor([x[0].detach()]))[0],
}


def linear(n, m, odd):
    return Layer(n, m, BECOMES[odd])


def parametrized(n, m, odd):
    wrap = parametrizations.weight_norm if odd < "h" else weight_norm
    return wrap(nn.Linear(n, m)) if n and m else nn.Linear(n, m)


def dtyped(n, m, odd):
    return nn.Sequential(Cast(torch.bfloat16), nn.Linear(n, m, dtype=torch.bfloat16))


class Cast(nn.Module):
    """To another precision."""

    def __init__(self, dtype):
        super().__init__()
        self.dtype = dtype

    def forward(self, x):
        return x.to(self.dtype)


class Convolved(nn.Module):
    """Convolutions of one pixel; the second transposed."""

    def __init__(self, n, m):
        super().__init__()
        self.one, self.two = nn.Conv1d(n, m, 1), nn.ConvTranspose1d(m, m, 1, bias=False)

    def forward(self, x):
        return self.two(torch.relu_(self.one(x[..., None])))[..., 0]


def convolved(n, m, odd):
    return Convolved(n, m) if n and m else nn.Linear(n, m)


class Raising(nn.Module):
    """Raises at every third call: forward, or in the backward pass."""

    def __init__(self, n, m, *, is_late):
        super().__init__()
        self.fc, self.calls, self.is_late = nn.Linear(n, m), 0, is_late

    def forward(self, x):
        self.calls += 1
        x = self.fc(x)
        if self.calls % 3 == 1:
            if not self.is_late:
                raise Odd
            if x.requires_grad:
                x.register_hook(self.fail)
        return x

    def fail(self, _):
        raise Odd


def raising(n, m, odd):
    return Raising(n, m, is_late=odd < "h")


class Wandering(nn.Module):
    """Its parts change while it runs."""

    def __init__(self, n, m):
        super().__init__()
        self.shape, self.fc, self.calls = (n, m), nn.Linear(n, m), 0

    def forward(self, x):
        self.calls += 1
        if self.calls == 2:
            self.fc.weight = nn.Parameter(self.fc.weight.detach().clone())
        if self.calls == 3:
            self.fc = nn.Linear(*self.shape)
            self.late = nn.Linear(*self.shape)
        return self.fc(x) + (self.late(x) if self.calls >= 3 else 0)


def wandering(n, m, odd):
    return Wandering(n, m)


class Recomputed(nn.Module):
    """A checkpoint, reentrant or not, around a layer that is used twice."""

    def __init__(self, n, m, *, is_reentrant):
        super().__init__()
        self.first, self.shared, self.is_reentrant = nn.Linear(n, m), nn.Linear(m, m), is_reentrant

    def forward(self, x):
        body = nn.Sequential(self.shared, nn.Tanh(), self.shared)
        x = self.first(x)
        return checkpoint(body, x, use_reentrant=self.is_reentrant) if x.requires_grad else body(x)


def recomputed(n, m, odd):
    return Recomputed(n, m, is_reentrant=odd < "h")


class Functional(nn.Module):
    """A layer called by other weights than its own, and under vmap."""

    def __init__(self, n, m):
        super().__init__()
        self.fc = nn.Linear(n, m)

    def forward(self, x):
        weights = {name: 2 * value for name, value in self.fc.named_parameters()}
        x, y = torch.func.functional_call(self.fc, weights, (x,)), torch.func.vmap(self.fc)(x)
        return x + y


def functional(n, m, odd):
    return Functional(n, m)


def varying(n, m, odd):
    """The same layer gives other numbers of units from call to call."""
    calls = []

    def becomes(x):
        calls.append(1)
        return (x, torch.zeros(4, 1)) if len(calls) % 2 else x[:, :1].expand(4, m)

    return Layer(n, m, becomes)


KINDS = [linear, linear, parametrized, dtyped, convolved, raising, wandering]
KINDS += [recomputed, functional, varying]
letters = st.sampled_from([*"ab/ .,=\nα", "\ud800", "\0", "w" * 300])
blocks = st.tuples(
    st.sampled_from(KINDS),
    st.sampled_from([0, 1, 1, 3]),
    st.sampled_from(sorted(BECOMES)),
    st.lists(letters, max_size=2).map("".join),
    st.sampled_from([None, nn.ReLU, nn.Tanh, nn.GELU, nn.Softplus]),
)


class Model(nn.Module):
    """Blocks by any names, and a head."""

    def __init__(self, plan, number):
        super().__init__()
        self.odds, width = [], 3
        for at, (kind, m, odd, name, activation) in enumerate(plan):
            block = nn.Sequential(kind(width, m, odd), First(m))
            block._modules[""] = (activation or nn.Identity)()
            self._modules[f"{name}{at}" if name in self._modules else name] = block
            self.odds.append(block)
            width = m
        self.head = nn.Linear(width, 2)
        with torch.no_grad():
            for parameter in list(self.parameters())[:2]:
                parameter.mul_(number)

    def forward(self, x):
        for block in self.odds:
            x = block(x)
        return self.head(x)


def trained(plan, number, optimizer, scale, *, is_watched):
    """A training of some steps, which deals with what fails: the model, and all that it gave."""
    torch.manual_seed(0)
    net, told = Model(plan, number), []
    optimizer = optimizer([p for p in net.parameters() if p.numel()], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=scale)
    with initflow.watch(net, every=1, name="α/") if is_watched else contextlib.nullcontext():
        for step in range(5):
            optimizer.zero_grad()
            for _ in range(1 + step % 2):
                try:
                    loss = net(torch.randn(4, 3)).square().mean()
                    scaler.scale(loss).backward()
                    told.append(bits(loss))
                except Exception as error:  # noqa: BLE001 - whatever it is, it is the same
                    told.append(f"{type(error)} {error}")
                assert not torch.overrides._get_current_function_mode_stack()
            optimizer.step()
    return net, [*told, *map(bits, net.state_dict().values()), bits(torch.get_rng_state())]


def bits(x):
    return x.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()


@pytest.fixture(scope="module")
def keys():
    """The metric keys of a run that is active for all examples."""
    found = set()

    def log_batch(self, run_id, metrics=(), params=(), tags=()):
        for metric in metrics:
            validation._validate_metric_name(metric.key)
            found.add(metric.key)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("INITFLOW_CONTEXT_TAGS", "false")
        patch.setattr(runs, "active", lambda: runs.Run("id", "0", ()))
        patch.setattr(mlflow.MlflowClient, "log_batch", log_batch)
        yield found


@pytest.mark.filterwarnings("ignore")  # what is odd is warned of by torch, in both trainings
@given(
    st.lists(blocks, max_size=4),
    st.sampled_from([1.0, 0.0, torch.nan, torch.inf, 1e30]),
    st.sampled_from([torch.optim.SGD, torch.optim.Adam]),
    st.booleans(),
)
@settings(max_examples=100, deadline=None)
def test_a_watched_training_is_the_same(keys, plan, number, optimizer, scale):
    """To the bit, and to its end; no hook is left, and its layers have valid keys."""
    keys.clear()
    _, plain = trained(plan, number, optimizer, scale, is_watched=False)
    net, watched = trained(plan, number, optimizer, scale, is_watched=True)
    assert plain == watched
    own = [hooks for hooks in hooks_on(net) if "initflow" in repr(hooks)]
    assert not own
