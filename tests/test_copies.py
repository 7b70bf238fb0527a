"""Copies of a converted model: averages of its weights, and the whole model in a file for another process."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from timm.utils import ModelEmaV3
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

from rblock_fx import apply_rblock, describe, set_drop_prob, split_pair

ROOT = Path(__file__).parent.parent


def build(batch_norm="joint"):
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=5)
    return apply_rblock(model, drop_prob=0.4, batch_norm=batch_norm, input_size=(3, 64, 64)).train()


def train_step(model, optimizer):
    optimizer.zero_grad()
    model(torch.randn(4, 3, 64, 64)).square().mean().backward()
    optimizer.step()


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_masks_alive(duplicate, model):
    """The masks of a copy drop, at a rate of its own, and `model` goes on with its rate."""
    x = torch.randn(4, 3, 64, 64)

    def drops(network):
        output = network.train()(x)
        assert output.shape == (8, 5)
        return not torch.equal(*split_pair(output))

    assert drops(duplicate)
    set_drop_prob(duplicate, 0.0)
    assert not drops(duplicate)
    assert drops(model)
    set_drop_prob(duplicate, 0.4)
    set_drop_prob(model, 0.0)
    assert drops(duplicate)
    assert not drops(model)


def assert_plain_network(duplicate, state):
    plain = timm.create_model("test_resnet", num_classes=5).eval()
    plain.load_state_dict(state, strict=True)
    x = torch.randn(4, 3, 64, 64)
    assert torch.equal(duplicate.eval()(x), plain(x))


def assert_same_weights(got, want):
    assert list(got) == list(want)
    for name, tensor in want.items():
        torch.testing.assert_close(got[name], tensor, msg=lambda text, name=name: f"{name}: {text}")


def test_a_deep_copy_shares_nothing():
    model = build("per_submodel")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train_step(model, optimizer)
    duplicate = copy.deepcopy(model)
    before = weights(model)
    shared = {tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    assert shared.isdisjoint({tensor.data_ptr() for tensor in (*duplicate.parameters(), *duplicate.buffers())})
    assert_masks_alive(copy.deepcopy(duplicate), copy.deepcopy(model))
    train_step(duplicate, torch.optim.SGD(duplicate.parameters(), lr=0.1))
    assert_same_weights(weights(model), before)
    assert not torch.equal(duplicate.fc.weight, model.fc.weight)


@pytest.mark.parametrize("exclude_buffers", [False, True])
def test_timms_ema_averages_a_converted_model(exclude_buffers):
    model = build("per_submodel")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ema = ModelEmaV3(model, decay=0.75, exclude_buffers=exclude_buffers)
    parameters = {name for name, _ in model.named_parameters()}
    want = weights(model)
    for _ in range(3):
        train_step(model, optimizer)
        ema.update(model)
        for name, now in model.state_dict().items():
            averaged = name in parameters or (now.is_floating_point() and not exclude_buffers)
            want[name] = 0.75 * want[name] + 0.25 * now if averaged else now.clone()
    assert_same_weights(weights(ema.module), want)
    assert ema(torch.randn(4, 3, 64, 64)).shape == (4, 5)
    assert_plain_network(ema.module, weights(ema.module))
    assert_masks_alive(ema.module, model)


@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize("average", ["equal", "exponential"])
def test_torch_averages_a_converted_model(average, use_buffers):
    model = build("per_submodel")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    averaged = AveragedModel(
        model,
        multi_avg_fn=get_ema_multi_avg_fn(0.75) if average == "exponential" else None,
        use_buffers=use_buffers,
    )
    parameters = {name for name, _ in model.named_parameters()}
    want = {}
    for step in range(3):
        train_step(model, optimizer)
        averaged.update_parameters(model)
        kept = 0.75 if average == "exponential" else step / (step + 1)
        for name, now in model.state_dict().items():
            if not (name in parameters or use_buffers) or step == 0:
                want[name] = now.clone()
            elif now.is_floating_point():
                want[name] = kept * want[name] + (1 - kept) * now
    got = weights(averaged.module)
    assert list(got) == list(model.state_dict())
    for name, tensor in want.items():
        if tensor.is_floating_point():  # torch rounds its averages of counts in ways of its own
            torch.testing.assert_close(got[name], tensor, msg=lambda text, name=name: f"{name}: {text}")
    assert averaged.eval()(torch.randn(4, 3, 64, 64)).shape == (4, 5)
    assert_plain_network(averaged.module, got)
    assert_masks_alive(averaged.module, model)


def test_update_bn_computes_training_statistics():
    model = build()
    averaged = AveragedModel(model)
    images = [torch.randn(4, 3, 64, 64) for _ in range(2)]
    before = weights(averaged.module)
    set_drop_prob(averaged.module, 0.0)
    update_bn(images, averaged)
    plain = timm.create_model("test_resnet", num_classes=5)
    plain.load_state_dict(before)
    update_bn(images, plain)
    # Where nothing is dropped the two sub-models are one network; only the unbiased variance counts rows twice.
    for name, want in plain.state_dict().items():
        if name.endswith("running_mean"):
            torch.testing.assert_close(averaged.module.state_dict()[name], want)
            assert not torch.equal(want, before[name])


IN_ANOTHER_PROCESS = """
import json, sys
import torch
assert "rblock_fx" not in sys.modules and "timm" not in sys.modules
torch.set_num_threads(1)
folder = sys.argv[1]
model = torch.load(f"{folder}/model.pt", weights_only=False)
x = torch.load(f"{folder}/images.pt")
torch.manual_seed(7)
trained = model.train()(x)
model.load_state_dict(torch.load(f"{folder}/weights.pt"))
evaluated = model.eval()(x)
torch.save((trained, evaluated), f"{folder}/outputs.pt")
from rblock_fx import describe, remove_rblock, set_drop_prob, split_pair
from timm.models.resnet import ResNet
text = str(describe(model))
set_drop_prob(model, 0.0)
equal_at_zero = torch.equal(*split_pair(model.train()(x)))
print(json.dumps({
    "class": type(model).__name__,
    "is_resnet": isinstance(model, ResNet),
    "description": text,
    "equal_at_zero": equal_at_zero,
    "removed": type(remove_rblock(model)) is ResNet,
    "norms": sorted({type(module).__name__ for module in model.modules() if "BatchNorm" in type(module).__name__}),
}))
"""


def test_pickled_model_is_the_same_in_another_process(tmp_path):
    model = build("per_submodel")
    train_step(model, torch.optim.SGD(model.parameters(), lr=0.1))
    set_drop_prob(model, 0.3)
    x = torch.randn(4, 3, 64, 64)
    torch.save(model, tmp_path / "model.pt")
    torch.save(x, tmp_path / "images.pt")
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", IN_ANOTHER_PROCESS, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": path},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    trained, evaluated = torch.load(tmp_path / "outputs.pt")
    assert torch.equal(evaluated, copy.deepcopy(model).eval()(x))
    torch.manual_seed(7)
    assert torch.equal(trained, model(x))
    assert not torch.equal(*split_pair(trained))
    assert result == {
        "class": type(model).__name__,
        "is_resnet": True,
        "description": str(describe(model)),
        "equal_at_zero": True,
        "removed": True,
        "norms": ["BatchNorm2d"],
    }
