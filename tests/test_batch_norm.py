import copy

import pytest
import timm
import torch
from torch import nn

from rblock_fx import apply_rblock, remove_rblock
from tests.oracles import recorded_masks, two_forwards


def build(name):
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=5).train()


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_byobnet"])
def test_per_submodel_statistics_are_those_of_two_forwards(name):
    plain = build(name)
    model = apply_rblock(build(name), [-2, -1], batch_norm="per_submodel", drop_prob=0.4, input_size=(3, 96, 96))
    assert list(model.state_dict()) == list(plain.state_dict())
    x = torch.randn(4, 3, 96, 96)
    with recorded_masks(model) as recorded:
        output = model(x)
    paths = [site.path for site, _ in model.rblock.conversion.masks]
    prefix = copy.deepcopy(plain)
    expected = two_forwards(plain, {path: recorded[path.replace(".", "_")] for path in paths}, x)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)
    output.square().sum().backward()
    expected.square().sum().backward()
    for (key, got), want in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(
            got.grad, want.grad, rtol=1e-3, atol=1e-3, msg=lambda text, key=key: f"{key}: {text}"
        )

    # Before the fork the statistics are of one forward, behind it of two.
    prefix(x)
    once, twice = dict(prefix.named_buffers()), dict(plain.named_buffers())
    updates = {1: 0, 2: 0}
    for key, got in dict(model.named_buffers()).items():
        if key.endswith("num_batches_tracked"):
            updates[int(got)] += 1
            want = twice if got == 2 else once
            for statistic in ("running_mean", "running_var"):
                name_of = key.replace("num_batches_tracked", statistic)
                torch.testing.assert_close(model.get_buffer(name_of), want[name_of], rtol=1e-4, atol=1e-5)
    assert min(updates.values()) > 0


def test_joint_statistics_are_of_all_rows():
    model = apply_rblock(build("test_resnet"), [-1], drop_prob=0.4, input_size=(3, 96, 96))
    model(torch.randn(4, 3, 96, 96))
    assert {int(value) for key, value in model.named_buffers() if key.endswith("num_batches_tracked")} == {1}


def test_frozen_and_evaluated_layers_are_what_they_were():
    plain = build("test_resnet")
    model = apply_rblock(build("test_resnet"), [-2], batch_norm="per_submodel", input_size=(3, 96, 96))
    x = torch.randn(4, 3, 96, 96)
    assert torch.equal(model.eval()(x), plain.eval()(x))
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    before = {key: value.clone() for key, value in model.named_buffers()}
    model(x)
    assert all(torch.equal(value, before[key]) for key, value in model.named_buffers())


def test_remove_restores_the_layers():
    model = remove_rblock(apply_rblock(build("test_byobnet"), batch_norm="per_submodel"))
    assert [type(module) for module in model.modules()] == [type(module) for module in build("test_byobnet").modules()]
