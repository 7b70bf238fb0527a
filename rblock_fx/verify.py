"""Compare a converted model with the plain network in real numbers."""

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from rblock_fx.converted import find_converted
from rblock_fx.errors import SettingError, VerificationError, first_line
from rblock_fx.masks.mask import Mask
from rblock_fx.masks.methods import METHODS
from rblock_fx.network.replica import WithoutRandomness, copy_model, random_state_kept, tensors_in
from rblock_fx.network.stages import format_table
from rblock_fx.settings import set_drop_prob
from rblock_fx.surgery.conversion import snapshot
from rblock_fx.surgery.trace import MASKS
from rblock_fx.swap import OWNER, Halved, restore_class

UNSEEN = (
    "images of another size, dtype or device, and other values of the images where the code depends on them",
    "hooks that you registered, which the compared copies do not have",
    "a site that is cut out of the model and called alone, which then runs without its mask",
    "values from closures, default arguments, the environment or other threads that change after this call",
    "sub-models that see each other through their masked values alone, as in a norm over the whole batch",
)

# Activations that the measured rate of a mask is an average of.
_ELEMENTS = 1 << 21


@dataclasses.dataclass(frozen=True)
class VerifyReport:
    """The checks that a converted model passed."""

    checks: tuple[tuple[str, str], ...]  # name and outcome of each
    unseen: tuple[str, ...] = UNSEEN  # the faults that they cannot detect

    def __str__(self) -> str:
        return "\n".join(
            [format_table(("check", "outcome"), self.checks), *(f"not seen: {text}" for text in self.unseen)]
        )

    __repr__ = __str__


def verify(model: nn.Module, images: Tensor) -> VerifyReport:
    """Compare a converted model with the plain network on one small batch.

    Everything runs on copies of the model, so its modes, buffers, hooks and the random state stay as they were. The
    network's own random layers are switched off for the comparison.

    Args:
        model: a converted model; wrapped (DistributedDataParallel, torch.compile) or bare.
        images: (N, C, *S), N >= 2; a few real images.

    Returns:
        A report that prints as a table.

    Raises:
        VerificationError: evaluation differs from the plain network's; a half of the training output differs from the
            plain training forward at drop rate 0 (relative tolerance 1e-5); a forward writes other attributes or
            batch-norm statistics; or a mask is not called or drops nothing at its rate.
        ConversionError: the model was not converted by apply_rblock, or cannot be copied.
        SettingError: images is not a batch of at least two.
    """
    converted, rblock = find_converted(model, "verify")
    if not isinstance(images, Tensor) or images.dim() < 2 or len(images) < 2:
        shape = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise SettingError(f"verify: images must be a batch (N, C, *S) of at least two, got {shape}")
    parts = METHODS[rblock.conversion.method].parts
    first = next((p for p in converted.parameters() if p.is_floating_point()), images)
    images = images.detach().to(first.device, first.dtype)
    is_double = images.dtype == torch.float32 and images.device.type != "mps"
    with random_state_kept(), torch.enable_grad():
        evaluation = _compare_evaluation(converted, images)
        try:
            training = _compare_training(converted, images, parts, torch.float64 if is_double else images.dtype)
        except RuntimeError:  # the network makes tensors of a dtype of its own
            training = _compare_training(converted, images, parts, images.dtype)
        return VerifyReport((evaluation, *training, *_measure_rates(converted, images)))


def _compare_evaluation(model: nn.Module, images: Tensor) -> tuple[str, str]:
    plain, twin = _plain(model).eval(), _twin(model).eval()
    try:
        with WithoutRandomness():
            expected = plain(images.clone())
    except Exception as error:
        shape = tuple(images.shape)
        raise SettingError(f"verify: the plain network does not run on images {shape}: {first_line(error)}") from error
    with WithoutRandomness():
        output = twin(images.clone())
    _compare(output, expected, 1, 0.0, "evaluation")
    _compare_state(twin, plain, "evaluation")
    return "evaluation", "equal to the plain network, bit for bit"


