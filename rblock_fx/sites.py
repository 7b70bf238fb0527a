"""Which stages can carry masks, and what the user's words for them mean."""

import dataclasses
import difflib
import fnmatch
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import nn

from rblock_fx.errors import SiteError
from rblock_fx.replica import weightless_copy
from rblock_fx.survey import ModuleRun, Shape, Survey, survey_forward
from rblock_fx.tables import format_table

Sites = None | str | int | Sequence[str | int]

HEAD = "head"


@dataclasses.dataclass(frozen=True)
class Site:
    """A place for masks.

    Attributes:
        index: number of the stage, 0-based in forward order; None for a place that is no stage.
        path: qualified name of the module whose output is masked; for the head, of the classifier, whose input is.
        shape: shape of one sample's map.
        channel_axis: 1 for (N, C, *S), -1 for (N, *S, C).
        cost_before: share of the forward FLOPs that comes before it, which a fork here does not double.
        is_head: whether this is the classifier's input.
    """

    index: int | None
    path: str
    shape: Shape
    channel_axis: int
    cost_before: float
    is_head: bool = False


class SiteList(tuple[Site, ...]):
    """Sites in forward order, printed as a table."""

    def __str__(self) -> str:
        rows = [
            (site.index, site.path, "x".join(map(str, site.shape)), site.channel_axis, f"{site.cost_before:.1%}")
            for site in self
        ]
        return format_table(("index", "path", "shape", "channel_axis", "cost_before"), rows)

    __repr__ = __str__


def list_sites(model: nn.Module, input_size: Sequence[int] | None = None) -> SiteList:
    """List the stages of a model that can carry masks, in forward order; the model is left as it is.

    Stages are timm's `feature_info` where the model has it, numbered like timm's `out_indices`. For other models they
    are the last map of each resolution through which every path from input to output runs.

    Args:
        model: any CNN.
        input_size: shape of one sample, (channels, *spatial); default the model's pretrained_cfg, else (3, 224, 224).

    Raises:
        ConversionError: the model does not run on a batch of this size.
    """
    return stages(model, survey_forward(weightless_copy(model), resolve_input_size(model, input_size)))


def resolve_input_size(model: nn.Module, input_size: Sequence[int] | None) -> Shape:
    """Fill in the default: the pretrained_cfg's input size or 224 x 224, with the channels that the stem takes."""
    if input_size is not None:
        sizes = tuple(input_size)
        if len(sizes) < 2 or not all(isinstance(size, int) and size > 0 for size in sizes):
            raise SiteError(
                f"input_size={input_size!r} is not the shape of one sample; expected (channels, *spatial), e.g. "
                "input_size=(3, 224, 224)"
            )
        return sizes
    config = getattr(model, "pretrained_cfg", None) or {}
    size = tuple((config.get("input_size") if isinstance(config, dict) else None) or (3, 224, 224))
    stem = next((m for m in model.modules() if isinstance(m, nn.modules.conv._ConvNd)), None)
    # timm's pretrained_cfg keeps three channels under create_model(in_chans=1).
    return (stem.in_channels, *size[1:]) if stem is not None else size


def stages(model: nn.Module, survey: Survey) -> SiteList:
    """Take timm's feature_info where it names maps, else cut the graph."""
    channels_last = getattr(model, "output_fmt", None) == "NHWC"
    described = [(entry, survey.runs_of(entry.get("module", ""))) for entry in _feature_info(model)]
    found: list[tuple[ModuleRun, int | None]]
    if any(runs for _, runs in described):
        # Where what timm calls stages are tokens, a patch embedding is no stage either.
        found = [(runs[-1], entry.get("num_chs")) for entry, runs in described if runs and is_map(runs[-1], survey)]
    else:
        found = [(run, None) for run in _last_cut_of_each_resolution(survey)]
    return SiteList(
        Site(index, run.path, _shape(run), _channel_axis(run, channels, channels_last), _share(run.flops, survey))
        for index, (run, channels) in enumerate(found)
    )


