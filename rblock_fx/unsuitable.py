"""Networks that no choice of sites can convert, told apart by what they are, with the part of them that converts."""

from torch import nn

from rblock_fx.errors import ConversionError


def refuse_unsuitable(model: nn.Module) -> None:
    """Refuse torchvision's detection and optical flow models, and quantized ones.

    Raises:
        ConversionError: with the call that would work.
    """
    name = type(model).__name__
    source = type(model).__module__
    if source.startswith("torchvision.models.detection") and hasattr(model, "transform"):
        raise ConversionError(
            f"{name} is a detection model: it takes lists of images and gives losses, which have no pair of outputs. "
            "Its backbone converts alone: apply_rblock(model.backbone)"
        )
    if source.startswith("torchvision.models.optical_flow") and hasattr(model, "feature_encoder"):
        raise ConversionError(
            f"{name} is an optical flow model: it takes two batches of images and gives a list of flows, and refines "
            "them in a loop, in which a mask would be drawn anew each time. Its encoders convert alone: "
            "apply_rblock(model.feature_encoder)"
        )
    kinds = {base.__name__ for module in model.modules() for base in type(module).__mro__}
    if "WeightedQuantizedModule" in kinds:  # of torch.ao, or wherever it moves to
        raise ConversionError(
            f"{name} is quantized: its integer layers cannot be trained. Convert the model before it is "
            "quantized, e.g. apply_rblock(torchvision.models.quantization.resnet18(quantize=False))"
        )
