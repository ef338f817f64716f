"""benchmarks.cuda_resources and what it stands on: wavefronts, occupancy, ptxas output, limits.

No kernel is compiled here: the counts that a compiler would make are made up.
"""

import itertools
from collections import Counter

import pytest

from benchmarks import cuda_cost, cuda_resources
from benchmarks.cuda_calls import A100, H100, Call, Launch, Tiles
from benchmarks.cuda_cost import Layout, wavefronts
from benchmarks.cuda_resources import Assembled, Code, Kernel, Variant, blocks_that_fit

FORWARD = (
    "_ZN11fastdeberta4cuda14forward_kernelI13__nv_bfloat16Li64ELi{}ELb{}EEEvNS_15AttentionParamsE"
)
KEYS = (
    "_ZN11fastdeberta4cuda11side_kernelILNS0_4SideE1E6__halfLi128ELb1EEEvNS_15AttentionParamsE"
    "NS0_9WorkspaceE"
)
DELTA = "_ZN11fastdeberta4cuda12delta_kernelI6__halfEEvNS_15AttentionParamsENS0_9WorkspaceE"

LOG = f"""\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '{FORWARD.format(1, 1)}' for 'sm_80'
ptxas info    : Function properties for {FORWARD.format(1, 1)}
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 188 registers, used 1 barriers, 656 bytes cmem[0]
ptxas info    : Compile time = 448.465 ms
ptxas info    : Compiling entry function '{KEYS}' for 'sm_80'
ptxas info    : Function properties for {KEYS}
    32 bytes stack frame, 36 bytes spill stores, 60 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 32 bytes cumulative stack size
"""


@pytest.mark.parametrize(
    ("addresses", "width", "expected"),
    [
        ([4 * n for n in range(32)], 4, 1),  # every lane its bank
        ([0] * 32, 4, 1),  # one word for all
        ([8 * n for n in range(32)], 4, 2),  # sixteen banks, two words each
        ([128 * n for n in range(32)], 4, 32),  # one bank
        ([2 * n for n in range(32)], 2, 1),  # two lanes a word
        ([130 * n for n in range(32)], 2, 2),  # sixteen banks, two words each
        ([16 * n for n in range(32)], 16, 4),  # eight lanes a phase
        ([128 * n for n in range(32)], 16, 32),  # ldmatrix without a swizzle
        ([144 * n for n in range(32)], 16, 4),  # its rows padded by one chunk
    ],
)
def test_wavefronts(addresses, width, expected):
    assert wavefronts(addresses, width) == expected


def test_operands_of_tiles_have_no_conflicts():
    for head_dim in (32, 64):
        layout = Layout(1, head_dim)
        for operand in (layout.a, layout.b, layout.b_of_rows):
            for column in range(0, head_dim, 16):
                assert wavefronts(*operand(16, column)) == 4
        assert all(wavefronts(*access) == 4 for access in layout.copy(64))


def test_wavefronts_of_the_swizzle_are_not_taken_for_granted():
    class Plain(Layout):
        def offset(self, row, chunk):
            return 2 * (row * self.head_dim + chunk * 8)

    assert wavefronts(*Plain(1).b(0, 0)) == 32


@pytest.mark.parametrize("tiles", [1, 2])
def test_terms_lie_on_diagonals(tiles):
    """Score (x, y) finds x - y above x in the own strip, and in row y of the other side's."""
    layout = Layout(tiles)
    own = cuda_cost.own_place(layout)
    for tile in range(4 * tiles):
        other = cuda_cost.other_place(layout, tile)
        for lane, n, c in itertools.product(range(32), range(8), range(4)):
            x, y = lane // 4 + c // 2 * 8, 8 * n + lane % 4 * 2 + c % 2
            assert own(lane, n, c) == (64 + x - y) * layout.own_pitch + x
            assert other(lane, n, c) == y * layout.other_pitch + 16 + 16 * tile + x - y % 16


