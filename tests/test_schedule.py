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


def test_one_rate_or_one_per_site_in_the_users_order():
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
def test_the_rate_is_linear_in_the_step_and_stays_at_the_end(start, end, total, steps):
    model = apply_rblock(Maps(), "stage", input_size=(2, 4, 4))
    schedule = DropSchedule(model, start, end, total)
    assert rates(model) == [pytest.approx(start)]
    for _ in range(steps):
        schedule.step()
    expected = end if steps >= total else start + (end - start) * steps / total
    assert rates(model) == [pytest.approx(expected, abs=1e-12)]


def test_a_schedule_goes_on_from_its_state(model):
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


def test_a_state_that_is_none_is_refused(model):
    schedule = DropSchedule(model, 0.0, 0.2, 8)
    with pytest.raises(SettingError, match=r"lacks \['start', 'end', 'total_steps', 'steps_done'\]"):
        schedule.load_state_dict({})
    assert schedule.steps_done == 0


def test_numpy_numbers_are_numbers():
    model = apply_rblock(Maps(), "stage", drop_prob=np.float32(0.25), block_size=np.int64(5), input_size=(2, 9, 9))
    assert (model.rblock.stage.drop_prob, model.rblock.stage.block_size) == (0.25, 5)


def test_the_rate_that_is_set_is_the_rate_that_happens():
    model = apply_rblock(Maps(), "stage", method="dropblock", drop_prob=0.1, input_size=(4, 9, 9)).train()
    set_drop_prob(model, 0.5)
    dropped = (model(torch.ones(2000, 4, 9, 9)) == 0).flatten(1).double().mean(1)
    assert abs(dropped.mean().item() - 0.5) < 4 * dropped.std().item() / 2000**0.5
