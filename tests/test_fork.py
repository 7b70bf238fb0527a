"""Where the batch doubles, in networks made to be awkward."""

import copy
from collections import OrderedDict

import pytest
import torch
from torch import nn

from rblock_fx import ConversionError, apply_rblock, describe
from tests.oracles import recorded_masks, two_forwards


class Awkward(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.fc = nn.Linear(4, 3)


class SizeReadBefore(Awkward):
    def forward(self, x):
        x = self.first(x)
        rows, channels = x.shape[0], x.size(1)
        x = self.second(x)
        return self.fc(x.reshape(rows, channels, -1).mean(2))


class UnpairedBranch(Awkward):
    """Uses a map from before the fork twice behind it."""

    def forward(self, x):
        early = self.first(x).relu()
        late = self.second(early)
        return self.fc((late * early.sigmoid() + (late - early) * early).mean((2, 3)))


class WholeSizeUsedBehind(Awkward):
    """Behind the fork uses a whole shape read before it, which no single factor doubles."""

    def forward(self, x):
        x = self.first(x)
        shape = x.shape
        x = self.second(x).flatten(1).view(shape)
        return self.fc(x.mean((2, 3)))


class ConstantOfSizes(Awkward):
    """Builds from sizes something that has no batch axis; it must not be doubled."""

    def forward(self, x):
        x = self.first(x)
        ramp = torch.linspace(0, 1, x.shape[-1], device=x.device)
        return self.fc((self.second(x) * ramp).mean((2, 3)))


class ConstantOfNumbers(Awkward):
    """Builds a tensor from numbers alone, and reads a buffer, around the sites."""

    def __init__(self):
        super().__init__()
        self.register_buffer("shift", torch.tensor(0.25))

    def forward(self, x):
        weights = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(4, 1, 1)
        x = self.first(x) * weights.to(x) + self.shift
        return self.fc((self.second(x) * weights.to(x) - self.shift).mean((2, 3)))


class ChangedInPlace(Awkward):
    """Uses a map from before the fork behind it, changes it in place, and uses it again."""

    def forward(self, x):
        early = self.first(x)
        late = self.second(early.relu()) + early
        early.mul_(2)
        return self.fc((late + early).mean((2, 3)))


class CalledTwice(Awkward):
    def forward(self, x):
        x = self.first(x)
        x = self.second(self.second(x).relu())
        return self.fc(x.mean((2, 3)))


class SeveralOutputs(Awkward):
    """One output leaves before the fork, as an auxiliary head would."""

    def forward(self, x):
        early = self.first(x)
        late = self.second(early)
        return {"out": self.fc(late.mean((2, 3))), "aux": early.mean((2, 3))}


class OptionalArguments(Awkward):
    def forward(self, x, scale: float = 1.0, mask=None):
        x = self.second(self.first(x)) * scale
        if mask is not None:
            x = x * mask
        return self.fc(x.mean((2, 3)))


def convert(network, sites=("second",)):
    return apply_rblock(network().train(), list(sites), drop_prob=0.5, input_size=(3, 8, 8))


@pytest.mark.parametrize(
    "network", [SizeReadBefore, UnpairedBranch, ConstantOfSizes, ConstantOfNumbers, OptionalArguments]
)
@pytest.mark.parametrize("sites", [["second"], ["first", "second"], ["first"]])
def test_late_forks_are_two_forwards(network, sites):
    model = convert(network, sites)
    assert describe(model).early_fork_reason is None
    assert [site.forks for site in describe(model).sites] == [True] + [False] * (len(sites) - 1)
    x = torch.randn(5, 3, 8, 8)
    with recorded_masks(model) as masks:
        output = model(x)
    torch.testing.assert_close(output, two_forwards(network().train(), masks, x))


def test_doubles_a_size_read_before_the_fork_once():
    assert describe(convert(SizeReadBefore)).code.count("* 2") == 1


def test_doubles_a_tensor_used_twice_once():
    code = describe(convert(UnpairedBranch)).code
    assert code.count("torch.cat([relu, relu])") == 1
    assert code.count("torch.cat") == 2  # and the sigmoid, which is computed on half the rows


def test_falls_back_to_doubling_the_input():
    model = convert(WholeSizeUsedBehind)
    assert "'getattr_1', computed before the first mask" in describe(model).early_fork_reason
    assert "the batch doubles at the input" in str(describe(model))
    assert describe(model).cost == pytest.approx(2.0)
    x = torch.randn(5, 3, 8, 8)
    with recorded_masks(model) as masks:
        output = model(x)
    torch.testing.assert_close(output, two_forwards(WholeSizeUsedBehind().train(), masks, x))


def test_reads_constants_and_buffers_from_the_model():
    model = copy.deepcopy(convert(ConstantOfNumbers))
    keys = list(model.state_dict())
    assert keys == list(ConstantOfNumbers().state_dict())
    code = describe(model).code
    assert "self.rblock.tensor_constant0" in code
    assert "self.shift" in code
    with torch.no_grad():
        model.shift.fill_(float("inf"))
    assert model(torch.randn(2, 3, 8, 8)).isnan().any()


def test_map_changed_in_place_is_not_doubled_before():
    model = convert(ChangedInPlace)
    assert "changed in place" in describe(model).early_fork_reason
    x = torch.randn(5, 3, 8, 8)
    with recorded_masks(model) as masks:
        output = model(x)
    torch.testing.assert_close(output, two_forwards(ChangedInPlace().train(), masks, x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_models_of_any_precision_convert(dtype):
    model = convert(lambda: SizeReadBefore().to(dtype))
    assert model(torch.randn(2, 3, 8, 8, dtype=dtype)).dtype == dtype


def test_empty_batch_returns_an_empty_pair():
    assert convert(UnpairedBranch)(torch.randn(0, 3, 8, 8)).shape == (0, 3)


def test_masks_each_call_of_a_module():
    model = convert(CalledTwice)
    assert [[mask.forks for mask in site.masks] for site in describe(model).sites] == [[True, False]]
    x = torch.randn(5, 3, 8, 8)
    with recorded_masks(model) as masks:
        output = model(x)
    plain = CalledTwice().train()
    halves = []
    for half in range(2):
        first, second = (masks[name].chunk(2)[half] for name in ("second", "second_call1"))
        inner = plain.second(plain.first(x)) * first
        halves.append(plain.fc((plain.second(inner.relu()) * second).mean((2, 3))))
    torch.testing.assert_close(output, torch.cat(halves))


def test_doubles_every_output():
    output = convert(SeveralOutputs)(torch.randn(5, 3, 8, 8))
    assert {name: len(leaf) for name, leaf in output.items()} == {"out": 10, "aux": 10}
    first, second = output["aux"].chunk(2)
    assert torch.equal(first, second)


def test_parallel_sites_fork_apart():
    class Parallel(Awkward):
        def forward(self, x):
            return self.fc((self.first(x) + self.second(self.first(x).detach())).mean((2, 3)))

    model = apply_rblock(Parallel().train(), ["first"], drop_prob=0.5, input_size=(3, 8, 8))
    assert [[mask.forks for mask in site.masks] for site in describe(model).sites] == [[True, True]]
    assert model(torch.randn(5, 3, 8, 8)).shape == (10, 3)


def test_guards_specialised_arguments():
    model = convert(OptionalArguments)
    x = torch.randn(2, 3, 8, 8)
    for call in (lambda: model(x, mask=torch.ones(2, 1, 8, 8)), lambda: model(x, 1.0, torch.ones(2, 1, 8, 8))):
        with pytest.raises(
            ConversionError,
            match=r"converted with mask=None, got mask of type Tensor; .* call model\(images\) without it",
        ):
            call()
    with pytest.raises(ConversionError, match=r"converted with scale=1\.0"):
        model(x, scale=2.0)
    assert model(x=x, scale=1.0).shape == model(x, 1.0, None).shape == (4, 3)
    assert model.eval()(torch.randn(2, 3, 8, 8), mask=torch.ones(2, 1, 8, 8)).shape == (2, 3)


@pytest.mark.parametrize("kind", [dict, OrderedDict, tuple, list])
def test_outputs_keep_their_type(kind):
    class Several(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1)

        def forward(self, x):
            x = self.stem(x)
            named = {"out": self.head(x), "features": x}
            return kind(named) if issubclass(kind, dict) else kind(named.values())

    model = apply_rblock(Several().train(), "stem", input_size=(3, 8, 8))
    output = model(torch.randn(2, 3, 8, 8))
    assert type(output) is kind
    assert [len(leaf) for leaf in (output.values() if issubclass(kind, dict) else output)] == [4, 4]
