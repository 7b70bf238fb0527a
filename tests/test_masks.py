import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from rblock_fx import apply_rblock, set_drop_prob, split_pair
from rblock_fx.masks.coverage import coverage
from rblock_fx.masks.functional import _Mask
from rblock_fx.masks.methods import METHODS, Mask
from tests.oracles import Maps, opened

pytestmark = pytest.mark.filterwarnings("error:An output with one or more elements was resized")

ISSUE_SHAPES = [((64, 32, 32), 3), ((16, 7, 7), 7), ((8, 4, 4), 3), ((8, 3, 5), 3), ((8, 1, 1), 3)]
COMPLEMENTARY = ["bdropdml", "sdropdml", "c-dropblock"]
NORMALISED = [*COMPLEMENTARY, "r-dropblock", "r-spatialdropout", "dropblock", "spatialdropout"]
UNITS = ["dropout", "r-drop", "c-drop"]

spatial = st.lists(st.integers(1, 8), min_size=1, max_size=3).map(tuple)
rates = st.floats(0, 0.95)
block_sizes = st.sampled_from([1, 3, 5, 7])
seeds = st.integers(0, 2**31)


def draw_masks(method, shape, drop_prob, block_size=3, rows=8, seed=0, **options):
    """The masks of both sub-models (or of the one), each (rows, C, *S)."""
    model = apply_rblock(
        Maps(), "stage", method=method, drop_prob=drop_prob, block_size=block_size, input_size=shape, **options
    ).train()
    torch.manual_seed(seed)
    output = model(torch.ones(rows, *shape))
    return split_pair(output) if METHODS[method].parts == 2 else (output,)


def test_every_method_is_in_a_group_tested_here():
    assert sorted(NORMALISED + UNITS) == sorted(METHODS)


@given(spatial, st.integers(1, 9), rates, block_sizes, seeds, st.sampled_from(COMPLEMENTARY))
def test_the_two_dropped_sets_are_disjoint(size, channels, drop_prob, block_size, seed, method):
    first, second = draw_masks(method, (channels, *size), drop_prob, block_size, seed=seed)
    # A sample that keeps nothing is all zero, dropped or not; of a kept sample zeros are the dropped ones.
    assert not ((first == 0) & (second == 0)).any()


@given(st.integers(1, 9), st.floats(0, 0.5), seeds)
def test_c_drop_is_disjoint(channels, drop_prob, seed):
    first, second = draw_masks("c-drop", (channels, 3, 3), drop_prob, seed=seed)
    assert not ((first == 0) & (second == 0)).any()


@given(spatial, st.integers(1, 9), rates, block_sizes, seeds)
def test_bdropdml_drops_one_block_mask_on_every_channel(size, channels, drop_prob, block_size, seed):
    first, second = draw_masks("bdropdml", (channels, *size), drop_prob, block_size, seed=seed)
    union = (first == 0) | (second == 0)
    assert (union == union[:, :1]).all()
    # Each channel belongs to one sub-model: the other drops nothing in it.
    touched = torch.stack([(half == 0).flatten(2).any(2) for half in (first, second)])
    assert (touched.sum(0) <= 1).all()
    for sample in union[:, 0].numpy():
        assert (opened(sample, block_size) == sample).all()


@given(spatial, st.integers(1, 9), rates, block_sizes, seeds)
def test_sdropdml_drops_whole_channels_between_the_two(size, channels, drop_prob, block_size, seed):
    first, second = draw_masks("sdropdml", (channels, *size), drop_prob, block_size, seed=seed)
    union = ((first == 0) | (second == 0)).flatten(2)
    assert (union.all(2) == union.any(2)).all()


def test_sdropdml_drops_blocks_in_1_and_the_rest_in_2():
    first, second = draw_masks("sdropdml", (1, 12, 12), 0.9, rows=64)
    split = [n for n in range(64) if (first[n] == 0).any() and (second[n] == 0).any()]
    assert len(split) > 40
    blocks = [opened((first[n, 0] == 0).numpy(), 3) for n in split]
    assert all((block == (first[n, 0] == 0).numpy()).all() for block, n in zip(blocks, split, strict=True))
    # A complement of blocks is in general no union of blocks: swapped halves would show here.
    rest = [(opened((second[n, 0] == 0).numpy(), 3) == (second[n, 0] == 0).numpy()).all() for n in split]
    assert not all(rest)


