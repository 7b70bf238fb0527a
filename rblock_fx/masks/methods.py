"""The mask modules, one small class per method: what each draws, for one site."""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from rblock_fx.masks.coverage import block_centre_probability, compiled_block_centre_probability
from rblock_fx.masks.functional import dilate, draw_blocks, fork_and_mask, kept_scale, mask_parts

Shape = tuple[int, ...]
Factors = tuple[Tensor, Tensor]


class Mask(nn.Module):
    """Masks drawn anew at every call, per sample, from torch's default generator of the input's device.

    A pair method takes (N, C, *S) where the batch forks and (2N, C, *S) behind the fork, and gives (2N, C, *S) with
    sub-model 1 in the first half; a single-model method gives what it takes. The module acts whenever it is called:
    only the training forward calls it.

    Args:
        drop_prob: probability that an activation is dropped, in [0, 1). For the complementary methods (BDropDML,
            SDropDML, C-DropBlock) the two sub-models share it: each drops drop_prob / 2.
        block_size: side of a block, odd.
        calibration: how gamma follows from drop_prob: "exact" (Eq. 8), "eq6" or "eq7".
        shape: shape of one sample's map, channels where `channel_axis` says; gamma is calibrated for it, and
            calibrated anew for a map of any other size.
        channel_axis: 1 for (N, C, *S), -1 for (N, *S, C).
        forks: whether the batch doubles here.
    """

    parts: ClassVar[int] = 2
    needs_map: ClassVar[bool] = True
    has_blocks: ClassVar[bool] = True
    largest_drop_prob: ClassVar[float] = 1.0

    rate: Tensor
    gamma: Tensor

    def __init__(
        self, drop_prob: float, block_size: int, calibration: str, shape: Shape, channel_axis: int, forks: bool
    ) -> None:
        super().__init__()
        self.drop_prob = drop_prob
        self.block_size = block_size
        self.calibration = calibration
        self.shape = shape
        self.channel_axis = channel_axis
        self.forks = forks
        self.map_size = _without_channels(shape, channel_axis)
        # Tensors, because as Python floats each new value of a schedule would be compiled anew; 0-dim and never a
        # mask, because DistributedDataParallel copies the buffers of rank 0 to every rank.
        self.register_buffer("rate", torch.empty((), dtype=torch.float32), persistent=False)
        self.register_buffer("gamma", torch.empty((), dtype=torch.float32), persistent=False)
        self.set_drop_prob(drop_prob)

    @abstractmethod
    def draw(self, rows: int, channels: int, map_size: Shape, device: torch.device) -> Factors:
        """Draw which channels (K, rows, channels, 1...) and which positions (K, rows, 1, *map_size) are dropped.

        An activation is dropped where both are True; a factor that holds for all may be of size 1 on any axis.
        """

    def scale(self, channel: Tensor, spatial: Tensor) -> Tensor:
        """What the kept activations of each sample are multiplied by, (K, N, 1, 1...): 1 / kept proportion."""
        return kept_scale(channel, spatial)

    def forward(self, x: Tensor) -> Tensor:
        """Mask x, doubling its batch where this site forks."""
        rows = x.shape[0] if self.forks else x.shape[0] // self.parts
        channel, spatial = self.draw(
            rows, x.shape[self.channel_axis], _without_channels(x.shape[1:], self.channel_axis), x.device
        )
        scale = self.scale(channel, spatial).expand(self.parts, rows, *(1 for _ in x.shape[1:]))
        operation = fork_and_mask if self.forks else mask_parts
        masked = operation(x.movedim(self.channel_axis, 1), channel, spatial.to(torch.float32), scale)
        return masked.movedim(1, self.channel_axis)

    def set_drop_prob(self, drop_prob: float) -> None:
        """Change the drop rate, and gamma with it; computed on the host, written to the buffers in place."""
        self.drop_prob = drop_prob
        with torch.no_grad():
            self.rate.fill_(drop_prob)
            self.gamma.fill_(self.block_centre_probability(self.map_size))

    def block_centre_probability(self, map_size: Shape) -> float:
        """Give gamma for a map of this size; 0 for the methods that draw no blocks."""
        if not self.has_blocks:
            return 0.0
        return block_centre_probability(self.drop_prob, map_size, self.block_size, self.calibration)

    def blocks(self, rows: int, map_size: Shape, device: torch.device) -> Tensor:
        """Draw M of (rows, 1, *map_size)."""
        return draw_blocks(self.gamma_for(map_size), rows, map_size, self.block_size, device)

    def gamma_for(self, map_size: Shape) -> Tensor | float:
        """Gamma of the map at hand, which is not the calibrated one when the images change size."""
        if map_size == self.map_size:
            return self.gamma
        if torch.compiler.is_compiling():
            return self.compiled_block_centre_probability(map_size)
        return self.block_centre_probability(map_size)

    def compiled_block_centre_probability(self, map_size: Shape) -> Tensor:
        """Give gamma as a tensor that follows drop_prob without compiling anew."""
        return compiled_block_centre_probability(self.rate, map_size, self.block_size, self.calibration)

    def extra_repr(self) -> str:
        """Every hyperparameter, and the gamma that follows from them."""
        parts = [f"drop_prob={self.drop_prob:g}"]
        if self.has_blocks:
            gamma = self.block_centre_probability(self.map_size)
            parts += [f"block_size={self.block_size}", f"calibration={self.calibration!r}", f"gamma={gamma:.5g}"]
        return ", ".join([*parts, f"shape={self.shape}", f"channel_axis={self.channel_axis}", f"forks={self.forks}"])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Follow the model to its device but stay in float32: gamma in half precision is a different drop rate."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in self._buffers.items():
            self._buffers[name] = torch.empty(
                (), dtype=torch.float32, device=buffer.device if buffer is not None else None
            )
        self.set_drop_prob(self.drop_prob)
        return self


