"""What a converted model saves, the plain one loads, and the other way round: weights and optimizer states."""

import copy

import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F

from rblock_fx import RBlockLoss, apply_rblock, split_pair

NAMES = ["test_resnet", "test_efficientnet", "test_byobnet", "test_convnext"]


def build(name="test_resnet", seed=0, **options):
    torch.manual_seed(seed)
    return timm.create_model(name, num_classes=5, **options)


def trained(name="test_resnet", steps=2):
    """A converted model whose weights and statistics are no longer those it was built with."""
    model = apply_rblock(build(name), batch_norm="per_submodel", input_size=(3, 64, 64)).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(4, 3, 64, 64)).square().mean().backward()
        optimizer.step()
    return model


def assert_same_network(first, second):
    x = torch.randn(3, 3, 64, 64)
    assert torch.equal(first.eval()(x), second.eval()(x))


@pytest.mark.parametrize("name", NAMES)
def test_state_dicts_load_strictly_both_ways(name):
    model, plain = trained(name), build(name, seed=1)
    assert list(model.state_dict()) == list(plain.state_dict())
    fresh = apply_rblock(copy.deepcopy(plain), input_size=(3, 64, 64))
    assert not torch.equal(plain.eval()(torch.ones(1, 3, 64, 64)), model.eval()(torch.ones(1, 3, 64, 64)))
    plain.load_state_dict(model.state_dict(), strict=True)
    assert_same_network(plain, model)
    fresh.load_state_dict(plain.state_dict(), strict=True)
    assert_same_network(fresh, plain)
    first, second = split_pair(fresh.train()(torch.randn(4, 3, 64, 64)))
    assert not torch.equal(first, second)


def test_a_safetensors_file_goes_both_ways(tmp_path):
    model, plain = trained(), build(seed=1)
    safetensors.torch.save_model(model, tmp_path / "model.safetensors")
    assert safetensors.torch.load_model(plain, tmp_path / "model.safetensors", strict=True) == (set(), [])
    assert_same_network(plain, model)
    with safetensors.safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(plain.state_dict())

    again = apply_rblock(build(seed=2))
    safetensors.torch.save_model(plain, tmp_path / "plain.safetensors")
    assert safetensors.torch.load_model(again, tmp_path / "plain.safetensors", strict=True) == (set(), [])
    assert_same_network(again, plain)


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_timm_loads_a_checkpoint_into_the_plain_model(suffix, tmp_path):
    model, path = trained(), tmp_path / f"model.{suffix}"
    if suffix == "pth":
        torch.save({"state_dict": model.state_dict(), "epoch": 1}, path)
    else:
        safetensors.torch.save_file(model.state_dict(), path)
    plain = build(seed=1, checkpoint_path=str(path))
    assert type(plain) is timm.models.resnet.ResNet
    assert_same_network(plain, model)


OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, eps=1e-3),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_state_of_a_plain_run_resumes(name, tmp_path):
    plain = build().train()
    optimizer = OPTIMIZERS[name](plain.parameters())

    def step(model, optimizer, criterion, seed):
        generator = torch.Generator().manual_seed(seed)
        x, labels = torch.randn(8, 3, 64, 64, generator=generator), torch.arange(8) % 5
        optimizer.zero_grad()
        criterion(model(x), labels).backward()
        optimizer.step()

    for seed in range(3):
        step(plain, optimizer, F.cross_entropy, seed)
    torch.save({"model": plain.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "plain.pt")

    # Where nothing is dropped, the mean over both sub-models is the plain criterion, and so is the step.
    results = {}
    for resumed in (True, False):
        model = apply_rblock(build(seed=1), drop_prob=0.0, input_size=(3, 64, 64)).train()
        assert [key for key, _ in model.named_parameters()] == [key for key, _ in plain.named_parameters()]
        own = OPTIMIZERS[name](model.parameters())
        saved = torch.load(tmp_path / "plain.pt")
        model.load_state_dict(saved["model"])
        if resumed:
            own.load_state_dict(saved["optimizer"])
        for seed in (3, 4):
            step(model, own, RBlockLoss(alpha=0.0, combine="mean"), seed)
        results[resumed] = dict(model.named_parameters())
    for seed in (3, 4):
        step(plain, optimizer, F.cross_entropy, seed)
    away = 0.0
    for key, want in plain.named_parameters():
        torch.testing.assert_close(results[True][key], want, rtol=1e-3, atol=1e-4, msg=lambda text, key=key: key + text)
        away = max(away, (results[False][key] - want).abs().max().item())
    assert away > 0.01  # a state that is not resumed shows
