"""R-Block as a task of timm's trainer: RBlockTask where ClassificationTask stands. Needs timm >= 1.0.31."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from timm.task import ClassificationTask
from torch import Tensor, nn

from rblock_fx.apply import apply_rblock
from rblock_fx.converted import RBlockModel
from rblock_fx.errors import SettingError
from rblock_fx.loss import RBlockLoss, split_pair
from rblock_fx.network.sites import Sites


class RBlockTask(ClassificationTask):
    """timm's ClassificationTask with an R-Block model and its loss.

    The first six arguments are those of ClassificationTask. EMA, compilation, distribution, checkpoints and evaluation
    are inherited, and so are the attributes and the keys of the state_dict: `criterion` stays the plain criterion,
    and a checkpoint of either task resumes the other.

    Args:
        model: a CNN, which is converted in place, or one that apply_rblock has converted.
        criterion: the criterion of each sub-model, or an RBlockLoss; default what criterion_kwargs make.
        criterion_kwargs: arguments for timm.loss.create_classification_loss, where no criterion is given.
        device: of the task.
        dtype: of the task.
        verbose: log the criterion.
        alpha: weight of the KL term, in [0, 1], as for RBlockLoss; so are the next two.
        temperature: T > 0.
        reduction: "sum" over the two sub-models, or "mean".
        sites: where to mask, as for apply_rblock; so are all that follow. Whatever is None has the default there.
        method: name of the method.
        drop_prob: probability that an activation is dropped, in [0, 1); one value, or one per site.
        block_size: side of a block, odd; one value, or one per site.
        calibration: "exact", "eq6" or "eq7".
        batch_norm: "joint" or "per_submodel".
        input_size: shape of one sample, (channels, *spatial).

    Raises:
        SettingError: a setting outside its range, or given again for what is an RBlockLoss or converted already.
        SiteError: a site that is unknown, never runs, or is no feature map.
        ConversionError: a model that cannot be converted. After any error the model is as it was.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: Callable[[Tensor, Any], Tensor] | None = None,
        criterion_kwargs: dict[str, Any] | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        verbose: bool = True,
        *,
        alpha: float | None = None,
        temperature: float | None = None,
        reduction: str | None = None,
        sites: Sites = None,
        method: str | None = None,
        drop_prob: float | Sequence[float] | None = None,
        block_size: int | Sequence[int] | None = None,
        calibration: str | None = None,
        batch_norm: str | None = None,
        input_size: Sequence[int] | None = None,
    ) -> None:
        super().__init__(model, criterion, criterion_kwargs, device, dtype, verbose)
        self.loss_settings = _given(alpha=alpha, temperature=temperature, reduction=reduction)
        if isinstance(self.criterion, RBlockLoss) and self.loss_settings:
            raise SettingError(
                f"RBlockTask: the criterion is an RBlockLoss with settings of its own, got {self.loss_settings} too; "
                "give them once: RBlockTask(model, RBlockLoss(loss, alpha=0.1)) or RBlockTask(model, loss, alpha=0.1)"
            )
        self.pair_loss()  # checks the settings

        conversion = _given(
            sites=sites,
            method=method,
            drop_prob=drop_prob,
            block_size=block_size,
            calibration=calibration,
            batch_norm=batch_norm,
            input_size=input_size,
        )
        # What is no module at all is refused by apply_rblock.
        if not isinstance(model, nn.Module) or not any(isinstance(module, RBlockModel) for module in model.modules()):
            apply_rblock(model, **conversion)
        elif conversion:
            raise SettingError(
                f"RBlockTask: {type(model).__name__} is converted already, got {conversion} for another conversion; "
                "pass the converted model alone, RBlockTask(model), or RBlockTask(remove_rblock(model), ...)"
            )

    def pair_loss(self) -> RBlockLoss:
        """The loss of a step: the present criterion's, over both sub-models.

        Made at each step, and no part of the task, so that the task's keys stay those of ClassificationTask and a
        criterion that is exchanged takes effect.
        """
        if isinstance(self.criterion, RBlockLoss):
            return self.criterion
        return RBlockLoss(self.criterion, **self.loss_settings)

    def forward(self, input: Tensor, target: Any) -> dict[str, Any]:
        """Forward N images and compute the loss.

        Args:
            input: images (N, C, *S).
            target: what the criterion takes, N rows: class indices, or probabilities (mixup).

        Returns:
            "loss", the R-Block loss in train mode and the criterion's in eval mode; "output", logits (N, K) for
            metrics, in train mode those of sub-model 1.

        Raises:
            PairError: the target does not have N rows.
        """
        output = self.trainable_module(input)
        loss = self.pair_loss()(output, target)
        return {"loss": loss, "output": output if len(output) == len(input) else split_pair(output)[0]}


def _given(**settings: Any) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if value is not None}
