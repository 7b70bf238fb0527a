"""Activation checkpointing, switched on before the conversion or after it, recomputes what the plain model would."""

import collections
import contextlib
from collections.abc import Iterator
from unittest import mock

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rblock_fx import apply_rblock, set_drop_prob

# The model, or its stages, switch; sites at stages, inside them, and behind a module that holds several stages.
CASES = [
    ("test_resnet", ["layer2", "layer3"]),
    ("test_resnet", ["layer3.0", "layer4"]),
    ("test_resnet", ["layer4.0.conv1"]),
    ("test_efficientnet", None),
    ("test_efficientnet", ["bn2"]),
    ("test_byobnet", None),
    ("test_byobnet", ["stages.1", "stages.2.0"]),
    ("test_convnext", None),
    ("test_convnext", ["stages.1.blocks.0", "stages.3"]),
    ("test_nfnet", None),
]


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=5).train()


@contextlib.contextmanager
def counted(model: nn.Module) -> Iterator[collections.Counter[str]]:
    """Count the calls of every convolution, recomputation included."""
    calls: collections.Counter[str] = collections.Counter()
    handles = [
        module.register_forward_pre_hook(lambda _module, _inputs, name=name: calls.update([name]))
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d)
    ]
    yield calls
    for handle in handles:
        handle.remove()


def step(model: nn.Module, x: Tensor) -> tuple[collections.Counter[str], int, list[Tensor]]:
    """Return the calls, the bytes that autograd saved in forward, and the gradients of one training step."""
    saved = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal saved
        saved += tensor.nbytes
        return tensor

    model.zero_grad()
    torch.manual_seed(1)
    with counted(model) as calls:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = model(x)
        output.square().mean().backward()
    return calls, saved, [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(("name", "sites"), CASES)
def test_recomputes_what_the_plain_model_does(name, sites, when):
    x = torch.randn(2, 3, 64, 64)
    plain = make(name)
    plain.set_grad_checkpointing(True)
    with mock.patch.object(torch.utils.checkpoint, "checkpoint", wraps=checkpoint) as plain_segments:
        expected, _, _ = step(plain, x)
    assert set(expected.values()) == {1, 2}  # some are recomputed, some are not

    model = make(name)
    if when == "before":
        model.set_grad_checkpointing(True)
    apply_rblock(model, sites)
    if when == "after":
        model.set_grad_checkpointing(True)
    with mock.patch.object(torch.utils.checkpoint, "checkpoint", wraps=checkpoint) as segments:
        calls, saved, gradients = step(model, x)
    assert calls == expected
    # Block by block, not stage by stage; a block with a site inside, in its parts.
    in_parts = sites == ["layer4.0.conv1"]
    assert (segments.call_count > plain_segments.call_count) == in_parts
    assert segments.call_count >= plain_segments.call_count > 0

    model.set_grad_checkpointing(False)
    calls, saved_without, gradients_without = step(model, x)
    assert set(calls.values()) == {1}
    assert saved < saved_without
    assert len(gradients) == len(gradients_without)
    for with_it, without in zip(gradients, gradients_without, strict=True):
        torch.testing.assert_close(with_it, without, rtol=1e-4, atol=1e-6)


class AlwaysCheckpointed(nn.Module):
    """A user's network that checkpoints one block whatever its settings, by a function imported by name."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.block = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())
        self.last = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(checkpoint(self.block, self.stem(x), use_reentrant=False)).mean((2, 3))


@pytest.mark.parametrize("site", ["stem", "block", "block.0"])
def test_a_block_that_is_always_checkpointed_stays_so(site):
    x = torch.randn(2, 3, 16, 16)
    expected, _, _ = step(AlwaysCheckpointed().train(), x)
    calls, _, _ = step(apply_rblock(AlwaysCheckpointed().train(), site, input_size=(3, 16, 16)), x)
    assert calls == expected == {"stem": 1, "block.0": 2, "last": 1}


def test_masks_are_drawn_once_when_recomputing():
    """A mask inside a recomputed part would differ in backward, and the gradient would be wrong."""
    model = apply_rblock(make("test_resnet"), ["layer2.0", "layer3"], batch_norm="per_submodel")
    x = torch.randn(2, 3, 64, 64)
    with_it, without = [], []
    for enabled, gradients in ((True, with_it), (False, without)):
        model.set_grad_checkpointing(enabled)
        set_drop_prob(model, 0.4)
        gradients.extend(step(model, x)[2])
    for first, second in zip(with_it, without, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-6)