def _compare_training(model: nn.Module, images: Tensor, parts: int, dtype: torch.dtype) -> list[tuple[str, str]]:
    """At drop rate 0 both sub-models are the plain network."""
    plain, twin = _plain(model).train(), _twin(model).train()
    for path, module in model.named_modules():  # frozen layers stay frozen
        plain.get_submodule(path).training = twin.get_submodule(path).training = module.training or not model.training
    plain.training = twin.training = True
    plain, twin, images = plain.to(dtype), twin.to(dtype), images.to(dtype)
    set_drop_prob(twin, 0.0)
    before = {path: tensor.clone() for path, tensor in plain.named_buffers()}
    inputs, twin_inputs = _batch_norm_inputs(plain), _batch_norm_inputs(twin)
    with WithoutRandomness():
        expected, output = plain(images.clone()), twin(images.clone())
    tolerance = 1e-5 if dtype.itemsize >= 4 else 2e-2
    difference = _compare(output, expected, parts, tolerance, "training at drop rate 0")
    _compare_state(twin, plain, "training")
    norms = 0
    for path, counts in inputs.items():
        layer, other = plain.get_submodule(path), twin.get_submodule(path)
        if isinstance(layer, _BatchNorm) and isinstance(other, _BatchNorm) and layer.running_mean is not None:
            norms += _compare_statistics(path, layer, other, before, counts, twin_inputs.get(path, []))
    halves = "both halves are the plain forward" if parts == 2 else "the plain forward"
    outcome = f"{halves}, up to {difference:.1e} of the largest output"
    written = f"written as by the plain forward; statistics of {norms} batch norms checked"
    return [("training at drop rate 0", outcome), ("attributes and buffers", written)]


def _compare(output: Any, expected: Any, parts: int, tolerance: float, where: str) -> float:
    """The largest difference between the parts of an output and the expected tensors, relative to the largest value."""
    got, wanted = tensors_in(output), tensors_in(expected)
    shapes = [(parts * tensor.shape[0], *tensor.shape[1:]) for tensor in wanted]
    if type(output) is not type(expected) or [tuple(tensor.shape) for tensor in got] != shapes:
        raise VerificationError(
            f"verify: {where} returns {type(output).__name__} of {[tuple(t.shape) for t in got]}, expected "
            f"{type(expected).__name__} of {shapes}"
        )
    largest = 0.0
    for tensor, other in zip(got, wanted, strict=True):
        if not other.isfinite().all():
            raise VerificationError(
                f"verify: the plain network returns values that are not finite in {where}; check weights and images"
            )
        for number, part in enumerate(tensor.chunk(parts)):
            if tolerance == 0 and torch.equal(part, other):
                continue
            difference = (part.double() - other.double()).abs().max().item()
            relative = difference / max(other.double().abs().max().item(), 1e-30)
            if not relative <= tolerance:  # nan too
                half = f"sub-model {number + 1} in " if parts == 2 else ""
                raise VerificationError(
                    f"verify: {half}{where} differs from the plain network by {relative:.2g} of the largest output; "
                    "the traced forward is not the network's: choose sites that lie less deep, list_sites(model)"
                )
            largest = max(largest, relative)
    return largest


def _compare_state(twin: nn.Module, plain: nn.Module, where: str) -> None:
    """Compare the plain values in the attributes of all modules; buffers are compared by their formula."""
    for path, module in plain.named_modules():
        other = {name: value for name, value in vars(twin.get_submodule(path)).items() if name not in (MASKS, OWNER)}
        for name in {*vars(module), *other} - _OF_EVERY_MODULE:
            if snapshot(vars(module).get(name)) != snapshot(other.get(name)):
                label = f"{path}.{name}" if path else name
                raise VerificationError(f"verify: in {where} the converted model writes {label!r} differently")


