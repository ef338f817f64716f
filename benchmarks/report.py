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
    ours, unit = infos[0]["ours"], infos[0]["unit"]
    left_out = {k: v for info in infos for k, v in info.get("left_out", {}).items()}
    names = [name for info in infos for name in (*info["values"], *info.get("left_out", {}))]
    rivals = [name for name in dict.fromkeys(names) if name != ours]
    more = [key for key in MORE if any(key in info for info in infos)]
    header = ["", f"{ours}, {unit}", *rivals, *(MORE[key] for key in more)]
    yield row(header)
    yield row(["---"] * len(header))
    for benchmark, info in zip(benchmarks, infos, strict=True):
        ratios = [info["ratio_to_ours"].get(name) for name in rivals]
        yield row(
            [
                case(benchmark),
                f"{info['values'][ours]:.3g}",
                *("-" if ratio is None else f"{ratio:.2f}x" for ratio in ratios),
                *(text(info.get(key, "-")) for key in more),
            ]
        )
    if left_out:
        yield ""
    for name, reason in left_out.items():
        yield f"- {name} (-): {reason}"


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
