"""The multiply-add layers of ResNets for 224 x 224 images, written from the architecture.

Source: He et al., "Deep Residual Learning", CVPR 2016, table 1. The stride of a bottleneck is in its 3x3 convolution,
as in the variant that frameworks ship (v1.5); in the original it is in the first 1x1.
"""

from __future__ import annotations

from accel_sim.pricing.layer import Layer, conv_layer, gemm_layer

_BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
_BOTTLENECK = {18: False, 34: False, 50: True, 101: True}


def resnet_layers(depth: int, batch: int = 1, ends: bool = True) -> list[Layer]:
    """Convolutions and the classifier in order; ``ends``: with the first convolution and the classifier.

    Sums, pooling and activations are left out. ValueError for a depth that is not 18, 34, 50 or 101.
    """
    if depth not in _BLOCKS:
        raise ValueError(f"no ResNet-{depth} here: give one of {', '.join(map(str, _BLOCKS))}")

    def conv(inner: int, outer: int, size: int, kernel: int, stride: int = 1) -> Layer:
        pads = (kernel // 2,) * 4
        return conv_layer(inner, outer, (size, size), (kernel, kernel), (stride, stride), pads=pads, batch=batch)

    layers = [conv(3, 64, 224, 7, 2)] if ends else []
    channels, size = 64, 56
    for stage, count in enumerate(_BLOCKS[depth]):
        width = 64 << stage
        outer = 4 * width if _BOTTLENECK[depth] else width
        for block in range(count):
            stride = 2 if stage and not block else 1
            after = size // stride
            if _BOTTLENECK[depth]:
                layers += [conv(channels, width, size, 1), conv(width, width, size, 3, stride)]
                layers.append(conv(width, outer, after, 1))
            else:
                layers += [conv(channels, outer, size, 3, stride), conv(outer, outer, after, 3)]
            if stride > 1 or channels != outer:
                layers.append(conv(channels, outer, size, 1, stride))
            channels, size = outer, after
    return [*layers, gemm_layer(batch, channels, 1000, bias=True)] if ends else layers