@pytest.mark.parametrize("tiles", [1, 2])
def test_near_tiles_of_the_forward_kernel_have_no_conflicts(tiles):
    parts = list(cuda_cost.forward_tile(Layout(tiles), near=True))
    assert {part.name: part.conflicts for part in parts if part.conflicts} == {}


def test_a_pitch_of_whole_chunks_alone_would_have_conflicts():
    class Tight(Layout):
        @property
        def own_pitch(self):
            return 16

    assert cuda_cost.own_products(Tight(1)).conflicts > 0
    assert not cuda_cost.own_products(Layout(1)).conflicts


@pytest.mark.parametrize("tiles", [1, 2])
def test_a_block_reads_each_row_of_the_other_ring_once(tiles):
    layout = Layout(tiles)
    ring = layout.ring_bytes // 128
    held, fetched = (cuda_cost.other_products(layout, held) for held in (True, False))
    pairs = 4 * layout.other_blocks  # strips and the blocks of shifts that they meet
    stores = 4 * pairs
    assert held.wavefronts == ring + stores
    # 16 rows of 16 elements are four wavefronts.
    assert fetched.wavefronts == held.wavefronts + pairs * layout.steps * 4
    assert held.mma == fetched.mma == pairs * layout.steps * 2


def test_plain_tile_is_what_arithmetic_says():
    plain = cuda_cost.plain_tile(1)
    assert plain.matrix == 2 * 64 * 64 * 64 / 1024
    # Every warp reads 16 KiB of keys and values, and once they are copied.
    assert plain.shared == (4 + 1) * 16384 / 128
    assert plain.special == (64 * 64 + 64 * 4) / 16
    assert plain.bound == plain.shared
    assert plain.conflicts == 0


def test_faster_products_leave_shared_memory_as_the_bound():
    near, plain = cuda_cost.total(cuda_cost.forward_tile(Layout(2), True)), cuda_cost.plain_tile(2)
    assert near.bound == near.matrix
    assert cuda_cost.ratios(2, matrix_rate=2)[0] == near.shared / plain.shared


@pytest.mark.parametrize("tiles", [1, 2])
def test_near_tiles_multiply_bands_too(tiles):
    layout = Layout(tiles)
    near, far = (cuda_cost.total(cuda_cost.forward_tile(layout, n)) for n in (True, False))
    bands = (layout.block_m * 80 + 64 * (layout.block_m + 16)) * 64
    assert near.matrix - far.matrix == bands / 1024
    assert near.exponentials == far.exponentials
    assert near.shared > 2 * far.shared


def test_two_large_blocks_fit_where_the_launcher_takes_them():
    for device, target, fit in ((A100, "sm_80", 1), (H100, "sm_90", 2)):
        gpu = cuda_resources.GPUS[target]
        assert gpu.shared << 10 == device.shared_bytes
        shared = cuda_cost.forward_shared_bytes(Layout(2))
        assert blocks_that_fit(gpu, 255, 128, shared) == fit
        # choose_forward's own condition
        assert (2 * (shared + 1024) <= device.shared_bytes) == (fit == 2)


@pytest.mark.parametrize(
    ("target", "registers", "shared", "blocks"),
    [
        ("sm_90", 168, 0, 3),  # three warps of 5376 registers in each quarter of 16384
        ("sm_90", 169, 0, 2),
        ("sm_90", 32, 0, 16),  # all 64 warps
        ("sm_86", 32, 0, 12),  # all 48
        ("sm_90", 32, 75 * 1024, 3),  # with 1 KiB reserved for each: 228
        ("sm_90", 32, 75 * 1024 + 1, 2),
        ("sm_80", 32, 81 * 1024, 2),
        ("sm_80", 32, 163 * 1024, 1),
        ("sm_80", 32, 163 * 1024 + 1, 0),
    ],
)
def test_blocks_that_fit(target, registers, shared, blocks):
    assert blocks_that_fit(cuda_resources.GPUS[target], registers, 128, shared) == blocks