class BDropDML(Mask):
    """Algorithm 1: one block mask M, each channel of it given to sub-model 1 or 2 by a fair coin.

    The two dropped sets are disjoint and their union is M on every channel.
    """

    def draw(self, rows: int, channels: int, map_size: Shape, device: torch.device) -> Factors:
        """l1 ~ Bernoulli(0.5) and l2 = 1 - l1 over channels; M over positions."""
        blocks = self.blocks(rows, map_size, device)
        first = _uniform(1, rows, channels, map_size, device) < 0.5
        return torch.cat((first, ~first)), blocks.unsqueeze(0)


class SDropDML(Mask):
    """Algorithm 2: channels l ~ Bernoulli(p); in each, sub-model 1 drops M, of coverage 0.5, and sub-model 2 the rest.

    The two dropped sets are disjoint and their union is every split channel, whole. gamma follows from Eq. 8 at p = 0.5
    whatever the calibration, as Algorithm 2 (step 2) says.
    """

    def draw(self, rows: int, channels: int, map_size: Shape, device: torch.device) -> Factors:
        """L over channels; M and 1 - M over positions."""
        split = _uniform(1, rows, channels, map_size, device) < self.rate
        blocks = self.blocks(rows, map_size, device).unsqueeze(0)
        return split, torch.cat((blocks, ~blocks))

    def block_centre_probability(self, map_size: Shape) -> float:
        """Give gamma at which the blocks cover half of the map."""
        return block_centre_probability(0.5, map_size, self.block_size, "exact")

    def compiled_block_centre_probability(self, map_size: Shape) -> Tensor:
        """Give gamma at which the blocks cover half of the map."""
        return compiled_block_centre_probability(torch.full_like(self.rate, 0.5), map_size, self.block_size, "exact")


