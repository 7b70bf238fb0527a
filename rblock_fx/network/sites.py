"""Resolve the `sites` argument of apply_rblock for one model."""

import dataclasses
import difflib
import fnmatch
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import nn

from rblock_fx.errors import SiteError
from rblock_fx.network.record import Shape
from rblock_fx.network.stages import Site, SiteList, channel_axis, find_stages, is_map, last_layer, share, site_at
from rblock_fx.network.survey import Survey

Sites = None | str | int | Sequence[str | int]

HEAD = "head"


def resolve_sites(model: nn.Module, survey: Survey, sites: Sites) -> list[Site]:
    """Turn the user's names into sites, in the user's order.

    Raises:
        SiteError: nothing chosen, an unknown name, a module that never runs or does not return a feature map, one map
            chosen twice.
    """
    listed = find_stages(model, survey)
    resolver = _Resolver(model, survey, listed)
    if sites is None or (isinstance(sites, str) and sites == "all"):
        if not listed:
            raise SiteError(_no_stage(model, survey))
        return list(listed) if sites == "all" else list(listed[-2:])
    words = list(sites) if isinstance(sites, list | tuple | set | frozenset | range) else [sites]
    if not words:
        raise SiteError(f"sites={sites!r} names no site; {resolver.choices()}")
    chosen = list(dict.fromkeys(itertools.chain.from_iterable(map(resolver.resolve, words))))
    resolver.refuse_same_map(chosen)
    return chosen


@dataclasses.dataclass(frozen=True)
class _Resolver:
    """The meaning of one word of `sites` in one model."""

    model: nn.Module
    survey: Survey
    listed: SiteList

    def resolve(self, word: object) -> list[Site]:
        if isinstance(word, int) and not isinstance(word, bool):
            if not -len(self.listed) <= word < len(self.listed):
                raise SiteError(f"{type(self.model).__name__} has no stage {word}; {self.choices()}")
            return [self.listed[word]]
        if not isinstance(word, str):
            raise SiteError(f"a site is a str or an int, got {word!r}; {self.choices()}")
        if word == HEAD:
            return find_heads(self.model, self.survey)
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
            raise SiteError(f"module {path!r} never runs in a forward, so it has no map; {self.choices()}")
        if not is_map(runs[-1], self.survey):
            raise SiteError(
                f"{path!r} does not return a feature map: expected {len(self.survey.input_size) + 1} axes "
                f"(N, channels, *spatial), or a list of such, got {_format_output(runs[-1].output)}; "
                f"{self.choices()} For the classifier's input: sites='head' with dropout, r-drop or c-drop."
            )
        # Where the shapes leave it open, the axis is that of the stages.
        channels_last = bool(self.listed) and all(site.channel_axis == -1 for site in self.listed)
        axis = channel_axis(runs[-1], self.survey, channels=None, channels_last=channels_last)
        return site_at(runs[-1], self.survey, index=None, channel_axis=axis)

    def refuse_same_map(self, chosen: Iterable[Site]) -> None:
        owners: dict[int, Site] = {}
        for site in chosen:
            if site.is_head:
                continue
            for value in self.survey.runs_of(site.path)[-1].values:
                other = owners.setdefault(value, site)
                if other is not site:
                    raise SiteError(f"sites {other.path!r} and {site.path!r} return the same map; name one of them")

    def choices(self, word: str = "", names: Iterable[str] = ()) -> str:
        """The end of an error message: near names, then the stages."""
        near = difflib.get_close_matches(word, list(names), n=4, cutoff=0.5) if word else []
        hint = f"did you mean {', '.join(map(repr, near))}? " if near else ""
        last = [site.path for site in self.listed]
        return f"{hint}Stages are {last}, e.g. sites={last[-2:]}; list_sites(model) shows their shapes."


def find_heads(model: nn.Module, survey: Survey) -> list[Site]:
    """Find the classifier: timm's get_classifier (several, of a distilled model), else the last layer that runs.

    Raises:
        SiteError: the model has no classifier that runs.
    """
    names = {module: name for name, module in model.named_modules()}
    get_classifier: Callable[[], Any] | None = getattr(model, "get_classifier", None)
    if callable(get_classifier):
        classifier = get_classifier()
        several = classifier if isinstance(classifier, tuple | list | nn.ModuleList) else [classifier]
        # A timm model without a classifier (num_classes=0) has an Identity there.
        paths = [names[module] for module in several if module in names and any(True for _ in module.parameters())]
    else:
        layer = last_layer(survey)
        paths = [] if layer is None else [layer.path]
    runs = [survey.runs_of(path)[-1] for path in paths if survey.runs_of(path)]
    sites = [
        Site(None, run.path, run.input_shape, 1, share(run.flops_before, survey), is_head=True)
        for run in runs
        if run.input_shape is not None
    ]
    if not sites:
        raise SiteError(
            f"sites='head': {type(model).__name__} has no classifier that runs; create the model with "
            "num_classes > 0, or name stages: sites=['layer4']"
        )
    return sites


def _format_output(output: Shape | list[Shape | None] | None) -> str:
    if isinstance(output, list):
        return f"a list of {[_format_output(item) for item in output]}"
    return "no tensor" if output is None else str(("N", *output))


def _no_stage(model: nn.Module, survey: Survey) -> str:
    return (
        f"{type(model).__name__} has no stage with a feature map of {len(survey.input_size) + 1} axes (N, channels, "
        "*spatial) that everything passes through. If a module returns such maps, name it: sites=['features.7']. A "
        "network of tokens alone cannot carry block masks, only sites='head' with method='r-drop'."
    )
