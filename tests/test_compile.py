"""torch.compile on a converted model: how many graphs, and whether the masks in them are right."""

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from rblock_fx import apply_rblock, set_drop_prob, split_pair
from tests.oracles import Maps

BACKENDS = ["eager", "aot_eager", "inductor"]


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class ConvNet(nn.Module):
    """A small residual network with batch norms, one stage inside another module."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.body = nn.Sequential(
            nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
            nn.Sequential(nn.Conv2d(8, 12, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU()),
        )
        self.skip = nn.Conv2d(8, 12, 1, stride=2)
        self.fc = nn.Linear(12, 5)

    def forward(self, x):
        x = self.stem(x)
        x = self.body(x) + self.skip(x)
        return self.fc(x.mean((2, 3)))


def compile_counted(model, backend, **options):
    """Compile as a whole, with a backend that counts the graphs it is given."""
    counter = CompileCounterWithBackend(backend)
    return torch.compile(model, backend=counter, fullgraph=True, **options), counter


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", ["bdropdml", "sdropdml", "c-dropblock"])
def test_two_graphs_serve_twenty_rates(backend, method):
    model = apply_rblock(Maps(), "stage", method=method, input_size=(16, 9, 9)).train()
    compiled, counter = compile_counted(model, backend)
    ones = torch.ones(32, 16, 9, 9)
    rates = torch.linspace(0, 0.6, 20).tolist()
    dropped = []
    for drop_prob in rates:
        set_drop_prob(model, drop_prob)
        first, second = split_pair(compiled(ones))
        assert not ((first == 0) & (second == 0)).any()
        union = (first == 0) | (second == 0)
        if method == "sdropdml":  # every split channel is dropped whole, by the two together
            assert torch.equal(union.flatten(2).any(2), union.flatten(2).all(2))
        else:  # the union is a map of blocks, the same for every channel
            assert torch.equal(union, union[:, :1].expand_as(union))
        means = torch.cat((first, second)).flatten(1).mean(1)
        torch.testing.assert_close(means, torch.ones(64))
        dropped.append(union.double().mean().item())
    assert counter.frame_count == 1

    # The rates were in force, and not those of the first graph.
    assert dropped[0] == 0
    assert sum(dropped) / sum(rates) == pytest.approx(1, abs=0.1)

    with torch.no_grad():
        for drop_prob in rates:
            set_drop_prob(model, drop_prob)
            assert torch.equal(compiled.eval()(ones), ones)
    assert compiled.train()(ones).shape == (64, 16, 9, 9)
    assert counter.frame_count == 2


@pytest.mark.parametrize(
    ("backend", "batch_norm"),
    [
        ("eager", "joint"),
        ("eager", "per_submodel"),
        ("aot_eager", "joint"),
        ("aot_eager", "per_submodel"),
        ("inductor", "per_submodel"),  # slow; the one that has more to it
    ],
)
def test_compiled_step_is_the_eager_one(backend, batch_norm):
    eager = apply_rblock(ConvNet().train(), ["body.0", "body"], batch_norm=batch_norm, input_size=(3, 12, 12))
    model = copy.deepcopy(eager)
    compiled, counter = compile_counted(model, backend)
    x, weight = torch.randn(5, 3, 12, 12), torch.randn(10, 5)
    # Otherwise inductor draws its random numbers in an order of its own.
    with torch._inductor.config.patch(fallback_random=True):
        for step in range(3):
            outputs = []
            for run in (eager, compiled):
                torch.manual_seed(step)
                outputs.append(run(x))
                (outputs[-1] * weight).sum().backward()
            torch.testing.assert_close(outputs[1], outputs[0])
            first, second = split_pair(outputs[1])
            assert not torch.equal(first, second)
    assert counter.frame_count == 1
    for (name, got), want in zip(model.named_parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(got.grad, want.grad, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: name + text)
    for got, want in zip(model.buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(got, want)

    with torch.no_grad():
        plain = ConvNet().eval()
        plain.load_state_dict(model.state_dict())
        torch.testing.assert_close(compiled.eval()(x), plain(x))
    assert counter.frame_count == 2


@pytest.mark.parametrize(
    ("backend", "how"),
    [
        ("eager", "marked"),
        ("eager", "dynamic"),
        ("aot_eager", "marked"),
        ("inductor", "marked"),
    ],
)
def test_one_graph_serves_every_batch_size(backend, how):
    model = apply_rblock(Maps(), "stage", input_size=(16, 9, 9)).train()
    compiled, counter = compile_counted(model, backend, **({"dynamic": True} if how == "dynamic" else {}))

    def batch(rows):
        ones = torch.ones(rows, 16, 9, 9)
        if how == "marked":
            torch._dynamo.mark_dynamic(ones, 0)
        return ones

    for rows in (4, 6, 10, 5, 7, 64):
        first, second = split_pair(compiled(batch(rows)))
        assert first.shape == (rows, 16, 9, 9)
        assert not ((first == 0) & (second == 0)).any()
        assert not torch.equal(first, second)
    assert counter.frame_count == 1
    with torch.no_grad():
        for rows in (4, 6, 10, 5, 7):
            assert torch.equal(compiled.eval()(batch(rows)), torch.ones(rows, 16, 9, 9))
    assert counter.frame_count == 2


def test_unmarked_batch_sizes_take_two_graphs():
    """One for the first size, one for all others: torch's automatic dynamic shapes."""
    compiled, counter = compile_counted(apply_rblock(Maps(), "stage", input_size=(16, 9, 9)).train(), "eager")
    for rows in (4, 6, 10, 5, 7):
        assert compiled(torch.ones(rows, 16, 9, 9)).shape == (2 * rows, 16, 9, 9)
    assert counter.frame_count == 2


