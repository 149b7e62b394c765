"""One network as an ONNX file and as a torch module: same sites, same candidates, same plan, outputs that agree."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from onnx import numpy_helper

from accel_sim.spec_file import load_spec
from codegen.asic_latency import AsicLatency
from codegen.events import QuietEvents
from codegen.memory import Forgetful
from codegen.plan_search import formats_named, read_plan
from codegen.reproduce.networks import resnet20
from codegen.results import plan_layers
from codegen.space import EFFORTS, Selection, Space, build_space
from codegen.walks import plain_chain
from passes.core.site import Chain
from passes.correct import Choice
from passes.errors import InputError
from passes.factorize import Factorize
from passes.fx_graph import FxGraph
from passes.fx_plan import matched, replayed
from passes.graph import Graph
from passes.manager import PassManager
from passes.onnx_graph import OnnxGraph
from passes.ranks.milp import MilpSolver, least
from passes.registry import PASSES
from tools.train_digits import network as digits_network

ROOT = Path(__file__).resolve().parents[3]
MODELS = ROOT.parent / "shared" / "models"
FORMATS = ("svd", "channel_svd_out")
CANONICAL = ("drop-identities", "fold-batchnorm", "drop-dead-code")


@dataclass(frozen=True, eq=False)
class Pair:
    """The network twice, BatchNorm folded; ``weights``: how much those of the files differ at most."""

    onnx: OnnxGraph
    torch: FxGraph
    weights: float


def digits() -> Pair:
    """The ONNX file holds BatchNorm as the module does, so its weights are the module's."""
    graph = OnnxGraph.read(ROOT / "examples" / "digits.onnx")
    stored = {i.name: i for i in graph.model().graph.initializer}
    module = digits_network()
    state = module.state_dict()
    values = {name: torch.from_numpy(numpy_helper.to_array(stored[name]).copy()) for name in state if name in stored}
    assert {name.rpartition(".")[2] for name in set(state) - set(values)} == {"num_batches_tracked"}
    module.load_state_dict(values, strict=False)
    return Pair(graph, FxGraph.trace(module, torch.zeros(1, 1, 16, 16)), 1e-6)


def cifar() -> Pair:
    """ResNet-20 as its authors trained it; torch.onnx.export folded the BatchNorm of the file, in single precision."""
    if not MODELS.is_dir():
        pytest.skip("the folder ../shared/models is absent")
    state = torch.load(MODELS / "resnet20_cifar10_state_dict.pt", weights_only=True)
    module = resnet20()
    module.load_state_dict({name.replace("linear.", "fc."): value for name, value in state.items()})
    return Pair(
        OnnxGraph.read(MODELS / "resnet20_cifar10.onnx"), FxGraph.trace(module, torch.zeros(1, 3, 32, 32)), 1e-6
    )


BUILDERS = {"digits": digits, "resnet20": cifar}


@cache
def built(name: str) -> Pair:
    pair = BUILDERS[name]()
    for graph in (pair.onnx, pair.torch):
        PassManager([PASSES.load(each)() for each in CANONICAL]).run(graph)
    return pair


@pytest.fixture(params=BUILDERS)
def name(request: pytest.FixtureRequest) -> str:
    built(request.param)
    return str(request.param)


@pytest.fixture
def pair(name: str) -> Pair:
    return built(name)


def names(pair: Pair) -> dict[str, str]:
    """Torch's site for each of ONNX's."""
    sources = pair.onnx.sites().sites
    return matched([site.name for site in sources], pair.torch.sites().sites, sources)


def outputs(graph: Graph, seed: int) -> np.ndarray:
    (spec,) = graph.inputs
    shape = (1, *(size for size in spec.shape[1:] if isinstance(size, int)))
    (found,) = graph.run({spec.name: np.random.default_rng(seed).standard_normal(shape).astype(np.float32)})
    return found


@cache
def spaces(name: str) -> tuple[Space, Space]:
    """What is chosen from, for either frontend, on the accelerator's price list and without data."""
    pair, effort = built(name), EFFORTS["quick"]
    formats, quiet = formats_named(FORMATS, QuietEvents()), QuietEvents()
    found = []
    for graph in (pair.onnx, pair.torch):
        prices = AsicLatency(load_spec())
        options = Selection(), None, None, effort, effort.correction(0), quiet
        found.append(build_space(graph, prices, formats, *options, memory=Forgetful()))  # type: ignore[arg-type]
    return found[0], found[1]


