"""Uses that work or name a remedy: arguments, outputs, names, parametrizations, contexts, blocks that do not fit."""

import copy
import dataclasses
import io
import warnings
from collections import OrderedDict, UserDict

import numpy as np
import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.nn.utils import parametrize

from rblock_fx import ConversionError, RBlockError, RBlockWarning, apply_rblock, describe, remove_rblock
from tests.networks import SIZE, Net, assert_halves_are, assert_right_or_refused, images


class Defaults(Net):
    """Its images have a default, as in every Hugging Face CNN."""

    def forward(self, pixel_values=None, output_hidden_states=None, return_dict=True):
        if pixel_values is None:
            raise ValueError("no images")
        x = self.b(self.a(pixel_values))
        logits = self.fc(self.c(x).mean((2, 3)))
        return {"logits": logits, "hidden": x if output_hidden_states else None} if return_dict else (logits,)


def test_an_image_argument_may_have_a_default():
    model, x = apply_rblock(Defaults(), ["b"], drop_prob=0.0, input_size=SIZE).train(), images()
    expected = Defaults().train()(x)["logits"]
    assert_halves_are(model(pixel_values=x)["logits"], expected)
    assert_halves_are(model(x, return_dict=True)["logits"], expected)
    with pytest.raises(ConversionError, match="converted with return_dict=True, got return_dict of type bool"):
        model(x, return_dict=False)
    assert torch.equal(model.eval()(x, return_dict=False)[0], expected)


class Conditioned(Net):
    def forward(self, x, ages=None):
        x = self.fc(self.c(self.b(self.a(x))).mean((2, 3)))
        return x if ages is None else x + ages[:, None]


def test_metadata_beside_the_images_is_refused_with_a_remedy():
    model = apply_rblock(Conditioned(), ["b"], input_size=SIZE).train()
    with pytest.raises(ConversionError, match=r"got ages of type Tensor; .*its rows must be doubled: .*torch\.cat"):
        model(images(), torch.ones(4))


class Outputs(Net):
    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def forward(self, x):
        x = self.b(self.a(x)).mean((2, 3))
        return self.kind(self.fc(x), x)


class Named(OrderedDict):
    @classmethod
    def of(cls, logits, features):
        return cls(logits=logits, features=features)


class Triple(tuple):
    @classmethod
    def of(cls, logits, features):
        return cls((logits, features, None))


class Maps(list):
    @classmethod
    def of(cls, logits, features):
        return cls([logits, {"inner": features}])


@dataclasses.dataclass
class Record:
    logits: torch.Tensor
    features: torch.Tensor
    loss: float | None = None


class Wrapped(UserDict):
    @classmethod
    def of(cls, logits, features):
        return cls(logits=logits, features=features)


@pytest.mark.parametrize("kind", [Named.of, Triple.of, Maps.of, Record, Wrapped.of])
def test_outputs_of_other_classes_are_right_or_refused(kind):
    x, model = images(), Outputs(kind)
    plain = Outputs(kind).train()(x)
    try:
        output = apply_rblock(model, ["a"], drop_prob=0.0, input_size=SIZE).train()(x)
    except RBlockError:
        assert type(model) is Outputs
        return
    assert type(output) is type(plain)
    content = (
        vars(output).values() if isinstance(output, Record) else output.values() if isinstance(output, dict) else output
    )
    wanted = vars(plain).values() if isinstance(plain, Record) else plain.values() if isinstance(plain, dict) else plain
    for got, want in zip(content, wanted, strict=True):
        if want is None:
            assert got is None
        else:
            assert_halves_are(got, want)


@pytest.mark.parametrize("batch_norm", ["joint", "per_submodel"])
@pytest.mark.parametrize(("path", "name"), [("", "gain"), ("norm", "weight"), ("b", "weight")])
def test_parametrizations_survive_training_and_removal(path, name, batch_norm):
    class Squared(nn.Module):
        def forward(self, weight):
            return weight**2

    class Gained(Net):
        def __init__(self):
            super().__init__()
            self.gain, self.norm = nn.Parameter(torch.full((5,), 2.0)), nn.BatchNorm2d(6)

        def forward(self, x):
            return super().forward(x) * self.gain

        def between(self, x):
            return self.norm(x)

    plain, x = Gained().train(), images()
    model = apply_rblock(Gained(), ["a"], drop_prob=0.0, batch_norm=batch_norm, input_size=SIZE).train()
    for network in (plain, model):
        parametrize.register_parametrization(network.get_submodule(path), name, Squared())
    assert_halves_are(model(x), copy.deepcopy(plain)(x), rtol=1e-4, atol=1e-5)
    keys, evaluated = list(model.state_dict()), model.eval()(x)
    remove_rblock(model)
    assert parametrize.is_parametrized(model.get_submodule(path), name)
    assert list(model.state_dict()) == keys == list(plain.state_dict())
    assert torch.equal(model.eval()(x), evaluated)
    assert len(model.train()(x)) == 4


def test_sizes_may_be_numpy_integers():
    for size in (tuple(np.int16([3, 16, 16])), np.array([3, 16, 16]), [np.uint8(3), 16, 16]):
        model = apply_rblock(Net(), ["b"], drop_prob=np.float32(0.25), block_size=np.int64(3), input_size=size)
        assert describe(model).input_size == SIZE
        assert describe(model).sites[0].drop_prob == 0.25


