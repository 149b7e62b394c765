import numpy as np
import pytest
import torch

from codegen.tune import reference
from codegen.tune.reference import Reference
from codegen.tune.workload import Workload


def torch_output(found: Reference, workload: Workload) -> np.ndarray:
    """The layer and its clamp by torch, in float64."""
    x, weight, bias = (torch.from_numpy(a).double() for a in (found.x, found.weight, found.bias))
    g = workload.work.geometry
    if not g.ndim:
        return torch.relu(torch.nn.functional.linear(x, weight, bias)).numpy()
    if g.transposed:
        # torch wants (I, O / groups, *kernel), and cuts the same from both ends; ours are cut by hand.
        o, i, *kernel = weight.shape
        swapped = (
            weight.reshape(g.groups, o // g.groups, i, *kernel).transpose(1, 2).reshape(-1, o // g.groups, *kernel)
        )
        transposed = {1: torch.nn.functional.conv_transpose1d, 2: torch.nn.functional.conv_transpose2d}[g.ndim]
        whole = transposed(x, swapped, None, g.strides, 0, g.output_padding, g.groups, g.dilations)
        cut = (slice(None), slice(None), *(
            slice(g.pads[axis], whole.shape[2 + axis] - g.pads[axis + g.ndim]) for axis in range(g.ndim)
        ))  # fmt: skip
        return torch.relu(whole[cut] + bias.reshape(-1, *(1,) * g.ndim)).numpy()
    pads = [p for axis in reversed(range(g.ndim)) for p in (g.pads[axis], g.pads[axis + g.ndim])]
    convolution = {1: torch.nn.functional.conv1d, 2: torch.nn.functional.conv2d}[g.ndim]
    padded = torch.nn.functional.pad(x, pads)
    return torch.relu(convolution(padded, weight, bias, g.strides, 0, g.dilations, g.groups)).numpy()


@pytest.mark.parametrize(
    "key",
    [
        "conv 2x6x9x8 -> 10, kernel 3x3, strides 2,1, pads 1,0,2,1, float32",
        "conv 1x6x9x8 -> 9, kernel 3x2, dilations 2,1, pads 1,1,1,1, groups 3, float32",
        "conv 1x8x7x7 -> 8, kernel 3x3, pads 1,1,1,1, groups 8, float32",
        "conv 1x5x30 -> 4, kernel 7, strides 3, float32",
        "conv_transpose 2x6x5x7 -> 4, kernel 3x2, strides 2,1, pads 1,0,0,1, groups 2, float32",
        "conv_transpose 1x3x6 -> 4, kernel 4, strides 2, pads 1,1, output_padding 1, float32",
        "linear 3x20 -> 7, float32",
    ],
)
def test_the_reference_is_what_torch_computes(key: str) -> None:
    workload = Workload.parse(key)
    found = Reference.of(workload, seed=3)
    output = torch_output(found, workload)
    assert (np.moveaxis(output, 1, -1).reshape(-1, output.shape[1]) == 0).any()  # the clamp is at work
    assert len(found.positions) == output.size // output.shape[1]
    np.testing.assert_allclose(
        found.values, np.moveaxis(output, 1, -1).reshape(-1, output.shape[1]), rtol=1e-12, atol=1e-12
    )
    # float32 keeps 24 bits: an output of a few hundred products is right to 1e-5 of its largest value.
    assert found.error(output.astype(np.float32)) < 1e-5


@pytest.mark.parametrize("where", ["first", "last", "tile at the border", "nan"])
def test_an_error_anywhere_near_a_border_is_found_in_a_large_output(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "_MOST_MACS", 10**6)  # room for 6,944 of 65,536 positions
    workload = Workload.parse("conv 1x4x256x256 -> 4, kernel 3x3, pads 1,1,1,1, float32")
    found = Reference.of(workload)
    assert 6_000 < len(found.positions) < 7_000 and (np.diff(found.positions) > 0).all()
    output = torch_output(found, workload).astype(np.float32)
    right = found.error(output)
    assert right < 1e-5
    if where == "nan":  # all of the output is looked at for these
        output[0, 3, 128, 131] = np.nan
        assert np.isnan(found.error(output))
        return
    index = {
        "first": (0, 2, 0, 0),
        "last": (0, 2, 255, 255),
        "tile at the border": (0, slice(0, 4), 252, slice(240, 256)),
    }
    output[index[where]] += 1
    assert found.error(output) > 100 * right and found.error(output) > 1e-3
