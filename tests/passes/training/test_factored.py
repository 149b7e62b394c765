"""What may be factorized in a torch network, and that ordinary layers come out of it again."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.flop_counter import FlopCounterMode

from passes.core.factor import Rank
from passes.errors import UnsupportedError, UsageError
from passes.training.elrt import Pick, scratch_chain
from passes.training.factored import chain_macs, ordinary, put, scan, selected, site_macs
from passes.training.layers import ChainLayer, StageLayer


class Odd(nn.Module):
    """Every way to be no ordinary layer, between two that are."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.twice = nn.Conv2d(8, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=4)
        self.used = nn.Conv2d(8, 8, 1)
        self.tied = nn.Linear(8, 8)
        self.copy = nn.Linear(8, 8)
        self.copy.weight = self.tied.weight
        self.normed = weight_norm(nn.Linear(8, 8))
        self.reflect = nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")
        self.up = nn.ConvTranspose2d(8, 8, 2)
        self.also = self.alias = nn.Linear(8, 8)
        self.hooked = nn.Linear(8, 8)
        self.hooked.register_forward_hook(lambda layer, taken, given: 2 * given)
        self.last = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(self.twice(F.relu(self.norm(self.first(x)))))
        x = F.conv2d(self.grouped(x), self.used.weight)
        x = self.up(self.reflect(x)).mean((2, 3))
        scores: Tensor = self.last(self.hooked(self.also(self.normed(self.copy(self.tied(x))))))
        return scores


IMAGE = torch.zeros(1, 3, 9, 7)


def flops(module: nn.Module, inputs: Sequence[Tensor]) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module.eval()(*inputs)
    return int(counter.get_total_flops())


def test_each_layer_is_a_site_or_kept_with_its_reason() -> None:
    found = scan(Odd(), [IMAGE])
    assert [(s.name, s.op, s.input_shape, s.output_shape, s.channel_axis) for s in found.sites] == [
        ("first", "Conv2d", (1, 3, 9, 7), (1, 8, 5, 4), 1),
        ("last", "Linear", (1, 8), (1, 5), -1),
    ]
    assert {note.node: note.reason for note in found.kept} == {
        "twice": "kept: it is called 2 times",
        "grouped": "kept: it is grouped",
        "used": "kept: it is never called as a module",
        "tied": "kept: it shares its weight with another module",
        "copy": "kept: it shares its weight with another module",
        "normed": "kept: its weight is parametrized",
        "reflect": "kept: it pads by 'reflect'; only zeros can be padded in a chain",
        "up": "kept: it is transposed",
        "also": "kept: it is reached by several names",
        "alias": "kept: it is reached by several names",
        "hooked": "kept: it carries hooks",
    }


def test_layers_are_called_as_they_are_wanted() -> None:
    found = scan(Odd(), [IMAGE], {"first": "/first/Conv"})
    assert [site.name for site in found.sites] == ["/first/Conv", "last"]
    assert found.paths == {"/first/Conv": "first", "last": "last"}


def test_multiply_adds_are_those_of_torchs_flop_counter_before_and_after() -> None:
    network = Odd()
    found = scan(network, [IMAGE])
    assert 2 * found.macs == flops(network, [IMAGE])
    assert site_macs(found.site("first")) == 5 * 4 * 8 * 3 * 9
    chosen: dict[str, tuple[str, Rank]] = {"first": ("tucker2", (2, 3)), "last": ("svd", (2,))}
    macs = {}
    for name, (format, rank) in chosen.items():
        site = found.site(name)
        chain = scratch_chain(site, Pick(format, rank, 0), torch.Generator().manual_seed(1))
        put(network, site.name, ChainLayer(chain, site.channel_axis))
        macs[name] = chain_macs(site, chain)
    assert 2 * found.total_macs(macs) == flops(network, [IMAGE])


def test_a_scan_leaves_the_network_as_it_was() -> None:
    network = Odd().train()
    network.norm.eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    scan(network, [IMAGE])
    assert network.training and network.twice.training and not network.norm.training
    assert not network.first._forward_hooks
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())


def test_inputs_that_do_not_fit_are_one_line() -> None:
    with pytest.raises(
        UnsupportedError, match=r"does not run on inputs of shape \(1, 4, 9, 7\): RuntimeError: .*channels"
    ):
        scan(Odd(), [torch.zeros(1, 4, 9, 7)])


def test_the_ends_stay_dense_unless_they_are_included() -> None:
    found = scan(Odd(), [IMAGE])
    assert selected(found, (), ())[0] == ()
    assert [site.name for site in selected(found, ("*",), ())[0]] == ["first", "last"]
    taken, notes = selected(found, ("*",), ("la*",))
    assert [site.name for site in taken] == ["first"]
    assert [(note.node, note.reason) for note in notes] == [("last", "kept: excluded")]
    with pytest.raises(UsageError, match=r"matches 'conv\*'; there are first, last"):
        selected(found, ("conv*",), ())


def test_a_layer_that_is_the_whole_network_is_kept() -> None:
    found = scan(nn.Linear(4, 3), [torch.zeros(1, 4)])
    assert not found.sites and found.kept[0].reason == "kept: the layer is the network itself"


@pytest.mark.parametrize("name", ["first", "last"])
def test_ordinary_layers_compute_the_same(name: str) -> None:
    network = Odd().eval()
    site = scan(network, [IMAGE]).site(name)
    pick = Pick("tucker2", (2, 3), 0) if name == "first" else Pick("svd", (2,), 0)
    chain = scratch_chain(site, pick, torch.Generator().manual_seed(1))
    put(network, site.name, ChainLayer(chain, site.channel_axis))
    made = ordinary(network)
    kinds = [type(layer) for layer in made.get_submodule(name)]  # type: ignore[arg-type]
    assert kinds == [nn.Conv2d if name == "first" else nn.Linear] * len(chain)
    x = torch.randn(4, 3, 9, 7, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(made(x), network(x), rtol=0, atol=0)
    assert isinstance(network.get_submodule(name), ChainLayer)


def test_uneven_padding_stays_a_stage() -> None:
    network = nn.Sequential(nn.Conv2d(2, 4, 4, padding="same"), nn.Conv2d(4, 2, 1))
    found = scan(network, [torch.zeros(1, 2, 8, 8)])
    for site in found.sites:
        put(network, site.name, StageLayer(site.stage))
    made = ordinary(network)
    assert [type(layer) for layer in made] == [StageLayer, nn.Conv2d]
    assert [site.name for site in scan(network, [torch.zeros(1, 2, 8, 8)]).sites] == ["0", "1"]
