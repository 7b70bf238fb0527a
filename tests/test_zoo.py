"""One member of every family of timm and torchvision converts and stays what it was; all are in a result file."""

import json

import pytest
import timm

from benchmarks import zoo, zoo_report

SUMMARY = json.loads(zoo_report.SUMMARY.read_text())
FAMILIES_CONVERTED, FAMILIES_REFUSED = 112, 37
CHECKS = ("eval_equal", "keys_equal", "rows_doubled", "halves_differ", "gradients_equal", "gradients_finite")


def smallest_of_each_family():
    """The smallest architecture that was converted, of every family that has one."""
    members = {}
    for line in SUMMARY["architectures"]:
        if line["status"] == "converted":
            other = members.get(line["family"])
            if other is None or line["parameters"] < other["parameters"]:
                members[line["family"]] = line
    return members


MEMBERS = smallest_of_each_family()


@pytest.mark.parametrize("family", MEMBERS)
def test_the_smallest_of_a_family_converts_and_stays_what_it_was(family):
    recorded = MEMBERS[family]
    found = zoo.examine(recorded["name"], largest=30e6)
    assert found["status"] == "converted", found.get("error")
    assert found["sites"] == recorded["sites"]
    assert found["keys_equal"]
    assert found["cost"] == pytest.approx(recorded["cost"], abs=1e-3)
    if recorded["parameters"] <= 30e6:
        numbers = found["numbers"]
        assert [check for check in CHECKS if not numbers[check]] == []
        assert zoo_report.undropped(numbers) < 1e-4


def test_every_family_is_covered():
    families = {zoo.family_of(name) for name in zoo.all_names()}
    recorded = {line["family"] for line in SUMMARY["architectures"]}
    assert recorded <= families
    if timm.__version__ == SUMMARY["versions"]["timm"]:
        assert recorded == families
        assert {line["name"] for line in SUMMARY["architectures"]} == set(zoo.all_names())
    refused = {line["family"] for line in SUMMARY["architectures"]} - set(MEMBERS)
    assert len(MEMBERS) == FAMILIES_CONVERTED
    assert len(refused) == FAMILIES_REFUSED


def test_everything_that_timm_says_has_maps_converts():
    lines = SUMMARY["architectures"]
    assert [line["name"] for line in lines if line["maps"] and line["status"] != "converted"] == []
    assert [line["name"] for line in lines if line["status"] == "failed"] == []
    assert SUMMARY["timm_with_maps"] == SUMMARY["timm_with_maps_converted"] >= 923


def test_the_readme_shows_the_result_file():
    text = zoo_report.README.read_text()
    words = " ".join(text.split())
    status, weighted = SUMMARY["status"], SUMMARY["with_weights"]["architectures"]
    tried = SUMMARY["architectures_tried"]
    assert f"Of {tried:,} tried, {status['converted']:,} convert and {status['refused']} are refused" in words
    assert f"all {SUMMARY['timm_with_maps']} of timm" in words
    assert f"for {weighted} architectures" in words
    assert zoo_report.MARKS[0] + zoo_report.markdown_table(SUMMARY["architectures"]) + zoo_report.MARKS[1] in text


def test_the_table_counts_what_is_in_the_lines():
    rows = zoo_report.markdown_table(SUMMARY["architectures"]).splitlines()[2:]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert sum(int(row[1]) for row in cells) == len(SUMMARY["architectures"])
    assert sum(int(row[2]) for row in cells) == SUMMARY["status"]["converted"]
    assert sum(int(row[3]) for row in cells) == SUMMARY["with_weights"]["architectures"]
