"""Forward hooks run once per forward in either mode, or are refused."""

import collections

import pytest
import timm
import torch

from rblock_fx import ConversionError, apply_rblock, describe, remove_rblock

SITES = ["layer2", "layer3.0"]  # "layer3" is around a site and so part of the training forward
CALLED = ["", "conv1", "layer1", "layer1.0", "layer2", "layer2.0", "layer3.0", "layer3.0.conv2", "layer4", "fc"]


def make():
    return timm.create_model("resnet10t", num_classes=5)


def count_calls(model, paths):
    calls = collections.Counter()
    for path in paths:
        model.get_submodule(path).register_forward_pre_hook(lambda _m, _i, path=path: calls.update([f"before {path}"]))
        model.get_submodule(path).register_forward_hook(lambda _m, _i, _o, path=path: calls.update([f"after {path}"]))
    return calls


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_hooks_run_once_per_forward(when, mode):
    model = make()
    if when == "before":
        calls = count_calls(model, CALLED)
        apply_rblock(model, SITES, input_size=(3, 64, 64))
        assert not calls
    else:
        calls = count_calls(apply_rblock(model, SITES, input_size=(3, 64, 64)), CALLED)
    model.train(mode == "train")
    model(torch.randn(2, 3, 64, 64))
    assert calls == {f"{moment} {path}": 1 for moment in ("before", "after") for path in CALLED}


def test_hooks_behind_the_fork_see_both_sub_models():
    model = apply_rblock(make(), SITES, input_size=(3, 64, 64)).train()
    rows = {}
    for path in ("layer1", "layer2", "layer3.0", "fc"):
        model.get_submodule(path).register_forward_hook(lambda _m, _i, out, path=path: rows.update({path: len(out)}))
    model(torch.randn(2, 3, 64, 64))
    assert rows == {"layer1": 2, "layer2": 2, "layer3.0": 4, "fc": 4}


REGISTER = {
    "forward": lambda module: module.register_forward_hook(lambda *_: None),
    "forward pre": lambda module: module.register_forward_pre_hook(lambda *_: None),
    "full backward": lambda module: module.register_full_backward_hook(lambda *_: None),
    "full backward pre": lambda module: module.register_full_backward_pre_hook(lambda *_: None),
}


@pytest.mark.parametrize("kind", REGISTER)
def test_rejects_hooks_that_training_would_skip(kind):
    message = r"'layer3' has hooks that would not run in train mode, .*apply_rblock\(model, \['layer3'\]\)"
    hooked = make()
    handle = REGISTER[kind](hooked.layer3)
    with pytest.raises(ConversionError, match=message):
        apply_rblock(hooked, SITES, input_size=(3, 64, 64))
    assert not hasattr(hooked, "rblock")
    handle.remove()

    model = apply_rblock(hooked, SITES, input_size=(3, 64, 64)).train()
    x = torch.randn(2, 3, 64, 64)
    handle = REGISTER[kind](model.layer3)
    with pytest.raises(ConversionError, match=message):
        model(x)
    model.eval()(x)
    handle.remove()
    assert len(model.train()(x)) == 4
    REGISTER[kind](model.layer3)
    assert len(remove_rblock(model)(x)) == 2


def test_hooks_on_mask_modules_run_in_call_order():
    model = apply_rblock(make(), SITES, input_size=(3, 64, 64)).train()
    calls = []
    for site in describe(model).sites:
        for mask in site.masks:
            mask.register_forward_hook(
                lambda _m, inputs, out, path=site.path: calls.append((path, len(inputs[0]), len(out)))
            )
    model(torch.randn(2, 3, 64, 64))
    assert calls == [("layer2", 2, 4), ("layer3.0", 4, 4)]
    model.eval()(torch.randn(2, 3, 64, 64))
    assert len(calls) == 2
