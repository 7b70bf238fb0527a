"""Settings, writes and rows that a forward reaches in roundabout ways: classes, modules, functions, other axes."""

import argparse
import dataclasses
import sys
import types

import pytest
import timm
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn

from rblock_fx import ConversionError, SettingError, apply_rblock, verify

SIZE = (3, 16, 16)
MODULE = types.ModuleType("tests_reach_config")
sys.modules[MODULE.__name__] = MODULE
SLOTS = dataclasses.make_dataclass("Slots", [("scale", float)], slots=True)(1.0)
NAMESPACE = argparse.Namespace(scale=1.0)


class Config:
    scale = 1.0
    seen: list = []  # noqa: RUF012


def helper(x):
    return x


def tripled(x):
    return 3 * x


class Network(nn.Module):
    """The middle of it is computed by a function."""

    def __init__(self, middle=lambda x: x):
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 5)
        self.middle = middle

    def forward(self, x):
        return self.fc(self.b(self.middle(self.a(x))).mean((2, 3)))


def converted(middle, sites=("a",)):
    return apply_rblock(Network(middle), list(sites), input_size=SIZE).train()


def restore():
    MODULE.scale, MODULE.seen = 1.0, []
    Config.scale, SLOTS.scale, NAMESPACE.scale = 1.0, 1.0, 1.0


READS = {
    "Config.scale": (lambda x: x * Config.scale, lambda: setattr(Config, "scale", 3.0)),
    "scale": (lambda x: x * MODULE.scale, lambda: setattr(MODULE, "scale", 3.0)),
    "SLOTS": (lambda x: x * SLOTS.scale, lambda: setattr(SLOTS, "scale", 3.0)),
    "NAMESPACE": (lambda x: x * NAMESPACE.scale, lambda: setattr(NAMESPACE, "scale", 3.0)),
    "helper": (lambda x: helper(x), lambda: setattr(sys.modules[__name__], "helper", tripled)),
}


@pytest.mark.parametrize("name", READS)
def test_settings_reached_by_name_are_guarded(name, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "helper", helper)
    restore()
    middle, change = READS[name]
    model, x = converted(middle), torch.randn(2, *SIZE)
    assert len(model(x)) == 4
    change()
    with pytest.raises(ConversionError, match=f"'{name}' has changed"):
        model(x)
    restore()


@pytest.mark.parametrize("target", [MODULE, Config], ids=["module", "class"])
def test_writes_reached_by_name_are_refused(target):
    restore()

    def middle(x):
        target_of_code = MODULE if target is MODULE else Config
        target_of_code.seen.append(1)
        return x

    with pytest.raises(ConversionError, match="seen"):
        converted(middle)


ACROSS = {
    "arithmetic with the number of rows": lambda x: x / x.shape[0],
    "a pool along the batch": lambda x: F.max_pool3d(x.transpose(0, 1), (3, 1, 1), 1, (1, 0, 0)).transpose(0, 1),
    "halves of the batch": lambda x: x.view(2, x.shape[0] // 2, 8, 16, 16).flip(0).view(x.shape),
    "a softmax over rows and channels": lambda x: x.reshape(-1, 16, 16).softmax(0).view(x.shape),
    "a norm over the whole batch": lambda x: F.layer_norm(x, x.shape),
    "a group norm over the whole batch": lambda x: F.group_norm(x.reshape(1, -1, 16, 16), 1).view(x.shape),
}


@pytest.mark.parametrize("middle", ACROSS.values(), ids=ACROSS)
def test_rejects_operations_across_the_batch(middle):
    with pytest.raises(ConversionError, match="relates the samples of a batch"):
        converted(middle)


def test_rejects_a_mask_on_rows_in_another_order():
    with pytest.raises(ConversionError, match="a mask on rows in another order"):
        converted(lambda x: torch.cat([x, x.flip(3)]), ("a", "b"))


class Recurrent(Network):
    """Runs a recurrent layer over the samples of a batch, a usual mistake."""

    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(8, 5)

    def forward(self, x):
        return self.rnn(self.b(self.a(x)).flatten(2).transpose(1, 2))[0].mean(1)


def test_rejects_a_recurrent_layer_along_the_batch():
    with pytest.raises(ConversionError, match="batch_first=True"):
        apply_rblock(Recurrent(), ["a"], input_size=SIZE)


class Wrapper(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = timm.create_model("test_resnet", num_classes=0)
        self.fc = nn.Linear(96, 5)

    def forward(self, x):
        return self.fc(self.backbone.forward_features(x).mean((2, 3)))


def test_methods_of_a_module_around_a_site_are_refused():
    model = apply_rblock(Wrapper(), ["backbone.layer3"], input_size=(3, 64, 64)).train()
    x = torch.randn(2, 3, 64, 64)
    assert len(model(x)) == 4
    with pytest.raises(ConversionError, match="forward_features, which runs a site"):
        model.backbone.forward_features(x)
    assert len(model.eval().backbone.forward_features(x)) == 2


def test_evaluation_follows_a_class_that_is_patched():
    kind = type("Patched", (Network,), {"classify": lambda _self, x: x})
    kind.forward = lambda self, x: self.classify(self.fc(self.b(self.a(x)).mean((2, 3))))
    model, x = apply_rblock(kind(), ["a"], input_size=SIZE), torch.randn(2, *SIZE)
    before = model.eval()(x)
    kind.classify = lambda _self, x: 3 * x
    assert torch.equal(model(x), 3 * before)
    with pytest.raises(ConversionError, match="'classify' has changed"):
        model.train()(x)


def test_verify_takes_half_precision_and_prepared_models():
    model = apply_rblock(timm.create_model("test_resnet", num_classes=5), input_size=(3, 96, 96))
    x = torch.randn(2, 3, 96, 96)
    verify(model.bfloat16(), x.bfloat16())
    verify(Accelerator(mixed_precision="bf16", cpu=True).prepare(model.float()), x)
    with pytest.raises(SettingError, match="does not run on images"):
        verify(model, x[:, :1])
