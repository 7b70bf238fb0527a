"""Random CNNs: the training forward is two forwards of the plain network with the same masks, or a typed refusal."""

import collections
import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from rblock_fx import RBlockError, apply_rblock
from tests.oracles import recorded_masks

CHANNELS, SIDE = 4, 6


class Split(nn.Module):
    """Returns a list (or tuple) of two maps."""

    def __init__(self, kind):
        super().__init__()
        self.conv, self.kind = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1), kind

    def forward(self, x):
        return self.kind([x.tanh(), self.conv(x)])


class ChannelsLast(nn.Module):
    """Returns a map of (N, H, W, C)."""

    def __init__(self):
        super().__init__()
        self.norm, self.fc = nn.LayerNorm(CHANNELS), nn.Linear(CHANNELS, CHANNELS)

    def forward(self, x):
        return self.fc(self.norm(x.permute(0, 2, 3, 1)))


class Merge(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2 * CHANNELS, CHANNELS, 1)

    def forward(self, a, b):
        return self.conv(torch.cat([a, b], 1))


MODULES = {
    "conv": lambda: nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1),
    "norm": lambda: nn.BatchNorm2d(CHANNELS),
    "block": lambda: nn.Sequential(nn.Conv2d(CHANNELS, CHANNELS, 1), nn.BatchNorm2d(CHANNELS), nn.ReLU(inplace=True)),
    "list": lambda: Split(list),
    "tuple": lambda: Split(tuple),
    "last": ChannelsLast,
    "merge": Merge,
}
FUNCTIONS = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gate": lambda x: x * x.mean((2, 3), keepdim=True).sigmoid(),
    "rows": lambda x: x.reshape(x.shape[0], x.size(1), -1).flip(2).view(x.shape[0], CHANNELS, SIDE, SIDE),
    "pool": lambda x: F.interpolate(F.avg_pool2d(x, 2), size=SIDE),
    "relu_": lambda x: x.relu_(),
    "mul_": lambda x: x.mul_(0.5),
    "slice_": lambda x: x[:, :2].add_(1.0).repeat(1, 2, 1, 1),
}
PAIRS = {"add": lambda a, b: a + b, "times": lambda a, b: a * b.sigmoid(), "add_": lambda a, b: a.add_(b)}
OUTPUTS = {
    "logits": lambda logits, maps: logits,  # noqa: ARG005
    "dict": lambda logits, maps: {"out": logits, "aux": maps[0].mean((2, 3))},
    "list": lambda logits, maps: [logits, *maps[-2:]],
}


