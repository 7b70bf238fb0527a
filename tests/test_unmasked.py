"""In train mode a converted model never returns rows without masks, nor rows in another order: right, or refused."""

import copy

import pytest
import timm
import torch
import torchvision
from torch import nn
from torchvision.models import detection

from rblock_fx import ConversionError, RBlockLoss, apply_rblock, remove_rblock, set_drop_prob, split_pair
from tests.networks import Net, assert_halves_are, images

SIZE = (3, 64, 64)
REMEDY = r"call model\(images\), or call model\.eval\(\) first, or convert the part alone"


def pair(name, sites, **options):
    """The plain model, and a converted copy that drops nothing yet."""
    torch.manual_seed(0)
    plain = timm.create_model(name, num_classes=5).train()
    return plain, apply_rblock(copy.deepcopy(plain), sites, drop_prob=0.0, input_size=SIZE, **options)


@pytest.mark.parametrize(
    ("name", "sites"),
    [
        ("test_resnet", ["layer3", "layer4"]),
        ("test_resnet", ["layer2.0"]),
        ("test_efficientnet", None),
        ("test_byobnet", None),
        ("test_convnext", None),
        ("test_nfnet", [-1]),
    ],
)
def test_forward_features_returns_both_sub_models(name, sites):
    plain, model = pair(name, sites)
    x = torch.randn(4, *SIZE)
    assert torch.equal(model.eval().forward_features(x), plain.eval().forward_features(x))
    expected = copy.deepcopy(plain).train().forward_features(x)
    assert_halves_are(copy.deepcopy(model).train().forward_features(x), expected, rtol=1e-3, atol=1e-4)
    set_drop_prob(model, 0.4)
    features = model.train().forward_features(x)
    assert not torch.equal(*split_pair(features))
    assert model.forward_head(features).shape == (8, 5)
    RBlockLoss()(model.forward_head(features), torch.arange(4)).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_head_on_forward_features_trains_as_a_pair():
    class Wrapper(nn.Module):
        def __init__(self, backbone):
            super().__init__()
            self.backbone, self.norm = backbone, nn.LayerNorm(backbone.num_features)

        def forward(self, x):
            return self.norm(self.backbone.forward_features(x).amax((2, 3)))

    _, model = pair("test_resnet", ["layer3"])
    set_drop_prob(model, 0.4)
    first, second = split_pair(Wrapper(model).train()(torch.randn(3, *SIZE)))
    assert len(first) == len(second) == 3
    assert not torch.equal(first, second)


CALLS = {
    "forward_intermediates": lambda m, x: m.forward_intermediates(x),
    "a container of stages": lambda m, x: m.stages(m.stem(x)),
}


@pytest.mark.parametrize("call", CALLS)
def test_rejects_calls_that_run_a_site_without_its_mask(call):
    _, model = pair("test_convnext", ["stages.1", "stages.2"])
    x = torch.randn(2, *SIZE)
    with pytest.raises(ConversionError, match=REMEDY):
        CALLS[call](model, x)
    CALLS[call](model.eval(), x)
    assert model.train()(x).shape == (4, 5)  # no hook stays behind
    CALLS[call](remove_rblock(model), x)


def test_rejects_forward_impl_or_masks_it():
    model = apply_rblock(torchvision.models.resnet18(weights=None, num_classes=5), ["layer4"], input_size=SIZE).train()
    x = torch.randn(2, *SIZE)
    try:
        assert not torch.equal(*split_pair(model._forward_impl(x)))
    except ConversionError as error:
        assert "_forward_impl" in str(error)  # noqa: PT017
    assert model.eval()._forward_impl(x).shape == (2, 5)


def test_methods_before_the_last_mask_are_rejected():
    _, model = pair("test_resnet", "head", method="r-drop")
    x = torch.randn(2, *SIZE)
    features = copy.deepcopy(model).eval().forward_features(x)
    with pytest.raises(
        ConversionError, match="forward_features, which runs before the last mask, of the converted ResNet"
    ):
        model.forward_features(x)
    with pytest.raises(ConversionError, match=REMEDY):
        model.forward_head(features)


def test_rejects_more_arguments_of_a_traced_method():
    class Scaled(Net):
        def features(self, x, scale=1.0):
            return self.b(self.a(x)) * scale

        def forward(self, x):
            return self.fc(self.features(x).mean((2, 3)))

    model, x = apply_rblock(Scaled(), ["b"], drop_prob=0.0, input_size=(3, 16, 16)).train(), images()
    assert_halves_are(model.features(x), Scaled().features(x))
    with pytest.raises(ConversionError, match="features with more arguments than the images of the converted Scaled"):
        model.features(x, scale=2.0)
    assert torch.equal(model.eval().features(x, scale=2.0), Scaled().features(x, scale=2.0))


def test_a_teacher_and_a_student_of_one_wrapper():
    """A wrapper in train mode may call the converted model; its evaluated teacher stays plain."""

    class Distilled(nn.Module):
        def __init__(self, student, teacher):
            super().__init__()
            self.student, self.teacher = student, teacher

        def forward(self, x):
            with torch.no_grad():
                target = self.teacher.eval()(x)
            return self.student(x), target

    _, model = pair("test_resnet", ["layer3"])
    teacher = copy.deepcopy(model)
    student, target = Distilled(model, teacher).train()(torch.randn(2, *SIZE))
    assert (len(student), len(target)) == (4, 2)


def test_rejects_replicas_of_data_parallel():
    _, model = pair("test_resnet", ["layer3"])
    replica = model._replicate_for_data_parallel()
    message = r"runs inside nn.DataParallel, .* wrong order; .*DistributedDataParallel\(apply_rblock\(model\)\)"
    with pytest.raises(ConversionError, match=message):
        replica(torch.randn(2, *SIZE))
    replica.eval()
    replica.training = False
    assert replica(torch.randn(2, *SIZE)).shape == (2, 5)


BODIES = {
    "fasterrcnn": lambda: detection.fasterrcnn_mobilenet_v3_large_320_fpn(weights=None, weights_backbone=None),
    "fcos": lambda: detection.fcos_resnet50_fpn(weights=None, weights_backbone=None, num_classes=3),
    "retinanet": lambda: detection.retinanet_resnet50_fpn(weights=None, weights_backbone=None, num_classes=3),
    "ssdlite": lambda: detection.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=3),
}
TARGET = {"boxes": torch.tensor([[4.0, 4.0, 40.0, 40.0]]), "labels": torch.tensor([1])}


@pytest.mark.parametrize("name", BODIES)
def test_rejects_detectors_their_backbones_and_bodies(name):
    """At the conversion, or in the detector's training forward: N targets never train beside 2N rows."""
    detector = BODIES[name]()
    with pytest.raises(ConversionError, match="is a torchvision detector or the backbone of one"):
        apply_rblock(detector)
    for path in ("backbone", "backbone.body"):
        try:
            part = detector.get_submodule(path)
        except AttributeError:
            continue
        try:
            apply_rblock(part, input_size=(3, 96, 96))
        except ConversionError as error:
            assert "detector" in str(error)  # noqa: PT017
            continue
        with pytest.raises(ConversionError, match=r"runs inside a torchvision detector, .*remove_rblock"):
            detector.train()([torch.rand(3, 96, 96)] * 2, [dict(TARGET)] * 2)
        remove_rblock(part)
