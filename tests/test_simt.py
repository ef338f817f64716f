"""csrc/simt runs CUDA kernels on the CPU: it does what a GPU does, and bugs do not pass unseen."""

import re

import numpy as np
import pytest
from simt.toolchain import BUILD, SOURCES, TOOLS, build, compile_once, cuda_home, run

pytestmark = pytest.mark.simulated

ORDERS = ["forward", "reverse", "random:1"]
PRIMITIVES = re.findall(r'^ +{"(\w+)", test_', (SOURCES / "primitives.cpp").read_text(), re.M)

# Kernels of bugs.cpp that no tool may complain about: each has a twin there with a bug.
CORRECT = ["multiply", "barrier", "syncwarp", "copy", "refill", "rows", "initialised", "atomics"]
CORRECT += ["read_then_write", "read_then_write_in_warp"]

HERE = r"bugs\.cpp:\d+, thread \(\d+,0,0\) of block \(0,0,0\)"
ERRORS = {
    "copy_left_in_flight": f"exits before it has waited for its cp.async at .*{HERE}",
    "misaligned_source": f"misaligned source of cp.async at .*{HERE}",
    "misaligned_rows": f"misaligned shared address at .*{HERE}",
    "rows_outside": f"address outside of shared memory at .*{HERE}",
    "diverged_shuffle": "deadlock in block .* 64 threads wait at .*<one half> .*warp collective.*"
    " 64 threads wait at .*<the other> .*barrier.* 0 have exited",
    "two_shuffles": "another warp collective at .*(<odd> .*<even>|<even> .*<odd>), thread",
    "two_barriers": "another barrier at .*(<first> .*<second>|<second> .*<first>), thread",
    "barrier_of_two_sizes": f"barrier with another number of threads at .* others wait at .*{HERE}",
    "barrier_of_half_warps": "a barrier that part of a warp skips at",
    "barrier_missing_a_warp": "deadlock in block .* 96 threads wait at .*barrier.* 32 have exited",
    "mask_without_self": f"a lane is not in the mask that it gives at .*{HERE}",
    "mask_with_exited": "deadlock in block .* 4 have exited|a mask names lanes that have exited",
    "shared_overrun": r"block \(0,0,0\) wrote outside its shared memory",
    "shared_underrun": r"block \(0,0,0\) wrote outside its shared memory",
    "too_much_shared": "232449 bytes of shared memory, of which a block has 232448 at most",
}
# What each tool says of kernels whose results may well be right.
REPORTS = {
    "asan": {
        "shared_overrun": "AddressSanitizer: use-after-poison(.|\n)* in write_shared",
        "shared_underrun": "AddressSanitizer: use-after-poison(.|\n)* in write_shared",
        "global_overrun": "AddressSanitizer: heap-buffer-overflow(.|\n)* in write_global",
        "overflow": r"bugs\.cpp:\d+:\d+: runtime error: signed integer overflow",
        "misaligned_vector": r"bugs\.cpp:\d+:\d+: runtime error: .* misaligned address",
    },
    "tsan": {
        "no_barrier": "pass_on",
        "no_syncwarp": "pass_in_warp",
        "write_while_read": "write_while_read",
        "write_while_read_in_warp": "write_while_read",
        "copy_no_wait": "copy_tile",
        "copy_no_barrier": "copy_tile",
        "refill_no_barrier": "fill_again",
        "race_in_block": "add_plainly",
        "race_between_blocks": "add_plainly",
    },
    "valgrind": {
        "uninitialised": r"depends on uninitialised value(.|\n)* branch_on_shared",
        "shared_overrun": r"Invalid write of size 4\n.* write_shared",
    },
}


def with_lines(pattern: str) -> str:
    """Puts in place of <text> the line of bugs.cpp that ends in this text."""
    lines = (SOURCES / "bugs.cpp").read_text().splitlines()

    def line(match: re.Match) -> str:
        [number] = [i for i, text in enumerate(lines, 1) if text.endswith(f": {match[1]}")]
        return rf"bugs\.cpp:{number}\b"

    return re.sub("<(.+?)>", line, pattern)


@pytest.mark.parametrize("name", PRIMITIVES)
def test_primitives(name):
    program = build("primitives.cpp")
    for order in ORDERS:
        done = run("plain", program, name, FASTDEBERTA_SIMT_ORDER=order)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("tool", TOOLS)