def test_output_of_ptxas():
    assert cuda_resources.parse_ptxas(LOG) == {
        FORWARD.format(1, 1): Assembled(188, 0, 0, 0),
        KEYS: Assembled(255, 32, 36, 60),
    }


def test_variants_are_read_from_symbols():
    near = Variant("forward_kernel, 32 rows a warp", "bfloat16", 64, True)
    assert Variant.of(FORWARD.format(2, 1)) == near
    assert Variant.of(FORWARD.format(1, 0)).positions is False
    assert Variant.of(KEYS) == Variant("side_kernel of keys", "float16", 128, True)
    assert Variant.of(DELTA) == Variant("delta_kernel", "float16")
    with pytest.raises(ValueError, match="no kernel of csrc/cuda: _Z3foov"):
        Variant.of("_Z3foov")


def test_dead_loads_do_not_count():
    class Line:
        def __init__(self, kind, operands):
            self.kind, self.operands = kind, operands

    lines = [Line("LDS", "RZ, [RZ]"), Line("LDS", "R1, [R2]"), Line("HMMA", "R4, R4")]
    assert cuda_resources.count(lines) == Counter({"all": 2, "LDS": 1, "HMMA": 1})


def kernel(registers=188, spills=0, shared=75776, hmma=136, ldsm=56, symbol=None, target="sm_90"):
    return Kernel(
        target,
        Variant.of(symbol or FORWARD.format(1, 1)),
        Launch(1, 128, shared),
        Assembled(registers, 0, spills, spills),
        Code(Counter(), Counter(HMMA=hmma, LDSM=ldsm)),
    )


@pytest.mark.parametrize(
    ("past", "message"),
    [
        ({"spills": 4}, "4 bytes spilled, limit 0"),
        ({"registers": 201}, "201 registers, limit 200"),
        ({"shared": 228 << 10}, "233472 bytes of shared memory do not fit a block"),
        ({"shared": 114 << 10}, "1 blocks a multiprocessor, wanted 2"),
        ({"symbol": KEYS, "spills": 101}, "101 bytes spilled, limit 100"),
    ],
)
def test_resources_past_a_limit_are_reported(past, message):
    assert not list(cuda_resources.past_resources([kernel()]))
    assert not list(cuda_resources.past_resources([kernel(symbol=KEYS, spills=100)]))
    found = list(cuda_resources.past_resources([kernel(**past)]))
    assert found[0].startswith("sm_90: ")
    assert message in found[0]


def test_spills_have_limits_by_target():
    def past(target, spills):
        one = kernel(symbol=KEYS, spills=spills, target=target)
        return list(cuda_resources.past_resources([one]))

    assert not past("sm_80", 76)
    assert "77 bytes spilled, limit 76" in past("sm_80", 77)[0]
    assert not past("sm_86", 100)  # has no limit of its own


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"hmma": 128}, "128 HMMA in the loop, the cost model has 136"),
        ({"ldsm": 60}, "60 LDSM in the loop, the cost model has 56"),
        ({"shared": 71680}, "71680 bytes of shared memory, the cost model has 75776"),
        ({"symbol": FORWARD.format(1, 0)}, "136 HMMA in the loop, the cost model has 64"),
    ],
)
def test_code_that_the_cost_model_does_not_describe_is_reported(other, message):
    assert not list(cuda_resources.past_model([kernel()], cuda_resources.costs()))
    found = list(cuda_resources.past_model([kernel(**other)], cuda_resources.costs()))
    assert message in found[0]


def test_ratios_past_a_limit_are_reported():
    assert not list(cuda_resources.past_ratios())
    near = list(cuda_resources.past_ratios(near={16: 1.5, 32: 1.5}, far=10))
    assert [line.split(":")[0] for line in near] == [
        "forward_kernel, 16 rows a warp",
        "forward_kernel, 32 rows a warp",
    ]
    assert all("a near tile takes" in line and "limit 1.5" in line for line in near)
    assert any("a far tile" in line for line in cuda_resources.past_ratios(far=0.5))


