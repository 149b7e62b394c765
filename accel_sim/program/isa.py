"""The instruction set: decoupled access and execute, in the manner of VTA (Moreau et al., 2019) and Gemmini.

Three in-order queues - load, execute, store - run beside each other and meet through tokens. An instruction waits
for one token of each kind in ``wait`` before it begins, and posts one of each kind in ``post`` when it has ended;
tokens of a kind are first in, first out. The instructions of a queue begin in order and end in order, but that stores
into the scratchpad take a way of their own and do not wait for stores into DRAM. No token is left over where all queues
meet (Sync, Host, Halt). There is no hazard hardware: a buffer that is overwritten too early is the program's error, and
the engine reports it. Loads and stores share the one channel to DRAM, which serves requests in the order in which their
tokens were there, of two in the same cycle the store: so a load that waits for the product that a store waits for, or
for a later one, moves its data after the store's.

=========  =================================  ==========================
token      posted by                          waited for by
=========  =================================  ==========================
LOADED     load: data are in place            execute
FREED      execute: a buffer has been read    load
COMPUTED   execute: a result is complete      store
STORED     store: accumulators are free       execute
=========  =================================  ==========================

What does not change from tile to tile stands in tables of descriptors (:class:`Window`, :class:`Output`,
:class:`VectorSpec`), to which instructions refer by index.

Layouts. A map in DRAM is images x blocks x positions x lanes: blocks of as many channels as the array has columns,
the last one narrower, each a contiguous run over depth, height and width. On chip it is the same, with the extent of
what was loaded: element (i, c, d, h, w) of a stored map of ``channels`` channels and extent (D, H, W) is at
``i * channels * P + b * columns * P + ((d * H + h) * W + w) * width + c % columns``, P = D * H * W, b = c // columns,
width = min(columns, channels - b * columns). Accumulators are laid out the same way, positions being those of the
tile (its images among them, outermost: there is one set of blocks). Weights of a tile are K x N, row
k = tap * channels + channel, N contiguous; biases are N accumulator words beside them in the scratchpad, little
endian, at any byte.

Addresses are in bytes. DRAM is one space. The scratchpad is one space: inputs from 0, weights from ``input_kib`` on,
or all of it for both where the machine shares it. The accumulator memory holds accumulator words (aligned to their
width), the residuals that wait for them, and the results of the vector unit (bytes).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum, IntFlag


class Token(IntFlag):
    """What queues tell each other; see the module's table."""

    NONE = 0
    LOADED = 1
    FREED = 2
    COMPUTED = 4
    STORED = 8


class Queue(IntEnum):
    LOAD = 0
    EXECUTE = 1
    STORE = 2


class Space(IntEnum):
    """On-chip memories."""

    SCRATCHPAD = 0
    ACCUMULATOR = 1


class Dataflow(IntEnum):
    """As in :mod:`accel_sim.pricing.array`."""

    WEIGHT_STATIONARY = 0
    OUTPUT_STATIONARY = 1
    INPUT_STATIONARY = 2


@dataclass(frozen=True)
class Loops:
    """A strided transfer: three nested loops, outermost first, over runs of ``run`` elements, contiguous on both sides.

    An element is a byte, or, on the accumulators' side of a store that requantizes, an accumulator word that becomes
    a byte. DRAM strides are in bytes, ``chip_strides`` in elements. A count is 1 where a loop is not used.

    What a request moves over the channel: its runs in order, those of its chained instructions too; a run that begins
    in DRAM where the one before it ended belongs to the same piece, and each piece moves in whole bursts,
    ceil(bytes / burst_bytes), wherever it begins. Data cycles: the pieces' bytes together over the bandwidth, rounded
    up once.
    """

    run: int
    counts: tuple[int, int, int] = (1, 1, 1)
    dram_strides: tuple[int, int, int] = (0, 0, 0)
    chip_strides: tuple[int, int, int] = (0, 0, 0)


@dataclass(frozen=True)
class Load:
    """DRAM to on-chip memory. ``space`` ACCUMULATOR: raw bytes, a residual that waits for its tile.

    ``chained``: part of the same request as the load before it, which pays the latency once for all; it waits for
    nothing, and only the last load of a request posts.
    """

    dram_address: int
    chip_address: int
    loops: Loops
    space: Space = Space.SCRATCHPAD
    chained: bool = False
    wait: Token = Token.NONE
    post: Token = Token.NONE


@dataclass(frozen=True)
class Preload:
    """Brings the first fold of the stationary operand into the array (weight- and input-stationary): ``rows`` cycles.

    The next instruction of the queue is the :class:`Matmul` that it belongs to.
    """

    wait: Token = Token.NONE
    post: Token = Token.NONE


