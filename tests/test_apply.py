"""A converted model trains as two sub-models and is otherwise the model that it was."""

import copy
import inspect
import io
import pickle

import pytest
import timm
import torch
import torchvision
from accelerate import Accelerator
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.feature_extraction import create_feature_extractor

from rblock_fx import ConversionError, SiteError, apply_rblock, describe, list_sites, remove_rblock, split_pair
from rblock_fx.masks.methods import METHODS
from tests.oracles import recorded_masks, two_forwards

MODELS = {
    **{
        f"timm/{name}": (lambda name=name: timm.create_model(name, num_classes=10))
        for name in (
            "resnet18",
            "resnet50",
            "efficientnet_b0",
            "convnext_atto",
            "densenet121",
            "regnety_002",
            "vgg16_bn",
        )
    },
    **{
        f"torchvision/{name}": (lambda name=name: torchvision.models.get_model(name, num_classes=10))
        for name in ("resnet18", "vgg16", "mobilenet_v3_small", "densenet121")
    },
}


class ConvNet(nn.Module):
    """Residual, without batch statistics; one stage inside another module, one site inside another site."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.body = nn.Sequential(
            nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.GELU()),
            nn.Sequential(nn.Conv2d(8, 12, 3, stride=2, padding=1), nn.GELU(), nn.GroupNorm(3, 12)),
        )
        self.skip = nn.Conv2d(8, 12, 1, stride=2)
        self.fc = nn.Linear(12, 5)

    def forward(self, x):
        x = self.stem(x)
        x = self.body(x) + self.skip(x)
        return self.fc(x.mean((2, 3)))


def gradients(model):
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("name", MODELS)
def test_converts_usual_models_and_removes(name):
    model = MODELS[name]()
    model.train()
    x = torch.randn(2, 3, 64, 64)
    model(x).sum().backward()
    with_gradient = set(gradients(model))
    model.zero_grad()
    keys, own_class = list(model.state_dict()), type(model)
    logits = model.eval()(x)
    rng = torch.get_rng_state()

    assert apply_rblock(model) is model

    assert torch.equal(torch.get_rng_state(), rng)
    assert not model.training
    assert torch.equal(model(x), logits)
    assert list(model.state_dict()) == keys
    assert isinstance(model, own_class)
    output = model.train()(torch.randn(4, 3, 64, 64))
    assert output.shape == (8, 10)
    first, second = split_pair(output)
    assert not torch.equal(first, second)
    output.sum().backward()
    assert set(gradients(model)) == with_gradient
    assert describe(model).early_fork_reason is None
    remove_rblock(model)
    assert type(model) is own_class
    assert torch.equal(model.eval()(x), copy.deepcopy(model)(x))


@pytest.mark.parametrize("method", [name for name in METHODS if METHODS[name].parts == 2 and METHODS[name].needs_map])
@pytest.mark.parametrize("sites", [["body"], ["stem", "body.0", "body.1"], ["body.1", "skip"], ["body.0.0", "body"]])
def test_doubled_forward_is_two_forwards(method, sites):
    plain = ConvNet().train()
    model = apply_rblock(ConvNet().train(), sites, method=method, drop_prob=0.5, input_size=(3, 12, 12))
    x = torch.randn(5, 3, 12, 12)
    weight = torch.randn(10, 5)
    with recorded_masks(model) as recorded:
        output = model(x)
    masks = {path: recorded[path.replace(".", "_")] for path in sites}
    assert all((mask == 0).any() for mask in masks.values())
    expected = two_forwards(plain, masks, x)
    torch.testing.assert_close(output, expected)
    (output * weight).sum().backward()
    (expected * weight).sum().backward()
    for name, gradient in gradients(plain).items():
        torch.testing.assert_close(gradients(model)[name], gradient)


@pytest.mark.parametrize("name", ["test_convnext", "test_nfnet"])
def test_doubled_forward_of_timm_models_is_two_forwards(name):
    torch.manual_seed(1)
    plain = timm.create_model(name, num_classes=7).train()
    model = apply_rblock(copy.deepcopy(plain), "all", drop_prob=0.4, input_size=(3, 96, 96))
    x = torch.randn(3, 3, 96, 96)
    with recorded_masks(model) as recorded:
        output = model(x)
    masks = {site.path: recorded[site.path.replace(".", "_")] for site in list_sites(plain)}
    expected = two_forwards(plain, masks, x)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    output.square().sum().backward()
    expected.square().sum().backward()
    for key, gradient in gradients(plain).items():
        torch.testing.assert_close(gradients(model)[key], gradient, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("sites", [["conv_proj"], ["encoder.layers.encoder_layer_0.mlp.0"]])
def test_sizes_read_before_the_fork_follow_it(sites):
    """torchvision's VisionTransformer reshapes, and expands its class token, by a batch size read before."""
    torch.manual_seed(2)
    plain = torchvision.models.VisionTransformer(32, 8, 2, 2, 12, 24, num_classes=5).train()
    nn.init.normal_(plain.heads.head.weight)  # zero at first
    if sites == ["conv_proj"]:
        model = apply_rblock(copy.deepcopy(plain), sites, drop_prob=0.5, input_size=(3, 32, 32))
        x = torch.randn(3, 3, 32, 32)
        with recorded_masks(model) as recorded:
            output = model(x)
        assert describe(model).early_fork_reason is None
        torch.testing.assert_close(output, two_forwards(plain, {"conv_proj": recorded["conv_proj"]}, x))
    else:
        with pytest.raises(SiteError, match="does not return a feature map"):
            apply_rblock(plain, sites, input_size=(3, 32, 32))


