"""Forwards that a trace would get wrong are refused, with the model left as it was; odd ones that work are right."""

import copy

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rblock_fx import ConversionError, apply_rblock, describe, list_sites, remove_rblock, split_pair
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


class AsksTorchForTheType(Base):
    def forward(self, x):
        x = self.b(self.a(x))
        return self.head(self.c(x * 2 if torch.is_tensor(x) else x))


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


class Normalised(Base):
    """Python reads the name of its layer as another one."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleDict({"\ufb01rst": nn.Conv2d(3, 8, 3, padding=1)})

    def forward(self, x):
        return self.head(self.c(self.b(self.layers["\ufb01rst"](x))))


class WithoutTensors(Base):
    def forward(self, x):
        return {"rows": len(self.b(self.a(x)))}


class TakesMetadata(Base):
    def forward(self, x, ages):
        return self.head(self.c(self.b(self.a(x)))) + ages[:, None]


class NoMapInTraining(Base):
    """Returns its map in evaluation and a dictionary in training."""

    class Stage(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(8, 16, 3, padding=1)

        def forward(self, x):
            x = self.conv(x).relu()
            return {"map": x} if self.training else x

    def __init__(self):
        super().__init__()
        self.b = nn.Sequential(self.Stage())

    def forward(self, x):
        x = self.b(self.a(x))
        return self.head(self.c(x["map"] if self.training else x))


REFUSED = {
    WithoutGradients: (["b", "c"], "switches gradients, autocast or inference mode"),
    Decorated: (["b", "c"], "switches gradients, autocast or inference mode"),
    WithAutocast: (["b", "c"], "switches gradients, autocast or inference mode"),
    AsksTorchForTheType: (["b", "c"], "the traced forward of AsksTorchForTheType differs from its own: it computes"),
    Appends: (["b"], "differs from its own|cannot be traced"),
    DrawsFromNumpy: (["b"], "it draws random numbers"),
    UsesWhatWasLeftBehind: (["c"], "a tensor that a module keeps as a plain attribute"),
    Shared: (["e.0"], r"site 'e\.0' runs 2 times but was traced 1 times in the traced forward of Shared"),
    GivesANumber: (["b"], "returns a 0-dim tensor in train mode, .*split_pair"),
    Keyword: (["layers.in", "c"], "the module name 'in' .*cannot be written in Python code; rename it"),
    Normalised: (["layers.\ufb01rst", "c"], "cannot be written in Python code; rename it"),
    WithoutTensors: (["b"], "WithoutTensors returns dict without a tensor"),
    TakesMetadata: (["b"], r"takes 'ages' beside the images, .*torch\.cat\(\[ages, ages\]\)"),
    NoMapInTraining: (["b.0"], "the training forward generated for NoMapInTraining does not run .*choose other sites"),
}
LISTED = set(REFUSED) - {WithoutTensors, TakesMetadata}


@pytest.mark.parametrize("network", REFUSED)
def test_rejects_what_a_trace_would_get_wrong(network):
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
    assert network not in LISTED or len(list_sites(model, (3, 32, 32))) > 0
    assert torch.nn.modules.module._global_forward_hooks == {}


@pytest.mark.parametrize("batch_norm", ["joint", "per_submodel"])
@pytest.mark.parametrize("place", ["model", "batch norm"])
def test_a_class_that_refuses_subclasses_is_left_alone(place, batch_norm):
    class Refuses:
        def __init_subclass__(cls, **_kwargs):
            if "rblock" in str(vars(cls)):
                raise TypeError("this class is final")

    class Norm(nn.BatchNorm2d, *([Refuses] if place == "batch norm" else [])):
        pass

    class Plain(Base, *([Refuses] if place == "model" else [])):
        def __init__(self):
            super().__init__()
            self.c = Norm(16)

        def forward(self, x):
            return self.head(self.c(self.b(self.a(x))))

    model = Plain()
    before = [(type(module), sorted(vars(module))) for module in model.modules()]
    if (place, batch_norm) == ("batch norm", "joint"):
        assert len(convert(model, ["b"], batch_norm=batch_norm)(torch.randn(2, 3, 32, 32))) == 4
        return
    with pytest.raises(ConversionError, match=r"cannot be subclassed \(TypeError: this class is final\); wrap it"):
        convert(model, ["b"], batch_norm=batch_norm)
    assert [(type(module), sorted(vars(module))) for module in model.modules()] == before


class RowNumbers(Base):
    def forward(self, x):
        rows = torch.arange(x.shape[0])
        maps = self.c(self.b(self.a(x))).flatten(2)
        return self.fc(maps[rows, :, maps.sum(1).argmax(1)])


def test_rejects_a_site_around_a_site_that_returns_no_map():
    with pytest.raises(ConversionError, match=r"site 'b\.0' does not return a tensor in the traced forward of NoMap"):
        convert(NoMapInTraining(), ["b.0", "a", "b.0.conv"])


def test_numbers_of_rows_are_right_or_refused():
    plain = RowNumbers().train()
    try:
        model = convert(copy.deepcopy(plain), drop_prob=0.5)
    except ConversionError as error:
        assert "relates the samples of a batch" in str(error)  # noqa: PT017
        return
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


def test_modes_of_modules_around_sites_are_guarded():
    model = convert(Inlined(), ["first.conv", "b"])
    x = torch.randn(2, 3, 32, 32)
    model.first.eval()
    with pytest.raises(ConversionError, match=r"'first\.training' has changed since the training forward was traced"):
        model(x)
    model.train().factor = 2.0
    with pytest.raises(ConversionError, match=r"'factor' has changed .*apply_rblock\(remove_rblock\(model\)"):
        model(x)
    plain = model.eval()(x)
    model.factor = 1.0
    assert len(model.train()(x)) == 4
    model.factor = 2.0
    assert torch.equal(model.eval()(x), plain)
    assert len(convert(remove_rblock(model), ["first.conv", "b"])(x)) == 4


def test_head_taken_off_with_its_pooling_converts_again():
    model = apply_rblock(timm.create_model("repvit_m0_9"), input_size=(3, 64, 64)).train()
    x = torch.randn(2, 3, 64, 64)
    model.reset_classifier(5)
    assert model(x).shape == (4, 5)
    model.reset_classifier(0, "")
    with pytest.raises(ConversionError, match="global_pool"):
        model(x)
    remove_rblock(model)
    assert model(x).shape == (2, 384, 2, 2)
    assert apply_rblock(model, input_size=(3, 64, 64))(x).shape == (4, 384, 2, 2)


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
    assert [[mask.place for mask in site.masks] for site in describe(model).sites] == [[0, 1]]
    first, second = split_pair(model(torch.randn(2, 3, 32, 32)))
    assert not torch.equal(first, second)


def test_finds_channels_of_a_network_of_one_image_size():
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


def test_rejects_functional_batch_norm_per_submodel():
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


def test_rejects_inference_mode():
    with torch.inference_mode(), pytest.raises(ConversionError, match=r"outside torch\.inference_mode\(\)"):
        apply_rblock(RowNumbers(), ["b"], input_size=(3, 32, 32))