@pytest.mark.parametrize("batches", [(4, 6, 10), (16, 17, 33)])
def test_takes_no_more_graphs_than_the_plain_network(batches):
    """On a CPU torch guards some convolutions on whether they have 16 rows, whatever the network."""
    doubled = [2 * rows for rows in batches]
    graphs = {}
    for name, model, sizes in (
        ("plain", ConvNet(), doubled),
        ("converted", apply_rblock(ConvNet(), ["body.0", "body"], input_size=(3, 12, 12)), batches),
    ):
        compiled, counter = compile_counted(model.train(), "eager")
        for rows in sizes:
            x = torch.randn(rows, 3, 12, 12)
            torch._dynamo.mark_dynamic(x, 0)
            output = compiled(x)
            output.sum().backward()
            assert len(output) == doubled[sizes.index(rows)]
        graphs[name] = counter.frame_count
    assert graphs["converted"] <= graphs["plain"]


@pytest.mark.parametrize("calibration", ["exact", "eq6"])
def test_compiled_training_keeps_the_rate_on_other_sizes(calibration):
    model = apply_rblock(Maps(), "stage", method="dropblock", calibration=calibration, input_size=(16, 9, 9)).train()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    compiled(torch.ones(2, 16, 9, 9))
    for drop_prob in (0.1, 0.4):
        set_drop_prob(model, drop_prob)
        both = []
        for run in (model, compiled):
            dropped = (run(torch.ones(2000, 16, 6, 4)) == 0).flatten(1).double().mean(1)
            both.append((dropped.mean().item(), dropped.var().item() / 2000))
        assert abs(both[0][0] - both[1][0]) < 4 * (both[0][1] + both[1][1]) ** 0.5


@pytest.mark.parametrize("backend", BACKENDS)
def test_masks_compiled_alone_make_a_graph_per_shape(backend):
    torch.manual_seed(0)
    model = apply_rblock(ConvNet(), ["stem", "body.0", "body.1"], input_size=(3, 16, 16)).train()
    counter = CompileCounterWithBackend(backend)
    model.rblock.compile(backend=counter, fullgraph=True)
    images = torch.randn(8, 3, 16, 16)
    for drop_prob in torch.linspace(0, 0.6, 100).tolist():
        set_drop_prob(model, drop_prob)
        model(images).sum().backward()
    assert counter.frame_count == 3
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    # The network around the masks is not compiled, and a copy has masks that are not.
    assert model._compiled_call_impl is None
    assert all(mask._compiled_call_impl is None for mask in copy.deepcopy(model).rblock.children())


def test_masks_compiled_alone_are_complementary():
    model = apply_rblock(Maps(), "stage", drop_prob=0.5, input_size=(16, 9, 9)).train()
    model.rblock.compile(fullgraph=True)
    first, second = split_pair(model(torch.ones(32, 16, 9, 9)))
    assert not ((first == 0) & (second == 0)).any()
    assert ((first == 0) | (second == 0)).float().mean() == pytest.approx(0.5, abs=0.05)