def test_the_goal_holds_with_32_rows_a_warp_and_is_missed_with_16():
    limits = cuda_resources.NEAR
    assert limits[32] == cuda_resources.GOAL
    small, large = (cuda_cost.ratios(tiles)[0] for tiles in (1, 2))
    assert large <= cuda_resources.GOAL < small <= limits[16] < small + 0.1


def call(batch=2, heads=12, length=2048):
    blocks = length // 64
    return Call(
        A100,
        batch,
        heads,
        length,
        {FORWARD.format(1, 1): Launch(batch * heads * blocks, 128, 75776)},
        {},
        {("queries", 64): Tiles(near=10, far=20, runs=5, bands=3)},
        statistics=0,
        far=0,
        near=0,
    )


def test_bytes_of_a_forward_call():
    one, row = call(), 128  # bytes of a row of a head
    content = 4 * 2 * 12 * 2048 * row
    assert one.rows_of_block == 64
    assert one.forward_memory() == content + 4 * 2 * 12 * 2048 + 2 * 512 * 12 * row
    # Own rows and two tiles of the other side; near tiles bring 64 rows of two tables each, and
    # the first of a block the rest of its bands.
    asked = (5 * 64 + (10 + 20) * 2 * 64 + 2 * (10 * 64 + 3 * 64)) * row
    assert one.forward_cache() == 2 * 12 * asked + content // 4 + 4 * 2 * 12 * 2048


def test_megabytes_past_a_limit_are_reported(monkeypatch):
    assert not list(cuda_resources.past_memory([call()]))
    monkeypatch.setitem(cuda_resources.MEGABYTES, (2, 12, 2048), 25)
    (found,) = cuda_resources.past_memory([call()])
    assert found == "A100, forward, (2, 12, 2048): 26.9 MB, limit 25"


@pytest.mark.parametrize("failures", [[], ["something"]])
def test_check_has_a_status(monkeypatch, capsys, failures):
    monkeypatch.setattr(cuda_resources, "missing", lambda: None)
    monkeypatch.setattr(cuda_resources, "collect", lambda targets: ([], []))
    monkeypatch.setattr(cuda_resources, "report", lambda kernels, calls: [])
    monkeypatch.setattr(cuda_resources, "violations", lambda kernels, calls: failures)
    monkeypatch.setattr("sys.argv", ["cuda_resources", "--check"])
    assert cuda_resources.main() == len(failures)
    assert capsys.readouterr().out == "".join(f"{line}\n" for line in failures)


def without(monkeypatch, what, tmp_path):
    """A machine that lacks nvcc, or a program that disassembles, or the package that has one."""
    if what == "nvcc":
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.delenv("CUDA_HOME", raising=False)
        monkeypatch.delenv("CUDA_PATH", raising=False)
        return
    monkeypatch.setattr(cuda_resources, "find_cuda", lambda: tmp_path)

    def disassembler():
        if what == "triton":
            raise ModuleNotFoundError("No module named 'triton'")
        return str(tmp_path / "cuobjdump")

    monkeypatch.setattr(cuda_resources, "disassembler", disassembler)


@pytest.mark.parametrize("what", ["nvcc", "cuobjdump", "triton"])
def test_check_passes_where_nothing_can_be_compiled(monkeypatch, capsys, tmp_path, what):
    without(monkeypatch, what, tmp_path)
    monkeypatch.setattr("sys.argv", ["cuda_resources", "--check"])
    assert cuda_resources.main() == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("nothing checked: ")
    assert what in line


@pytest.mark.parametrize("what", ["nvcc", "cuobjdump", "triton"])
def test_a_report_needs_the_compiler(monkeypatch, capsys, tmp_path, what):
    without(monkeypatch, what, tmp_path)
    out = tmp_path / "report.md"
    monkeypatch.setattr("sys.argv", ["cuda_resources", "--check", "--out", str(out)])
    with pytest.raises(SystemExit) as end:
        cuda_resources.main()
    assert end.value.code == 1
    assert what in capsys.readouterr().err
    assert not out.exists()
