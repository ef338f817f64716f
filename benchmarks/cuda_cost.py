"""What one tile costs the CUDA kernels on one multiprocessor, counted on paper: nothing is run.

    near = total(forward_tile(Layout(tiles=2), near=True))
    near.matrix, near.shared, near.special      # cycles, all warps of a block together

Shared memory is counted by simulating addresses: every access of every warp is laid out as tile.cuh
and bands.cuh lay it out, and its wavefronts are counted from the banks. Rates are an A100's for one
multiprocessor: 1024 multiply-adds of 16-bit numbers, one wavefront of 128 bytes and 16 exponentials
a cycle. Latencies, arithmetic of addresses and softmax, shuffles and barriers are left out, and
traffic beyond shared memory; a bound is what a tile takes at least.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

BANKS, WORD = 32, 4
LANES = range(32)
WARPS = 4
ELEMENT = 2  # bytes
BLOCK_N = 64

MMA_CYCLES = 16 * 8 * 16 / 1024
EXP_CYCLES = 32 / 16


def wavefronts(addresses: Sequence[int], width: int) -> int:
    """Wavefronts of one access by a warp: each lane's first byte and how many bytes it moves.

    Accesses wider than a word go in phases of as many lanes as 128 bytes hold; in a phase each bank
    gives one word at a time, to all lanes that want that word.
    """
    lanes = min(32, BANKS * WORD // width)
    count = 0
    for first in range(0, len(addresses), lanes):
        words = {
            word
            for address in addresses[first : first + lanes]
            for word in range(address // WORD, (address + width - 1) // WORD + 1)
        }
        banks = [word % BANKS for word in words]
        count += max(banks.count(bank) for bank in set(banks))
    return count


def phases(count: int, width: int) -> int:
    """Wavefronts of an access by `count` lanes if no two words met in a bank."""
    return -(-count // min(32, BANKS * WORD // width))


@dataclass(frozen=True)
class Part:
    """One step of a tile, all warps of the block together.

    `conflicts` are the wavefronts past one a phase. `code_mma` and `code_ldmatrix` are how often
    the instructions stand in the code of the loop, where rolled loops count once.
    """

    name: str
    mma: int = 0
    wavefronts: int = 0
    conflicts: int = 0
    exponentials: int = 0
    code_mma: int = 0
    code_ldmatrix: int = 0

    @property
    def matrix(self) -> float:
        return self.mma * MMA_CYCLES

    @property
    def shared(self) -> float:
        return float(self.wavefronts)

    @property
    def special(self) -> float:
        return self.exponentials * EXP_CYCLES

    @property
    def bound(self) -> float:
        """Cycles that the busiest of the three units takes."""
        return self.bound_with(1)

    def bound_with(self, matrix_rate: float) -> float:
        """The same with so many times the products a cycle."""
        return max(self.matrix / matrix_rate, self.shared, self.special)


def total(parts: Iterable[Part], name: str = "all") -> Part:
    parts = list(parts)
    fields = (
        "mma", "wavefronts", "conflicts", "exponentials", "code_mma", "code_ldmatrix",
    )  # fmt: skip
    return Part(name, **{field: sum(getattr(part, field) for part in parts) for field in fields})


Access = tuple[Sequence[int], int]  # addresses of the lanes, bytes of each


def part(name: str, accesses: Iterable[Access], **counts: int) -> Part:
    accesses = list(accesses)
    taken = sum(wavefronts(*access) for access in accesses)
    least = sum(phases(len(addresses), width) for addresses, width in accesses)
    return Part(name, wavefronts=taken, conflicts=taken - least, **counts)


@dataclass(frozen=True)
class Layout:
    """The constants of BandShape<tiles>, and a head dimension that stays in registers (<= 64)."""

    tiles: int
    head_dim: int = 64

    @property
    def block_m(self) -> int:
        return 16 * self.tiles * WARPS

    @property
    def ring(self) -> int:
        return self.block_m + BLOCK_N

    @property
    def own_blocks(self) -> int:
        return BLOCK_N // 16 + 1

    @property
    def other_blocks(self) -> int:
        return self.block_m // 16 + 1

    @property
    def own_pitch(self) -> int:
        return 16 + 8

    @property
    def own_strip(self) -> int:
        return 16 * self.own_blocks * self.own_pitch

    @property
    def other_pitch(self) -> int:
        return 16 * self.other_blocks + 8

    @property
    def strip_bytes(self) -> int:
        own = self.own_strip * self.tiles * WARPS
        return ELEMENT * (own + BLOCK_N * self.other_pitch)

    @property
    def ring_bytes(self) -> int:
        return ELEMENT * self.ring * self.head_dim

    @property
    def tile_bytes(self) -> int:
        return ELEMENT * BLOCK_N * self.head_dim

    @property
    def steps(self) -> int:
        """Products of 16 along the head dimension."""
        return self.head_dim // 16

    def offset(self, row: int, chunk: int) -> int:
        """Tile::offset, in bytes."""
        swizzle = row & 7 if self.head_dim % 64 == 0 else row >> 1 & 3
        return ELEMENT * (row * self.head_dim + (chunk ^ swizzle) * 8)

    # The operands of Tile: addresses of one ldmatrix of four.

    def a(self, row: int, column: int) -> Access:
        return [self.offset(row + n % 16, column // 8 + n // 16) for n in LANES], 16

    def b(self, row: int, column: int) -> Access:
        place = [(row + n % 8 + n // 16 * 8, column // 8 + n // 8 % 2) for n in LANES]
        return [self.offset(*p) for p in place], 16

    def b_of_rows(self, row: int, column: int) -> Access:
        return self.a(row, column)  # transposed while it is loaded: the same places

    def copy(self, rows: int) -> Iterator[Access]:
        """cp.async of so many rows, by all threads."""
        chunks = self.head_dim // 8
        for first in range(0, rows * chunks, 32):
            yield [self.offset(n // chunks, n % chunks) for n in range(first, first + 32)], 16


def copies(layout: Layout, tensors: int, near: bool) -> Iterator[Part]:
    yield part("copies of tiles", tensors * list(layout.copy(BLOCK_N)))
    if near:
        yield part("copies of bands", 2 * list(layout.copy(BLOCK_N)))


def transposed_product(
    layout: Layout, name: str, rows_in_registers: bool = True, extra: int = 0
) -> Part:
    """multiply_transposed: 16 * tiles rows of each warp times a tile, its rows as columns.

    Every warp loads the tile once, whether other_products has it from these registers or not.
    extra: ldmatrix of rows that go to registers first.
    """
    tiles, steps = layout.tiles, layout.steps
    accesses = [
        layout.a(16 * n, 16 * k) for _ in range(WARPS) for n in range(4) for k in range(steps)
    ]
    loads = extra + (0 if rows_in_registers else steps)
    accesses += [layout.a(16 * w, 0) for w in range(WARPS) for _ in range(loads)]
    rolled = 1 if rows_in_registers else steps  # bands apart, the other form's loop is not unrolled
    return part(
        name,
        accesses,
        mma=WARPS * 4 * steps * 2 * tiles,
        code_mma=4 * steps * 2 * tiles // rolled,
        code_ldmatrix=(4 * steps + (loads - extra)) // rolled + extra,
    )


def product(layout: Layout, name: str) -> Part:
    """multiply: scores of each warp times a tile."""
    steps, tiles = layout.steps, layout.tiles
    accesses = [
        layout.b_of_rows(16 * k, 16 * n)
        for _ in range(WARPS)
        for k in range(4)
        for n in range(steps)
    ]
    code = 4 * steps * 2 * tiles
    return part(name, accesses, mma=WARPS * code, code_mma=code, code_ldmatrix=4 * steps)


def strip_stores(pitch: int, first: int) -> Iterator[Access]:
    """store_strip of sixteen columns: two words of two halves of the columns."""
    for column in (0, 8):
        for below in (0, 8):
            place = [first + (n // 4 + below) * pitch + n % 4 * 2 + column for n in LANES]
            yield [ELEMENT * p for p in place], 4


def own_products(layout: Layout) -> Part:
    """Rows of the ring times those of x as columns: strips of x are stored by shifts."""
    tiles, blocks = layout.tiles, layout.own_blocks
    accesses: list[Access] = []
    done = 0
    for warp in range(WARPS):
        for n in range(blocks + tiles - 1):
            row = 16 * (tiles * warp + n)
            accesses += [layout.a(row, 16 * k) for k in range(layout.steps)]
            for m in range(tiles):
                if m <= n < m + blocks:
                    done += 1
                    strip = layout.own_strip * (warp * tiles + m)
                    first = strip + 16 * (n - m) * layout.own_pitch
                    accesses += strip_stores(layout.own_pitch, first)
    rolled = 1 if tiles > 1 else blocks  # the loop over blocks is unrolled for one strip alone
    return part(
        "own products",
        accesses,
        mma=done * layout.steps * 2,
        code_mma=rolled * tiles * layout.steps * 2,
        code_ldmatrix=rolled * layout.steps,
    )


def other_products(layout: Layout, held: bool = True) -> Part:
    """Every fourth block of shifts is a warp's, for all strips that meet it.

    held: rows of y are in registers, for the scores too; else each strip loads its own again.
    """
    steps, strips = layout.steps, BLOCK_N // 16
    accesses: list[Access] = []
    done = 0
    for warp in range(WARPS):
        for block in range(warp, layout.ring // 16, WARPS):
            accesses += [layout.b(16 * block, 16 * k) for k in range(steps)]
            for s in range(strips):
                n = block - (strips - 1 - s)
                if 0 <= n < layout.other_blocks:
                    done += 1
                    if not held:
                        accesses += [layout.a(16 * s, 16 * k) for k in range(steps)]
                    strip = 16 * s * layout.other_pitch
                    accesses += strip_stores(layout.other_pitch, strip + 16 * n)
    unrolled = strips if held else 1  # the loop over strips; that over blocks is not
    return part(
        "other products",
        accesses,
        mma=done * steps * 2,
        code_mma=unrolled * steps * 2,
        code_ldmatrix=steps + (0 if held else steps),
    )


Place = Callable[[int, int, int], int]  # lane, n, c: an element of a strip


def own_place(layout: Layout) -> Place:
    """each_own of the first strip."""
    pitch = layout.own_pitch

    def place(lane: int, n: int, c: int) -> int:
        row, column = lane // 4, lane % 4 * 2
        first = (BLOCK_N + row - column) * pitch + row
        return first + c // 2 * (8 * pitch + 8) - (8 * n + c % 2) * pitch

    return place


def other_place(layout: Layout, tile: int = 0) -> Place:
    """each_other of one of the block's tiles of 16 rows."""
    pitch = layout.other_pitch

    def place(lane: int, n: int, c: int) -> int:
        row, column = lane // 4, lane % 4 * 2
        first = column * pitch + 16 + 16 * tile + row - column
        return first + 8 * n * pitch - n % 2 * 8 + c % 2 * (pitch - 1) + c // 2 * 8

    return place


