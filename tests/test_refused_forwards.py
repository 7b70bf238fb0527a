"""Forwards that a trace would get wrong in silence are refused, or right; what it took for granted is guarded."""

import copy

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rblock_fx import (
    ConversionError,
    SettingError,
    SiteError,
    apply_rblock,
    describe,
    list_sites,
    remove_rblock,
    split_pair,
)
from tests.oracles import recorded_masks, two_forwards


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.c, self.fc = nn.Conv2d(16, 16, 3, padding=1), nn.Linear(16, 5)

    def head(self, x):
        return self.fc(x.mean((2, 3)))


def convert(network, sites=("b", "c"), **options):
    return apply_rblock(network.train(), list(sites), input_size=(3, 32, 32), **options)


class WithoutGradients(Base):
    def forward(self, x):
        with torch.no_grad():
            x = self.a(x)
        return self.head(self.c(self.b(x)))


class Decorated(Base):
    @torch.no_grad()
    def first(self, x):
        return self.a(x)

    def forward(self, x):
        return self.head(self.c(self.b(self.first(x))))


class WithAutocast(Base):
    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x = self.b(self.a(x))
        return self.head(self.c(x.float()))


class AsksForTheType(Base):
    def forward(self, x):
        x = self.a(x)
        if isinstance(x, Tensor):
            x = x * 2
        return self.head(self.c(self.b(x)))


class AsksTorchForTheType(Base):
    def forward(self, x):
        x = self.b(self.a(x))
        return self.head(self.c(x * 2 if torch.is_tensor(x) else x))


class AsksForGradients(Base):
    def forward(self, x):
        x = self.b(self.a(x))
        return self.head(self.c(x * 2 if torch.is_grad_enabled() else x))


