"""The masks are outside the module tree: code that walks over children finds the network that it was."""

import copy
import io
import pickle
from collections import OrderedDict

import pytest
import timm
import torch
import torchvision
from torch import nn
from torchvision.models._utils import IntermediateLayerGetter

from rblock_fx import ConversionError, apply_rblock, remove_rblock, set_drop_prob, split_pair
from tests.networks import assert_halves_are

WALKS = {
    "children": lambda m: list(m.children()),
    "named_children": lambda m: list(m.named_children()),
    "modules": lambda m: list(m.modules()),
    "named_modules": lambda m: [name for name, _ in m.named_modules()],
    "named_parameters": lambda m: [name for name, _ in m.named_parameters()],
    "named_buffers": lambda m: [name for name, _ in m.named_buffers()],
    "state_dict": lambda m: list(m.state_dict()),
    "_modules": lambda m: list(m._modules),
    "dir": lambda m: [name for name in dir(m) if name in m._modules],
    "apply": lambda m: (seen := [], m.apply(lambda module: seen.append(module)))[0],
}


@pytest.mark.parametrize("walk", WALKS)
def test_walks_do_not_meet_the_masks(walk):
    model = torchvision.models.mobilenet_v3_small(weights=None)
    before = WALKS[walk](model)
    apply_rblock(model, ["features.8", "features.11"], batch_norm="per_submodel")
    assert WALKS[walk](model) == before


def cut_resnet():
    return torchvision.models.resnet18(weights=None, num_classes=5)


CUTS = {
    "all but the last child": (cut_resnet, ["layer3"], lambda m: nn.Sequential(*list(m.children())[:-1])),
    "a slice": (lambda: nn.Sequential(*list(cut_resnet().children())[:-2]), ["6"], lambda m: m[:7]),
    "an index": (lambda: nn.Sequential(*list(cut_resnet().children())[:-2]), ["6"], lambda m: m[-1]),
    "a copy without the last": (
        cut_resnet,
        ["layer3"],
        lambda m: nn.Sequential(OrderedDict(list(m._modules.items())[:-1])),
    ),
    "a getter": (cut_resnet, ["layer3"], lambda m: IntermediateLayerGetter(m, {"layer2": "low", "layer4": "high"})),
}


@pytest.mark.parametrize("cut", CUTS)
def test_networks_cut_by_children_are_the_plain_ones(cut):
    make, sites, take = CUTS[cut]
    plain = make().eval()
    model = apply_rblock(copy.deepcopy(plain), sites, input_size=(3, 64, 64)).eval()
    x = torch.randn(2, 256, 4, 4) if cut == "an index" else torch.randn(2, 3, 64, 64)
    got, expected = take(model)(x), take(plain)(x)
    items = zip(got.values(), expected.values(), strict=True) if isinstance(expected, dict) else [(got, expected)]
    assert all(torch.equal(*pair) for pair in items)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("test_resnet", {}),
        ("test_efficientnet", {"out_indices": (1, 3)}),
        ("test_byobnet", {}),
        ("test_convnext", {}),
        ("vgg11", {}),
    ],
)
def test_features_only_models_evaluate_and_train(name, options):
    torch.manual_seed(0)
    plain = timm.create_model(name, features_only=True, **options)
    model = apply_rblock(copy.deepcopy(plain), input_size=(3, 64, 64))
    x = torch.randn(2, 3, 64, 64)
    assert all(map(torch.equal, model.eval()(x), plain.eval()(x)))
    set_drop_prob(model, 0.0)
    assert_halves_are(model.train()(x), copy.deepcopy(plain).train()(x), rtol=1e-3, atol=1e-4)
    set_drop_prob(model, 0.5)
    assert not torch.equal(*split_pair(model(x)[-1]))


def test_rejects_a_graph_module_around_a_site():
    model = timm.create_model("test_byobnet", features_only=True, feature_cls="fx")
    with pytest.raises(ConversionError, match=r"'graph_module' is a torch\.fx GraphModule, which was traced before"):
        apply_rblock(model, input_size=(3, 64, 64))
    assert len(model.train()(torch.randn(2, 3, 64, 64))[-1]) == 2


class Loop(nn.Module):
    """Runs its children one after the other, and reads them by attribute names that it lists."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(6, 6, 3), nn.ReLU())
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5))

    def forward(self, x):
        for name, layer in self.named_children():
            x = layer(x) if name != "head" else layer(x.relu())
        return x


def test_forward_that_loops_over_children_evaluates_and_trains():
    plain, x = Loop(), torch.randn(2, 3, 12, 12)
    model = apply_rblock(Loop(), ["body"], drop_prob=0.0, input_size=(3, 12, 12))
    assert torch.equal(model.eval()(x), plain.eval()(x))
    assert_halves_are(model.train()(x), plain.train()(x))


def test_masks_follow_the_model_and_its_copies():
    model = apply_rblock(Loop(), ["body"], drop_prob=0.3, input_size=(3, 12, 12)).to(torch.float64)
    assert model.rblock.body.gamma.dtype == torch.float32
    assert model.to("meta").rblock.body.gamma.is_meta
    model = apply_rblock(Loop(), ["body"], drop_prob=0.3, input_size=(3, 12, 12)).double()
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)):
        assert list(other._modules) == ["stem", "body", "head"]
        assert other.rblock.body is not model.rblock.body
        assert other.rblock.body.drop_prob == 0.3
        assert other.train()(torch.randn(2, 3, 12, 12).double()).shape == (4, 5)
        assert type(remove_rblock(other)) is Loop


def test_print_shows_the_masks():
    text = str(apply_rblock(Loop(), ["body"], drop_prob=0.25, input_size=(3, 12, 12)))
    assert "(rblock): RBlock(" in text
    assert "(body): BDropDML(drop_prob=0.25, block_size=3" in text
    assert text.startswith("RBlockLoop(")
    assert "rblock" not in str(remove_rblock(apply_rblock(Loop(), ["body"], input_size=(3, 12, 12))))