def diagonals(place: Place) -> Iterator[Access]:
    """A 16-bit access for each of a lane's 32 scores of 16 rows."""
    for n in range(BLOCK_N // 8):
        for c in range(4):
            yield [ELEMENT * place(lane, n, c) for lane in LANES], 2


def terms(layout: Layout, verb: str) -> Iterator[Part]:
    """Diagonal accesses of all strips."""
    strips = layout.tiles * WARPS
    yield part(f"own terms {verb}", strips * list(diagonals(own_place(layout))))
    others = (list(diagonals(other_place(layout, tile))) for tile in range(strips))
    yield part(f"other terms {verb}", [access for tile in others for access in tile])


def softmax(layout: Layout, forward: bool = True) -> Part:
    """Exponentials: one a score and, forward, one a row of the lane for the sums so far."""
    each = BLOCK_N // 2 + (2 if forward else 0)
    return Part("exponentials", exponentials=WARPS * layout.tiles * each)


def forward_tile(layout: Layout, near: bool) -> Iterator[Part]:
    """block_m x 64 scores: queries stay in registers, every warp reads all keys and values."""
    yield from copies(layout, 2, near)
    yield transposed_product(layout, "scores")
    if near:
        yield other_products(layout)
        yield own_products(layout)
        yield from terms(layout, "read")
    yield softmax(layout)
    yield product(layout, "values")


def plain_tile(tiles: int) -> Part:
    """FlashAttention-2's inner loop for the same scores, warps and rows a warp."""
    layout = Layout(tiles)
    return total(
        [
            *copies(layout, 2, near=False),
            transposed_product(layout, "scores"),
            softmax(layout),
            product(layout, "values"),
        ]
    )


def ratios(tiles: int, matrix_rate: float = 1) -> tuple[float, float]:
    """Bounds of a near and of a far tile of the forward kernel over plain attention's."""
    layout, plain = Layout(tiles), plain_tile(tiles).bound_with(matrix_rate)
    near, far = (total(forward_tile(layout, n)).bound_with(matrix_rate) for n in (True, False))
    return near / plain, far / plain


def clear_own(layout: Layout) -> Part:
    """The first 16 shifts and the last, two chunks each."""
    accesses: list[Access] = []
    for first in (0, BLOCK_N):
        place = [(first + lane // 2) * layout.own_pitch + lane % 2 * 8 for lane in LANES]
        accesses.append(([ELEMENT * p for p in place], 16))
    return part("own strips cleared", WARPS * accesses)


def clear_other(layout: Layout) -> Part:
    accesses = []
    for warp in range(WARPS):
        for n in range(8):
            place = []
            for lane in LANES:
                row, column = (32 * warp + lane) // 2, lane % 2 * 8 + n
                moved = 0 if column <= 15 - row % 16 else layout.block_m
                place.append(row * layout.other_pitch + column + moved)
            accesses.append(([ELEMENT * p for p in place], 2))
    return part("other strips cleared", accesses)


def band_gradients(layout: Layout) -> Part:
    """add_band_gradients of side_kernel."""
    steps, pitch = layout.steps, layout.own_pitch
    accesses: list[Access] = []
    for warp in range(WARPS):
        for k in range(layout.own_blocks):
            shifts = [16 * k + n % 8 + n // 16 * 8 for n in LANES]
            place = [shift * pitch + n // 8 % 2 * 8 for n, shift in zip(LANES, shifts, strict=True)]
            accesses.append(([ELEMENT * p for p in place], 16))
            accesses += [layout.b_of_rows(16 * (warp + k), 16 * n) for n in range(steps)]
    code = layout.own_blocks * steps * 2
    return part(
        "own gradients times band",
        accesses,
        mma=WARPS * code,
        code_mma=code,
        code_ldmatrix=layout.own_blocks * (steps + 1),
    )


def column_statistics(keys: bool) -> Iterator[Part]:
    """Shift and delta of a tile's queries, where these are columns."""
    if keys:
        stores: list[Access] = [([4 * (32 * w + n) for n in LANES], 4) for w in range(WARPS)]
        loads: list[Access] = [
            ([4 * (8 * n + lane % 4 * 2 + c) for lane in LANES], 4)
            for n in range(8)
            for c in range(2)
        ]
        yield part("statistics of queries", stores + 2 * WARPS * loads)


def side_tile(keys: bool, near: bool, layout: Layout = Layout(1)) -> Iterator[Part]:  # noqa: B008
    """side_kernel: 64 x 64 scores; a far tile is what it takes without position terms."""
    yield from copies(layout, 2, near)
    yield from column_statistics(keys)
    yield transposed_product(layout, "scores")
    if near:
        yield other_products(layout)
        yield own_products(layout)
        yield from terms(layout, "read")
    yield softmax(layout, forward=False)
    if keys:
        yield product(layout, "gradient of values")
    yield transposed_product(layout, "gradients of probabilities")
    if near:
        yield clear_own(layout)
        yield part("own gradients written", WARPS * list(diagonals(own_place(layout))))
        yield band_gradients(layout)
    yield product(layout, "gradients of own rows")


def gathered(layout: Layout, own: bool) -> Part:
    """gather of table_kernel, by shifts: each warp takes two blocks of 16 of these."""
    pitch, steps = layout.own_pitch if own else layout.other_pitch, layout.steps
    accesses: list[Access] = []
    for shifts in range(2 * WARPS):
        for strip in range(BLOCK_N // 16):
            block = shifts - (strip if own else 3 - strip)
            if 0 <= block < layout.own_blocks:
                if own:
                    first = strip * layout.own_strip + 16 * block * pitch
                    place = [first + n % 16 * pitch + n // 16 * 8 for n in LANES]
                else:
                    first = 16 * strip * pitch + 16 * block
                    place = [first + (n % 8 + n // 16 * 8) * pitch + n // 8 % 2 * 8 for n in LANES]
                accesses.append(([ELEMENT * p for p in place], 16))
                accesses += [layout.b_of_rows(16 * strip, 16 * n) for n in range(steps)]
    blocks = len(accesses) // (steps + 1)
    return part(
        f"{'own' if own else 'other'} gradients gathered",
        accesses,
        mma=blocks * steps * 2,
        code_mma=2 * steps * 2,  # a loop over strips for each half of the shifts
        code_ldmatrix=2 * (steps + 1),
    )


def table_tile(layout: Layout = Layout(1)) -> Iterator[Part]:  # noqa: B008
    """table_kernel: 64 x 64 scores of a near tile; its bands stay."""
    yield from copies(layout, 4, near=False)
    yield other_products(layout, held=False)
    yield own_products(layout)
    yield transposed_product(layout, "scores", rows_in_registers=False, extra=layout.steps)
    yield from terms(layout, "read")
    yield transposed_product(layout, "gradients of probabilities", rows_in_registers=False)
    yield softmax(layout, forward=False)
    yield clear_own(layout)
    yield clear_other(layout)
    yield from terms(layout, "written")
    yield gathered(layout, own=True)
    yield gathered(layout, own=False)


def forward_shared_bytes(layout: Layout) -> int:
    """Forward::kSharedBytes: what the layout above takes, to hold against the compiled kernel's."""
    return 2 * layout.tile_bytes + 2 * layout.ring_bytes + layout.strip_bytes


def side_shared_bytes(layout: Layout = Layout(1)) -> int:  # noqa: B008
    statistics = 2 * BLOCK_N * 4
    return forward_shared_bytes(layout) + statistics


def table_shared_bytes(layout: Layout = Layout(1)) -> int:  # noqa: B008
    return forward_shared_bytes(layout) + 2 * layout.tile_bytes
