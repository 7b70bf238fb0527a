"""Where masks can go: the stages of a network, and the axis of its channels."""

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.utils._pytree import tree_leaves

from benchmarks.zoo_models import build_without_weights
from rblock_fx import SiteError, apply_rblock, describe, list_sites, split_pair
from tests.oracles import Maps


def test_list_sites_is_data_and_prints_as_a_table():
    sites = list_sites(timm.create_model("resnet50"))
    assert [(site.index, site.path, site.shape, site.channel_axis) for site in sites[-2:]] == [
        (3, "layer3", (1024, 14, 14), 1),
        (4, "layer4", (2048, 7, 7), 1),
    ]
    assert [site.path for site in sites] == ["act1", "layer1", "layer2", "layer3", "layer4"]
    assert sites[3].cost_before == pytest.approx(0.80, abs=0.01)
    lines = str(sites).splitlines()
    assert lines[0].split() == ["index", "path", "shape", "channel_axis", "cost_before"]
    assert lines[-1].split() == ["4", "layer4", "2048x7x7", "1", "99.9%"]
    assert [site.shape for site in list_sites(timm.create_model("resnet18"), (3, 64, 64))][-1] == (512, 2, 2)


STAGES = {
    "resnet18": ["layer1", "layer2", "layer3", "layer4"],
    "vgg16": ["features.3", "features.8", "features.15", "features.22", "features.29"],
    "densenet121": [f"features.denseblock{i}" for i in (1, 2, 3, 4)],
    "mobilenet_v2": ["features.1", "features.3", "features.6", "features.13", "features.17"],
    "mobilenet_v3_small": ["features.1", "features.3", "features.8", "features.11"],
    "efficientnet_b0": ["features.1", "features.2", "features.3", "features.5", "features.7"],
    "googlenet": ["inception3b", "inception4e", "inception5b"],
    "alexnet": ["features.1", "features.4", "features.11"],
    "squeezenet1_1": ["features.4", "features.7", "features.12"],
    "convnext_tiny": ["features.1", "features.3", "features.5", "features.7"],
    "regnet_y_400mf": [f"trunk_output.block{i}" for i in (1, 2, 3, 4)],
    "shufflenet_v2_x0_5": ["stage2", "stage3", "stage4"],
    "resnet50": ["layer1", "layer2", "layer3", "layer4"],
    "mnasnet0_5": ["layers.8", "layers.9", "layers.11", "layers.13"],
    "inception_v3": ["Mixed_5d", "Mixed_6e", "Mixed_7c"],
    "swin_t": ["features.1", "features.3", "features.5", "features.7"],
    "maxvit_t": ["stem", "blocks.0", "blocks.1", "blocks.2", "blocks.3"],
    # Dilated: of the layers with one resolution the last; neither the classifier nor the auxiliary one.
    "fcn_resnet50": ["backbone.layer1", "backbone.layer4"],
    "deeplabv3_resnet50": ["backbone.layer1", "backbone.layer4"],
    "deeplabv3_mobilenet_v3_large": ["backbone.1", "backbone.3", "backbone.6", "backbone.15"],
    "lraspp_mobilenet_v3_large": ["backbone.1", "backbone.3", "backbone.6", "backbone.15"],
    "r3d_18": ["layer1", "layer2", "layer3", "layer4"],
    "mc3_18": ["layer1", "layer2", "layer3", "layer4"],
    "r2plus1d_18": ["layer1", "layer2", "layer3", "layer4"],
    "s3d": ["features.0", "features.3", "features.6", "features.12", "features.15"],
    "swin3d_t": ["features.0", "features.2", "features.4", "features.6"],
}


@pytest.mark.parametrize("name", STAGES)
def test_stages_are_the_last_cut_of_each_resolution(name):
    sites = list_sites(build_without_weights(f"torchvision/{name}"))
    assert [site.path for site in sites] == STAGES[name]
    assert all(max(site.shape[1:] if site.channel_axis == 1 else site.shape[:-1]) > 1 for site in sites)
    assert [site.cost_before for site in sites] == sorted(site.cost_before for site in sites)


def test_the_encoder_of_an_optical_flow_model_converts():
    encoder = torchvision.models.optical_flow.raft_small(weights=None).feature_encoder.train()
    plain = encoder(torch.randn(2, 3, 128, 128))
    assert apply_rblock(encoder, input_size=(3, 128, 128))(torch.randn(2, 3, 128, 128)).shape[0] == 2 * len(plain)


class Pyramid(nn.Module):
    """An encoder of three stages with a decoder that returns every level."""

    def __init__(self, order=1):
        super().__init__()
        block = lambda c, d: nn.Sequential(nn.Conv2d(c, d, 3, 2, 1), nn.ReLU(), nn.Conv2d(d, d, 3, padding=1))  # noqa: E731
        self.one, self.two, self.three = block(3, 4), block(4, 8), block(8, 8)
        self.up, self.lateral, self.order = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1), order

    def forward(self, x):
        second = self.two(self.one(x))
        third = self.three(second)
        up = self.up(nn.functional.interpolate(third, scale_factor=2.0) + self.lateral(second))
        return [up, third][:: self.order]


