"""Run timm's own test_models.py with every created model converted: the smallest member of each family.

    python tests/timm_suite.py                  # every family
    python tests/timm_suite.py --families 20    # the first 20

Forward, backward, forward_features (it builds features_only models) and intermediates must pass. A model that
apply_rblock refuses, and a TorchScript or fx test that ends with an RBlockError, counts as refused. Prints a line for
each test, then a summary with the reasons. Exit status 1 if a test failed.

timm's tests are in its sdist alone. It is taken from --sdist, or downloaded with pip.
"""

import argparse
import collections
import fnmatch
import functools
import json
import subprocess
import sys
import tarfile
import tempfile
import warnings
from pathlib import Path

import pytest
import timm
import torch
from timm.models import _registry

from rblock_fx import RBlockError, apply_rblock

TESTS = (
    "test_model_forward",
    "test_model_backward",
    "test_model_forward_features",
    "test_model_forward_intermediates_features",
    "test_model_forward_intermediates",
)
MAY_BE_REFUSED = ("test_model_forward_torchscript", "test_model_forward_fx", "test_model_backward_fx")


def unpack_tests(sdist, folder):
    """Path of timm's test_models.py of the installed version, unpacked into a folder."""
    if sdist is None:
        download = ["pip", "download", "--no-deps", "--no-binary", "timm", "--no-build-isolation"]
        subprocess.run(
            [sys.executable, "-m", *download, "--dest", str(folder), f"timm=={timm.__version__}"], check=True
        )
        sdist = next(Path(folder).glob("timm-*.tar.gz"))
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    return next(Path(folder).glob("timm-*/tests/test_models.py"))


@functools.cache
def count_parameters(name):
    try:
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in timm.create_model(name).parameters())
    except Exception:
        return sum(parameter.numel() for parameter in timm.create_model(name).parameters())


def smallest_of_each_family(cache):
    """Name of the smallest architecture of each module of timm. Takes minutes, so that a cache file helps."""
    if cache is not None and cache.exists():
        return json.loads(cache.read_text())
    families = collections.defaultdict(list)
    for name in timm.list_models(exclude_filters=["*enormous*", "*_1b_*", "*_3b_*", "*_5b_*", "*_7b_*", "*giant*"]):
        families[_registry._model_to_module[name]].append(name)
    smallest = {family: min(names, key=count_parameters) for family, names in sorted(families.items())}
    if cache is not None:
        cache.write_text(json.dumps(smallest))
    return smallest


class RefusalError(Exception):
    """apply_rblock refused the model."""


class Suite:
    """Pytest plugin: selects the tests of some models, converts these, and counts the outcomes."""

    def __init__(self, models):
        self.models = models
        self.outcomes = collections.defaultdict(list)
        self.refusals = {}

    def pytest_collection_modifyitems(self, items):
        chosen = []
        for item in items:
            arguments = getattr(item, "callspec", None)
            name = item.originalname
            if name in TESTS + MAY_BE_REFUSED and arguments and arguments.params.get("model_name") in self.models:
                item.module.create_model = self.create_converted
                chosen.append(item)
        chosen.sort(key=lambda item: self.models.index(item.callspec.params["model_name"]))
        items[:] = chosen

    def create_converted(self, *args, **kwargs):
        key = repr((args, {name: kwargs[name] for name in kwargs if name != "num_classes"}))
        if key in self.refusals:
            raise RefusalError(self.refusals[key])
        model = timm.create_model(*args, **kwargs)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return apply_rblock(model)
        except RBlockError as error:
            self.refusals[key] = f"{type(error).__name__}: {error}"
            raise RefusalError(self.refusals[key]) from error

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item, call):
        report = yield
        if call.when == "call":
            test, model = item.originalname, item.callspec.params["model_name"]
            error = call.excinfo.value if call.excinfo else None
            outcome, reason = "passed", ""
            if isinstance(error, RefusalError) or (isinstance(error, RBlockError) and test in MAY_BE_REFUSED):
                outcome, reason = "refused", str(error)
                report.outcome, report.longrepr = "skipped", (str(item.path), 0, reason)
            elif isinstance(error, pytest.skip.Exception):
                outcome, reason = "skipped", str(error)
            elif error is not None:
                outcome, reason = "failed", f"{type(error).__name__}: {error}"
            reason = " ".join(reason.split())[:300]
            self.outcomes[outcome].append((test, model, reason))
            print(f"{outcome:8} {test} {model} {call.duration:.1f} s {reason}", file=sys.__stdout__, flush=True)
        return report

    def summary(self):
        lines = [f"{len(self.models)} models: " + ", ".join(f"{len(v)} {k}" for k, v in sorted(self.outcomes.items()))]
        for outcome in ("failed", "refused", "skipped"):
            reasons = collections.defaultdict(list)
            for test, model, reason in self.outcomes[outcome]:
                reasons[reason].append(f"{test.removeprefix('test_model_')} of {model}")
            lines += [f"{outcome}: {', '.join(tests)}\n    {reason}" for reason, tests in reasons.items()]
        return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--families", type=int, help="only the first N families")
    parser.add_argument("--only", default="*", help="only families that match this glob")
    parser.add_argument("--sdist", type=Path, help="timm's source distribution; by default downloaded")
    parser.add_argument("--cache", type=Path, help="JSON file that keeps the smallest member of each family")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = unpack_tests(options.sdist, folder)
        families = smallest_of_each_family(options.cache)
        models = [model for family, model in families.items() if fnmatch.fnmatch(family, options.only)]
        suite = Suite(models[: options.families])
        quiet = ["--capture=sys", "-p", "no:terminal", "-p", "no:cacheprovider", "-W", "ignore"]
        pytest.main([str(path), *quiet, "-c", "/dev/null", "--rootdir", str(path.parent)], plugins=[suite])
    print(suite.summary())
    sys.exit(bool(suite.outcomes["failed"]) or not suite.outcomes["passed"])


if __name__ == "__main__":
    main()
