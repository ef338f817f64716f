"""Tables in Markdown from a file of --benchmark-json.

python -m benchmarks.report FILE...
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Columns beside the rivals': keys of extra_info.
MORE = {
    "limit_ms": "limit, ms",
    "share_of_limit": "share of limit",
    "share_of_tokens": "share of tokens",
    "tokens_per_second": "tokens/s",
    "mebibytes": "MiB",
    "cores_busy_elsewhere": "cores busy elsewhere",
}


def report(results: dict[str, Any]) -> Iterator[str]:
    """The lines of a report: the machine, then one table for each group of benchmarks."""
    machine, commit = results["machine_info"], results["commit_info"]
    versions = ", ".join(f"{k} {v}" for k, v in machine["versions"].items())
    changed = " with changes" if commit["dirty"] else ""
    allocator = "keeps freed memory" if machine["warm_allocator"] else "as it comes"
    cpu = machine["cpu"]
    name = f"{cpu['brand_raw']} (family {cpu.get('family', '?')}, model {cpu.get('model', '?')})"
    if "device" in machine:
        yield f"{machine['device']}."
    yield f"{name}, {machine['threads']} threads; malloc {allocator}."
    yield f"{versions}, Python {machine['python_version']}."
    yield f"Commit {commit['id'][:12]}{changed}, {results['datetime'][:10]}."
    groups: dict[str, list[dict[str, Any]]] = {}
    for benchmark in results["benchmarks"]:
        if "values" in benchmark["extra_info"]:
            groups.setdefault(benchmark["group"], []).append(benchmark)
    for group, benchmarks in groups.items():
        yield from ("", f"## {group[0].upper()}{group[1:]}", "", *table(benchmarks))


def table(benchmarks: list[dict[str, Any]]) -> Iterator[str]:
    """Ours in its unit, and each rival as a multiple of it: above 1, ours is better."""
    infos = [b["extra_info"] for b in benchmarks]
    ours, unit, rivals = infos[0]["ours"], infos[0]["unit"], contestants(infos)
    more = [key for key in MORE if any(key in info for info in infos)]
    header = ["", f"{ours}, {unit}", *rivals, *(MORE[key] for key in more)]
    yield row(header)
    yield row(["---"] * len(header))
    for benchmark, info in zip(benchmarks, infos, strict=True):
        others = [text(info.get(key, "-")) for key in more]
        yield row([case(benchmark), f"{info['values'][ours]:.3g}", *ratios(info, rivals), *others])
    remarks = list(footnotes(benchmarks))
    if remarks:
        yield ""
    yield from remarks


def short(benchmarks: list[dict[str, Any]]) -> Iterator[str]:
    """The same of several groups at once, for a terminal."""
    infos = [b["extra_info"] for b in benchmarks]
    rivals = contestants(infos)
    lines = [["", infos[0]["ours"], *rivals]]
    for benchmark, info in zip(benchmarks, infos, strict=True):
        ours = f"{info['values'][info['ours']]:.3g} {info['unit']}"
        lines.append([benchmark["param"].replace("-", " "), ours, *ratios(info, rivals)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for first, *others in lines:
        cells = (cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))
        yield "  ".join([first.ljust(widths[0]), *cells])
    yield from footnotes(benchmarks)


def contestants(infos: list[dict[str, Any]]) -> list[str]:
    """Names of all rivals, in the order of their first appearance."""
    names = [name for info in infos for name in (*info["values"], *info.get("left_out", {}))]
    return [name for name in dict.fromkeys(names) if name != infos[0]["ours"]]


def ratios(info: dict[str, Any], rivals: list[str]) -> list[str]:
    found = [info["ratio_to_ours"].get(name) for name in rivals]
    return ["-" if ratio is None else f"{ratio:.2f}x" for ratio in found]


def footnotes(benchmarks: list[dict[str, Any]]) -> Iterator[str]:
    """Why rivals are left out, and which results differ from ours."""
    infos = [b["extra_info"] for b in benchmarks]
    left_out = {k: v for info in infos for k, v in info.get("left_out", {}).items()}
    for name, reason in left_out.items():
        yield f"- {name} (-): {reason}"
    for benchmark, info in zip(benchmarks, infos, strict=True):
        for name, error in info.get("differs", {}).items():
            share = f"{error} of our largest value"
            yield f"- {name}, {benchmark['param'].replace('-', ' ')}: differs by up to {share}"


def case(benchmark: dict[str, Any]) -> str:
    """What tells a benchmark from others of its group."""
    known = benchmark["group"].split(", ")
    return " ".join(part for part in benchmark["param"].split("-") if part not in known)


def text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k}: {v}" for k, v in value.items())
    return str(value)


def row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main(*files: str) -> None:
    for file in files:
        print(f"# {Path(file).stem}\n")
        print(*report(json.loads(Path(file).read_text())), sep="\n", end="\n\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