def test_correct_kernels_pass(tool):
    program = build("bugs.cpp", tool)
    for order in ORDERS:
        done = run(tool, program, *CORRECT, FASTDEBERTA_SIMT_ORDER=order)
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.split("\n") == [*(f"{name}: right" for name in CORRECT), ""]
        assert done.stderr == ""


@pytest.mark.parametrize(
    "name", ["no_barrier", "copy_no_wait", "copy_no_barrier", "refill_no_barrier"]
)
@pytest.mark.parametrize("order", ORDERS)
def test_results_are_wrong_in_every_order(name, order):
    done = run("plain", build("bugs.cpp"), name, FASTDEBERTA_SIMT_ORDER=order)
    assert (done.returncode, done.stdout) == (3, f"{name}: wrong\n")


@pytest.mark.parametrize("name", ERRORS)
def test_launches_fail(name):
    program = build("bugs.cpp")
    for order in ORDERS:
        done = run("plain", program, name, FASTDEBERTA_SIMT_ORDER=order)
        assert done.returncode == 4, done.stdout + done.stderr
        assert re.search(with_lines(ERRORS[name]), done.stdout), done.stdout


@pytest.mark.parametrize(
    ("tool", "name"), [(tool, name) for tool, reports in REPORTS.items() for name in reports]
)
def test_tools_report(tool, name):
    done = run(tool, build("bugs.cpp", tool), name)
    pattern = REPORTS[tool][name]
    if tool == "tsan":
        pattern = rf"data race(.|\n)* {pattern}(.|\n)*CUDA thread \(\d+,0,0\) of block"
    assert re.search(pattern, done.stderr), done.stdout + done.stderr
    assert done.returncode == {"asan": 1, "tsan": 66, "valgrind": 9}[tool]


def conformance(program, tmp_path, **environment) -> tuple[np.ndarray, np.ndarray]:
    """The exact words, and the floats, that conformance.cu comes to."""
    done = run("plain", program, tmp_path / "out", **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    data = np.fromfile(tmp_path / "out", np.uint32)
    words, floats = data[:2]
    assert len(data) == 2 + words + floats
    return data[2 : 2 + words], data[2 + words :].view(np.float32)


def test_conformance_program_is_deterministic(tmp_path):
    program = build("conformance.cu")
    words, floats = conformance(program, tmp_path, FASTDEBERTA_SIMT_ORDER="forward")
    assert len(set(words)) > 1000
    assert not np.isnan(floats).any()
    for order in ORDERS[1:]:
        others = conformance(program, tmp_path, FASTDEBERTA_SIMT_ORDER=order)
        np.testing.assert_array_equal(others[0], words)
        np.testing.assert_array_equal(others[1], floats)


def nvcc() -> list[str]:
    home = cuda_home()
    if home is None or not (home / "bin/nvcc").exists():
        pytest.skip("there is no nvcc")
    return [str(home / "bin/nvcc"), "-std=c++17", "-O1", "-Werror=all-warnings"]


def test_ptx_compiles():
    source = SOURCES / "conformance.cu"
    for target in ("80", "90"):
        command = [*nvcc(), f"-gencode=arch=compute_{target},code=sm_{target}", "-c", str(source)]
        compile_once(BUILD / f"conformance-sm{target}.o", command, [source])


@pytest.mark.gpu
def test_gpu_agrees(tmp_path):
    source = SOURCES / "conformance.cu"
    command = [*nvcc(), "-arch=native", str(source)]
    program = compile_once(BUILD / "conformance-native.exe", command, [source])
    words, floats = conformance(program, tmp_path)
    host_words, host_floats = conformance(build("conformance.cu"), tmp_path)
    np.testing.assert_array_equal(words, host_words)
    products, powers = floats[:-4096], floats[-4096:]
    # Sums of 17 terms of at most 1, which tensor cores cut off where float32 rounds.
    np.testing.assert_allclose(products, host_floats[:-4096], rtol=0, atol=2e-5)
    # 2 ulp by PTX's word, half of one by the C library; results next to the smallest may be zero.
    np.testing.assert_allclose(powers, host_floats[-4096:], rtol=2**-21, atol=2**-126)
