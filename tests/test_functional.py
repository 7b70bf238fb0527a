import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rblock_fx import apply_rblock
from rblock_fx.masks.functional import _mask_in_one_expression, dilate, fork_and_mask, kept_scale, mask_parts
from rblock_fx.masks.methods import BDropDML
from tests.oracles import Maps, recorded_masks

seeds = st.integers(0, 2**31)
layouts = st.sampled_from(["channels outside", "channels inside", "gaps"])

# float32 sums of two terms that may cancel, against float64.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def factors(seed, parts_channel, parts_spatial, rows, channels, size):
    generator = torch.Generator().manual_seed(seed)
    ones = [1] * len(size)
    channel = torch.rand((parts_channel, rows, channels, *ones), generator=generator) < 0.5
    spatial = torch.rand((parts_spatial, rows, 1, *size), generator=generator) < 0.3
    scale = kept_scale(channel, spatial).expand(2, rows, 1, *ones)
    return channel, spatial, scale


def dense(channel, spatial, scale):
    """The masks as tensors of (2N, C, *S), element by element as section 3 writes them."""
    return ((1 - channel.double() * spatial.double()) * scale.double()).flatten(0, 1)


def laid_out(shape, layout, seed):
    """Random numbers of (N, C, *S): in that order in memory, with the channels innermost, or with gaps."""
    generator = torch.Generator().manual_seed(seed)
    if layout == "channels inside":
        return torch.randn((shape[0], *shape[2:], shape[1]), generator=generator).movedim(-1, 1).requires_grad_()
    if layout == "gaps":
        return torch.randn((*shape, 2), generator=generator)[..., 0].requires_grad_()
    return torch.randn(shape, generator=generator).requires_grad_()


cases = st.tuples(
    seeds,
    st.sampled_from([(2, 1), (1, 2), (2, 2), (1, 1)]),
    st.integers(1, 5),
    st.integers(1, 6),
    st.lists(st.integers(1, 6), min_size=1, max_size=3),
    layouts,
    st.sampled_from([fork_and_mask, mask_parts]),
)


def check_against_dense(operation, function, x, channel, spatial, scale, seed):
    """Output and gradient, of first order, against masks multiplied out in float64."""
    masks = dense(channel, spatial, scale)
    output = function(x, channel, spatial, scale)
    rows = scale.shape[1]
    wide = torch.cat((x, x)) if operation is fork_and_mask else x
    torch.testing.assert_close(output.double(), wide.double() * masks)
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(seed + 1))
    (gradient,) = torch.autograd.grad((output * weight).sum(), x)
    expected = weight.double() * masks
    if operation is fork_and_mask:
        expected = expected.unflatten(0, (2, rows)).sum(0)
    torch.testing.assert_close(gradient.double(), expected, **CLOSE)


@given(cases)
def test_each_part_is_multiplied_by_its_mask(case):
    seed, parts, rows, channels, size, layout, operation = case
    x = laid_out((rows if operation is fork_and_mask else 2 * rows, channels, *size), layout, seed)
    check_against_dense(operation, operation, x, *factors(seed, *parts, rows, channels, size), seed)


@given(cases)
def test_the_compiled_expression_is_the_same_operation(case):
    seed, parts, rows, channels, size, layout, operation = case
    x = laid_out((rows if operation is fork_and_mask else 2 * rows, channels, *size), layout, seed)
    name = "fork" if operation is fork_and_mask else "keep"

    def expression(x, *all_factors):
        return _mask_in_one_expression(x, *all_factors, name)

    check_against_dense(operation, expression, x, *factors(seed, *parts, rows, channels, size), seed)