@dataclass(frozen=True)
class Matmul:
    """One tile of a convolution or GEMM: M positions x K = taps x channels x N filters, all folds of it.

    ``window`` is the index of a :class:`Window`: positions and taps in the stored input map at ``input_address``; of
    its channels, ``channels`` from ``first_channel`` on are read. ``weight_address``: K x N. ``accumulate``: the sums
    go on from what the accumulators hold (``bias_address`` is -1 then); otherwise from the biases at
    ``bias_address``, or from 0 where that is -1.
    Cycles: :func:`accel_sim.pricing.array.gemm_cycles`, less the ``rows`` of a preload before it.
    """

    window: int
    input_address: int
    weight_address: int
    accumulator_address: int
    channels: int
    filters: int
    first_channel: int = 0
    bias_address: int = -1
    accumulate: bool = False
    dataflow: Dataflow = Dataflow.WEIGHT_STATIONARY
    wait: Token = Token.NONE
    post: Token = Token.NONE


@dataclass(frozen=True)
class Vector:
    """One piece of an operation without a GEMM: bytes of the scratchpad in, bytes of the accumulator memory out.

    ``spec`` is the index of a :class:`VectorSpec`. Element-wise functions take ``elements`` bytes from ``a_address``
    (and ``b_address``); pools take a stored map at ``a_address``, with the window of the spec, and write a tile of
    ``elements`` bytes in the layout of maps. ``operations`` elementary operations take
    ceil(operations / lanes) cycles.
    """

    spec: int
    a_address: int
    output_address: int
    elements: int
    operations: int
    b_address: int = -1
    wait: Token = Token.NONE
    post: Token = Token.NONE


@dataclass(frozen=True)
class Store:
    """Results out of the accumulator memory.

    ``output`` is the index of an :class:`Output`, the way on which accumulator words become bytes; -1: bytes as they
    are (results of the vector unit). ``first_channel`` is the channel of the tile's first filter in the output's
    table of scales. ``residual_address``: bytes in the accumulator memory, in the layout of the tile, that the output
    adds; -1: none. ``to_scratchpad``: into the scratchpad at ``address`` with ``loops.dram_strides`` as its strides, a
    row of the array's width per cycle and position, not over the channel. ``loops.chip_strides`` address accumulator
    words (or bytes). ``lanes``: how many channels lie next to each other within a run; run is a multiple of it.
    ``block_channels``: the channel step of the outermost loop. ``chained`` as in :class:`Load`; all stores of a
    request go the same way.
    """

    address: int
    accumulator_address: int
    loops: Loops
    lanes: int
    output: int = -1
    first_channel: int = 0
    block_channels: int = 0
    residual_address: int = -1
    to_scratchpad: bool = False
    chained: bool = False
    wait: Token = Token.NONE
    post: Token = Token.NONE


@dataclass(frozen=True)
class Sync:
    """All queues end before any goes on. ``marker``: the layer that begins here, its index in the program's list."""

    marker: int


@dataclass(frozen=True)
class Host:
    """As :class:`Sync`; then the host runs its call number ``call`` on tensors in DRAM, and the program goes on."""

    call: int


@dataclass(frozen=True)
class Halt:
    """The last instruction: as :class:`Sync`, and the end."""


Instruction = Load | Preload | Matmul | Vector | Store | Sync | Host | Halt


@dataclass(frozen=True)
class Window:
    """Where a tile's positions and taps lie in the stored input map; all triples are (depth, height, width).

    Output position (i, o) with tap t reads the map at ``o * strides + t * dilations + origin``, in image i; what lies
    outside ``extent`` is padding and reads ``pad_value`` (the zero point). ``images`` x ``out`` are the positions of
    the tile. ``signed``: bytes are int8, else uint8.
    """

    images: int
    channels: int
    extent: tuple[int, int, int]
    out: tuple[int, int, int]
    kernel: tuple[int, int, int]
    strides: tuple[int, int, int]
    dilations: tuple[int, int, int]
    origin: tuple[int, int, int]
    pad_value: int
    signed: bool


@dataclass(frozen=True)
class Output:
    """From an accumulator word a to a byte: ``q = clamp(rint(float32(a) * scale) + zero_point, low, high)``.

    rint is to even; the product is one of float32. ``scales``: index of the first entry in the program's scale table;
    channel c has entry ``scales + c`` (one entry for all with ``per_channel`` False). ``table`` (index of a
    256-byte table, -1: none) maps q, as a byte, to the activation's result. With a residual r (Store), the byte q is
    then added to it, see :class:`Sum`, and ``sum_table`` is applied last.
    """

    scales: int
    per_channel: bool
    zero_point: int
    low: int
    high: int
    signed: bool
    table: int = -1
    sum: int = -1
    sum_table: int = -1


