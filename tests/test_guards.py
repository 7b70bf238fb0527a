"""What a trace takes for granted: side effects are refused, and a later change is detected by the next forward."""

import collections
import copy
import dataclasses
import functools
import itertools
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rblock_fx import ConversionError, RBlockError, apply_rblock, remove_rblock
from tests.networks import SIZE, Net, assert_halves_are, assert_right_or_refused, images

SEEN = []
COUNTS = {"calls": 0}
FACTOR = [1.0]


class Attribute(Net):
    last = None

    def between(self, x):
        self.last = x
        return x

    def written(self):
        return self.last


class Deque(Net):
    def __init__(self):
        super().__init__()
        self.kept = collections.deque(maxlen=2)

    def between(self, x):
        self.kept.append(x)
        return x

    def written(self):
        return self.kept[-1] if self.kept else None


class Nested(Net):
    @dataclasses.dataclass
    class Store:
        maps: dict = dataclasses.field(default_factory=dict)

    def __init__(self):
        super().__init__()
        self.store = self.Store()

    def between(self, x):
        self.store.maps.setdefault("between", []).append(x)
        return x

    def written(self):
        return self.store.maps.get("between", [None])[-1]


class OfClass(Net):
    log = []  # noqa: RUF012

    def between(self, x):
        self.log.append(x)
        return x

    def written(self):
        return self.log[-1] if self.log else None


class OfClassByType(OfClass):
    def between(self, x):
        type(self).log.append(x)
        return x


class OfAnotherModule(Net):
    def between(self, x):
        self.a.kept = x
        return x

    def written(self):
        return getattr(self.a, "kept", None)


class ByHelper(Net):
    @staticmethod
    def keep(x):
        SEEN.append(x)
        return x

    def between(self, x):
        return self.keep(x)

    def written(self):
        return SEEN[-1] if SEEN else None


class Partial(Net):
    def __init__(self):
        super().__init__()
        self.kept = []
        self.keep = functools.partial(list.append, self.kept)

    def between(self, x):
        self.keep(x)
        return x

    def written(self):
        return self.kept[-1] if self.kept else None


class Closure(Net):
    def __init__(self):
        super().__init__()
        kept = self.kept = []

        def keep(x):
            kept.append(x)
            return x

        self.keep = keep

    def between(self, x):
        return self.keep(x)

    def written(self):
        return self.kept[-1] if self.kept else None


class SetItem(Net):
    def __init__(self):
        super().__init__()
        self.slots = [None, None]

    def between(self, x):
        self.slots[1] = x
        return x

    def written(self):
        return self.slots[1]


class AroundSite(Net):
    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.b, self.info = nn.Conv2d(6, 6, 3, padding=1), types.SimpleNamespace(x=None)

        def forward(self, x):
            self.info.x = x
            return self.b(x)

    def __init__(self):
        super().__init__()
        self.b = self.Around()

    def written(self):
        return self.b.info.x


class Buffer(Net):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(6))

    def between(self, x):
        with torch.no_grad():
            self.mean.copy_(x.mean((0, 2, 3)))
        return x

    def written(self):
        return self.mean


WRITES = [
    Attribute, Deque, Nested, OfClass, OfClassByType, OfAnotherModule, ByHelper, Partial, Closure, SetItem, AroundSite,
    Buffer,
]  # fmt: skip


@pytest.mark.parametrize("kind", WRITES)
def test_writes_are_done_or_refused(kind):
    """Never the features of an earlier batch."""
    plain, model, x = kind().train(), kind(), images()
    plain(x)
    wanted = plain.written().detach().clone()
    sites = ["b.b"] if kind is AroundSite else ["b"]
    try:
        apply_rblock(model, sites, drop_prob=0.0, input_size=SIZE)
        model.eval()(images(2))
        model.train()(x)
    except RBlockError as error:
        assert type(error) is ConversionError  # noqa: PT017
        return
    written = model.written()
    assert written is not None
    torch.testing.assert_close(written[: len(wanted)], wanted)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Attribute, "it assigns 'last', which the generated forward would not do"),
        (OfAnotherModule, r"it assigns 'a\.kept'"),
        (Deque, "it writes into 'kept'"),
        (Nested, "it writes into 'store'"),
        (ByHelper, "it writes into 'SEEN'"),
        (Closure, "it writes into 'kept'"),
    ],
)
def test_refused_writes_are_named(kind, message):
    SEEN.clear()
    with pytest.raises(ConversionError, match=message):
        apply_rblock(kind(), ["b"], input_size=SIZE)


class Counters(Net):
    def __init__(self):
        super().__init__()
        self.calls, self.numbers, self.own = {"n": 0}, itertools.count(1), 0

    def between(self, x):
        return x * float(self.next())


class CountsInDict(Counters):
    def next(self):
        self.calls["n"] += 1
        return self.calls["n"]


class CountsInGlobal(Counters):
    def next(self):
        COUNTS["calls"] += 1
        return COUNTS["calls"]


class CountsInIterator(Counters):
    def next(self):
        return next(self.numbers)


class CountsInAttribute(Counters):
    def next(self):
        self.own += 1
        return self.own