def test_conversion_under_a_device_context():
    plain = Net()
    with torch.device("meta"):
        model = apply_rblock(plain, ["b"], drop_prob=0.0, input_size=SIZE)
    assert model.rblock.b.gamma.device.type == "cpu"
    assert_halves_are(model.train()(images()), Net().train()(images()))


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_scripting_makes_the_plain_network_or_is_refused():
    plain = torchvision.models.resnet18(weights=None, num_classes=5).eval()
    model = apply_rblock(copy.deepcopy(plain), ["layer4"], input_size=(3, 64, 64)).eval()
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(torch.jit.script(model)(x), plain(x))
    with pytest.raises(
        ConversionError, match=r"torch\.jit\.script .* in train mode .*torch\.jit\.script\(model\.eval\(\)"
    ):
        torch.jit.script(model.train())
    assert len(model(x)) == 4


@pytest.mark.filterwarnings("ignore")
def test_fx_quantization_is_plain_in_evaluation_or_refused():
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    x = images()
    model = apply_rblock(Net(), ["b"], input_size=SIZE).eval()
    mapping = get_default_qconfig_mapping("x86")
    try:
        prepared = prepare_fx(model, mapping, (x,))
        assert convert_fx(prepared)(x).shape == (4, 5)
    except ConversionError as error:
        assert "remove_rblock" in str(error)  # noqa: PT017
    assert len(model.train()(x)) == 8


class OddNames(nn.Module):
    """Layers whose names are not Python's, or clash with names of generated code."""

    def __init__(self, name):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleDict({name: nn.Conv2d(3, 6, 3)})
        self.after, self.name = nn.Conv2d(6, 5, 3), name

    def forward(self, x):
        return self.after(self.layers[self.name](x)).mean((2, 3))


@pytest.mark.parametrize(
    "name", ["1", "a-b", "x", "self", "torch", "rblock", "conv 1", "\u00e4", "\u212b", "class", "print", "None"]
)
def test_odd_names_of_layers_are_right_or_refused(name):
    x = images()
    expected = OddNames(name).train()(x)
    assert_right_or_refused(OddNames(name), x, expected, "rename it", sites=[f"layers.{name}"])


def test_a_class_without_a_module_of_its_own_converts():
    """As torch.hub makes them: from a file that is not importable by name."""
    scope = {"__name__": "hubconf_that_is_gone", "Net": Net}
    exec("FACTOR = 2.0\nclass FromHub(Net):\n    def between(self, x):\n        return x * FACTOR\n", scope)
    plain, x = scope["FromHub"]().train(), images()
    model = apply_rblock(copy.deepcopy(plain), ["b"], drop_prob=0.0, input_size=SIZE)
    assert_halves_are(model(x), plain(x), rtol=1e-4, atol=1e-5)
    assert type(remove_rblock(copy.deepcopy(model))) is scope["FromHub"]


class ChecksSize(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk, self.head = timm.create_model("test_resnet", features_only=True), nn.Conv2d(96, 2, 1)

    def forward(self, x):
        if x.shape[-1] % 16:
            raise RuntimeError("wrong size")
        return nn.functional.interpolate(self.head(self.trunk(x)[-1]), x.shape[-2:])


def test_a_forward_that_checks_sizes_names_a_part():
    model = ChecksSize()
    model.head = nn.LazyConv2d(2, 1)
    model(torch.randn(1, 3, 64, 64))
    x = torch.randn(2, 3, 64, 64)
    error = assert_right_or_refused(model, x, copy.deepcopy(model).train()(x), "model.trunk", sites=["trunk.layer3"])
    if error is not None:
        assert "apply_rblock(model.trunk)" in str(error)
        apply_rblock(model.trunk, drop_prob=0.0, input_size=(3, 64, 64))


def test_warns_where_blocks_do_not_fit():
    with pytest.warns(RBlockWarning, match=r"blocks of side 31 do not fit the 16x16 map of 'b': .*smaller block_size"):
        model = apply_rblock(Net(), ["b"], method="dropblock", drop_prob=0.3, block_size=31, input_size=SIZE)
    (site,) = describe(model).sites
    ones = torch.ones(4000, 6, 16, 16)
    dropped = (site.masks[0](ones) == 0).flatten(1)
    assert site.loses_everything == pytest.approx(
        dropped.all(1).float().mean().item(), abs=0.06
    )  # estimated from a sample
    assert site.loses_nothing == pytest.approx(
        1 - dropped.any(1).float().mean().item(), abs=0.06
    )  # estimated from a sample
    text = str(describe(model))
    assert "loses nothing" in text
    assert "loses everything" in text
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        apply_rblock(Net(), ["b"], input_size=SIZE)


def test_repeated_conversions_leave_nothing_behind():
    import linecache

    model = Net()
    apply_rblock(remove_rblock(apply_rblock(model, ["b"], input_size=SIZE)), ["c"], input_size=SIZE)
    before = len(linecache.cache)
    for _ in range(3):
        apply_rblock(remove_rblock(model), ["b"], input_size=SIZE)
        model.train()(images())
    assert len(linecache.cache) == before
    buffer = io.BytesIO()
    torch.save(remove_rblock(model), buffer)
    assert b"rblock" not in buffer.getvalue()