def resolve_sites(model: nn.Module, survey: Survey, sites: Sites) -> list[Site]:
    """Turn what the user wrote into sites, in the user's order.

    Raises:
        SiteError: nothing chosen, an unknown name, a module that never runs or whose output is no feature map, one map
            chosen twice.
    """
    listed = stages(model, survey)
    resolver = _Resolver(model, survey, listed)
    if sites is None:
        if not listed:
            raise SiteError(_no_stage(model, survey))
        return list(listed[-2:])
    if sites == "all":
        if not listed:
            raise SiteError(_no_stage(model, survey))
        return list(listed)
    words = [sites] if isinstance(sites, str | int) else list(sites)
    if not words:
        raise SiteError(f"sites={sites!r} names no site; {resolver.choices()}")
    chosen = list(itertools.chain.from_iterable(map(resolver.resolve, words)))
    unique = list(dict.fromkeys(chosen))
    resolver.refuse_same_map(unique)
    return unique


@dataclasses.dataclass(frozen=True)
class _Resolver:
    """What one word of `sites` means for one model."""

    model: nn.Module
    survey: Survey
    listed: SiteList

    def resolve(self, word: object) -> list[Site]:
        if isinstance(word, int) and not isinstance(word, bool):
            if not -len(self.listed) <= word < len(self.listed):
                raise SiteError(f"site {word} is no stage of {type(self.model).__name__}; {self.choices()}")
            return [self.listed[word]]
        if not isinstance(word, str):
            raise SiteError(f"site {word!r} is a {type(word).__name__}; {self.choices()}")
        if word == HEAD:
            return [head_site(self.model, self.survey)]
        if word == "all":
            return list(self.listed)
        if any(sign in word for sign in "*?["):
            return self._match(word)
        return [self._module(word)]

    def _match(self, pattern: str) -> list[Site]:
        """A glob, in which * stays within one name of the path."""
        wanted = pattern.split(".")
        paths = [
            path
            for path in dict.fromkeys(run.path for run in self.survey.runs if is_map(run, self.survey))
            if len(path.split(".")) == len(wanted) and all(map(fnmatch.fnmatchcase, path.split("."), wanted))
        ]
        if not paths:
            raise SiteError(f"no feature map of {type(self.model).__name__} matches {pattern!r}; {self.choices()}")
        return [self._module(path) for path in paths]

    def _module(self, path: str) -> Site:
        for site in self.listed:
            if site.path == path:
                return site
        modules = dict(self.model.named_modules(remove_duplicate=False))
        if not path or path not in modules:
            raise SiteError(f"{type(self.model).__name__} has no module {path!r}; {self.choices(path, modules)}")
        # A module shared under several names runs under the first of them.
        name = next(first for first, module in self.model.named_modules() if module is modules[path])
        runs = self.survey.runs_of(name)
        if not runs:
            raise SiteError(f"module {path!r} never runs in a forward pass, so it has no map; {self.choices()}")
        if not is_map(runs[-1], self.survey):
            raise SiteError(
                f"the output of {path!r} is no feature map: expected {len(self.survey.input_size) + 1} axes "
                f"(N, channels, *spatial) for inputs of {self.survey.input_size}, got "
                f"{('N', *_shape(runs[-1])) if runs[-1].output_shape is not None else 'no single tensor'}; "
                f"{self.choices()} Use sites='head' with dropout, r-drop or c-drop for the classifier's input."
            )
        axis = -1 if self.listed and all(site.channel_axis == -1 for site in self.listed) else 1
        return Site(None, name, _shape(runs[-1]), axis, _share(runs[-1].flops, self.survey))

    def refuse_same_map(self, chosen: Iterable[Site]) -> None:
        owners: dict[int, Site] = {}
        for site in chosen:
            if site.is_head:
                continue
            other = owners.setdefault(self.survey.runs_of(site.path)[-1].value, site)
            if other is not site:
                raise SiteError(f"sites {other.path!r} and {site.path!r} are one and the same map; name one of them.")

    def choices(self, word: str = "", names: Iterable[str] = ()) -> str:
        """The end of an error message: near names, then the stages."""
        near = difflib.get_close_matches(word, list(names), n=4, cutoff=0.5) if word else []
        hint = f"did you mean {', '.join(map(repr, near))}? " if near else ""
        last = [site.path for site in self.listed]
        return f"{hint}Stages are {last}, e.g. sites={last[-2:]}; list_sites(model) shows them with their shapes."