class Network(nn.Module):
    """Runs steps of (kind, numbers of two earlier maps, number of its module)."""

    def __init__(self, steps, output, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.steps, self.output = steps, output
        self.stem = nn.Conv2d(3, CHANNELS, 3, padding=1)
        kinds = {number: kind for kind, _, _, number in steps if number is not None}
        self.parts = nn.ModuleDict({str(number): MODULES[kind]() for number, kind in kinds.items()})
        self.fc = nn.Linear(CHANNELS, 3)

    def forward(self, x):
        maps = [self.stem(x)]
        for kind, first, second, number in self.steps:
            a, b = maps[first], maps[second]
            if kind == "merge":
                maps.append(self.parts[str(number)](a, b))
            elif kind in ("list", "tuple"):
                one, two = self.parts[str(number)](a)
                maps += [one, two]
            elif kind == "last":
                maps.append(self.parts[str(number)](a).permute(0, 3, 1, 2))
            elif kind in MODULES:
                maps.append(self.parts[str(number)](a))
            elif kind in PAIRS:
                maps.append(PAIRS[kind](a, b))
            else:
                maps.append(FUNCTIONS[kind](a))
        return OUTPUTS[self.output](self.fc(maps[-1].mean((2, 3))), maps)


@st.composite
def networks(draw):
    """A network and the sites to convert it with."""
    steps, maps, modules = [], 1, []
    for _ in range(draw(st.integers(3, 9))):
        kind = draw(st.sampled_from([*MODULES, "conv", "conv", "shared", *FUNCTIONS, *PAIRS, "add"]))
        # Mostly the latest map, so that the network is deep.
        first = draw(st.sampled_from([maps - 1, maps - 1, draw(st.integers(0, maps - 1))]))
        second = draw(st.integers(0, maps - 1))
        number = None
        if kind == "shared":
            kind, number = draw(st.sampled_from(modules)) if modules else ("conv", None)
        if kind in MODULES and number is None:
            number = len(modules)
            modules.append((kind, number))
        steps.append((kind, first, second, number))
        maps += 2 if kind in ("list", "tuple") else 1
    paths = ["stem", *(f"parts.{number}" for _, number in modules)]
    paths += [f"parts.{number}.0" for kind, number in modules if kind == "block"]
    sites = draw(st.lists(st.sampled_from(paths), min_size=1, max_size=3, unique=True))
    return tuple(steps), draw(st.sampled_from(list(OUTPUTS))), sites


def two_forwards(plain, sites, masks, x):
    """Run the plain network twice; each call of a site's module is masked by the mask of that call."""
    halves = []
    for half in range(2):
        calls = collections.Counter()

        def mask(path, place, output, call, half=half):
            name = path.replace(".", "_") + ("" if place is None else f"_map{place}") + (f"_call{call}" if call else "")
            return output * masks[name].chunk(2)[half] if name in masks else output

        def hook(_module, _inputs, output, path, calls=calls, mask=mask):
            call = calls[path]
            calls[path] += 1
            if isinstance(output, list | tuple):
                return type(output)(mask(path, place, item, call) for place, item in enumerate(output))
            return mask(path, None, output, call)

        handles = [
            plain.get_submodule(path).register_forward_hook(lambda m, i, o, path=path, hook=hook: hook(m, i, o, path))
            for path in sites
        ]
        halves.append(plain(x.clone()))
        for handle in handles:
            handle.remove()
    return halves


def leaves(output):
    return (
        [output] if isinstance(output, torch.Tensor) else list(output.values() if isinstance(output, dict) else output)
    )


def compare(drawn, seed, method):
    """Compare one network with its conversion; returns the refusal, if there is one."""
    steps, output, sites = drawn
    plain = Network(steps, output, seed).double().train()
    model = copy.deepcopy(plain)
    options = {"method": method, "drop_prob": 0.4, "batch_norm": "per_submodel", "input_size": (3, SIDE, SIDE)}
    try:
        apply_rblock(model, sites, **options)
    except RBlockError as error:
        assert type(model) is Network
        return f"{type(error).__name__}: {error}"
    x = torch.randn(3, 3, SIDE, SIDE, dtype=torch.float64)
    evaluated, twin = copy.deepcopy(model).eval(), copy.deepcopy(plain).eval()
    assert all(map(torch.equal, leaves(evaluated(x.clone())), leaves(twin(x.clone()))))
    with recorded_masks(model) as masks:
        trained = model(x.clone())
    assert masks
    expected = two_forwards(plain, sites, masks, x)
    for got, first, second in zip(leaves(trained), *map(leaves, expected), strict=True):
        torch.testing.assert_close(got, torch.cat([first, second]), rtol=1e-8, atol=1e-8)
    return None


@pytest.mark.filterwarnings("ignore:apply_rblock. blocks of side")
@pytest.mark.parametrize(
    "examples", [25, pytest.param(settings.get_profile("nightly").max_examples, marks=pytest.mark.nightly)]
)
def test_training_is_two_forwards_with_the_same_masks(examples):
    refusals = []

    @settings(max_examples=examples, deadline=None)
    @given(networks(), st.integers(0, 2**31), st.sampled_from(["bdropdml", "sdropdml", "c-dropblock", "r-dropblock"]))
    def check(drawn, seed, method):
        refusals.append(compare(drawn, seed, method))

    check()
    converted = sum(refusal is None for refusal in refusals)
    print(collections.Counter(refusals).most_common())
    assert len(refusals) >= examples
    assert converted >= 0.6 * len(refusals), collections.Counter(refusals).most_common()