@given(seeds, st.integers(1, 4), st.integers(1, 5), st.lists(st.integers(1, 4), max_size=2), st.booleans())
def test_activations_dropped_one_by_one(seed, rows, channels, size, channels_inside):
    generator = torch.Generator().manual_seed(seed)
    dropped = torch.rand((2, rows, channels, *size), generator=generator) < 0.4
    everywhere = torch.ones((1, rows, 1, *(1 for _ in size)), dtype=torch.bool)
    scale = torch.full((2, rows, 1, *(1 for _ in size)), 1.25)
    x = laid_out((rows, channels, *size), "channels inside" if channels_inside else "", seed)
    check_against_dense(fork_and_mask, fork_and_mask, x, dropped, everywhere, scale, seed)


@pytest.mark.parametrize("operation", [fork_and_mask, mask_parts])
def test_gradients_of_first_and_second_order(operation):
    rows = 2
    channel, spatial, scale = factors(5, 2, 1, rows, 3, [4, 4])
    x = torch.randn(rows if operation is fork_and_mask else 2 * rows, 3, 4, 4, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: operation(x, channel, spatial, scale.double()), (x,))
    assert torch.autograd.gradgradcheck(lambda x: operation(x, channel, spatial, scale.double()), (x,))


@pytest.mark.parametrize("operation", [fork_and_mask, mask_parts])
def test_torch_func_differentiates_and_maps_over_a_mask(operation):
    rows = 2
    all_factors = factors(5, 2, 1, rows, 3, [4, 4])
    x = torch.randn(5, rows if operation is fork_and_mask else 2 * rows, 3, 4, 4)

    def loss(x):
        return operation(x, *all_factors).square().sum()

    expected = torch.stack([torch.autograd.functional.jacobian(loss, batch) for batch in x])
    torch.testing.assert_close(torch.func.grad(loss)(x[0]), expected[0])
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(x), expected)


def test_torch_func_grad_works_through_a_converted_model():
    model = apply_rblock(Maps(), "stage", input_size=(16, 9, 9)).train()
    x = torch.randn(4, 16, 9, 9)
    gradients = []
    for differentiate in (torch.func.grad, lambda f: lambda x: torch.autograd.functional.jacobian(f, x)):
        torch.manual_seed(0)
        gradients.append(differentiate(lambda x: model(x).square().sum())(x))
    torch.testing.assert_close(*gradients)


def test_a_dropped_infinity_becomes_nan():
    channel, spatial, scale = factors(5, 2, 1, 2, 3, [4, 4])
    output = fork_and_mask(torch.full((2, 3, 4, 4), torch.inf), channel, spatial, scale)
    assert torch.equal(output.isnan(), (channel & spatial).flatten(0, 1))
    assert output[~output.isnan()].isposinf().all()


def test_the_gradient_of_ones_is_the_sum_of_the_masks():
    model = apply_rblock(Maps(), "stage", input_size=(16, 9, 9)).train()
    x = torch.ones(4, 16, 9, 9, requires_grad=True)
    with recorded_masks(model) as masks:
        model(x).sum().backward()
    torch.testing.assert_close(x.grad, masks["stage"].unflatten(0, (2, 4)).sum(0))


