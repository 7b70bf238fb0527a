"""The mask methods, one small class each: the factors that it draws for one site."""

import torch
from torch import Tensor

from rblock_fx.masks.coverage import RateT, block_centre_probability
from rblock_fx.masks.functional import dilate
from rblock_fx.masks.mask import Factors, Mask, Shape

__all__ = ["METHODS", "Mask"]


class BDropDML(Mask):
    """Algorithm 1: one block mask M, each channel of it given to sub-model 1 or 2 by a fair coin.

    The two dropped sets are disjoint and their union is M on every channel.
    """

    shares_drop_prob = True

    def draw(self, x: Tensor) -> Factors:
        """Draw l1 ~ Bernoulli(0.5) and l2 = 1 - l1 over channels; M over positions."""
        blocks = self.draw_blocks(x)
        first = _draw_channels(x) < 0.5
        return torch.cat((first, ~first)), blocks


class SDropDML(Mask):
    """Algorithm 2: channels l ~ Bernoulli(p); in each, sub-model 1 drops M, of coverage 0.5, and sub-model 2 the rest.

    The two dropped sets are disjoint and their union is every split channel, whole. gamma follows from Eq. 8 at p = 0.5
    whatever the calibration, as Algorithm 2 (step 2) says.
    """

    shares_drop_prob = True

    def draw(self, x: Tensor) -> Factors:
        """Draw l over channels; M and 1 - M over positions."""
        split = _draw_channels(x) < self.rate
        blocks = self.draw_blocks(x)
        return split, torch.cat((blocks, ~blocks))

    def compute_gamma(self, map_size: Shape, drop_prob: RateT) -> RateT:
        """Compute the gamma at which blocks cover half of the map, whatever the drop rate."""
        return block_centre_probability(0.0 * drop_prob + 0.5, map_size, self.block_size, "exact")


class CDropBlock(Mask):
    """C-DropBlock (ours, not in the paper): whole-channel blocks, each block given to one sub-model by a fair coin.

    Where blocks of the two meet, one sub-model, chosen per sample by a fair coin, drops the position. The two dropped
    sets are disjoint and their union is M on every channel.
    """

    shares_drop_prob = True

    def draw(self, x: Tensor) -> Factors:
        """Draw the blocks of sub-model 1 and those of 2, on every channel."""
        centres = self.draw_centres(x)
        coin = torch.rand(centres.shape, device=x.device) < 0.5
        first, second = (dilate(centres & side, self.block_size) for side in (coin, ~coin))
        first_yields = _draw_channels(x[:, :1])[0] < 0.5
        return _everything(x), torch.stack((first & ~(second & first_yields), second & ~(first & ~first_yields)))


class DropBlock(Mask):
    """DropBlock (Ghiasi et al. 2018) for one model: blocks over all channels."""

    parts = 1

    def draw(self, x: Tensor) -> Factors:
        """Draw M over positions for each part independently, on every channel."""
        return _everything(x), self.draw_blocks(x, self.parts)


class RDropBlock(DropBlock):
    """R-DropBlock (section 4.3, d): DropBlock twice, independently."""

    parts = 2


class SpatialDropout(Mask):
    """SpatialDropout (Tompson et al. 2015) for one model: whole channels."""

    parts = 1
    has_blocks = False

    def draw(self, x: Tensor) -> Factors:
        """Draw channels for each part independently, whole."""
        return _draw_channels(x, self.parts) < self.rate, _everything(x)


class RSpatialDropout(SpatialDropout):
    """R-SpatialDropout (section 4.3, c): SpatialDropout twice, independently."""

    parts = 2


class Dropout(Mask):
    """Dropout (Srivastava et al. 2014) for one model: single activations, the kept ones scaled by 1 / (1 - p)."""

    parts = 1
    needs_map = False
    has_blocks = False

    def draw(self, x: Tensor) -> Factors:
        """Draw activations for each part independently: a factor over all axes and one over none."""
        return torch.rand((self.parts, *x.shape), device=x.device) < self.rate, _everything(x)

    def scale(self, channel: Tensor, spatial: Tensor) -> Tensor:  # noqa: ARG002
        """Compute 1 / (1 - p), as torch.nn.Dropout and R-Drop do."""
        return 1 / (1 - self.rate)


class RDrop(Dropout):
    """R-Drop (section 4.3, a; Liang et al. 2021): Dropout twice, independently."""

    parts = 2


class CDrop(Dropout):
    """C-Drop (section 4.3, b): an activation is dropped in 1 with p, in 2 with p, in neither with 1 - 2p (p <= 0.5)."""

    parts = 2
    largest_drop_prob = 0.5

    def draw(self, x: Tensor) -> Factors:
        """Draw activations from the two ends of one uniform number; at p = 0.5 exactly complementary."""
        uniform = torch.rand((1, *x.shape), device=x.device)
        return torch.cat((uniform < self.rate, uniform >= 1 - self.rate)), _everything(x)


METHODS: dict[str, type[Mask]] = {
    "bdropdml": BDropDML,
    "sdropdml": SDropDML,
    "c-dropblock": CDropBlock,
    "r-drop": RDrop,
    "c-drop": CDrop,
    "r-spatialdropout": RSpatialDropout,
    "r-dropblock": RDropBlock,
    "dropout": Dropout,
    "spatialdropout": SpatialDropout,
    "dropblock": DropBlock,
}


def _draw_channels(x: Tensor, parts: int = 1) -> Tensor:
    """Draw a number in [0, 1) for each channel: (K, N, C, 1...)."""
    return torch.rand((parts, *x.shape[:2], *(1 for _ in x.shape[2:])), device=x.device)


def _everything(x: Tensor) -> Tensor:
    """Build the factor that is True everywhere: (1, N, 1, 1...)."""
    return torch.ones((1, len(x), *(1 for _ in x.shape[1:])), dtype=torch.bool, device=x.device)
