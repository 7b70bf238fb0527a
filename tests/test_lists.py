"""Stages that return a list or tuple of maps, as HRNet's do: each map that is used gets its own mask."""

import copy

import pytest
import timm
import torch
from torch import Tensor, nn

from rblock_fx import SiteError, apply_rblock, describe, list_sites, set_drop_prob, split_pair
from tests.oracles import recorded_masks, two_forwards


class Split(nn.Module):
    """Two resolutions; returns a list, or a tuple with tokens as its last item."""

    def __init__(self, kind: type) -> None:
        super().__init__()
        self.fine, self.coarse = nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 10, 3, stride=2, padding=1)
        self.kind = kind

    def forward(self, x: Tensor) -> list[Tensor] | tuple[Tensor, ...]:
        maps = [self.fine(x), self.coarse(x)]
        return maps if self.kind is list else (*maps, maps[1].flatten(2))


class Exchange(nn.Module):
    """Takes a list, writes into it as HRNet's modules do, and returns another."""

    def __init__(self) -> None:
        super().__init__()
        self.fine, self.coarse = nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(10, 10, 3, padding=1)
        self.up, self.down = nn.Conv2d(10, 6, 1), nn.Conv2d(6, 10, 3, stride=2, padding=1)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        maps[0] = self.fine(maps[0])
        maps[1] = self.coarse(maps[1])
        up = nn.functional.interpolate(self.up(maps[1]), scale_factor=2.0)
        return [maps[0] + up, maps[1] + self.down(maps[0])]


class Lists(nn.Module):
    """The list goes whole from stage to stage, and is taken apart in the end."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.split, self.exchange = Split(list), Exchange()
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.exchange(self.split(self.stem(x)))
        return self.fc(torch.cat([maps[-2].mean((2, 3)), maps[1].mean((2, 3))], 1))


class Tuples(nn.Module):
    """Unpacked, sliced and indexed; the first map is never used, the tokens are not masked."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.split = Split(tuple)
        self.fc = nn.Linear(30, 5)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.split(self.stem(x))
        _, coarse, tokens = maps
        rest = maps[1:]
        return self.fc(torch.cat([coarse.mean((2, 3)), tokens.mean(-1), rest[0].amax((2, 3))], 1))


@pytest.mark.parametrize(
    ("network", "sites", "masks"),
    [
        (Lists, ["split"], {"split": [0, 1]}),
        (Lists, ["exchange"], {"exchange": [0, 1]}),
        (Lists, ["split", "exchange"], {"split": [0, 1], "exchange": [0, 1]}),
        # The list is written into and made while the module is traced.
        (Lists, ["split", "exchange.fine"], {"split": [0, 1], "exchange.fine": None}),
        (Lists, ["stem", "exchange", "exchange.up"], {"stem": None, "exchange": [0, 1], "exchange.up": None}),
        (Tuples, ["split"], {"split": [0, 1]}),
        (Tuples, ["stem", "split"], {"split": [0, 1], "stem": None}),
        (Tuples, ["split.coarse"], {"split.coarse": None}),
    ],
)
def test_masks_each_map_of_a_list(network, sites, masks):
    torch.manual_seed(0)
    plain = network().train()
    model = apply_rblock(copy.deepcopy(plain), sites, drop_prob=0.5, input_size=(3, 8, 8))
    x = torch.randn(3, 3, 8, 8)
    with recorded_masks(model) as recorded:
        output = model(x)
    given = {
        path: recorded[path.replace(".", "_")]
        if places is None
        else {place: recorded[f"{path}_map{place}"] for place in places if f"{path}_map{place}" in recorded}
        for path, places in masks.items()
    }
    expected = two_forwards(plain, given, x)
    torch.testing.assert_close(output, expected)
    weight = torch.randn_like(output)
    (output * weight).sum().backward()
    (expected * weight).sum().backward()
    for trained, reference in zip(model.parameters(), plain.parameters(), strict=True):
        assert (trained.grad is None) == (reference.grad is None)
        if trained.grad is not None:
            torch.testing.assert_close(trained.grad, reference.grad)


