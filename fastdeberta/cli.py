"""fastdeberta <command>. Exit status: 0 success, 2 wrong usage or bad input, 1 failure."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

try:
    import typer
except ImportError:
    sys.exit("fastdeberta: the command line needs more packages: pip install 'fastdeberta[train]'")

app = typer.Typer(
    name="fastdeberta",
    help="DeBERTa and ELECTRA on fused disentangled attention.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...")]


@app.command()
def info(as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False) -> None:
    """Versions, devices, backends with reasons, build flags."""
    from .info import collect, render

    values = collect()
    print(json.dumps(values, indent=2) if as_json else render(values))


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="where to write the report and the models")] = Path(
        "runs/demo"
    ),
    minutes: Annotated[float, typer.Option(help="time for the whole demo")] = 10.0,
    seed: Annotated[int, typer.Option(help="of everything random")] = 0,
) -> None:
    """The main job on the embedded text: parity, pre-training, fine-tuning, a report."""
    from .demo import run

    run(out, minutes, seed)


def _list_presets(wanted: bool) -> None:
    if wanted:
        from .pretraining import presets

        print("\n".join(presets.names()))
        raise typer.Exit


@app.command()
def pretrain(
    config: Annotated[Path, typer.Argument(help="YAML file, or a preset's name; see README")],
    overrides: Overrides = None,
    miniature: Annotated[
        bool,
        typer.Option(
            "--miniature", help="the preset's algorithm at a size for minutes on two cores"
        ),
    ] = False,
    list_presets: Annotated[
        bool,
        typer.Option(
            "--list-presets", help="print their names", is_eager=True, callback=_list_presets
        ),
    ] = False,
) -> None:
    """Pre-trains a generator and a discriminator on text; continues an interrupted run."""
    from .pretraining.presets import pretraining_values
    from .pretraining.settings import PretrainSettings
    from .pretraining.task import pretrain as run
    from .training.reporting import default_progress
    from .training.settings import apply_overrides, build

    values = apply_overrides(pretraining_values(config, miniature), overrides or [])
    settings = build(PretrainSettings, values)
    result = run(settings, default_progress())
    _summary(result, settings.output)


@app.command()
def prepare(
    config: Annotated[Path, typer.Argument(help="YAML file, or a preset's name; see README")],
    overrides: Overrides = None,
) -> None:
    """Tokenises text into shards that pre-training reads; continues an interrupted run."""
    from .pretraining.prepare import PrepareSettings
    from .pretraining.prepare import prepare as run
    from .pretraining.presets import preparation_values
    from .training.reporting import default_progress
    from .training.settings import apply_overrides, build

    settings = build(PrepareSettings, apply_overrides(preparation_values(config), overrides or []))
    meta = run(settings, default_progress())
    for part, count in meta["documents"].items():
        print(f"{part}: {count} documents, {meta['tokens'][part]} tokens")
    print(f"written: {settings.output}")


@app.command()
def finetune(
    data_dir: Annotated[
        str,
        typer.Option(
            help="directory with the task's files, as distributed or as train and dev (.jsonl, .tsv"
            " or .csv), or datasets:NAME"
        ),
    ],
    model: Annotated[
        str, typer.Option(help="directory or hub id of the checkpoint; none with ensemble=[...]")
    ] = "",
    task: Annotated[
        str, typer.Option(help="what to fine-tune for: cola, squad2, classification, ...")
    ] = "classification",
    task_file: Annotated[
        Path | None, typer.Option(help="YAML file that describes data of your own; see README")
    ] = None,
    sift: Annotated[
        bool, typer.Option("--sift", help="scale-invariant fine-tuning: perturbed embeddings")
    ] = False,
    overrides: Overrides = None,
) -> None:
    """Fine-tunes a checkpoint for a task and scores it."""
    from .finetuning.run import finetune as run
    from .finetuning.settings import resolve
    from .training.distributed import is_main
    from .training.reporting import default_progress

    values: dict[str, Any] = {"data_dir": data_dir, "model": model, "task": task}
    values |= {"task_file": str(task_file)} if task_file else {}
    values |= {"sift": True} if sift else {}
    settings, recipe = resolve(values, overrides or [])
    if is_main():
        print(recipe, flush=True)
    result = run(settings, default_progress())
    _summary(result, settings.output)


@app.command()
def predict(
    model: Annotated[str, typer.Option(help="directory or hub id of the checkpoint")],
    source: Annotated[
        str, typer.Option("--input", metavar="FILE", help="a JSON object a line; - for stdin")
    ],
    out: Annotated[
        str, typer.Option(metavar="FILE", help="a JSON object a line; - for stdout")
    ] = "-",
    on_error: Annotated[
        str, typer.Option(metavar="fail|skip", help="of a line that cannot be read")
    ] = "fail",
    head: Annotated[
        str | None, typer.Option(help="default: the one that the checkpoint's config.json names")
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(help="tokens of a sequence (default: the model's)")
    ] = None,
    tokens: Annotated[int, typer.Option(help="of a batch")] = 4096,
    precision: Annotated[str, typer.Option(metavar="fp32|bf16", help="of the model")] = "fp32",
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda (default: cuda where there is one)")
    ] = None,
    text_column: Annotated[str | None, typer.Option(help="key of the text")] = None,
    pair_column: Annotated[
        str | None, typer.Option(help="key of a pair's second text, the question or the options")
    ] = None,
) -> None:
    """What a fine-tuned model says of every line; continues an interrupted run."""
    from contextlib import redirect_stdout

    from .finetuning.predict import predict as run
    from .finetuning.predictors import load
    from .training.reporting import default_progress

    predictor = load(
        model,
        head,
        precision,
        device,
        max_length=max_length,
        tokens=tokens,
        text=text_column,
        beside=pair_column,
    )
    results = sys.stdout.buffer if out == "-" else out
    with redirect_stdout(sys.stderr):  # Standard output is for results alone.
        counts = run(predictor, source, results, on_error, default_progress())
        rate = counts.new / max(counts.seconds, 1e-9)
        print(f"lines: {counts.predicted} predicted, {counts.skipped} skipped; {rate:.1f} a second")
        if counts.truncated:
            print(f"truncated: {counts.truncated}, to {predictor.max_length} tokens")
    if out != "-":
        print(f"written: {out}")


@app.command()
def study(
    name: Annotated[str, typer.Argument(help="pretraining: objectives, ties, algorithms")],
    quick: Annotated[bool, typer.Option("--quick", help="less of everything, 8 minutes")] = False,
    minutes: Annotated[
        float | None, typer.Option(help="time for the whole study (default: 50; 8 with --quick)")
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(help="runs of each arm (default: 3; 2 with --quick)")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="for results and report (default: runs/study-NAME)")
    ] = None,
) -> None:
    """A paper's ablation study in miniature; continues an interrupted one."""
    if name != "pretraining":
        raise ValueError(f"study must be one of pretraining; got {name!r}")
    from .study.pretraining import run

    run(out or Path(f"runs/study-{name}"), minutes, seeds, quick)


