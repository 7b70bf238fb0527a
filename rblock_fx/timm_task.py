"""R-Block in timm's trainer: RBlockTask in place of ClassificationTask. Needs timm >= 1.0.31."""

from collections.abc import Callable
from typing import Any

import torch
from timm.task import ClassificationTask
from torch import Tensor, nn

from rblock_fx.loss import RBlockLoss
from rblock_fx.pair import returns_pair, split_pair


class RBlockTask(ClassificationTask):
    """timm's ClassificationTask for a converted model.

    EMA, compilation, distribution, evaluation and the keys of checkpoints are ClassificationTask's: a checkpoint of
    either task resumes the other. `class MultiLabelTask(RBlockTask, MultiLabelClassificationTask)` adds timm's
    multi-label evaluator.

    Args:
        model: a model that apply_rblock converted; compiled or bare.
        criterion: an RBlockLoss. Any other criterion, and the one made by criterion_kwargs, is wrapped in an RBlockLoss
            with its default settings. The loss refers to the model where it does not refer to one yet.
        criterion_kwargs: arguments of timm.loss.create_classification_loss, if criterion is None.
        device: device of the task.
        dtype: dtype of the task.
        verbose: log the criterion.

    Raises:
        ConversionError: the model was not converted by apply_rblock.
        SettingError: the criterion cannot be called as criterion(logits, target).
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: Callable[[Tensor, Any], Tensor] | None = None,
        criterion_kwargs: dict[str, Any] | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        verbose: bool = True,
    ) -> None:
        returns_pair(model, "RBlockTask")  # raises unless the model is converted
        super().__init__(
            model, criterion, criterion_kwargs=criterion_kwargs, device=device, dtype=dtype, verbose=verbose
        )
        if not isinstance(self.criterion, RBlockLoss):
            self.criterion = RBlockLoss(self.criterion)
        if not self.criterion.is_attached:
            self.criterion.attach(model)

    def forward(self, input: Tensor, target: Any) -> dict[str, Any]:
        """Return the loss and the output of N images.

        Args:
            input: images (N, C, *S).
            target: N rows of whatever the criterion takes.

        Returns:
            "loss", the plain criterion in eval mode, and "output", logits (N, K), in train mode of sub-model 1.

        Raises:
            PairError: the target does not have N rows.
        """
        result: dict[str, Any] = super().forward(input, target)
        if returns_pair(self.trainable_module, "RBlockTask"):
            result["output"] = split_pair(result["output"])[0]
        return result
