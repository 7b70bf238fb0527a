"""The outputs of a pair of sub-models in one batch: their rows, their names, and how far they are apart."""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from rblock_fx.converted import find_converted
from rblock_fx.errors import ConversionError, PairError, SettingError
from rblock_fx.masks.methods import METHODS

# Names of the main output: in torchvision's segmentation models; in its GoogLeNet, Inception v3 and Hugging Face.
MAIN_OUTPUTS = ("out", "logits")


# The default divergence, by the name of the criterion's class or base class: timm's classes count without timm.
DEFAULT_DIVERGENCES = {
    **dict.fromkeys(("CrossEntropyLoss", "NLLLoss"), "softmax"),
    **dict.fromkeys(("BCEWithLogitsLoss", "BinaryCrossEntropy", "AsymmetricLossMultiLabel"), "bernoulli"),
    **dict.fromkeys(("MSELoss", "L1Loss", "SmoothL1Loss", "HuberLoss"), "mse"),
}


def split_pair(output: Any) -> tuple[Any, Any]:
    """Split a training output into (output of sub-model 1, output of sub-model 2).

    Args:
        output: any nesting of tensors with 2N rows. Dicts, lists, tuples and named tuples keep their type; values
            other than tensors go to both halves.

    Raises:
        PairError: a tensor has an odd number of rows or no batch dimension, or the output contains no tensor, or a
            container that torch.utils._pytree does not know.
    """
    leaves, structure = pytree.tree_flatten(output)
    for leaf in leaves:
        is_container = isinstance(leaf, Collection) and not isinstance(leaf, str | bytes | Tensor)
        if is_container or dataclasses.is_dataclass(leaf):
            raise PairError(
                f"split_pair: cannot split a {type(leaf).__name__}; pass tensors in dicts, lists, tuples or named "
                "tuples: split_pair({'out': logits})"
            )
        if isinstance(leaf, Tensor) and (leaf.dim() == 0 or len(leaf) % 2):
            raise PairError(
                f"split_pair: expected an even number of rows (2N), got shape {tuple(leaf.shape)}; pass the output of "
                "a converted model in train mode: split_pair(model(images))"
            )
    if not any(isinstance(leaf, Tensor) for leaf in leaves):
        raise PairError(f"split_pair: no tensor in {type(output).__name__}; pass an output: split_pair(model(images))")
    halves = zip(*(leaf.chunk(2) if isinstance(leaf, Tensor) else (leaf, leaf) for leaf in leaves), strict=True)
    first, second = (pytree.tree_unflatten(half, structure) for half in halves)
    return first, second


def returns_pair(model: nn.Module, call: str) -> bool:
    """Whether a converted model returns 2N rows now: in train mode, by a pair method.

    Raises:
        ConversionError: model was not converted by apply_rblock.
    """
    converted, rblock = find_converted(model, call)
    return bool(converted.training) and METHODS[rblock.conversion.method].parts == 2


class ModelReference:
    """A model that is not a submodule. A deepcopy refers to the same model or its copy; a pickle refers to none."""

    def __init__(self, model: nn.Module | None = None) -> None:
        self.model = model

    @property
    def returns_pair(self) -> bool:
        """Whether the model is still converted and returns 2N rows now."""
        try:
            return self.model is not None and returns_pair(self.model, "RBlockLoss")
        except ConversionError:  # after remove_rblock
            return False

    def __deepcopy__(self, memo: dict[int, Any]) -> "ModelReference":
        return ModelReference(memo.get(id(self.model), self.model))

    def __reduce__(self) -> tuple[Any, ...]:
        return ModelReference, ()


def read_outputs(output: Any, with_auxiliary: bool) -> tuple[Tensor, list[Tensor]]:
    """Return the main output and the auxiliary ones, which have as many rows. Outputs that are None do not count.

    Raises:
        PairError: the main output is ambiguous or is not a tensor, or an auxiliary one has other rows.
    """
    kind, main_name = type(output).__name__, ""
    named: dict[str, Any] = {"": output}
    if isinstance(output, Mapping) or hasattr(output, "_fields"):
        pairs = output.items() if isinstance(output, Mapping) else zip(output._fields, output, strict=True)
        named = {name: value for name, value in pairs if value is not None}
        mains = [name for name in MAIN_OUTPUTS if name in named]
        if len(mains) != 1:
            raise PairError(
                f"RBlockLoss: expected one main output called 'out' or 'logits', got a {kind} of "
                f"{', '.join(map(repr, named)) or 'nothing'}; name it: criterion({{'out': logits}}, labels)"
            )
        main_name = mains[0]
    elif isinstance(output, list | tuple):
        raise PairError(
            f"RBlockLoss: got a {kind} of {len(output)} outputs without names; pass the main one, "
            "criterion(output[0], labels), or call model.set_distilled_training(False) on timm's distilled models"
        )
    main = named.pop(main_name)
    if not isinstance(main, Tensor) or not main.dim():
        place = f" in {main_name!r}" if main_name else ""
        raise PairError(
            f"RBlockLoss: expected logits (2N, classes, ...){place}, got {_kind_of(main)}; "
            "pass the model's output: criterion(model(images), labels)"
        )
    if not with_auxiliary:
        return main, []
    for name, value in named.items():
        if not (isinstance(value, Tensor) and value.dim() and len(value) == len(main)):
            raise PairError(
                f"RBlockLoss: expected {len(main)} rows in {name!r} like in {main_name!r}, got {_kind_of(value)}; "
                "to train the main output alone: RBlockLoss(aux_weight=0)"
            )
    return main, list(named.values())