@app.command()
def export(
    model: Annotated[str, typer.Option(help="directory or hub id of the checkpoint")],
    format: Annotated[str, typer.Option(metavar="onnx|torch|transformers", help="of the file")],
    out: Annotated[
        Path | None,
        typer.Option(
            help="directory, which also gets config.json and the tokenizer, or a .onnx or .pt2 file"
            " (default: runs/export-FORMAT)"
        ),
    ] = None,
    head: Annotated[
        str | None, typer.Option(help="default: the one that the checkpoint's config.json names")
    ] = None,
    opset: Annotated[int, typer.Option(help="with onnx")] = 18,
) -> None:
    """Writes a checkpoint for onnxruntime, torch.export.load or transformers."""
    from .export import export as run

    for line in run(model, format, out, head, opset):
        print(line)


@app.command()
def bench(
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda (default: cuda where there is one)")
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.0, help="of timing for each case")] = 1.0,
    shape: Annotated[
        list[str] | None,
        typer.Option(metavar="BxL", help="batch and length, as 4x512; repeatable"),
    ] = None,
    dtype: Annotated[
        list[str] | None,
        typer.Option(
            metavar="bf16|fp16|fp32",
            help="repeatable (default: bf16 and fp32; with --tune bf16 and fp16)",
        ),
    ] = None,
    file: Annotated[Path | None, typer.Option("--json", help="write the results there")] = None,
    tune: Annotated[
        bool,
        typer.Option("--tune", help="search the Triton kernels' configurations for this GPU"),
    ] = False,
    head_dim: Annotated[
        list[int] | None, typer.Option(help="with --tune; repeatable (default: 64)")
    ] = None,
    candidates: Annotated[
        int | None,
        typer.Option(min=1, help="with --tune: configurations of a pass, at most (default: 30)"),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="with --tune: the profile, which FASTDEBERTA_TRITON_PROFILE may then name"
            " (default: runs/triton-profile.json)"
        ),
    ] = None,
) -> None:
    """Times attention on this machine: every backend, and torch's without positions."""
    from . import bench as benchmark

    of_report: dict[str, Any] = {"--shape": shape, "--json": file}
    of_tuning: dict[str, Any] = {"--head-dim": head_dim, "--candidates": candidates, "--out": out}
    for name, value in (of_report if tune else of_tuning).items():
        if value:
            raise ValueError(f"{name} has no meaning {'with' if tune else 'without'} --tune")
    if tune:
        benchmark.tune(device, seconds, head_dim, dtype, candidates, out)
    else:
        benchmark.run(device, seconds, shape, dtype, file)


def _summary(result: dict[str, Any], output: str) -> None:
    from .training.distributed import is_main

    if not is_main():
        return
    for name, value in result.items():
        if isinstance(value, float):
            print(f"{name}: {value:.4g}")
        elif isinstance(value, int):
            print(f"{name}: {value}")
    print(f"written: {output}")


def main(arguments: list[str] | None = None) -> None:
    """The console script. --debug, anywhere, shows tracebacks."""
    arguments = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        app(arguments, prog_name="fastdeberta")  # Exits with 0, or 2 on wrong usage.
    except SystemExit as done:
        if done.code == 130:  # typer's own answer to Ctrl-C
            sys.exit(_failed("interrupted", 1))
        raise
    except Exception as error:
        if debug:
            raise
        from .training.trainer import Diverged, Interrupted

        if isinstance(error, (Interrupted, Diverged)):
            sys.exit(_failed(str(error), 1))
        if isinstance(error, (ValueError, TypeError, FileNotFoundError)):
            sys.exit(_failed(str(error), 2))
        sys.exit(_failed(f"{type(error).__name__}: {error} (--debug shows where)", 1))


def _failed(message: str, status: int) -> int:
    print("fastdeberta: " + " ".join(message.split()), file=sys.stderr)
    return status
