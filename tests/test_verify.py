"""verify passes on converted models and raises for planted faults; it leaves the model as it was."""

import random

import numpy as np
import pytest
import timm
import torch
import torchvision
from torch import nn

from rblock_fx import ConversionError, SettingError, VerificationError, apply_rblock, verify
from tests.networks import SIZE, Net, images

GOOD = {
    "timm resnet": lambda: apply_rblock(timm.create_model("test_resnet", num_classes=5), input_size=(3, 64, 64)),
    "timm efficientnet, per sub-model": lambda: apply_rblock(
        timm.create_model("test_efficientnet", drop_rate=0.3, drop_path_rate=0.2),
        batch_norm="per_submodel",
        input_size=(3, 64, 64),
    ),
    "torchvision resnet, single": lambda: apply_rblock(
        torchvision.models.resnet18(weights=None), ["layer3"], method="dropblock", input_size=(3, 64, 64)
    ),
    "head": lambda: apply_rblock(timm.create_model("test_convnext"), method="r-drop", input_size=(3, 64, 64)),
    "rate 0": lambda: apply_rblock(timm.create_model("test_byobnet"), drop_prob=0.0, input_size=(3, 64, 64)),
}


@pytest.mark.parametrize("name", GOOD)
def test_passes_on_right_models_and_prints_a_report(name):
    torch.manual_seed(0)
    report = verify(GOOD[name](), torch.randn(2, 3, 64, 64))
    text = str(report)
    assert "evaluation" in text
    assert "equal to the plain network, bit for bit" in text
    assert "training at drop rate 0" in text
    assert text.count("not seen: ") == len(report.unseen) > 0


def normed():
    class Normed(Net):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(6)

        def between(self, x):
            return self.norm(x)

    return Normed()


def converted(**options):
    return apply_rblock(normed(), ["b"], drop_prob=0.4, **{"input_size": SIZE, **options})


def replace_forward(model, forward):
    """Replace the forward of a converted model's class; returns the old one."""
    own = type(model).forward
    type(model).forward = forward
    return own


def with_wrong_trace(model):
    def forward(self, x):
        return own(self, x) * (1.001 if self.training else 1)

    own = replace_forward(model, forward)


def with_changed_evaluation(model):
    def forward(self, x):
        return own(self, x) + (0 if self.training else 1e-7)

    own = replace_forward(model, forward)


def with_halves_mixed(model):
    def forward(self, x):
        output = own(self, x)
        return output.view(2, len(x), -1).transpose(0, 1).reshape(len(output), -1) if self.training else output

    own = replace_forward(model, forward)


def with_half_the_rows(model):
    def forward(self, x):
        return own(self, x)[: len(x)]

    own = replace_forward(model, forward)


def with_a_skipped_mask(model):
    def forward(self, x):
        if not self.training:
            return own(self, x)
        return self._rblock_original.forward(self, torch.cat([x, x]))

    own = replace_forward(model, forward)


def with_a_write(model):
    def forward(self, x):
        self.seen = len(x)
        return own(self, x)

    own = replace_forward(model, forward)


def with_statistics_of_one_half(model):
    def forward(self, x):
        if not self.training:
            return own(self, x)
        before = self.norm.running_var.clone()
        output = own(self, x)
        self.norm.running_var.copy_(before)
        return output

    own = replace_forward(model, forward)


def with_another_rate(model):
    model.rblock.b.gamma.zero_()
    model.rblock.b._apply = lambda *_args, **_kwargs: model.rblock.b


FAULTS = {
    "wrong trace": (with_wrong_trace, "sub-model 1 in training at drop rate 0 differs from the plain network by 0.001"),
    "evaluation": (with_changed_evaluation, "evaluation differs from the plain network"),
    "rows in another order": (with_halves_mixed, "sub-model 1 in training at drop rate 0 differs"),
    "N rows": (with_half_the_rows, r"training at drop rate 0 returns Tensor of \[\(4, 5\)\], expected .*\(8, 5\)"),
    "mask not called": (with_a_skipped_mask, "the mask 'b' is not called in a training forward"),
    "write": (with_a_write, "the converted model writes 'seen' differently"),
    "statistics": (with_statistics_of_one_half, "running_var of 'norm' is off the formula"),
    "rate": (with_another_rate, r"the mask 'b' drops 0\.0% of a sub-model's activations, expected 20\.0%"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_raises_for_planted_faults(fault):
    plant, message = FAULTS[fault]
    model = converted()
    verify(model, images())
    plant(model)
    with pytest.raises(VerificationError, match=message):
        verify(model, images())


@pytest.mark.parametrize("batch_norm", ["joint", "per_submodel"])
@pytest.mark.parametrize("training", [True, False])
def test_leaves_the_model_and_the_random_state_alone(batch_norm, training):
    model = converted(batch_norm=batch_norm).train(training)
    model.norm.eval()
    calls = []
    handle = model.a.register_forward_hook(lambda *_: calls.append(1))
    model.fc.weight.grad = torch.ones_like(model.fc.weight)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    random.seed(1)
    np.random.seed(1)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    verify(model, images())
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert calls == []
    assert list(model.a._forward_hooks) == [handle.id]
    assert model.rblock.b.drop_prob == 0.4
    assert torch.equal(model.fc.weight.grad, torch.ones_like(model.fc.weight))


def test_takes_wrapped_models_and_models_of_other_precisions():
    model = converted()
    verify(torch.compile(model, backend="eager"), images())
    verify(model.double(), images())
    verify(model.bfloat16(), images())


def test_rejects_plain_models_and_images_that_are_not_a_batch():
    with pytest.raises(ConversionError, match="verify: Net is not converted; expected a model from apply_rblock"):
        verify(Net(), images())
    for wrong, shown in ((images(1), r"\(1, 3, 16, 16\)"), (torch.zeros(()), r"\(\)"), ([images()], "list")):
        with pytest.raises(SettingError, match=rf"images must be a batch \(N, C, \*S\) of at least two, got {shown}"):
            verify(converted(), wrong)
