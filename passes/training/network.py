"""A network under training: a torch.fx module, and where its layers are.

What trains (recovery, rank search by gradient, training from scratch) sees every network in this one form, whichever
file or module it came from, and changes layers by their site's name.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch
from torch import nn

from passes.core.site import Site


@dataclass(eq=False)
class TrainableNetwork:
    """``module`` takes the network's inputs in their order, and gives its output (a tuple where there are several).

    ``layers``: the name of each site -> path of the submodule in its place, which is called exactly once: first a
    :class:`passes.training.layers.StageLayer`, and whatever is put there later. ``sites`` by name, in execution order,
    hold the weights that the network came with. BatchNorm nodes are ``torch.nn.BatchNorm`` modules: training updates
    their statistics. Constants that are no layer's are parameters where they are floats that the result depends on
    (slopes, gains), else buffers. ``constants``: path of such a parameter -> name of the constant in the network that
    this one was made of; ``norms``: path of a BatchNorm module -> name of the tensor it writes there.
    """

    module: torch.fx.GraphModule
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    sites: dict[str, Site] = field(default_factory=dict)
    layers: dict[str, str] = field(default_factory=dict)
    constants: dict[str, str] = field(default_factory=dict)
    norms: dict[str, str] = field(default_factory=dict)

    def layer(self, site: str) -> nn.Module:
        """What stands in the place of a site. KeyError for an unknown name."""
        return self.module.get_submodule(self.layers[site])

    def put(self, site: str, layer: nn.Module) -> None:
        """Puts another module into a site's place; the graph stays as it is."""
        self.module.set_submodule(self.layers[site], layer, strict=True)

    def clone(self) -> TrainableNetwork:
        """An independent copy: parameters, statistics and structure."""
        return TrainableNetwork(
            copy.deepcopy(self.module),
            self.inputs,
            self.outputs,
            dict(self.sites),
            dict(self.layers),
            dict(self.constants),
            dict(self.norms),
        )