class CDropBlock(Mask):
    """C-DropBlock (ours, not in the paper): whole-channel blocks, each block given to one sub-model by a fair coin.

    Where blocks of the two meet, one sub-model, chosen per sample by a fair coin, drops the position. The two dropped
    sets are disjoint and their union is M on every channel.
    """

    def draw(self, rows: int, channels: int, map_size: Shape, device: torch.device) -> Factors:  # noqa: ARG002
        """Every channel; the blocks of sub-model 1 and those of 2."""
        centres = torch.rand((rows, 1, *map_size), device=device) < self.gamma_for(map_size)
        coin = torch.rand((rows, 1, *map_size), device=device) < 0.5
        first = dilate(centres & coin, self.block_size)
        second = dilate(centres & ~coin, self.block_size)
        first_yields = _uniform(1, rows, 1, map_size, device)[0] < 0.5
        both = first & second
        spatial = torch.stack((first & ~(both & first_yields), second & ~(both & ~first_yields)))
        return _everything(rows, map_size, device), spatial


class DropBlock(Mask):
    """DropBlock (Ghiasi et al. 2018) for one model: blocks over all channels."""

    parts = 1

    def draw(self, rows: int, channels: int, map_size: Shape, device: torch.device) -> Factors:  # noqa: ARG002
        """Every channel; M over positions, drawn for each part independently."""
        blocks = self.blocks(self.parts * rows, map_size, device)
        return _everything(rows, map_size, device), blocks.view(self.parts, rows, 1, *map_size)


class RDropBlock(DropBlock):
    """R-DropBlock (section 4.3, d): DropBlock twice, independently."""

    parts = 2


class SpatialDropout(Mask):
    """SpatialDropout (Tompson et al. 2015) for one model: whole channels."""

    parts = 1
    has_blocks = False

    def draw(self, rows: int, channels: int, map_size: Shape, device: torch.device) -> Factors:
        """Channels, drawn for each part independently; every position."""
        dropped = _uniform(self.parts, rows, channels, map_size, device) < self.rate
        return dropped, _everything(rows, map_size, device)


class RSpatialDropout(SpatialDropout):
    """R-SpatialDropout (section 4.3, c): SpatialDropout twice, independently."""

    parts = 2


class Dropout(Mask):
    """Dropout (Srivastava et al. 2014) for one model: single activations, the kept ones scaled by 1 / (1 - p)."""

    parts = 1
    needs_map = False
    has_blocks = False

    def draw(self, rows: int, channels: int, map_size: Shape, device: torch.device) -> Factors:
        """Activations, drawn for each part independently: a factor over all axes and one over none."""
        dropped = torch.rand((self.parts, rows, channels, *map_size), device=device) < self.rate
        return dropped, _everything(rows, map_size, device)

    def scale(self, channel: Tensor, spatial: Tensor) -> Tensor:
        """1 / (1 - p), as torch.nn.Dropout and R-Drop do."""
        return (1 / (1 - self.rate)).expand(self.parts, spatial.shape[1], *(1 for _ in channel.shape[2:]))


class RDrop(Dropout):
    """R-Drop (section 4.3, a; Liang et al. 2021): Dropout twice, independently."""

    parts = 2


class CDrop(Dropout):
    """C-Drop (section 4.3, b): an activation is dropped in 1 with p, in 2 with p, in neither with 1 - 2p (p <= 0.5)."""

    parts = 2
    largest_drop_prob = 0.5

    def draw(self, rows: int, channels: int, map_size: Shape, device: torch.device) -> Factors:
        """Activations: the two ends of one uniform draw; at p = 0.5 exactly complementary."""
        uniform = torch.rand((1, rows, channels, *map_size), device=device)
        return torch.cat((uniform < self.rate, uniform >= 1 - self.rate)), _everything(rows, map_size, device)


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


def _uniform(parts: int, rows: int, channels: int, map_size: Shape, device: Any) -> Tensor:
    """One number in [0, 1) per channel, shaped to broadcast over the map."""
    return torch.rand((parts, rows, channels, *(1 for _ in map_size)), device=device)


def _everything(rows: int, map_size: Shape, device: Any) -> Tensor:
    """The factor that drops everywhere its partner does."""
    return torch.ones((1, rows, 1, *(1 for _ in map_size)), dtype=torch.bool, device=device)


def _without_channels(shape: Shape, channel_axis: int) -> Shape:
    """The spatial part of one sample's shape."""
    return tuple(shape[1:]) if channel_axis == 1 else tuple(shape[:-1])