def test_unused_map_has_no_mask():
    class OnlyTheLast(Tuples):
        def forward(self, x: Tensor) -> Tensor:
            _, coarse, tokens = self.split(self.stem(x))
            return self.fc(torch.cat([coarse.mean((2, 3)), tokens.mean(-1), coarse.mean((2, 3))], 1))

    model = apply_rblock(OnlyTheLast(), "split", input_size=(3, 8, 8))
    (site,) = describe(model).sites
    assert (site.path, [mask.place for mask in site.masks]) == ("split", [1])
    assert dict(model.rblock.named_children()).keys() == {"split_map1"}


def test_stages_of_hrnet_are_lists():
    model = timm.create_model("hrnet_w18_small", num_classes=5)
    sites = list_sites(model)
    assert [site.path for site in sites] == ["stage2", "stage3", "stage4"]
    assert sites[2].maps == ((16, 56, 56), (32, 28, 28), (64, 14, 14), (128, 7, 7))
    assert sites[2].shape == (16, 56, 56)
    assert "16x56x56, 32x28x28, 64x14x14, 128x7x7" in str(sites)

    apply_rblock(model, ["stage3", "stage4"], drop_prob=[0.1, 0.3], input_size=(3, 64, 64))
    described = describe(model).sites
    assert [(site.path, site.drop_prob) for site in described] == [("stage3", 0.1), ("stage4", 0.3)]
    assert [[mask.place for mask in site.masks] for site in described] == [[0, 1, 2], [0, 1, 2, 3]]
    sides = [[mask.shape[-1] for mask in site.masks] for site in described]
    assert sides == [[16, 8, 4], [16, 8, 4, 2]]
    set_drop_prob(model, [0.2, 0.4])
    assert [[mask.drop_prob for mask in site.masks] for site in describe(model).sites] == [[0.2] * 3, [0.4] * 4]
    first, second = split_pair(model.train()(torch.randn(2, 3, 64, 64)))
    assert not torch.equal(first, second)


def test_rejects_one_list_under_two_names():
    model = timm.create_model("hrnet_w18_small")
    with pytest.raises(SiteError, match=r"'stage3' and 'stage3\.0' return the same map"):
        apply_rblock(model, ["stage3", "stage3.0"])


def test_rejects_a_list_without_a_map():
    class Tokens(nn.Module):
        def forward(self, x: Tensor) -> list[Tensor]:
            return [x.flatten(2)]

    model = nn.Sequential(nn.Conv2d(3, 4, 3), Tokens())
    with pytest.raises(SiteError, match=r"'1' does not return a feature map: .* got a list of"):
        apply_rblock(model, "1", input_size=(3, 8, 8))


class Nested(nn.Module):
    """A site that returns a list whose second map is computed from the first, by a site inside it."""

    class Stage(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fine, self.coarse = nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 1)

        def forward(self, x: Tensor) -> list[Tensor]:
            fine = self.fine(x)
            return [fine, self.coarse(fine.relu())]

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stage = nn.Conv2d(3, 6, 3, padding=1), self.Stage()

    def forward(self, x: Tensor) -> Tensor:
        fine, coarse = self.stage(self.stem(x))
        return (fine * coarse.sigmoid()).mean((2, 3))


@pytest.mark.parametrize("sites", [["stage"], ["stage", "stage.fine"], ["stage.fine", "stage"]])
def test_maps_inside_a_list_site_are_masked_once(sites):
    """Masks of a list lie behind its stage: what the stage computes from its first map reads the unmasked map."""
    plain = Nested().train()
    try:
        model = apply_rblock(copy.deepcopy(plain), sites, method="r-dropblock", drop_prob=0.4, input_size=(3, 8, 8))
    except SiteError as error:
        assert len(sites) == 2
        assert "return the same map" in str(error)  # noqa: PT017
        return
    x = torch.randn(3, 3, 8, 8)
    with recorded_masks(model) as recorded:
        output = model(x)
    masks = {"stage": {place: recorded[f"stage_map{place}"] for place in (0, 1)}}
    torch.testing.assert_close(output, two_forwards(plain, masks, x))