@pytest.mark.parametrize("sites", [["body"], ["stem", "fc"], ["head"]])
def test_scripted_parts_stay_whole(sites):
    class PartlyScripted(ConvNet):
        def __init__(self):
            super().__init__()
            self.body = torch.jit.script(self.body)

    plain = PartlyScripted().train()
    if sites == ["stem", "fc"]:
        with pytest.raises(SiteError, match="'fc' does not return a feature map"):
            apply_rblock(plain, sites, input_size=(3, 12, 12))
        sites = ["stem"]
    method = "r-drop" if sites == ["head"] else "bdropdml"
    model = apply_rblock(PartlyScripted().train(), sites, method=method, drop_prob=0.0, input_size=(3, 12, 12))
    x = torch.randn(2, 3, 12, 12)
    torch.testing.assert_close(model(x), torch.cat([plain(x)] * 2))
    with pytest.raises(SiteError, match=r"'body\.0' never runs in a forward"):
        apply_rblock(PartlyScripted(), "body.0", input_size=(3, 12, 12))


def test_functional_dropout_at_the_root_stays_alive():
    model = apply_rblock(timm.create_model("test_efficientnet", drop_rate=0.5, num_classes=4).train(), drop_prob=0.0)
    x = torch.ones(2, 3, 64, 64)
    assert not torch.equal(*split_pair(model(x)))
    assert torch.equal(model.eval()(x), model(x))


def test_masks_each_head_of_a_distilled_model():
    model = apply_rblock(timm.create_model("levit_128s", num_classes=5).train(), method="r-drop", drop_prob=0.5)
    assert [(site.path, site.is_head) for site in describe(model).sites] == [("head", True), ("head_dist", True)]
    first, second = split_pair(model(torch.randn(2, 3, 224, 224)))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("method", ["r-drop", "c-drop"])
def test_head_masks_the_input_of_the_classifier(method):
    plain = ConvNet().train()
    model = apply_rblock(ConvNet().train(), method=method, drop_prob=0.4, input_size=(3, 12, 12))
    assert [(site.path, site.is_head) for site in describe(model).sites] == [("fc", True)]
    x = torch.randn(5, 3, 12, 12)
    with recorded_masks(model) as recorded:
        output = model(x)
    inputs = []
    plain.fc.register_forward_pre_hook(lambda _module, args: inputs.append(args[0]))
    plain(x)
    expected = nn.functional.linear(torch.cat((inputs[0], inputs[0])) * recorded["fc"], plain.fc.weight, plain.fc.bias)
    torch.testing.assert_close(output, expected)


@pytest.mark.parametrize("method", ["dropout", "spatialdropout", "dropblock"])
def test_single_model_methods_do_not_double(method):
    model = apply_rblock(ConvNet().train(), ["body"], method=method, drop_prob=0.5, input_size=(3, 12, 12))
    x = torch.randn(5, 3, 12, 12)
    assert model(x).shape == (5, 5)
    assert not torch.equal(model(x), model(x))
    assert torch.equal(model.eval()(x), ConvNet().eval()(x))


def test_remove_is_the_inverse():
    model, plain = ConvNet(), ConvNet()
    attributes = set(vars(model))
    apply_rblock(model, ["body.1"], input_size=(3, 12, 12), batch_norm="per_submodel")
    model.train()(torch.randn(2, 3, 12, 12)).sum().backward()
    assert remove_rblock(model) is model
    assert type(model) is ConvNet
    assert set(vars(model)) == attributes
    assert repr(model) == repr(plain)
    assert [name for name, _ in model.named_modules()] == [name for name, _ in plain.named_modules()]
    x = torch.randn(2, 3, 12, 12)
    assert torch.equal(model.train()(x), plain.train()(x))
    apply_rblock(model, ["body.0"], input_size=(3, 12, 12))
    assert model(x).shape == (4, 5)


def test_checkpoints_load_into_the_plain_model_and_back():
    model = apply_rblock(timm.create_model("test_resnet", num_classes=5))
    plain = timm.create_model("test_resnet", num_classes=5)
    plain.load_state_dict(model.state_dict(), strict=True)
    model.load_state_dict(plain.state_dict(), strict=True)
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert [name for name, _ in model.named_buffers()] == [name for name, _ in plain.named_buffers()]
    assert model.pretrained_cfg == plain.pretrained_cfg
    assert model.get_classifier() is model.fc


