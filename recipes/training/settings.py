"""What can be set, how it is read, and how a mistake in it is told."""

import difflib
import math
import os
import re
import sys
import time
from argparse import ArgumentError
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

from jsonargparse import ArgumentParser, Namespace

Method = Literal[
    "bdropdml", "sdropdml", "c-dropblock", "r-drop", "c-drop", "r-spatialdropout", "r-dropblock",  # pairs of sub-models
    "dropout", "spatialdropout", "dropblock",  # one model
    "none",  # plain training: the model is not touched
]  # fmt: skip


EXPLAINED = Path(__file__).resolve().parents[1] / "configs" / "digits.yaml"


class RecipeError(ValueError):
    """A mistake in the settings or the files they name: one line for the user, no traceback."""


@dataclass
class Config:
    """Every setting of recipes/train.py; recipes/configs/digits.yaml explains each where it stands."""

    output_dir: str
    epochs: int
    dataset: str
    image_size: int
    model: str
    model_kwargs: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    resume: str | None = None  # "auto" or a checkpoint folder
    max_steps: int | None = None  # end after so many optimizer steps, whatever epochs says
    checkpoint_steps: int | None = None  # optimizer steps between checkpoints within an epoch
    trackers: list[str] = field(default_factory=list)

    data_dir: str | None = None
    download: bool = True
    train_split: str = "train"  # of timm's data sets
    test_split: str = "validation"
    num_classes: int | None = None  # of streams, which cannot be asked
    train_images: int | None = None  # a fixed stratified subset of the training split
    augment: bool = True
    num_workers: int = 0

    method: Method = "bdropdml"
    drop_prob: float = 0.2
    drop_schedule: Literal["constant", "linear"] = "constant"
    block_size: int = 3
    sites: list[int | str] | int | str | None = None
    calibration: Literal["exact", "eq6", "eq7"] = "exact"
    batch_norm: Literal["joint", "per_submodel"] = "joint"
    alpha: float = 0.1
    temperature: float = 3.0

    batch_size: int = 64  # images in one optimizer step, all processes together
    accumulate_steps: int = 1  # forwards and backwards that share an optimizer step's images
    lr: float = 0.1
    lr_schedule: Literal["cosine", "multistep", "constant"] = "cosine"
    milestones: list[int] = field(default_factory=list)  # epochs, of multistep
    lr_gamma: float = 0.1
    warmup_epochs: int = 0
    momentum: float = 0.9
    weight_decay: float = 5e-4
    label_smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    clip_grad_norm: float | None = None
    ema_decay: float | None = None
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    channels_last: bool = False
    compile: bool = False
    gap_images: int = 1000  # test images on which the train/inference gap is measured, evenly spaced over the split

    def __post_init__(self) -> None:
        """Refuse numbers outside their range; the rest of the R-Block settings are checked by apply_rblock."""
        ranges = {
            "epochs": (1, math.inf), "image_size": (1, math.inf), "seed": (0, 2**31), "batch_size": (2, math.inf),
            "warmup_epochs": (0, math.inf), "num_workers": (0, math.inf), "weight_decay": (0, math.inf),
            "alpha": (0, 1), "lr_gamma": (0, 1),
            "max_steps": (1, math.inf), "checkpoint_steps": (1, math.inf), "num_classes": (2, math.inf),
            "train_images": (2, math.inf), "accumulate_steps": (1, math.inf),
            "mixup": (0, math.inf), "cutmix": (0, math.inf), "gap_images": (0, math.inf),
        }  # fmt: skip
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                expected = f"a number of at least {low}" if high == math.inf else f"a number from {low} to {high}"
                raise RecipeError(f"{name} is {value}; expected {expected}, e.g. --{name} {low}")
        for name in ("drop_prob", "momentum", "label_smoothing", "ema_decay"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise RecipeError(f"{name} is {value}; expected a number from 0 to below 1, e.g. --{name} 0.1")
        for name in ("lr", "temperature", "clip_grad_norm"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise RecipeError(f"{name} is {value}; expected a positive number, e.g. --{name} 0.1")
        if not self.output_dir:
            raise RecipeError("output_dir is empty; expected a folder, e.g. --output_dir runs/digits")
        self.output_dir = os.path.expanduser(self.output_dir)
        if self.lr_schedule == "multistep" and not self.milestones:
            raise RecipeError(
                "lr_schedule multistep has no milestones; expected epochs, e.g. --milestones [75,130,180]"
            )
        if self.milestones and self.lr_schedule != "multistep":
            raise RecipeError(
                f"milestones is {self.milestones}, which lr_schedule {self.lr_schedule} does not use; expected "
                "--lr_schedule multistep or --milestones []"
            )
        rising = sorted(set(self.milestones)) == self.milestones
        if not rising or any(not 1 <= epoch < self.epochs for epoch in self.milestones):
            low = max(2, self.epochs)
            raise RecipeError(
                f"milestones is {self.milestones} of {self.epochs} epochs; expected rising epochs from 1 to "
                f"{self.epochs - 1}, at which the learning rate falls, e.g. --milestones [{low * 3 // 8 or 1}]"
            )


def make_parser() -> ArgumentParser:
    """The command line: --config FILE, and --key value for every field of Config, the later winning."""
    # abbreviations off: --epoch must be an unknown option, not a quiet --epochs
    parser = ArgumentParser(
        exit_on_error=False,
        allow_abbrev=False,
        description=(
            "Train an image classifier, plainly or as an R-Block model. "
            "recipes/configs/digits.yaml explains each setting."
        ),
    )
    parser.add_argument("--config", action="config", help="a YAML file of settings, e.g. recipes/configs/digits.yaml")
    parser.add_class_arguments(Config, as_group=False)
    told = explanations()
    for action in parser._actions:
        action.help = told.get(action.dest, action.help or "").replace("%", "%%") or None
    return parser


def explanations() -> dict[str, str]:
    """What configs/digits.yaml says of each setting, in the comment beside it."""
    told: dict[str, str] = {}
    name = None
    for line in EXPLAINED.read_text().splitlines():
        setting = re.match(r"(\w+):[^#]*(?:# (.*))?", line)
        more = re.match(r"\s+(?:\w+:[^#]*)?# (.*)", line)
        if setting is not None:
            name, words = setting[1], setting[2] or ""
        elif more is not None and name is not None:
            words = f"{told[name]} {more[1]}".strip()
        else:
            continue
        told[name] = words
    return told


def read_config(arguments: list[str] | None = None) -> Config:
    """Settings from the command line (sys.argv by default).

    Raises:
        RecipeError: a key is unknown or missing, a value has the wrong type or range, the file cannot be read.
    """
    try:
        values = make_parser().parse_args(arguments).as_dict()
    except ArgumentError as error:
        raise argument_error(error, get_type_hints(Config), "recipes/train.py") from error
    values.pop("config")
    return Config(**values)


def argument_error(error: ArgumentError, types: dict[str, Any], script: str) -> RecipeError:
    """What jsonargparse says of a mistake, with the name that may have been meant.

    Args:
        error: jsonargparse's.
        types: the name of every option and its type.
        script: the script whose options they are, for the advice.
    """
    message = " ".join(str(error).split())
    value = re.match(r'Parser key "(\w+)": .* (?:Got value|Given value): (.*)', message)
    unknown = re.match(r"unrecognized arguments: --(\w+)|Option '(\w+)' is not accepted", message)
    if value is not None and get_origin(types.get(value[1])) is Literal:
        choices = get_args(types[value[1]])
        message = f"{value[1]} is {value[2]!r}; {near(value[2], choices)} Known: {', '.join(choices)};"
    elif value is not None and value[1] in types:
        expected = types[value[1]]
        name = expected.__name__ if isinstance(expected, type) else str(expected).replace("typing.", "")
        message = f"{value[1]} is {value[2]!r}; expected {name};"
    elif unknown is not None:
        message += f"; {near(unknown[1] or unknown[2], types)}"
    else:
        message += ";"
    return RecipeError(f"{message} `python {script} --help` lists what can be set")


def to_yaml(config: Config) -> str:
    """The settings as a YAML file that `--config` reads back."""
    values = Namespace(asdict(config))  # type: ignore[no-untyped-call]
    return str(make_parser().dump(values, skip_unset=False))


def near(name: str, known: Iterable[str]) -> str:
    """The known names that resemble a name, for an error message."""
    matches = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    return f"did you mean {' or '.join(matches)}?" if matches else "no known name is near."


def exit_with(error: Exception) -> NoReturn:
    """Tell a mistake in one line of stderr, once, and end with exit code 2."""
    rank = int(os.environ.get("RANK", "0"))
    # an error of a loader's worker comes with the worker's traceback before it
    message = " ".join(str(error).rpartition("RecipeError: ")[2].split())
    if rank != 0:
        # Every process meets the same mistake and the main one speaks; the launcher then ends the others here. One
        # that is still alive after this wait met a mistake that the main process did not, and must say so itself.
        time.sleep(10)
        message = f"(process {rank}) {message}"
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(2)
