import numpy as np
import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from rblock_fx import DropSchedule, SettingError, apply_rblock, describe, set_drop_prob
from tests.oracles import Maps


@pytest.fixture
def model():
    return apply_rblock(timm.create_model("test_resnet"), [3, 4], drop_prob=0.2)


def rates(model):
    return [site.drop_prob for site in describe(model).sites]


def test_sets_one_rate_or_one_per_site_in_the_users_order():
    model = apply_rblock(
        timm.create_model("test_resnet"), ["layer4", "layer2"], drop_prob=[0.4, 0.1], block_size=[1, 3]
    )
    sites = {site.path: (site.drop_prob, site.block_size) for site in describe(model).sites}
    assert sites == {"layer2": (0.1, 3), "layer4": (0.4, 1)}
    set_drop_prob(model, [0.3, 0.2])
    assert {site.path: site.drop_prob for site in describe(model).sites} == {"layer2": 0.2, "layer4": 0.3}
    set_drop_prob(nn.DataParallel(model), 0.25)
    assert rates(model) == [0.25, 0.25]


@given(st.floats(0, 0.99), st.floats(0, 0.99), st.integers(1, 50), st.integers(0, 60))
def test_the_rate_is_linear_and_then_stays_at_the_end(start, end, total, steps):
    model = apply_rblock(Maps(), "stage", input_size=(2, 4, 4))
    schedule = DropSchedule(model, start, end, total)
    assert rates(model) == [pytest.approx(start)]
    for _ in range(steps):
        schedule.step()
    expected = end if steps >= total else start + (end - start) * steps / total
    assert rates(model) == [pytest.approx(expected, abs=1e-12)]


def test_a_schedule_resumes_from_its_state(model):
    schedule = DropSchedule(model, 0.0, 0.2, 8)
    for _ in range(3):
        schedule.step()
    state = schedule.state_dict()
    resumed_model = apply_rblock(timm.create_model("test_resnet"), [3, 4])
    resumed = DropSchedule(resumed_model, 0.5, 0.1, 2)
    resumed.load_state_dict(state)
    assert rates(resumed_model) == rates(model) == [pytest.approx(0.075)] * 2
    for one in (schedule, resumed):
        one.step()
    assert rates(resumed_model) == rates(model) == [pytest.approx(0.1)] * 2


STATE = {"start": 0.0, "end": 0.2, "total_steps": 10, "steps_done": 5}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (STATE | {"end": 5.0}, r"drop_prob must be in \[0, 1\), got 5.0 \(did you mean 0.05\?\)"),
        (STATE | {"start": -0.1}, r"drop_prob must be in \[0, 1\), got -0.1$"),
        (STATE | {"end": float("nan")}, r"drop_prob must be in \[0, 1\), got nan$"),
        (STATE | {"start": "0.1"}, r"drop_prob must be in \[0, 1\), got '0.1'$"),
        (STATE | {"total_steps": 0}, "total_steps must be an integer >= 1, got 0"),
        (STATE | {"total_steps": "ten"}, "total_steps must be an integer >= 1, got 'ten'"),
        (STATE | {"total_steps": True}, "total_steps must be an integer >= 1, got True"),
        (STATE | {"steps_done": float("nan")}, "steps_done must be an integer >= 0, got nan"),
        (STATE | {"steps_done": -100}, "steps_done must be an integer >= 0, got -100"),
        (None, r"lacks start, end, total_steps, steps_done, got None; .*schedule\.state_dict\(\)"),
        ({"start": 0.0, "end": 0.2, "total_steps": 10}, "lacks steps_done"),
    ],
)
def test_a_bad_state_is_rejected_and_changes_nothing(model, state, message):
    schedule = DropSchedule(model, 0.1, 0.3, 20)
    schedule.step()
    before = schedule.state_dict(), rates(model)
    with pytest.raises(SettingError, match="DropSchedule.load_state_dict: .*" + message):
        schedule.load_state_dict(state)
    assert (schedule.state_dict(), rates(model)) == before


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((0.0, 1.0, 10), r"DropSchedule: drop_prob must be in \[0, 1\), got 1.0$"),
        ((20, 0.2, 10), r"DropSchedule: drop_prob must be in \[0, 1\), got 20 \(did you mean 0.2\?\)"),
        ((0.0, 0.2, 0), "DropSchedule: total_steps must be an integer >= 1, got 0"),
        ((0.0, 0.2, 2.5), r"DropSchedule: total_steps must be an integer >= 1, got 2\.5"),
    ],
)
def test_a_bad_line_is_rejected_and_changes_nothing(model, values, message):
    with pytest.raises(SettingError, match=message):
        DropSchedule(model, *values)
    assert rates(model) == [0.2, 0.2]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (20.0, r"set_drop_prob: drop_prob must be in \[0, 1\), got 20.0 \(did you mean 0.2\?\)"),
        (np.float32(1.5), r"drop_prob must be in \[0, 1\), got 1.5 \(did you mean 0.015\?\)"),
        ([0.1, True], r"drop_prob must be in \[0, 1\), got True$"),
        ([0.1], r"set_drop_prob: drop_prob must be one value or one per site \(2\), got 1: \[0.1\]"),
    ],
)
def test_a_bad_rate_is_rejected_and_changes_nothing(model, value, message):
    with pytest.raises(SettingError, match=message):
        set_drop_prob(model, value)
    assert rates(model) == [0.2, 0.2]


def test_the_largest_rate_of_a_method_holds_for_a_schedule():
    model = apply_rblock(Maps(), "stage", method="c-drop", input_size=(2, 4, 4))
    with pytest.raises(SettingError, match=r"at most 0.5 for method='c-drop'.*got 0.6"):
        DropSchedule(model, 0.0, 0.6, 10)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"block_size": 4}, "apply_rblock: block_size must be an odd positive integer, got 4"),
        ({"block_size": np.int64(0)}, "block_size must be an odd positive integer, got 0"),
        ({"block_size": 3.0}, "block_size must be an odd positive integer, got 3.0"),
        ({"block_size": True}, "block_size must be an odd positive integer, got True"),
        ({"drop_prob": 20.0}, r"apply_rblock: drop_prob must be in \[0, 1\), got 20.0 \(did you mean 0.2\?\)"),
        ({"method": "bdropdm"}, r"method must be one of bdropdml, .*got 'bdropdm' \(did you mean 'bdropdml'\?\)"),
        ({"calibration": None}, "calibration must be one of exact, eq6, eq7, got None"),
        ({"batch_norm": "split"}, "batch_norm must be one of joint, per_submodel, got 'split'"),
    ],
)
def test_bad_settings_are_rejected(settings, message):
    with pytest.raises(SettingError, match=message):
        apply_rblock(Maps(), "stage", input_size=(2, 4, 4), **settings)


def test_numpy_numbers_are_accepted():
    model = apply_rblock(Maps(), "stage", drop_prob=np.float32(0.25), block_size=np.int64(5), input_size=(2, 9, 9))
    assert (model.rblock.stage.drop_prob, model.rblock.stage.block_size) == (0.25, 5)


def test_the_new_rate_is_the_realised_rate():
    model = apply_rblock(Maps(), "stage", method="dropblock", drop_prob=0.1, input_size=(4, 9, 9)).train()
    set_drop_prob(model, 0.5)
    dropped = (model(torch.ones(2000, 4, 9, 9)) == 0).flatten(1).double().mean(1)
    assert abs(dropped.mean().item() - 0.5) < 4 * dropped.std().item() / 2000**0.5