def test_copies_and_pickles_are_converted():
    model = apply_rblock(timm.create_model("test_resnet", num_classes=5), "all", batch_norm="per_submodel").train()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)]
    x = torch.randn(2, 3, 64, 64)
    torch.manual_seed(7)
    expected = copy.deepcopy(model)(x)
    for duplicate in copies:
        assert duplicate.rblock is not model.rblock
        torch.manual_seed(7)
        assert torch.equal(duplicate(x), expected)
        assert str(describe(duplicate)) == str(describe(model))
        remove_rblock(duplicate)
        assert type(duplicate) is timm.models.resnet.ResNet
        assert {type(module) for module in duplicate.modules()} == {
            type(module) for module in timm.create_model("test_resnet").modules()
        }


def test_the_training_forward_can_be_read():
    model = apply_rblock(timm.create_model("test_resnet"), ["layer3"])
    lines = [line.strip() for line in describe(model).code.splitlines()]
    assert "layer3 = self.layer3(layer2)" in lines
    assert "rblock_layer3 = self.rblock.layer3(layer3)  # the batch doubles here" in lines
    assert "layer4 = self.layer4(rblock_layer3)" in lines
    assert not any("None" in line or ";" in line for line in lines)
    assert "print(describe(model).code)" in str(describe(model))
    own = inspect.signature(timm.create_model("test_resnet").forward)
    assert list(inspect.signature(model.forward).parameters) == list(own.parameters)


def test_fx_tools_read_the_plain_network():
    plain = torchvision.models.resnet18(weights=None).eval()
    model = apply_rblock(copy.deepcopy(plain)).eval()
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(torch.fx.symbolic_trace(model)(x), plain(x))
    message = r"torch\.fx cannot trace the converted ResNet in train mode; .*remove_rblock\(copy\.deepcopy\(model\)\)"
    with pytest.raises(ConversionError, match=message):
        torch.fx.symbolic_trace(model.train())
    with pytest.raises(ConversionError, match=message):  # it traces both modes
        create_feature_extractor(model.eval(), ["layer2", "layer4"])
    extractor = create_feature_extractor(remove_rblock(copy.deepcopy(model)), ["layer2", "layer4"])
    wanted = create_feature_extractor(plain, ["layer2", "layer4"]).eval()(x)
    got = extractor.eval()(x)
    assert {name: torch.equal(got[name], leaf) for name, leaf in wanted.items()} == {"layer2": True, "layer4": True}


def test_accelerate_returns_a_model_that_trains_as_a_pair():
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    model = accelerator.prepare(apply_rblock(timm.create_model("test_resnet", num_classes=5)))
    x = torch.randn(2, 3, 64, 64)
    assert model.train()(x).shape == (4, 5)
    assert model.eval()(x).shape == (2, 5)
    for keep in (True, False):
        bare = accelerator.unwrap_model(model, keep_fp32_wrapper=keep)
        assert bare.train()(x).shape == (4, 5)
        assert torch.equal(bare.eval()(x), bare(x))


def test_sequential_can_be_indexed_and_edited():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(4 * 36, 3))
    x = torch.randn(2, 3, 8, 8)
    expected = model.eval()(x)
    layers = list(model)
    apply_rblock(model, ["1"], input_size=(3, 8, 8))
    assert torch.equal(model(x), expected)
    assert model.train()(x).shape == (4, 3)
    assert list(model) == layers
    assert (len(model), model[-1]) == (4, layers[-1])
    assert type(model[:2]) is nn.Sequential
    assert list(model[:2]) == layers[:2]
    model[-1] = nn.Linear(4 * 36, 7)
    assert model(x).shape == (4, 7)
    assert list(remove_rblock(model)) == [*layers[:3], model[-1]]


def test_sequential_with_its_own_constructor_can_be_sliced():
    model = torchvision.ops.Conv2dNormActivation(3, 4, norm_layer=None, activation_layer=nn.ReLU)
    layers = list(model)
    apply_rblock(model, ["1"], input_size=(3, 8, 8))
    assert list(model[1:]) == layers[1:]
    assert model.train()(torch.randn(2, 3, 8, 8)).shape == (4, 4, 8, 8)


def test_fork_costs_what_the_design_says():
    def cifar_resnet18():
        model = timm.create_model("resnet18", num_classes=10)
        model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        model.maxpool = nn.Identity()
        return model.train()

    def training_flops(model):
        with FlopCounterMode(display=False) as counter:
            model(torch.randn(2, 3, 32, 32)).sum().backward()
        return counter.get_total_flops()

    plain = training_flops(cifar_resnet18())
    for sites, ratio in [(["layer3", "layer4"], 1.24), ("layer[1234]", 1.73)]:
        model = apply_rblock(cifar_resnet18(), sites, input_size=(3, 32, 32))
        assert training_flops(model) / plain == pytest.approx(ratio, abs=0.005)
        assert describe(model).cost == pytest.approx(ratio, abs=0.01)