@pytest.mark.parametrize("kind", [CountsInDict, CountsInGlobal, CountsInIterator, CountsInAttribute])
def test_rejects_forwards_that_count_their_calls(kind):
    with pytest.raises(ConversionError, match=r"cannot be traced|differs from its own"):
        apply_rblock(kind(), ["b"], input_size=SIZE)


class Settings(Net):
    """Reads settings from everywhere."""

    scale = 1.0
    table = {"scale": 1.0}  # noqa: RUF012

    @dataclasses.dataclass
    class Config:
        scale: float = 1.0
        inner: dict = dataclasses.field(default_factory=lambda: {"power": [1, 1]})

    class Gain(nn.Module):
        def __init__(self):
            super().__init__()
            self.factor = 1.0
            self.register_parameter("bias", None)

        def forward(self, x):
            return x * self.factor

    def __init__(self):
        super().__init__()
        self.config, self.gain, self.activation = self.Config(), self.Gain(), F.relu
        self.order, self.choice = (0, 1), "plain"
        self.blocks, self.named = nn.ModuleList([nn.Identity()]), nn.ModuleDict({"one": nn.Identity()})
        self.extra = None
        self.register_buffer("shift", None)

    def between(self, x):
        x = self.activation(x) * self.scale * self.config.scale * self.table["scale"] * FACTOR[0]
        x = x ** self.config.inner["power"][1] if self.config.inner["power"][1] != 1 else x
        x = self.gain(x) * (self.gain.factor if self.choice == "plain" else 2 * self.gain.factor)
        for block in self.blocks:
            x = block(x)
        for block in self.named.values():
            x = block(x)
        if self.extra is not None:
            x = self.extra(x)
        if self.shift is not None:
            x = x + self.shift
        return x if self.order == (0, 1) else x + 1

    def tripled(self, x):
        return 3 * x


def set_attribute(path, name, value):
    return lambda model: setattr(model.get_submodule(path) if isinstance(path, str) else path(model), name, value)


CHANGES = {
    "attribute of the instance": set_attribute("", "scale", 3.0),
    "attribute of the class": set_attribute(type, "scale", 3.0),
    "entry of the class's table": lambda model: type(model).table.update(scale=3.0),
    "field of a dataclass": set_attribute(lambda model: model.config, "scale", 3.0),
    "nested entry": lambda model: model.config.inner["power"].__setitem__(1, 2),
    "another dataclass": lambda model: setattr(model, "config", model.Config(scale=3.0)),
    "item of a global list": lambda _model: FACTOR.__setitem__(0, 3.0),
    "setting of a layer": set_attribute("gain", "factor", 3.0),
    "function": set_attribute("", "activation", torch.tanh),
    "string": set_attribute("", "choice", "other"),
    "tuple": set_attribute("", "order", (1, 0)),
    "module that was None": set_attribute("", "extra", nn.Softplus()),
    "buffer that was None": lambda model: model.register_buffer("shift", torch.ones(1)),
    "list, appended": lambda model: model.blocks.append(nn.Softplus()),
    "list, inserted": lambda model: model.blocks.insert(0, nn.Softplus()),
    "list, replaced item": lambda model: model.blocks.__setitem__(0, nn.Softplus()),
    "dictionary of modules": lambda model: model.named.update({"two": nn.Softplus()}),
    "method of the instance": lambda model: setattr(model, "between", types.MethodType(Settings.tripled, model)),
    "method of the class": lambda model: setattr(type(model), "between", Settings.tripled),
    "layer": set_attribute("", "c", nn.Conv2d(6, 6, 3, padding=1)),
    "weights": lambda model: nn.init.ones_(model.c.weight),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changed_settings_are_followed_or_refused(name):
    kind = type("Fresh", (Settings,), {"scale": 1.0, "table": {"scale": 1.0}})
    FACTOR[0] = 1.0
    x, change = images(), CHANGES[name]
    model = apply_rblock(kind(), ["b"], drop_prob=0.0, input_size=SIZE).train()
    assert_halves_are(model(x), kind().train()(x), rtol=1e-4, atol=1e-5)
    change(model)
    plain = remove_rblock(copy.deepcopy(model)).train()
    expected = plain(x)
    try:
        output = model(x)
    except ConversionError as error:
        assert "since the training forward was traced; set it back, or convert again" in str(error)  # noqa: PT017
        output = apply_rblock(remove_rblock(model), ["b"], drop_prob=0.0, input_size=SIZE)(x)
    assert_halves_are(output, expected, rtol=1e-4, atol=1e-5)
    FACTOR[0] = 1.0


class AroundSites(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Sequential(nn.Conv2d(6, 6, 3), nn.ReLU()), nn.ReLU())
        self.fc = nn.Linear(6, 5)

    def forward(self, x):
        return self.fc(self.body(x).mean((2, 3)))


AROUND = {
    "append": lambda model: model.body.append(nn.Softplus()),
    "extend": lambda model: model.body.extend([nn.Softplus()]),
    "insert": lambda model: model.body.insert(1, nn.Softplus()),
    "pop": lambda model: model.body.pop(-1),
    "delete": lambda model: model.body.__delitem__(2),
    "replace an item": lambda model: model.body.__setitem__(2, nn.Softplus()),
    "append inside": lambda model: model.body[1].append(nn.Softplus()),
    "replace all": lambda model: setattr(model, "body", nn.Sequential(*model.body, nn.Softplus())),
    "replace by a leaf": lambda model: setattr(model, "body", nn.Conv2d(3, 6, 3)),
}


@pytest.mark.parametrize("name", AROUND)
def test_changed_layers_around_a_site_are_followed_or_refused(name):
    plain, x = AroundSites(), images()
    model = apply_rblock(AroundSites(), ["body.1.0"], drop_prob=0.0, input_size=SIZE).train()
    AROUND[name](model)
    AROUND[name](plain)
    if name == "replace by a leaf":
        plain.body.load_state_dict(model.body.state_dict())
    expected = plain.train()(x)
    try:
        output = model(x)
    except ConversionError as error:
        assert "body" in str(error)  # noqa: PT017
        sites = {"replace by a leaf": "body", "insert": "body.2.0"}.get(name, "body.1.0")
        output = apply_rblock(remove_rblock(model), sites, drop_prob=0.0, input_size=SIZE)(x)
    assert_halves_are(output, expected, rtol=1e-4, atol=1e-5)


def test_a_changed_sequential_is_named():
    model = apply_rblock(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)), ["0"], input_size=(3, 8, 8))
    x = torch.randn(2, 3, 8, 8)
    model.append(nn.ReLU())
    with pytest.raises(ConversionError, match="'layers' has changed since the training forward was traced"):
        model.train()(x)
    assert model.eval()(x).shape[0] == 2
    assert len(apply_rblock(remove_rblock(model), ["0"], input_size=(3, 8, 8)).train()(x)) == 4