@given(spatial, st.integers(1, 9), rates, block_sizes, seeds)
def test_c_dropblock_drops_whole_channels_within_blocks(size, channels, drop_prob, block_size, seed):
    first, second = draw_masks("c-dropblock", (channels, *size), drop_prob, block_size, seed=seed)
    for half in (first, second):
        assert ((half == 0) == (half == 0)[:, :1]).all()
    for sample in ((first == 0) | (second == 0))[:, 0].numpy():
        assert (opened(sample, block_size) == sample).all()


@given(spatial, st.integers(1, 9), rates, block_sizes, seeds, st.sampled_from(NORMALISED))
def test_each_sample_is_normalised_on_its_own(size, channels, drop_prob, block_size, seed, method):
    for half in draw_masks(method, (channels, *size), drop_prob, block_size, seed=seed):
        samples = half.flatten(1)
        assert torch.isfinite(samples).all()
        kept = samples[(samples != 0).any(1)]
        torch.testing.assert_close(kept.mean(1), torch.ones(len(kept)), rtol=1e-5, atol=0)
        for sample in kept:
            assert len(sample[sample != 0].unique()) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_sample_that_keeps_nothing_is_zero(dtype):
    model = apply_rblock(Maps(), "stage", method="dropblock", drop_prob=0.9, input_size=(300, 1, 1)).train()
    output = model(torch.ones(200, 300, 1, 1, dtype=dtype))
    empty = (output == 0).flatten(1).all(1)
    assert empty.sum() > 100
    assert not empty.all()
    assert torch.isfinite(output).all()


@pytest.mark.parametrize("method", UNITS)
def test_unit_dropout_scales_by_the_keep_probability(method):
    for half in draw_masks(method, (16, 5, 5), 0.4):
        assert half.unique().tolist() == pytest.approx([0, 1 / 0.6])


def test_c_drop_at_one_half_is_exactly_complementary():
    first, second = draw_masks("c-drop", (16, 5, 5), 0.5)
    assert ((first == 0) ^ (second == 0)).all()


@pytest.mark.parametrize("method", ["r-drop", "r-spatialdropout", "r-dropblock"])
def test_the_two_draws_of_r_methods_are_independent(method):
    first, second = draw_masks(method, (8, 1, 1), 0.3, rows=20000)
    # (sample, channel) pairs are independent but for r-dropblock, where the channels of a sample agree.
    pairs = [(half == 0)[:, : 1 if method == "r-dropblock" else 8].flatten().float() for half in (first, second)]
    both = (pairs[0] * pairs[1]).mean().item()
    n = len(pairs[0])
    assert abs(both - 0.09) < 4 * (0.09 * 0.91 / n) ** 0.5


@pytest.mark.parametrize(("shape", "block_size"), ISSUE_SHAPES)
@pytest.mark.parametrize("drop_prob", [0.05, 0.2, 0.6])
@pytest.mark.parametrize("method", [m for m in METHODS if m != "c-drop"])
def test_the_realised_rate_is_the_requested_rate(shape, block_size, drop_prob, method):
    share = drop_prob / 2 if method in COMPLEMENTARY else drop_prob
    for half in draw_masks(method, shape, drop_prob, block_size, rows=600):
        dropped = (half == 0).flatten(1).double().mean(1)
        error = dropped.std().item() / len(dropped) ** 0.5
        assert abs(dropped.mean().item() - share) < 4 * error