@cache
def plan(name: str, side: int) -> dict[str, Choice]:
    """Format and rank by site at a latency half-way between the dense layers' and the least there is."""
    space = spaces(name)[side]
    free = space.problem({}, {})
    dense = free.fixed["latency"] + sum(site.options[0].costs["latency"] for site in free.sites)
    problem = space.problem({"latency": (dense + least(free, "latency")) / 2}, {})
    solved = MilpSolver().solve(problem)
    assert solved.status == "optimal"
    return space.choices(problem, solved.picks)


def chains(graph: Graph, choices: dict[str, Choice]) -> dict[str, Chain]:
    sites = {site.name: site for site in graph.sites().sites}
    return {name: plain_chain(sites[name], choice) for name, choice in choices.items() if choice.format is not None}


def rewritten(graph: Graph, made: dict[str, Chain]) -> Graph:
    other = graph.clone()
    PassManager([Factorize(made)]).run(other)
    return other


def test_the_sites_agree(pair: Pair) -> None:
    mine = {site.name: site for site in pair.torch.sites().sites}
    assert list(names(pair).values()) == list(mine), "in the same order"
    for site in pair.onnx.sites().sites:
        other = mine[names(pair)[site.name]]
        assert (other.stage.geometry, other.op, other.channel_axis) == (site.stage.geometry, site.op, site.channel_axis)
        assert (other.input_shape, other.output_shape) == (site.input_shape, site.output_shape)
        np.testing.assert_allclose(other.stage.weight, site.stage.weight, rtol=0, atol=pair.weights)
        assert other.stage.bias is not None and site.stage.bias is not None
        np.testing.assert_allclose(other.stage.bias, site.stage.bias, rtol=0, atol=pair.weights)
    np.testing.assert_allclose(outputs(pair.torch, 0), outputs(pair.onnx, 0), rtol=0, atol=1e-4)


def test_the_candidates_and_their_prices_agree(name: str, pair: Pair) -> None:
    one, other = spaces(name)
    for theirs, mine in names(pair).items():
        assert one.scored[theirs].candidates == other.scored[mine].candidates
        np.testing.assert_allclose(one.scored[theirs].relative, other.scored[mine].relative, rtol=1e-4, atol=1e-9)
    if name == "digits":  # ResNet-20's shortcuts are written in other operators
        assert one.baseline == other.baseline


def test_the_plans_agree(name: str, pair: Pair) -> None:
    theirs, mine = plan(name, 0), plan(name, 1)
    assert {names(pair)[layer]: choice for layer, choice in theirs.items()} == mine
    assert sum(choice.format is not None for choice in mine.values()) >= 3


def test_networks_with_the_same_chains_agree(name: str, pair: Pair) -> None:
    made = chains(pair.onnx, plan(name, 0))
    one = rewritten(pair.onnx, made)
    other = rewritten(pair.torch, {names(pair)[layer]: chain for layer, chain in made.items()})
    for seed in range(3):
        found, expected = outputs(other, seed), outputs(one, seed)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
        assert abs(expected - outputs(pair.onnx, seed)).max() > 1e-2, "the chains make a difference"


def test_a_plan_of_the_onnx_file_gives_the_same_outputs_on_the_module(name: str, pair: Pair, tmp_path: Path) -> None:
    choices = plan(name, 0)
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({"layers": plan_layers(pair.onnx.sites().sites, choices)}))
    formats = formats_named(FORMATS, QuietEvents())
    read = replayed(read_plan(path), pair.torch.sites().sites, formats)
    mine = {
        site: Choice() if choice == "dense" else Choice(formats[choice], rank) for site, (choice, rank) in read.items()
    }
    one, other = rewritten(pair.onnx, chains(pair.onnx, choices)), rewritten(pair.torch, chains(pair.torch, mine))
    for seed in range(3):
        np.testing.assert_allclose(outputs(other, seed), outputs(one, seed), rtol=0, atol=1e-4)


def test_a_plan_of_another_network_is_refused() -> None:
    pair = built("digits")
    layers = [site.name for site in built("resnet20").onnx.sites().sites]
    with pytest.raises(InputError, match="the plan has 20 layers, the network 8"):
        matched(layers, pair.torch.sites().sites)