def test_rejects_missing_and_replaced_modules_around_sites():
    model = apply_rblock(AroundSites(), ["body.1.0"], input_size=SIZE).train()
    body = model.body
    model.body.forward = types.MethodType(lambda self, x: 2 * nn.Sequential.forward(self, x), body)
    with pytest.raises(ConversionError, match="'body' has another forward since the training forward was traced"):
        model(images())
    del model._modules["body"]
    with pytest.raises(ConversionError, match="'body' is missing since the training forward was traced"):
        model(images())


class Asks(Net):
    def between(self, x):
        return x * self.factor(x)


def asking(function):
    return type(getattr(function, "__name__", "Asks"), (Asks,), {"factor": staticmethod(function)})


def _attempt(function, x):
    try:
        return function(x)
    except Exception:
        return 7.0


QUESTIONS = {
    "isinstance of a tuple": lambda x: 1.0 if isinstance(x, tuple) else 2.0,
    "isinstance of a proxy": lambda x: 5.0 if isinstance(x, torch.fx.Proxy) else 2.0,
    "class name": lambda x: 2.0 if type(x).__name__ == "Tensor" else 1.0,
    "getattr with a default": lambda x: float(getattr(x, "boxes", 3.0) == 3.0),
    "callable": lambda x: 3.0 if callable(x) else 2.0,
    "hasattr of a dict method": lambda x: 3.0 if hasattr(x, "keys") else 2.0,
    "len in try": lambda x: _attempt(lambda y: 2.0 if len(y) > 1 else 1.0, x),
    "float of a shape in try": lambda x: _attempt(lambda y: 1.0 + float(y.shape[1] == 6), x),
    "iteration in try": lambda x: _attempt(lambda y: 2.0 * len(list(y.unbind(0))) / len(y), x),
    "contiguity": lambda x: _attempt(lambda y: 2.0 if y.is_contiguous() is True else 1.0, x),
    "identity": lambda x: 2.0 if x.float() is x else 1.0,
    "requires_grad": lambda x: 2.0 if x.requires_grad is True else 1.0,
}


@pytest.mark.parametrize("name", QUESTIONS)
def test_traces_that_differ_in_a_number_are_refused(name):
    kind, x = asking(QUESTIONS[name]), images()
    assert_right_or_refused(kind(), x, kind().train()(x))


class AsksForAutocast(Net):
    def between(self, x):
        return x * (2.0 if torch.is_autocast_enabled("cpu") else 1.0)


class AsksForGradients(Net):
    def between(self, x):
        return x * (2.0 if torch.is_grad_enabled() else 1.0)


def test_modes_of_the_conversion_are_guarded():
    x, model = images(), apply_rblock(AsksForAutocast(), ["b"], drop_prob=0.0, input_size=SIZE)
    assert_halves_are(model.train()(x), AsksForAutocast().train()(x), rtol=1e-4, atol=1e-5)
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(ConversionError, match=r"reads torch\.is_autocast_enabled\(\), .*convert in the context"),
    ):
        model(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert_right_or_refused(AsksForAutocast(), x, AsksForAutocast().train()(x), sites=("b",))
    run = torch.no_grad()(lambda model: model(x))
    assert_right_or_refused(AsksForGradients(), x, run(AsksForGradients().train()), run=run)