@pytest.mark.parametrize("calibration", ["eq6", "eq7"])
def test_the_papers_calibrations_set_gamma(calibration):
    shape, block_size, drop_prob = (4, 14, 14), 7, 0.1
    model = apply_rblock(
        Maps(), "stage", drop_prob=drop_prob, block_size=block_size, calibration=calibration, input_size=shape
    )
    b, m, n = block_size, *shape[1:]
    gamma = {"eq6": drop_prob / b**2, "eq7": m * n * drop_prob / (b**2 * (m - b + 1) * (n - b + 1))}[calibration]
    assert model.rblock.stage.gamma.item() == pytest.approx(gamma)
    first, second = split_pair(model.train()(torch.ones(4000, *shape)))
    covered = ((first == 0) | (second == 0)).flatten(1).double().mean(1)
    assert abs(covered.mean().item() - coverage(gamma, shape[1:], block_size)) < 4 * covered.std().item() / 4000**0.5


@pytest.mark.parametrize("method", ["bdropdml", "sdropdml", "dropblock"])
def test_other_map_sizes_get_the_requested_rate(method):
    model = apply_rblock(Maps(), "stage", method=method, drop_prob=0.3, block_size=5, input_size=(8, 16, 16)).train()
    output = model(torch.ones(1000, 8, 4, 6))
    expected = 0.3 if method == "dropblock" else 0.15
    dropped = (output == 0).flatten(1).double().mean(1)
    assert abs(dropped.mean().item() - expected) < 4 * dropped.std().item() / len(dropped) ** 0.5


@pytest.mark.parametrize("method", METHODS)
def test_nothing_is_dropped_at_rate_zero(method):
    for half in draw_masks(method, (4, 5, 5), 0.0):
        assert (half == 1).all()


@pytest.mark.parametrize("method", METHODS)
def test_masks_come_from_torchs_default_generator_alone(method):
    drop_prob = 0.3
    once, again, other = (draw_masks(method, (16, 9, 9), drop_prob, seed=seed) for seed in (3, 3, 4))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(once, other, strict=True))
    state = np.random.get_state()[1].copy()
    draw_masks(method, (16, 9, 9), drop_prob)
    assert (np.random.get_state()[1] == state).all()


@pytest.mark.parametrize("method", METHODS)
def test_samples_differ(method):
    for half in draw_masks(method, (16, 9, 9), 0.4):
        assert len({sample.numpy().tobytes() for sample in half == 0}) > 4


def test_gamma_is_a_zero_dim_buffer_outside_checkpoints():
    model = apply_rblock(Maps(), "stage", input_size=(8, 9, 9))
    mask = model.rblock.stage
    assert isinstance(mask, Mask)
    assert dict(mask.named_buffers())["gamma"].shape == ()
    assert "gamma" not in str(list(model.state_dict()))
    before = mask.gamma
    set_drop_prob(model, 0.5)
    assert mask.gamma is before
    assert coverage(mask.gamma.item(), (9, 9), 3) == pytest.approx(0.5, abs=1e-6)


@pytest.mark.parametrize("convert", [torch.nn.Module.half, torch.nn.Module.bfloat16, torch.nn.Module.double])
def test_gamma_stays_float32_when_the_model_is_cast(convert):
    model = apply_rblock(Maps(), "stage", drop_prob=0.1, input_size=(8, 9, 9))
    before = model.rblock.stage.gamma.item()
    convert(model)
    assert model.rblock.stage.gamma.dtype == torch.float32
    assert model.rblock.stage.gamma.item() == before


def test_print_shows_every_hyperparameter():
    model = apply_rblock(Maps(), "stage", drop_prob=0.25, block_size=5, calibration="eq6", input_size=(8, 9, 9))
    text = repr(model)
    for part in ["BDropDML", "drop_prob=0.25", "block_size=5", "calibration='eq6'", "gamma=0.01", "shape=(8, 9, 9)"]:
        assert part in text


