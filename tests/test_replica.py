"""What is tried on a copy never touches the model, and a conversion does not disturb other threads."""

import sys
import threading

import pytest
import timm
import torch
from torch import nn

from rblock_fx import ConversionError, apply_rblock, remove_rblock, verify
from rblock_fx.network.replica import weightless_copy
from tests.networks import SIZE, Net, assert_halves_are, images, state_of


class Frozen(nn.Module):
    """A part that every deep copy shares."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6, momentum=None), nn.Dropout(0.5))
        self.grad_checkpointing = True
        self.requires_grad_(False).eval()

    def __deepcopy__(self, memo):
        return self

    def train(self, mode=True):  # noqa: ARG002
        return super().train(False)

    def forward(self, x):
        return self.net(x)


class WithFrozenPart(Net):
    def __init__(self):
        super().__init__()
        self.a = Frozen()


def test_a_part_that_returns_itself_as_its_copy_is_not_touched():
    model = WithFrozenPart().train()
    calls = []
    model.a.net[0].register_forward_hook(lambda *_: calls.append(1))
    x = images()
    expected = model(x)
    before, values = state_of(model.a), [tensor.clone() for tensor in model.a.state_dict().values()]
    calls.clear()
    apply_rblock(model, ["b"], drop_prob=0.0, input_size=SIZE)
    assert calls == []
    assert state_of(model.a) == before
    assert (model.a.net[1].momentum, model.a.grad_checkpointing) == (None, True)
    assert all(map(torch.equal, model.a.state_dict().values(), values))
    assert_halves_are(model(x), expected)
    assert calls == [1]
    verify(model, x)
    assert state_of(model.a) == before
    assert remove_rblock(model).a.net[0].weight.device.type == "cpu"


def test_the_copy_has_no_data_and_none_of_the_users_hooks():
    model = timm.create_model("test_resnet")
    model.layer1.register_forward_hook(lambda *_: pytest.fail("a hook of the user ran"))
    model.extra = torch.ones(3)
    replica = weightless_copy(model)
    assert {tensor.device.type for tensor in (*replica.parameters(), *replica.buffers(), replica.extra)} == {"meta"}
    assert [name for name, _ in replica.named_modules()] == [name for name, _ in model.named_modules()]
    assert not any(module._forward_hooks for module in replica.modules())
    assert len(model.layer1._forward_hooks) == 1


def test_rejects_a_model_that_cannot_be_copied():
    model = Net()
    model.lock = threading.Lock()
    before = state_of(model)
    with pytest.raises(ConversionError, match=r"Net cannot be copied \(TypeError: .*copy.deepcopy accepts"):
        apply_rblock(model, ["b"], input_size=SIZE)
    assert state_of(model) == before


@pytest.fixture
def _frequent_switches():
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.usefixtures("_frequent_switches")
def test_conversions_do_not_disturb_other_threads():
    """Two threads convert, one evaluates and trains a plain model with a checkpointed block meanwhile."""
    plain = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3)).eval()
    x, errors, done = images(2), [], threading.Event()
    expected = plain(x)
    models = [Net() for _ in range(8)]

    def guarded(function, *arguments):
        try:
            function(*arguments)
        except Exception as error:
            errors.append(error)

    def run():
        while not done.is_set():
            output = torch.utils.checkpoint.checkpoint(plain, x, use_reentrant=False)
            output.sum().backward()
            assert torch.equal(output, expected)

    def convert(share):
        for model in share:
            apply_rblock(model, ["b"], input_size=SIZE)

    other = threading.Thread(target=guarded, args=(run,))
    converters = [threading.Thread(target=guarded, args=(convert, models[start::2])) for start in (0, 1)]
    for thread in (other, *converters):
        thread.start()
    for thread in converters:
        thread.join()
    done.set()
    other.join()
    assert errors == []
    assert all(model.train()(x).shape == (4, 5) for model in models)
