"""The CUDA kernels of attention, run by csrc/simt, under every tool; and what bugs in them do."""

import re
from pathlib import Path

import pytest
from simt import mutants
from simt.toolchain import CSRC, SOURCES, build, run

pytestmark = pytest.mark.simulated

ORDERS = ["forward", "reverse", "random:1"]
CASES = re.findall(r'^ +\{"(\w+)",\s+\d', (SOURCES / "attention.cpp").read_text(), re.M)
SMALL = [case for case in CASES if case.startswith("small_")]


def attention(tool: str, csrc: Path = CSRC) -> Path:
    """The program of tests/simt/attention.cpp, with the kernels of `csrc`."""
    kernels = SOURCES / "attention_kernels.cpp"
    types = ("__half", "__nv_bfloat16")
    parts = [(kernels, [f"-DELEMENT={element}"]) for element in types]
    return build("attention.cpp", tool, *parts, (csrc / "cuda/attention.cu", []), csrc=csrc)


def assert_right(tool: str, case: str, order: str) -> None:
    done = run(tool, attention(tool), case, FASTDEBERTA_SIMT_ORDER=order)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{case}: right\n", "")


def test_program_lists_its_cases():
    assert run("plain", attention("plain")).stdout.split() == CASES
    assert len(SMALL) == 5


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("case", CASES)
def test_results(case, order):
    assert_right("plain", case, order)


@pytest.mark.parametrize("case", CASES)
def test_asan(case):
    assert_right("asan", case, "forward")


# TSan knows what is ordered, whatever the order: one case more shows that.
@pytest.mark.parametrize("case,order", [*((c, "forward") for c in SMALL), (SMALL[0], "random:1")])
def test_tsan(case, order):
    assert_right("tsan", case, order)


@pytest.mark.parametrize("case", SMALL)
def test_valgrind(case):
    assert_right("valgrind", case, "forward")


def notice(tool: str, mutant: mutants.Mutant, cases: list[str]) -> int:
    """The exit status of the first case that fails with the bug, or 0."""
    program = attention(tool, mutants.write())
    done = (run(tool, program, case, MUTANT=str(mutant.number)) for case in cases)
    return next((one.returncode for one in done if one.returncode), 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "mutant",
    # What only TSan notices is below.
    [one for one in mutants.MUTANTS if one.tool not in (None, "tsan")],
    ids=lambda mutant: mutant.name,
)
def test_mutants_are_noticed(mutant):
    """Each bug of simt/mutants.py makes some case fail, for the tool that knows it."""
    assert mutant.tool != "missing", "simt/mutants.py looks for what the kernels no longer have"
    status = notice(mutant.tool, mutant, SMALL + [case for case in CASES if case not in SMALL])
    # Without a tool, what is overrun may crash the program.
    assert status in ([9] if mutant.tool == "valgrind" else [3, 4, -6, -11]), "nothing fails"


@pytest.mark.slow
@pytest.mark.parametrize(
    "mutant",
    [one for one in mutants.MUTANTS if one.tool and "without __sync" in one.name],
    ids=lambda mutant: mutant.name,
)
def test_tsan_reports_missing_barriers(mutant):
    assert notice("tsan", mutant, SMALL) == 66