class Appends(Base):
    class Appender(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(16, 16, 3, padding=1)

        def forward(self, x, kept):
            kept.append(self.conv(x))
            return kept[-1]

    def __init__(self):
        super().__init__()
        self.c = self.Appender()

    def forward(self, x):
        kept = [self.b(self.a(x))]
        self.c(kept[0], kept)
        return self.head(sum(kept))


class Counts(Base):
    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        self.count += 1
        return self.head(self.c(self.b(self.a(x))))


class Remembers(Base):
    def forward(self, x):
        self.last = self.a(x)
        return self.head(self.c(self.b(self.last)))


class DrawsFromNumpy(Base):
    def forward(self, x):
        x = self.b(self.a(x))
        return self.head(self.c(x) if np.random.rand() < 0.5 else x)


class UsesWhatWasLeftBehind(Base):
    class Leaves(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(8, 16, 3, padding=1)

        def forward(self, x):
            self.saved = self.conv(x)
            return self.saved

    def __init__(self):
        super().__init__()
        self.b = self.Leaves()

    def forward(self, x):
        x = self.b(self.a(x))
        return self.head(self.c(x) + self.b.saved.mean())


class Shared(Base):
    def __init__(self):
        super().__init__()
        block = nn.Conv2d(8, 8, 3, padding=1)
        self.e, self.f = nn.Sequential(block, nn.ReLU()), nn.Sequential(block, nn.GELU())

    def forward(self, x):
        return self.head(self.b(self.f(self.e(self.a(x)))))


class GivesANumber(Base):
    def forward(self, x):
        x = self.b(self.a(x))
        return self.head(self.c(x)), x.square().mean()


class Keyword(Base):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleDict({"in": nn.Conv2d(3, 8, 3, padding=1)})

    def forward(self, x):
        return self.head(self.c(self.b(self.layers["in"](x))))


REFUSED = {
    WithoutGradients: (["b", "c"], "switches gradients, autocast or inference mode"),
    Decorated: (["b", "c"], "switches gradients, autocast or inference mode"),
    WithAutocast: (["b", "c"], "switches gradients, autocast or inference mode"),
    AsksForTheType: (["b", "c"], "the traced forward of AsksForTheType is not its own: it computes"),
    AsksTorchForTheType: (["b", "c"], "the traced forward of AsksTorchForTheType is not its own"),
    AsksForGradients: (["b", "c"], "the traced forward of AsksForGradients is not its own"),
    Appends: (["b"], "the traced forward of Appends is not its own"),
    Counts: (["b"], "it assigns 'count'"),
    Remembers: (["b"], "it assigns 'last'"),
    DrawsFromNumpy: (["b"], "it draws random numbers"),
    UsesWhatWasLeftBehind: (["c"], "a tensor that a module has left behind"),
    Shared: (["e.0"], "'e.0' runs 2 times, of which 1 can be masked"),
    GivesANumber: (["b"], "gives a number .* split_pair"),
    Keyword: (["layers.in", "c"], r"make no Python \(invalid syntax.*rename them"),
}


@pytest.mark.parametrize("network", REFUSED)
def test_what_a_trace_would_get_wrong_is_refused_and_left_alone(network):
    sites, message = REFUSED[network]
    model = network()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    numpy_state = np.random.get_state()[1].copy()
    with pytest.raises(ConversionError, match=message):
        convert(model, sites)
    assert type(model) is network
    assert not hasattr(model, "rblock")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert (np.random.get_state()[1] == numpy_state).all()
    assert len(list_sites(model, (3, 32, 32))) > 0
    assert torch.nn.modules.module._global_forward_hooks == {}


def test_a_class_that_cannot_be_subclassed_is_left_alone():
    class Final(Base):
        def __init_subclass__(cls, **_kwargs):
            if "__module__" in vars(cls) and "rblock" in repr(vars(cls)):
                raise TypeError("this class is final")

        def forward(self, x):
            return self.head(self.c(self.b(self.a(x))))

    model = Final()
    with pytest.raises(
        ConversionError, match=r"the forward of Final.* cannot be traced \(TypeError: this class is final\)"
    ):
        convert(model)
    assert type(model) is Final
    assert not hasattr(model, "rblock")


class RowNumbers(Base):
    def forward(self, x):
        rows = torch.arange(x.shape[0])
        maps = self.c(self.b(self.a(x))).flatten(2)
        return self.fc(maps[rows, :, maps.sum(1).argmax(1)])


def test_numbers_of_rows_double_the_batch_at_the_input():
    plain = RowNumbers().train()
    model = convert(copy.deepcopy(plain), drop_prob=0.5)
    x = torch.randn(3, 3, 32, 32)
    with recorded_masks(model) as masks:
        output = model(x)
    torch.testing.assert_close(output, two_forwards(plain, dict(masks), x))
    assert "'arange', computed before the first mask" in describe(model).early_fork_reason


class Inlined(Base):
    def __init__(self):
        super().__init__()
        self.first = nn.Module()
        self.factor = 1.0

        class First(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv = nn.Conv2d(3, 8, 3, padding=1)

            def forward(self, x):
                return F.dropout(self.conv(x), 0.5, self.training)

        self.first = First()

    def forward(self, x):
        return self.head(self.c(self.b(self.first(x)))) * self.factor


def test_settings_that_the_trace_took_for_granted_are_guarded():
    model = convert(Inlined(), ["first.conv", "b"])
    x = torch.randn(2, 3, 32, 32)
    model.first.eval()
    with pytest.raises(ConversionError, match=r"first\.training was True when the training forward was traced"):
        model(x)
    model.train()
    model.factor = 2.0
    with pytest.raises(ConversionError, match=r"factor was 1\.0 .*apply_rblock\(remove_rblock\(model\)"):
        model(x)
    plain = model.eval()(x)
    model.factor = 1.0
    assert len(model.train()(x)) == 4
    model.factor = 2.0
    assert torch.equal(model.eval()(x), plain)
    model = convert(remove_rblock(model), ["first.conv", "b"])
    assert len(model(x)) == 4


def test_a_classifier_taken_off_with_its_pooling_is_converted_anew():
    model = apply_rblock(timm.create_model("repvit_m0_9"), input_size=(3, 64, 64)).train()
    x = torch.randn(2, 3, 64, 64)
    model.reset_classifier(5)
    assert model(x).shape == (4, 5)
    model.reset_classifier(0, "")
    with pytest.raises(ConversionError, match="global_pool was 'avg'"):
        model(x)
    remove_rblock(model)
    assert model(x).shape == (2, 384, 2, 2)
    assert apply_rblock(model, input_size=(3, 64, 64))(x).shape == (4, 384, 2, 2)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.append(nn.ReLU()),
        lambda model: model.extend([nn.ReLU()]),
        lambda model: model.insert(1, nn.ReLU()),
        lambda model: model.pop(-1),
        lambda model: model.__delitem__(-1),
    ],
)
def test_a_converted_sequence_is_not_taken_apart(change):
    model = apply_rblock(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)), ["0"], input_size=(3, 8, 8))
    layers = list(model)
    with pytest.raises(ConversionError, match=r"layers of a converted Sequential .*remove_rblock\(model\)"):
        change(model)
    assert list(model) == layers
    change(remove_rblock(model))
    assert list(model) != layers