_OF_EVERY_MODULE = set(vars(nn.Module())) | {"forward"}


def _compare_statistics(
    path: str, layer: Any, twin: Any, before: dict[str, Tensor], counts: list[int], twin_counts: list[int]
) -> bool:
    """Compare the statistics of a layer that ran once with (1 - m) * running + m * batch, if that applies."""
    m = layer.momentum
    is_half = layer.running_mean.dtype.itemsize < 4
    if len(counts) != 1 or m is None or not layer.training or counts[0] < 2 or is_half:
        return False
    n = counts[0]
    for name in ("running_mean", "running_var"):
        old = before[f"{path}.{name}" if path else name].double()
        batch = (getattr(layer, name).double() - (1 - m) * old) / m
        share = 1 - (1 - m) ** 2 if isinstance(twin, Halved) else m
        is_doubled = name == "running_var" and twin_counts == [2 * n] and not isinstance(twin, Halved)
        unbiased = (n - 1) / n * 2 * n / (2 * n - 1) if is_doubled else 1.0
        expected = (1 - share) * old + share * unbiased * batch
        difference = (getattr(twin, name).double() - expected).abs().max()
        if not difference <= 1e-4 * expected.abs().max().clamp(min=1e-6):
            raise VerificationError(
                f"verify: {name} of {path!r} is off the formula by {difference:.2g}; the layer sees other rows"
            )
    return True


def _measure_rates(model: nn.Module, images: Tensor) -> list[tuple[str, str]]:
    """Check that a training forward calls every mask, and that each drops at its rate."""
    twin = _twin(model).train()
    shapes: dict[str, torch.Size] = {}
    masks = dict(vars(twin)[MASKS].named_children())
    for name, mask in masks.items():

        def note(_mask: nn.Module, inputs: Any, name: str = name) -> None:
            shapes[name] = inputs[0].shape

        mask.register_forward_pre_hook(note)
    twin(images.clone())
    checks = []
    for name, mask in masks.items():
        if not isinstance(mask, Mask):
            continue
        if name not in shapes:
            raise VerificationError(f"verify: the mask {name!r} is not called in a training forward")
        rows = max(_ELEMENTS // max(shapes[name][1:].numel(), 1), 2)
        ones = torch.ones((2 * rows, *shapes[name][1:]), device=images.device)
        shares = (mask(ones) == 0).flatten(1).double().mean(1)
        seen, error = shares.mean().item(), shares.std().item() / len(shares) ** 0.5
        asked = mask.drop_prob / 2 if mask.shares_drop_prob else mask.drop_prob
        is_exact = mask.calibration == "exact" or not mask.has_blocks
        if is_exact and abs(seen - asked) > 6 * error + 0.01:
            raise VerificationError(
                f"verify: the mask {name!r} drops {seen:.1%} of a sub-model's activations, expected {asked:.1%}"
            )
        checks.append((f"mask {name}", f"drops {seen:.1%} of each sub-model, asked {asked:.1%}"))
    return checks


def _twin(model: nn.Module) -> nn.Module:
    twin = copy_model(model)
    vars(twin).pop("forward", None)  # that of a tool (Accelerate)
    return twin


def _plain(model: nn.Module) -> nn.Module:
    plain = _twin(model)
    del vars(plain)[MASKS]
    for module in plain.modules():
        restore_class(module)
    return plain


def _batch_norm_inputs(model: nn.Module) -> dict[str, list[int]]:
    """How many values of a channel each batch norm sees in each call; filled by hooks when the model runs."""
    counts: dict[str, list[int]] = {}
    for path, module in model.named_modules():
        if isinstance(module, _BatchNorm):

            def record(layer: nn.Module, inputs: Any, path: str = path) -> None:
                counts.setdefault(path, []).append(inputs[0].numel() // layer.num_features)

            module.register_forward_pre_hook(record)
    return counts