def is_pair(logits: Tensor, target: Any) -> bool:
    """Whether logits have 2N rows for N targets, rather than N.

    Raises:
        PairError: the rows are neither, or target contains no tensor.
    """
    leaves = [leaf for leaf in pytree.tree_leaves(target) if isinstance(leaf, Tensor) and leaf.dim()]
    if not leaves:
        raise PairError(f"RBlockLoss: expected a tensor of N targets, got {_kind_of(target)}")
    rows = len(leaves[0])
    if len(logits) not in (rows, 2 * rows):
        raise PairError(
            f"RBlockLoss: expected {2 * rows} rows (train mode) or {rows} (eval mode) for {rows} targets, got "
            f"{_kind_of(logits)}; pass each target once: criterion(model(images), labels)"
        )
    return len(logits) != rows


def undouble(target: Any, rows: int) -> Any:
    """Return the first half of targets whose two halves are equal."""

    def first_half(leaf: Any) -> Any:
        if not (isinstance(leaf, Tensor) and leaf.dim() and len(leaf) == rows):
            return leaf
        if rows % 2 or not torch.equal(*leaf.chunk(2)):
            raise PairError(
                f"RBlockLoss: expected N targets for 2N rows, because the model is in train mode, got {rows} targets "
                f"for {rows} rows with gradients; pass each target once, criterion(model(images), labels), or evaluate "
                "under torch.no_grad()"
            )
        return leaf[: rows // 2]

    return pytree.tree_map(first_half, target)


def default_divergence(criterion: Any) -> str | None:
    """Return the divergence for the class of a criterion, None for other classes."""
    names = (base.__name__ for base in type(criterion).__mro__)
    return next((DEFAULT_DIVERGENCES[name] for name in names if name in DEFAULT_DIVERGENCES), None)


def divergence_of(first: Tensor, second: Tensor, kind: Any, temperature: float) -> Tensor:
    """Return the sum of the divergence in both directions, (N, *S) for outputs (N, K, *S) or (N,).

    KL(p_1 || p_2) + KL(p_2 || p_1) = sum of (p_1 - p_2)(ln p_1 - ln p_2), p = softmax(z / T) or sigmoid(z / T).
    Twice the result of a callable.
    """
    if callable(kind):
        return 2 * kind(first, second)  # type: ignore[no-any-return]
    if first.dim() == 1:
        first, second = first[:, None], second[:, None]
    if kind == "mse":
        return 2 * (first - second).square().mean(1)
    log_first, log_second = first / temperature, second / temperature
    if kind == "bernoulli":  # ln p - ln(1 - p) = z / T sums both outcomes
        difference = log_first.sigmoid() - log_second.sigmoid()
    else:
        log_first, log_second = F.log_softmax(log_first, dim=1), F.log_softmax(log_second, dim=1)
        difference = log_first.exp() - log_second.exp()
    # Equal logits of -inf have a difference of 0, not nan.
    return (difference * torch.where(log_first == log_second, 0.0, log_first - log_second)).sum(1)


def reduce_like(divergence: Tensor, loss: Tensor, count: int) -> Tensor:
    """Reduce a divergence, (N, *S) or 0-dim, to a loss of 0-dim, (N,), (N, *S) or (N, K, *S), so that it broadcasts.

    A 0-dim loss is the sum of `count` losses.
    """
    if loss.dim() == 0 or divergence.dim() == 0 or len(loss) != len(divergence):
        return divergence.mean() * (count if loss.dim() == 0 else 1)
    if divergence.shape == loss.shape:
        return divergence
    if divergence.shape == loss.shape[:1] + loss.shape[2:]:
        return divergence.unsqueeze(1)
    return divergence.reshape(len(loss), -1).mean(1).reshape(-1, *(1 for _ in loss.shape[1:]))


def check_softmax(logits: Tensor, target: Any, check_target: bool) -> None:
    """Reject outputs on which a softmax is constant, and float targets that are not one distribution.

    Raises:
        SettingError: one class, or float targets (N, K, *S) that do not sum to 1 over axis 1.
    """
    remedy = "pass divergence='bernoulli' for independent labels, or 'mse' for regression"
    if logits.dim() == 1 or logits.shape[1] == 1:
        raise SettingError(
            f"RBlockLoss: divergence='softmax' needs at least two classes on axis 1, got {_kind_of(logits)} for each "
            f"sub-model; {remedy}"
        )
    is_dense = isinstance(target, Tensor) and target.is_floating_point() and target.shape == logits.shape
    if check_target and is_dense and not torch.compiler.is_compiling():
        sums = target.sum(1, dtype=torch.float32)
        if not ((sums - 1).abs() < 0.005).all():  # bfloat16 rounds to 0.002
            raise SettingError(
                "RBlockLoss: divergence='softmax' needs float targets that sum to 1 over axis 1, got sums from "
                f"{sums.min():.3g} to {sums.max():.3g}; {remedy}"
            )


def _kind_of(value: Any) -> str:
    """Describe a value in an error: the shape of a tensor, the type of anything else."""
    return f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