def test_arguments_of_any_name_can_be_passed():
    class Named(Base):
        def forward(self, check, training_forward=None, original_forward=None):
            assert training_forward is original_forward is None
            return self.head(self.c(self.b(self.a(check))))

    assert len(convert(Named())(torch.randn(2, 3, 32, 32))) == 4


def test_a_shallow_copy_shares_its_parts():
    class Plain(Base):
        def forward(self, x):
            return self.head(self.c(self.b(self.a(x))))

    model = convert(Plain())
    duplicate = copy.copy(model)
    assert type(duplicate) is type(model)
    assert duplicate.a is model.a
    assert len(duplicate(torch.randn(2, 3, 32, 32))) == 4


def test_named_tuples_of_maps_are_masked():
    from typing import NamedTuple

    class Pair(NamedTuple):
        fine: Tensor
        coarse: Tensor

    class Stage(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(8, 16, 3, padding=1)

        def forward(self, x):
            x = self.conv(x)
            return Pair(x, F.avg_pool2d(x, 2))

    class Net(Base):
        def __init__(self):
            super().__init__()
            self.b = Stage()

        def forward(self, x):
            maps = self.b(self.a(x))
            return self.head(self.c(maps.fine)) + self.head(maps[1])

    model = convert(Net(), ["b"], drop_prob=0.5)
    assert [site.path for site in describe(model).sites] == ["b[0]", "b[1]"]
    first, second = split_pair(model(torch.randn(2, 3, 32, 32)))
    assert not torch.equal(first, second)


def test_a_network_of_one_image_size_has_its_channels_where_its_maps_say():
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.pool = nn.Conv2d(3, 8, 3, padding=1), nn.AdaptiveAvgPool2d(4)
            self.block = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))
            self.fc = nn.Linear(8, 5)

        def forward(self, x):
            return self.fc(self.block(self.pool(self.stem(x)).permute(0, 2, 3, 1)).mean((1, 2)))

    assert describe(convert(Fixed(), ["block"])).sites[0].channel_axis == -1
    model = timm.create_model("gcvit_xxtiny")
    assert describe(apply_rblock(model, ["stages.3.blocks.0"])).sites[0].channel_axis == -1


def test_functional_batch_norm_has_no_statistics_of_each_sub_model():
    class Functional(Base):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(16)

        def forward(self, x):
            x = self.b(self.a(x))
            norm = self.norm
            x = F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, self.training)
            return self.head(self.c(x))

    with pytest.raises(ConversionError, match=r"calls F\.batch_norm, .* batch_norm='joint'"):
        convert(Functional(), ["a"], batch_norm="per_submodel")
    assert len(convert(Functional(), ["a"])(torch.randn(2, 3, 32, 32))) == 4


def test_odd_arguments_are_refused_by_type():
    class Plain(Base):
        def forward(self, x):
            return self.head(self.c(self.b(self.a(x))))

    for sites in (torch.tensor(1), np.array(["b"]), {"b": 1}, 1.5):
        with pytest.raises(SiteError, match="is a "):
            apply_rblock(Plain(), sites, input_size=(3, 32, 32))
    for setting in ("method", "calibration", "batch_norm"):
        with pytest.raises(SettingError, match=f"unknown {setting}"):
            apply_rblock(Plain(), ["b"], **{setting: np.array(["bdropdml", "exact"])})
    with torch.inference_mode(), pytest.raises(ConversionError, match=r"inside torch\.inference_mode"):
        apply_rblock(Plain(), ["b"], input_size=(3, 32, 32))