@pytest.mark.parametrize(("rows", "channels", "size"), [(0, 8, 5), (1, 8, 5), (3, 8, 5), (1500, 8, 5), (2, 24, 130)])
def test_chunks_make_no_difference(rows, channels, size):
    channel, spatial, scale = factors(1, 2, 1, rows, channels, [size, size])
    x = torch.randn(rows, channels, size, size)
    expected = torch.cat((x, x)).double() * dense(channel, spatial, scale)
    torch.testing.assert_close(fork_and_mask(x, channel, spatial, scale).double(), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_dtype_stays_and_is_rounded_once(dtype):
    channel, spatial, scale = factors(2, 1, 2, 4, 8, [5, 5])
    x = torch.randn(4, 8, 5, 5, dtype=dtype)
    output = fork_and_mask(x, channel, spatial, scale)
    assert output.dtype == dtype
    exact = torch.where(
        dense(channel, spatial, scale) == 0, 0.0, torch.cat((x, x)).double() * dense(channel, spatial, scale)
    )
    torch.testing.assert_close(output.double(), exact, rtol=torch.finfo(dtype).eps * 1.01, atol=1e-7)


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_the_memory_format_stays(memory_format):
    channel, spatial, scale = factors(3, 2, 1, 4, 8, [5, 5])
    x = torch.randn(4, 8, 5, 5).to(memory_format=memory_format).requires_grad_()
    output = fork_and_mask(x, channel, spatial, scale)
    assert output.is_contiguous(memory_format=memory_format)
    output.backward(torch.ones_like(output))
    torch.testing.assert_close(output.double(), torch.cat((x, x)).double() * dense(channel, spatial, scale))


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("forks", [True, False])
@pytest.mark.parametrize("channel_axis", [1, -1])
def test_the_output_may_be_changed_in_place(memory_format, forks, channel_axis):
    mask = BDropDML(0.2, 3, "exact", (8, 8, 8), channel_axis, forks=forks)
    x = torch.randn(4, 8, 8, 8).to(memory_format=memory_format).requires_grad_()
    gradients = []
    for change in (torch.relu_, torch.relu):
        torch.manual_seed(0)
        gradients += torch.autograd.grad(change(mask(x)).sum(), x)
    assert torch.equal(*gradients)


def test_backward_keeps_the_factors_and_no_mask():
    model = apply_rblock(Maps(), "stage", input_size=(32, 16, 16)).train()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        model(torch.ones(8, 32, 16, 16, requires_grad=True))
    assert saved
    assert max(saved) <= max(2 * 8 * 32, 8 * 16 * 16)


@given(st.sampled_from([1, 3, 5, 7]), st.lists(st.integers(1, 8), min_size=1, max_size=3), seeds)
def test_dilate_grows_each_centre_to_a_clipped_cube(block_size, size, seed):
    centres = torch.rand((2, 1, *size), generator=torch.Generator().manual_seed(seed)) < 0.1
    grown = dilate(centres, block_size)
    k = block_size // 2
    expected = torch.zeros_like(centres)
    for n, _, *position in centres.nonzero().tolist():
        expected[(n, 0, *(slice(max(i - k, 0), i + k + 1) for i in position))] = True
    assert torch.equal(grown, expected)


@given(seeds, st.integers(1, 3), st.integers(1, 5), st.lists(st.integers(1, 5), min_size=1, max_size=3), layouts)
def test_any_number_of_copies_forks_and_joins(seed, parts, channels, size, layout):
    generator = torch.Generator().manual_seed(seed)
    ones = [1] * len(size)
    channel = torch.rand((parts, 2, channels, *ones), generator=generator) < 0.5
    spatial = torch.rand((1, 2, 1, *size), generator=generator) < 0.3
    scale = 1 + torch.rand((parts, 2, 1, *ones), generator=generator)
    masks = dense(channel, spatial, scale)
    x = laid_out((2, channels, *size), layout, seed)
    output = fork_and_mask(x, channel, spatial, scale)
    torch.testing.assert_close(output.double(), torch.cat([x] * parts).double() * masks)
    (gradient,) = torch.autograd.grad(output.sum(), x)
    torch.testing.assert_close(gradient.double(), masks.unflatten(0, (parts, 2)).sum(0), **CLOSE)


@given(seeds, st.integers(1, 6), st.lists(st.integers(1, 6), min_size=1, max_size=3))
def test_kept_scale_is_one_over_the_kept_share(seed, channels, size):
    channel, spatial, _ = factors(seed, 2, 1, 4, channels, size)
    kept = 1 - (channel & spatial).flatten(2).double().mean(2)
    scale = kept_scale(channel, spatial).flatten(1).double()
    assert torch.isfinite(scale).all()
    torch.testing.assert_close(scale[kept > 0], 1 / kept[kept > 0], rtol=1e-6, atol=0)