def head_site(model: nn.Module, survey: Survey) -> Site:
    """Find the classifier: timm's get_classifier, else the last linear or conv layer that runs.

    Raises:
        SiteError: the model has no classifier that runs.
    """
    names = {module: name for name, module in model.named_modules()}
    get_classifier: Callable[[], Any] | None = getattr(model, "get_classifier", None)
    classifier = get_classifier() if callable(get_classifier) else None
    if isinstance(classifier, nn.Module) and any(True for _ in classifier.parameters()):
        path = names.get(classifier, "")
    else:
        weighted = {names[module] for module in names if isinstance(module, nn.Linear | nn.modules.conv._ConvNd)}
        path = next((run.path for run in reversed(survey.runs) if run.path in weighted), "")
        if callable(get_classifier) and classifier is not None:  # timm's Identity: created with num_classes=0
            path = ""
    runs = survey.runs_of(path) if path else []
    if not runs or runs[-1].input_shape is None:
        raise SiteError(
            f"sites='head': {type(model).__name__} has no classifier that runs; give the model one "
            "(num_classes > 0), or name stages: sites=['layer4']"
        )
    return Site(None, path, runs[-1].input_shape, 1, _share(runs[-1].flops_before, survey), is_head=True)


def is_map(run: ModuleRun, survey: Survey) -> bool:
    """Whether a module gave one tensor with channels and as many spatial axes as the input has."""
    return run.output_shape is not None and len(run.output_shape) == len(survey.input_size)


def _feature_info(model: nn.Module) -> list[dict[str, Any]]:
    described = getattr(model, "feature_info", None) or []
    entries = getattr(described, "info", described)  # timm's FeatureInfo, or the list it is made of
    return [entry for entry in entries if isinstance(entry, dict)]


def _last_cut_of_each_resolution(survey: Survey) -> list[ModuleRun]:
    """The last map of each resolution that everything passes through, at which the network computes.

    Where the network is built of blocks (modules of two and more convolutions) only their outputs count, so that a
    stem, a transition or a last 1x1 convolution is no stage; of nested modules with one output the outermost is meant.
    """
    maps = [
        run
        for run in survey.runs
        if is_map(run, survey) and run.value in survey.cuts and max(_shape(run)[1:]) > 1 and run.path
    ]
    blocks = [
        run for run in maps if len(convolutions := _convolutions(run, survey)) > 1 and _shape(run)[1:] in convolutions
    ]
    computed = [operation.convolution for operation in survey.operations if operation.convolution is not None]
    # A single convolution is the patch embedding of a network of tokens.
    candidates = blocks or [run for run in maps if _shape(run)[1:] in computed and len(computed) > 1]
    last: dict[Shape, ModuleRun] = {}
    for run in candidates:
        several = any(
            run.first <= other.first and other.last < run.last and _shape(other)[1:] != _shape(run)[1:]
            for other in blocks
        )
        if not several:
            # Modules return innermost first, so of equal values the later one is the outer.
            last[_shape(run)[1:]] = run
    return sorted(last.values(), key=lambda run: run.last)


def _convolutions(run: ModuleRun, survey: Survey) -> list[Shape]:
    operations = survey.operations[run.first : run.last]
    return [operation.convolution for operation in operations if operation.convolution is not None]


def _channel_axis(run: ModuleRun, channels: int | None, channels_last: bool) -> int:
    """Where num_chs is told, the axis that has it; the model's declared format where both or neither do."""
    shape = _shape(run)
    matches = {axis for axis, size in ((1, shape[0]), (-1, shape[-1])) if size == channels}
    return matches.pop() if len(matches) == 1 else -1 if channels_last else 1


def _shape(run: ModuleRun) -> Shape:
    return run.output_shape or ()


def _share(flops: int, survey: Survey) -> float:
    return flops / survey.flops if survey.flops else 0.0


def _no_stage(model: nn.Module, survey: Survey) -> str:
    return (
        f"{type(model).__name__} has no stage with a feature map of {len(survey.input_size) + 1} axes (N, channels, "
        "*spatial) that everything passes through; a network of tokens alone cannot carry block masks. Name a module "
        "whose output is a map, e.g. sites=['features'], or use sites='head' with method='r-drop'."
    )
