"""Every family of timm and torchvision converts as recorded; outputs are compared for 20 families drawn per commit."""

import pytest
import timm

from benchmarks import zoo, zoo_models, zoo_outputs, zoo_report
from tests.zoo_families import COMPARED, MEMBERS, SUMMARY, WEIGHTED, draw_families, read_commit

FAMILIES_CONVERTED, FAMILIES_REFUSED = 106, 43


@pytest.mark.parametrize("family", MEMBERS)
def test_smallest_of_family_converts_as_recorded(family):
    recorded = MEMBERS[family]
    found = zoo.examine_structure(recorded["name"])
    assert found["status"] == "converted", found.get("error")
    assert found["sites"] == recorded["sites"]
    assert found["keys_equal"]
    assert found["cost"] == pytest.approx(recorded["cost"], abs=1e-3)


def compare_outputs(family):
    numbers = zoo_outputs.compare_outputs(MEMBERS[family])
    assert zoo_report.failed_checks(numbers) == []


@pytest.mark.parametrize("family", draw_families(read_commit()))
def test_outputs_agree_for_families_drawn_by_commit(family):
    compare_outputs(family)


@pytest.mark.nightly
@pytest.mark.parametrize("family", WEIGHTED)
def test_outputs_agree_for_every_family(family):
    compare_outputs(family)


def test_the_draw_depends_on_the_commit_alone():
    first, again, other = map(draw_families, ("a" * 40, "a" * 40, "b" * 40))
    assert first == again != other
    assert len(set(first)) == COMPARED
    assert set().union(*(draw_families(f"{number:040x}") for number in range(100))) == set(WEIGHTED)


def test_every_family_is_in_the_result_file():
    families = {zoo_models.family_of(name) for name in zoo_models.all_names()}
    recorded = {line["family"] for line in SUMMARY["architectures"]}
    assert recorded <= families
    if timm.__version__ == SUMMARY["versions"]["timm"]:
        assert recorded == families
        assert {line["name"] for line in SUMMARY["architectures"]} == set(zoo_models.all_names())
    assert len(MEMBERS) == FAMILIES_CONVERTED
    assert len(recorded - set(MEMBERS)) == FAMILIES_REFUSED


def test_every_timm_model_with_maps_converts():
    lines = SUMMARY["architectures"]
    assert [line["name"] for line in lines if line["maps"] and line["status"] != "converted"] == []
    assert [line["name"] for line in lines if line["status"] == "failed"] == []
    assert SUMMARY["timm_with_maps"] == SUMMARY["timm_with_maps_converted"] >= 923


def test_summary_follows_from_the_lines():
    made = zoo_report.summarise(SUMMARY["architectures"])
    assert made.keys() == SUMMARY.keys()
    here = ("versions", "machine")
    assert [key for key in made if key not in here and made[key] != SUMMARY[key]] == []
