"""Networks that relate samples, or lay them out in another way: each half is the plain network, or it is refused."""

import copy

import pytest
import torch
from timm.layers import convert_splitbn_model
from torch import nn

from tests.networks import Net, assert_right_or_refused, images


class Centred(Net):
    def between(self, x):
        return x - x.mean(0)


class Similar(Net):
    def between(self, x):
        rows = x.flatten(1)
        return x * (rows @ rows.T).softmax(1).sum(1).view(-1, 1, 1, 1)


class Flipped(Net):
    def between(self, x):
        return x + 0.5 * x.flip(0)


class SoftmaxOverBatch(Net):
    def between(self, x):
        return x * x.softmax(0)


class Rolled(Net):
    def between(self, x):
        return x + torch.roll(x, 1, 0)


class Shuffled(Net):
    def between(self, x):
        return x + x[torch.arange(x.shape[0] - 1, -1, -1)]


class Sorted(Net):
    def between(self, x):
        return x + x.sort(0).values


class Accumulated(Net):
    def between(self, x):
        return x.cumsum(0)


class NormOfBatch(Net):
    def between(self, x):
        return x / x.norm()


class Standardised(Net):
    def between(self, x):
        return (x - x.mean((0, 2, 3), keepdim=True)) / x.std((0, 2, 3), keepdim=True)


class Einsum(Net):
    def between(self, x):
        return x + torch.einsum("nchw,mchw->mchw", x, x)


class FirstSample(Net):
    def between(self, x):
        return x - x[:1]


class Halves(Net):
    """Mixes the first and the second half of the batch, as manifold mixup does."""

    def between(self, x):
        first, second = x.chunk(2)
        return torch.cat([first + second, first - second])


MIXING = [
    Centred, Similar, Flipped, SoftmaxOverBatch, Rolled, Shuffled, Sorted, Accumulated, NormOfBatch, Standardised,
    Einsum, FirstSample, Halves,
]  # fmt: skip


class InModule(Net):
    """The same operation in a module of its own."""

    class Between(nn.Module):
        def __init__(self, function):
            super().__init__()
            self.function = function

        def forward(self, x):
            return self.function(None, x)

    def __init__(self, kind):
        super().__init__()
        self.mix = self.Between(kind.between)

    def between(self, x):
        return self.mix(x)


@pytest.mark.parametrize("place", ["in the forward", "in a module"])
@pytest.mark.parametrize("kind", MIXING)
def test_operations_across_the_batch_run_per_half(kind, place):
    make = kind if place == "in the forward" else lambda: InModule(kind)
    x = images(4)
    error = assert_right_or_refused(make(), x, make().train()(x), "sub-models would see each other", "batch")
    if kind in (Centred, Flipped, SoftmaxOverBatch) and place == "in a module":
        assert error is None


class PositionsFirst(Net):
    """Rows of (H*W*N, C), as attention without batch_first has them, added to rows from before the mask."""

    order = (2, 0, 1)

    def forward(self, x):
        early = self.a(x)
        late = self.b(early)
        n, c, h, w = late.shape
        rows, others = (maps.flatten(2).permute(*self.order).reshape(-1, c) for maps in (late, early))
        rows = (rows + others.tanh()).relu()
        if self.order == (2, 0, 1):
            return self.fc(rows.view(h * w, n, c).amax(0))
        return self.fc(rows.view(n, h * w, c).amax(1))


class SamplesFirst(PositionsFirst):
    order = (0, 2, 1)


@pytest.mark.parametrize("batch_norm", ["joint", "per_submodel"])
def test_rows_with_positions_first_are_right_or_refused(batch_norm):
    x = images()
    expected = PositionsFirst().train()(x)
    assert_right_or_refused(PositionsFirst(), x, expected, batch_norm=batch_norm)
    assert assert_right_or_refused(SamplesFirst(), x, SamplesFirst()(x), batch_norm=batch_norm) is None


class InputChanged(Net):
    """Reads its input before the fork, changes it in place behind it, and reads it again."""

    def forward(self, x):
        late = self.b(self.a(x)) + x.mean(1, keepdim=True)
        x.clamp_(min=0)
        return self.fc((self.c(late) * x.mean(1, keepdim=True)).mean((2, 3)))


class ViewChanged(Net):
    """Changes a view of a map from before the fork."""

    def forward(self, x):
        early = self.a(x)
        late = self.b(early) + early
        early[:, :3].zero_()
        return self.fc((self.c(late) + early).mean((2, 3)))


class ChangedBeforeOnly(Net):
    def forward(self, x):
        early = self.a(x)
        early.relu_()
        return self.fc((self.c(self.b(early)) + early).mean((2, 3)))


@pytest.mark.parametrize("kind", [InputChanged, ViewChanged, ChangedBeforeOnly])
def test_values_changed_in_place_are_not_stale(kind):
    x = images()
    expected = kind().train()(x.clone())
    assert assert_right_or_refused(kind(), x, expected, run=lambda model: model(x.clone())) is None


class Split(Net):
    def __init__(self):
        super().__init__()
        self.norm = nn.Sequential(nn.BatchNorm2d(6), nn.ReLU())

    def between(self, x):
        return self.norm(x)


@pytest.mark.parametrize("parts", [2, 3, 4])
@pytest.mark.parametrize("batch_norm", ["joint", "per_submodel"])
def test_split_batch_norm_sees_its_own_part_of_each_half(parts, batch_norm):
    plain = convert_splitbn_model(Split(), parts).train()
    model = copy.deepcopy(plain)
    x = torch.cat([images(3) + 10 * part for part in range(parts)])
    expected = plain(x)
    if assert_right_or_refused(model, x, expected, batch_norm=batch_norm) is None:
        share = (1 - 0.9**2) / 0.1  # two updates in place of one
        for got, want in zip(model.buffers(), plain.buffers(), strict=True):
            if want.shape == (6,) and got.is_floating_point() and not (want > 0.5).all():
                torch.testing.assert_close(got, want * share, rtol=1e-3, atol=1e-4)