def test_gamma_is_float32_under_another_default_dtype():
    torch.set_default_dtype(torch.float64)
    try:
        model = apply_rblock(Maps(), "stage", input_size=(8, 9, 9)).train()
        output = model(torch.ones(4, 8, 9, 9, dtype=torch.float32))
    finally:
        torch.set_default_dtype(torch.float32)
    assert model.rblock.stage.gamma.dtype == torch.float32
    assert output.dtype == torch.float32


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rows", [1, 64])
def test_masks_do_not_wait_for_the_device(method, rows):
    """On a GPU that would wait for everything before it; a fake tensor raises where its value is asked for."""
    kind = METHODS[method]
    with FakeTensorMode():
        mask = kind(0.2, 3, "exact", (64, 9, 9), 1, forks=kind.parts == 2)
        mask.rate, mask.gamma = torch.empty((), device="cuda"), torch.empty((), device="cuda")
        x = torch.empty(rows, 64, 9, 9, device="cuda")
        masked = mask(x)
        factors = mask.draw(x)
        scale = mask.scale(*factors).expand(kind.parts, rows, 1, 1, 1)
        joined = _Mask.apply(masked, *factors, scale, "join")
        assert masked.shape == (kind.parts * rows, 64, 9, 9)
        assert joined.shape == x.shape
        assert masked.device == joined.device == torch.device("cuda", 0)
        with pytest.raises(DataDependentOutputException):
            masked.sum().item()


def brute_force_fit(mask, samples=8000):
    """The shares of samples that lose nothing and everything, counted in the masked ones."""
    torch.manual_seed(7)
    lost = (mask(torch.ones(samples, *mask.shape)) == 0).flatten(1)
    return (~lost.any(1)).double().mean().item(), lost.all(1).double().mean().item()


FIT_CASES = [((2, 2, 2), 3, 0.1), ((2, 7, 7), 7, 0.1), ((1, 3, 5), 3, 0.4), ((1, 4, 4), 1, 0.02), ((2, 9), 5, 0.3)]


@pytest.mark.parametrize(("shape", "block_size", "drop_prob"), FIT_CASES)
@pytest.mark.parametrize("method", METHODS)
def test_fit_shares_are_those_counted(method, shape, block_size, drop_prob):
    mask = METHODS[method](drop_prob, block_size, "exact", shape, 1, forks=True)
    for estimate, counted in zip(mask.fit_shares(), brute_force_fit(mask), strict=True):
        # At least 4096 samples each; those of a pair are not independent.
        assert abs(estimate - counted) < 4 * (2 * counted * (1 - counted) / 4096) ** 0.5 + 1e-3


def test_small_maps_lose_whole_samples():
    nothing, everything = METHODS["dropblock"](0.1, 3, "exact", (8, 2, 2), 1, forks=False).fit_shares()
    assert (nothing, everything) == (pytest.approx(0.9, abs=0.02), pytest.approx(0.1, abs=0.02))


@pytest.mark.parametrize("method", ["dropblock", "bdropdml", "dropout"])
def test_fit_shares_leaves_the_random_state(method):
    with torch.device("meta"):
        mask = METHODS[method](0.2, 3, "exact", (8, 9, 9), 1, forks=True)
        before = torch.get_rng_state()
        assert mask.fit_shares() == mask.to("meta").fit_shares()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("shape", "axis", "covers"), [((8, 7, 7), 1, True), ((8, 7, 8), 1, False), ((5, 6, 8), -1, True)]
)
def test_covers_map_compares_the_block_with_every_side(shape, axis, covers):
    assert METHODS["dropblock"](0.1, 7, "exact", shape, axis, forks=True).covers_map is covers
    assert not METHODS["dropout"](0.1, 7, "exact", shape, axis, forks=True).covers_map


def test_a_mask_built_under_meta_has_its_gamma():
    with torch.device("meta"):
        mask = METHODS["bdropdml"](0.2, 3, "exact", (8, 9, 9), 1, forks=True, place=2)
    assert mask.gamma.device.type == "cpu"
    assert coverage(mask.gamma.item(), (9, 9), 3) == pytest.approx(0.2, abs=1e-6)
    assert mask.place == 2
    assert "place=2" in repr(mask)
    assert mask.to("meta").gamma.is_meta
    restored = mask.to_empty(device="cpu")
    assert coverage(restored.gamma.item(), (9, 9), 3) == pytest.approx(0.2, abs=1e-6)
