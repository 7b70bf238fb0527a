"""Small networks for the tests of the core, and the two outcomes that a conversion may have: right, or refused."""

import torch
from torch import nn

from rblock_fx import RBlockError, apply_rblock

SIZE = (3, 16, 16)


def images(rows=4, dtype=torch.float32):
    return torch.randn(rows, *SIZE, dtype=dtype, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    """Three convolutions and a classifier; a subclass defines what happens between b and c."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 1)
        self.fc = nn.Linear(6, 5)

    def between(self, x):
        return x

    def forward(self, x):
        return self.fc(self.c(self.between(self.b(self.a(x)))).mean((2, 3)))


def state_of(model):
    """What an error must leave as it was."""
    return (
        [
            (name, id(m), type(m), m.training, sorted(vars(m)), len(m._forward_hooks))
            for name, m in model.named_modules()
        ],
        [
            (name, id(tensor), tensor.device, tensor._version)
            for name, tensor in [*model.named_parameters(), *model.named_buffers()]
        ],
    )


def leaves(output):
    if isinstance(output, torch.Tensor):
        return [output]
    return [leaf for item in (output.values() if isinstance(output, dict) else output) for leaf in leaves(item)]


def assert_halves_are(output, expected, **tolerance):
    for pair, single in zip(leaves(output), leaves(expected), strict=True):
        torch.testing.assert_close(pair, torch.cat([single, single]), **tolerance)


def assert_right_or_refused(model, x, expected, *words, sites=("b",), run=None, **options):
    """Convert at drop rate 0: both halves are `expected`, or an RBlockError that contains one of the words.

    After a refused conversion the model is as it was. Returns the error, if there is one.
    """
    before = state_of(model)
    try:
        apply_rblock(model, list(sites), drop_prob=0.0, **{"input_size": tuple(x.shape[1:]), **options})
    except RBlockError as error:
        assert state_of(model) == before
        assert not words or any(word in str(error) for word in words), error  # noqa: PT017
        return error
    try:
        output = (run or (lambda network: network(x)))(model.train())
    except RBlockError as error:
        assert not words or any(word in str(error) for word in words), error  # noqa: PT017
        return error
    assert_halves_are(output, expected, rtol=1e-4, atol=1e-5)
    return None