@pytest.mark.parametrize(
    ("build", "stages"),
    [
        (lambda: Pyramid(), ["two", "three"]),
        (lambda: Pyramid(-1), ["two", "three"]),
        (lambda: timm.create_model("test_resnet", features_only=True), ["layer3", "layer4"]),
        (lambda: timm.create_model("test_convnext", features_only=True, out_indices=(0, 3)), ["stages_2", "stages_3"]),
        (
            lambda: torchvision.models._utils.IntermediateLayerGetter(
                torchvision.models.resnet18(weights=None), {"layer1": "low", "layer4": "high"}
            ),
            ["layer3", "layer4"],
        ),
        (lambda: torchvision.models.segmentation.fcn_resnet50(weights=None, weights_backbone=None, aux_loss=True), 2),
    ],
)
def test_default_sites_of_several_outputs_are_the_encoders_last(build, stages):
    model = build()
    found = [site.path for site in describe(apply_rblock(model, input_size=(3, 64, 64))).sites]
    assert found == (["backbone.layer1", "backbone.layer4"] if stages == 2 else stages)
    output = model.train()(torch.randn(2, 3, 64, 64))
    assert {len(leaf) for leaf in tree_leaves(output)} == {4}


TOKENS = ["timm/test_vit", "timm/twins_svt_small", "timm/coat_tiny", "timm/levit_128", "timm/vit_tiny_r_s16_p8_224"]
TOKENS += ["torchvision/vit_b_16", "torchvision/mvit_v2_s"]


@pytest.mark.parametrize("name", TOKENS)
def test_networks_of_tokens_have_no_stages(name):
    model = build_without_weights(name)
    assert list_sites(model) == ()
    with pytest.raises(SiteError, match=r"has no stage with a feature map of [45] axes"):
        apply_rblock(model)
    apply_rblock(model, method="r-drop")  # the classifier's input is there
    assert all(site.is_head and len(site.shape) == 1 for site in describe(model).sites)


class Stemless(nn.Module):
    """A residual path from the stem to the output bypasses the stage."""

    def __init__(self):
        super().__init__()
        block = [nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)]
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))
        self.stage = nn.Sequential(nn.MaxPool2d(2), *block)
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        x = self.stem(x)
        return self.fc(self.stage(x).mean((2, 3)) + x.mean((2, 3)))


def test_bypassed_maps_are_not_stages():
    assert [site.path for site in list_sites(Stemless(), (3, 16, 16))] == ["stem"]


def test_wrapped_network_has_the_stages_of_the_network():
    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = torchvision.models.resnet18(weights=None)

        def forward(self, x):
            return self.net((x - 0.5) / 0.2)

    assert [site.path for site in list_sites(Wrapper())] == [f"net.layer{i}" for i in (1, 2, 3, 4)]
    body = nn.Sequential(*list(torchvision.models.resnet18(weights=None).children())[:-2])
    assert [site.path for site in list_sites(body)] == ["4", "5", "6", "7"]  # without a head the last stage is one too


def test_listing_leaves_the_model_alone():
    model = torchvision.models.resnet18(weights=None).train()
    model.bn1.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    list_sites(model)
    assert model.training
    assert not model.bn1.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not model._forward_hooks


@pytest.mark.parametrize(
    ("build", "site", "shape", "axis"),
    [
        (lambda: timm.create_model("convnext_tiny"), "stages.3.blocks.0.norm", (7, 7, 768), -1),
        (lambda: timm.create_model("convnext_atto"), "stages.3.blocks.0.conv_dw", (320, 7, 7), 1),
        (lambda: timm.create_model("mambaout_femto"), "stages.3", (7, 7, 288), -1),
        (lambda: timm.create_model("swin_tiny_patch4_window7_224"), "layers.3", (7, 7, 768), -1),
        (lambda: torchvision.models.swin_t(weights=None), "features.7", (7, 7, 768), -1),
        (lambda: torchvision.models.swin_t(weights=None), "features.5.1.norm1", (14, 14, 384), -1),
    ],
)
def test_finds_the_channel_axis(build, site, shape, axis):
    description = describe(apply_rblock(build(), site)).sites[0]
    assert (description.shape, description.channel_axis) == (shape, axis)


@pytest.mark.parametrize("method", ["bdropdml", "sdropdml"])
def test_masks_channels_last_maps_along_their_axes(method):
    class ChannelsLast(Maps):
        def forward(self, x):
            return self.stage(x.movedim(1, -1)).movedim(-1, 1)

    model = apply_rblock(ChannelsLast().train(), "stage", method=method, drop_prob=0.5, input_size=(6, 9, 5))
    assert (model.rblock.stage.shape, model.rblock.stage.channel_axis) == ((9, 5, 6), -1)
    first, second = split_pair(model(torch.ones(200, 6, 9, 5)))
    union = (first == 0) | (second == 0)
    if method == "bdropdml":
        assert (union == union[:, :1]).all()
    else:
        assert (union.flatten(2).all(2) == union.flatten(2).any(2)).all()
    dropped = union.flatten(1).double().mean(1)
    assert abs(dropped.mean().item() - 0.5) < 4 * dropped.std().item() / 200**0.5


def test_default_input_has_the_channels_of_the_stem():
    model = timm.create_model("test_resnet", in_chans=1, num_classes=5)
    assert describe(apply_rblock(model)).input_size == (1, 160, 160)


@pytest.mark.parametrize(("name", "side", "axis"), [("mambaout_femto", 192, -1), ("convnext_atto", 160, 1)])
def test_finds_the_channel_axis_of_a_cube(name, side, axis):
    site = list_sites(timm.create_model(name), (3, side, side))[0]
    assert len(set(site.shape)) == 1
    assert site.channel_axis == axis