@dataclass(frozen=True)
class Sum:
    """The quantized sum of two bytes, in float32: each ratio is an operand's scale over the result's.

    ``clamp(rint(fma(q, own_ratio, fma(r, other_ratio, offset))), low, high)`` with ``own_first``, else
    ``clamp(rint(fma(r, other_ratio, fma(q, own_ratio, offset))), low, high)``; fma(a, b, c) is a * b + c rounded once.
    ``offset`` holds the zero points. The own byte is a store's result, or a of a vector instruction.
    """

    own_ratio: float
    other_ratio: float
    offset: float
    low: int
    high: int
    own_first: bool
    own_signed: bool
    other_signed: bool
    signed: bool


class VectorFunction(IntEnum):
    """What the vector unit computes."""

    COPY = 0
    """Bytes as they are."""
    SUM = 1
    """Element-wise :class:`Sum` of a and b."""
    PRODUCT = 2
    """Element-wise product: ``rint(float32((a - a_zero) * (b - b_zero)) * ratio + zero_point)``, two roundings."""
    TABLE = 3
    """A 256-byte table, by element: any function of one byte."""
    MAX_POOL = 4
    AVERAGE_POOL = 5
    """``rint(float32(sum of (a - a_zero)) * (ratio / (divisor * count))) + zero_point``: each operation of float32;
    count is the window's taps that are no padding."""
    FILL = 6
    """``elements`` times ``zero_point``: padding."""


@dataclass(frozen=True)
class VectorSpec:
    """Parameters of a vector instruction; which of them a function reads is said at :class:`VectorFunction`.

    ``sum`` and ``table`` are indices of a :class:`Sum` and of a table; ``window`` that of a :class:`Window`.
    ``count_padding``: an average divides by all taps.
    """

    function: VectorFunction
    sum: int = -1
    table: int = -1
    window: int = -1
    ratio: float = 0.0
    divisor: float = 1.0
    a_zero: int = 0
    b_zero: int = 0
    zero_point: int = 0
    low: int = -128
    high: int = 127
    signed: bool = True
    count_padding: bool = False


@dataclass(frozen=True)
class Tensor:
    """A tensor of the network that lies in DRAM: an input, an output, or what a host call reads or writes.

    ``shape`` is the network's (N, C, then axes; a matrix is rows x channels), the bytes lie in the layout of maps at
    ``address``. Real value = ``scale * (byte - zero_point)``. ``role``: "input", "output" or "internal".
    """

    name: str
    shape: tuple[int, ...]
    address: int
    scale: float
    zero_point: int
    signed: bool
    role: str


@dataclass(frozen=True)
class Marker:
    """A layer: its name and what it is, for reports; ``nodes`` are the nodes of the network that it carries out.

    ``predicted_cycles`` is what the price list says, -1 where it says nothing.
    """

    name: str
    op: str
    nodes: tuple[str, ...] = ()
    predicted_cycles: int = -1
    macs: int = 0


@dataclass(frozen=True)
class HostCall:
    """What the machine cannot run: ``model`` is a serialized ONNX graph from ``inputs`` to ``outputs`` (float tensors).

    ``inputs``/``outputs`` are names of the program's tensors, dequantized and quantized on the way.
    """

    name: str
    reason: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    model: bytes = field(repr=False, default=b"")


@dataclass(frozen=True)
class Program:
    """Everything that a machine runs: code, tables, and the constants that lie in DRAM.

    ``spec_hash`` names the machine that it was compiled for (:func:`accel_sim.program.container.spec_hash`).
    ``dram_bytes`` is the size of the DRAM image; ``constants`` are laid at ``constants_address`` of it. ``columns`` is
    the block width of the layouts. ``scales`` are float32, ``tables`` 256 bytes each. Every float of a program is one
    that float32 holds exactly (the container refuses others), its ratios and the tensors' scales too.
    """

    spec_hash: bytes
    columns: int
    code: tuple[Instruction, ...]
    windows: tuple[Window, ...]
    outputs: tuple[Output, ...]
    sums: tuple[Sum, ...]
    vectors: tuple[VectorSpec, ...]
    scales: tuple[float, ...]
    tables: tuple[bytes, ...]
    tensors: tuple[Tensor, ...]
    markers: tuple[Marker, ...]
    calls: tuple[HostCall, ...]
    constants: bytes = field(repr=False)
    constants_address: int
    dram_bytes: int
