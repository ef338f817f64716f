"""Models as files that run elsewhere: ONNX, torch.export's .pt2, transformers' layout.

A trace must not depend on values: in it models keep padding and run their modules layer by layer.
"""

import importlib
import logging
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .attention import DisentangledAttention
from .files import atomic_directory
from .models import Config, Model, ModelOutput, from_pretrained, layouts
from .models.checkpoint import write_config
from .models.encoded import SpanBeam

# What torch.export.export(model, ...) by hand gives back.
for _output in (SpanBeam, ModelOutput):
    torch.export.register_dataclass(_output)

FORMATS = ("onnx", "torch", "transformers")
_FILES = {"onnx": "model.onnx", "torch": "model.pt2"}

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "spm.model",
    "spiece.model",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
)

OPSET = 18  # The first that torch writes without converting.
LONGEST = 2**24  # Tokens of a sequence that the fused kernels take.
TOLERANCE = 1e-4  # Of an exported graph, for outputs up to 1, and relative to larger ones.


@contextmanager
def composed(model: nn.Module) -> Iterator[None]:
    """Within it, attention of padded batches is PyTorch's own operators instead of the fused one.

    Holds [B, H, L, L] scores. For graphs that must run without this package.
    """
    layers = [m for m in model.modules() if isinstance(m, DisentangledAttention)]
    before = [layer.composed for layer in layers]
    try:
        for layer in layers:
            layer.compose()
        yield
    finally:
        for layer, value in zip(layers, before, strict=True):
            layer.compose(value)


def sample(model: Model, batch: int, length: int, left: bool = False) -> dict[str, Tensor]:
    """Inputs of an exported model, by name: random ids, every second sequence padded.

    Args:
        left: padding comes first, not last.

    Returns:
        input_ids, attention_mask and, if the model has token types, token_type_ids, int64 [batch,
        length], for a choice head [batch, 2, length]; for an entity head entity_spans, int64
        [batch, 2, 2].
    """
    config = model.config
    shape = (batch, 2, length) if model.head_name == "choice" else (batch, length)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, shape, generator=generator)
    mask = torch.ones_like(ids)
    half = length // 2
    mask[1::2, ..., slice(0, half) if left else slice(length - half, length)] = 0
    inputs = {"input_ids": ids.where(mask.bool(), config.pad_token_id), "attention_mask": mask}
    if config.type_vocab_size > 0:
        inputs["token_type_ids"] = torch.zeros_like(ids)
        if config.type_vocab_size > 1:
            inputs["token_type_ids"][..., length // 3 :] = 1
    if model.head_name == "entity":
        first = half if left else 0
        inputs["entity_spans"] = torch.tensor([[first, first + 1], [first, length - half]])
        inputs["entity_spans"] = inputs["entity_spans"].repeat(batch, 1, 1)
    return inputs


class Graph(nn.Module):
    """What is traced: a model from its inputs' tensors to its outputs', by name.

    Outputs are `logits`, `start_logits`, ... as the head gives them (`beam_start_index`, ... for
    the parts of `beam`), and `last_hidden_state` of a model without a head.
    """

    def __init__(self, model: Model):
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        token_type_ids: Tensor | None = None,
        entity_spans: Tensor | None = None,
    ) -> dict[str, Tensor]:
        output = self.model(
            input_ids, attention_mask, token_type_ids=token_type_ids, entity_spans=entity_spans
        )
        tensors = dict(_tensors(output))
        if len(tensors) > 1:
            del tensors["last_hidden_state"]
        return tensors


def program(model: Model) -> torch.export.ExportedProgram:
    """A model in eval mode as torch.export sees it, for any batch and length.

    The fused operator stays in it, with the backend that "auto" takes on the model's device, so
    that loading and running it need `import fastdeberta`; traced within `composed(model)` it needs
    torch alone. Inputs are those that `sample` names, as keywords; the result is a dictionary.

    Raises:
        ValueError: a model in training mode, or one that cannot be traced.
    """
    inputs, shapes = _traced(model)
    with torch.no_grad():
        return torch.export.export(Graph(model).eval(), (), inputs, dynamic_shapes=shapes)


def export_torch(model: Model, path: str | Path) -> None:
    """Writes `program(model)` to a .pt2 file, for torch.export.load."""
    path = Path(path)
    exported = program(model)
    _publish(path.parent, lambda place: torch.export.save(exported, place / path.name), path.name)


def export_onnx(model: Model, path: str | Path, opset: int = OPSET) -> float | None:
    """Writes a model on the CPU in eval mode as ONNX, for any batch and length.

    Only standard operators. Weights beyond 1.5 GiB lie in a second file, `path` + ".data". Where
    onnxruntime is installed, its outputs are compared with the model's before the file appears.

    Args:
        model: float32.
        opset: at least 18.

    Returns:
        The largest difference of outputs up to 1 (relative to larger ones), over several shapes;
        None without onnxruntime.

    Raises:
        ImportError: onnx or onnxscript is missing.
        ValueError: a model in training mode or of another dtype, or an opset that is not known.
        RuntimeError: onnxruntime's outputs differ by more than 1e-4.
    """
    _need_onnx()
    import onnx

    path, newest = Path(path), onnx.defs.onnx_opset_version()
    if not OPSET <= opset <= newest:
        raise ValueError(f"opset must be {OPSET} to {newest} with this onnx, got {opset}")
    parameter = next(model.parameters())
    if parameter.dtype != torch.float32 or parameter.device.type != "cpu":
        raise ValueError(
            f"model must be float32 on the CPU, got {parameter.dtype} on {parameter.device}"
        )
    inputs, shapes = _traced(model)
    graph = Graph(model).eval()
    with torch.no_grad(), composed(model), _quiet():
        names = list(graph(**inputs))
        onnx_program = torch.onnx.export(
            graph,
            (),
            kwargs=inputs,
            dynamo=True,
            opset_version=opset,
            input_names=list(inputs),
            output_names=names,
            dynamic_shapes=shapes,
            custom_translation_table={torch.ops.aten.sort.stable: _stable_sort},
            verbose=False,
        )
    assert onnx_program is not None
    difference = None

    def write(place: Path) -> None:
        nonlocal difference
        onnx_program.save(place / path.name)
        difference = _onnx_difference(model, place / path.name)

    _publish(path.parent, write, path.name)
    return difference


def export(
    model: str | Path,
    format: str,
    out: str | Path | None = None,
    head: str | None = None,
    opset: int = OPSET,
) -> list[str]:
    """Exports a checkpoint: the command.

    Args:
        model: directory or hub id, of any layout that `from_pretrained` reads.
        format: "onnx", "torch" or "transformers".
        out: a directory, which gets the graph (or weights), config.json and the tokenizer's files,
            and keeps what else it holds; or a .onnx or .pt2 file, which is all that is written
            then. None: runs/export-`format`.
        head: None: the one that the checkpoint's `architectures` names, else "base".
        opset: of ONNX.

    Returns:
        Lines that say what was done.

    Raises:
        FileNotFoundError, ValueError: see from_pretrained; an unknown format.
        ImportError, RuntimeError: see export_onnx.
    """
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}; got {format!r}")
    if format == "onnx":
        _need_onnx()  # Before anything is loaded.
    out = Path(f"runs/export-{format}" if out is None else out)
    if out.exists() and not (out.is_dir() or out.suffix == Path(_FILES.get(format, "")).suffix):
        raise ValueError(f"out must be a directory or a file of format {format}, got {out}")
    source = _local(model)
    named = _named_head(source)
    head = head or named or "base"
    loaded = from_pretrained(model, head).eval()
    lines = [f"head: {head}"]
    if named is None:
        lines[0] += " (config.json names no known architecture: --head chooses)"
    if format == "transformers":
        loaded.save_pretrained(out)
        _publish(out, lambda place: _copy_tokenizer(source, place))
        if layouts.architecture(loaded.config, head) is None:
            lines.append(f"transformers has no class for head {head!r}: it can load the encoder")
        return [*lines, f"written: {out}"]
    whole = out.is_dir() or out.suffix != Path(_FILES[format]).suffix
    file = out / _FILES[format] if whole else out
    if format == "onnx":
        difference = export_onnx(loaded, file, opset)
        if difference is None:
            lines.append("not verified: onnxruntime is not installed")
        else:
            lines.append(f"largest difference in onnxruntime: {difference:.1e}")
    else:
        export_torch(loaded, file)
    if whole:
        _publish(out, lambda place: _write_companions(loaded, source, place))
    return [*lines, f"written: {file}"]


# Tracing


def _traced(model: Model) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Inputs to trace a model with, and which of their dimensions are free."""
    if any(m.training for m in model.modules()):
        raise ValueError("model must be in eval mode: call model.eval()")
    config = model.config
    shortest = 1
    if model.head_name == "span" and config.span_head == "beam":
        shortest = config.span_beam_size + 1  # The search's width is a constant of the graph.
    longest = LONGEST
    if model.backbone.embeddings.position_embeddings is not None:
        longest = config.max_position_embeddings
    if shortest >= longest:
        raise ValueError(
            f"span_beam_size must be below max_position_embeddings = {longest} for an export, "
            f"got {shortest}"
        )
    # Neither 0 nor 1, which traces take for constants, nor any number that a model may hold.
    traced = min(longest, shortest + 12)
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length", max=longest)
    if shortest > 1:
        length = torch.export.Dim("length", min=shortest, max=longest)
    tokens: dict[int, Any] = {0: batch, 1: length}
    if model.head_name == "choice":
        tokens = {0: batch, 1: torch.export.Dim("choices"), 2: length}
    inputs = sample(model, 3, traced)
    shapes: dict[str, Any] = dict.fromkeys(inputs, tokens)
    if "entity_spans" in inputs:
        shapes["entity_spans"] = {0: batch, 1: torch.export.Dim("entities")}
    device = next(model.parameters()).device
    return {name: x.to(device) for name, x in inputs.items()}, shapes


def _tensors(output: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    for field in fields(output):
        value = getattr(output, field.name)
        if isinstance(value, Tensor):
            yield prefix + field.name, value
        elif is_dataclass(value):
            yield from _tensors(value, f"{prefix}{field.name}_")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch.onnx says about libraries that are not installed and names of axes."""
    logs = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [log.level for log in logs]
    try:
        for log in logs:
            log.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.setLevel(level)


# ONNX


def _need_onnx() -> None:
    missing = [name for name in ("onnx", "onnxscript") if find_spec(name) is None]
    if missing:
        raise ImportError(f"ONNX needs {' and '.join(missing)}: pip install 'fastdeberta[onnx]'")


def _stable_sort(x, stable=True, dim=-1, descending=False):
    """aten.sort.stable, which torch does not translate. Of ties TopK takes the earlier first."""
    onnxscript = importlib.import_module("onnxscript")
    op = onnxscript.opset18
    size = op.Gather(op.Shape(x), op.Constant(value_ints=[dim]))
    return op.TopK(x, size, axis=dim, largest=int(descending), sorted=1)


def _onnx_difference(model: Model, path: Path) -> float | None:
    """The largest error of a graph in onnxruntime, over shapes that it was not traced with."""
    if find_spec("onnxruntime") is None:
        return None
    session = importlib.import_module("onnxruntime").InferenceSession(
        path, providers=["CPUExecutionProvider"]
    )
    longest = model.config.max_position_embeddings
    rule = model.backbone.encoder.relative_position
    reach = 0 if rule is None else rule.span
    shortest = min(longest, 24)
    if model.config.span_head == "beam" and model.head_name == "span":
        shortest = max(shortest, model.config.span_beam_size + 1)
    worst = 0.0
    for batch, length in ((1, shortest), (2, min(longest, max(2 * shortest, reach + 3)))):
        for left in (False, True):
            inputs = sample(model, batch, length, left)
            names = [output.name for output in session.get_outputs()]
            got = session.run(names, {name: x.numpy() for name, x in inputs.items()})
            with torch.no_grad():
                expected = Graph(model)(**inputs)
            for name, array in zip(names, got, strict=True):
                ours, theirs = expected[name], torch.from_numpy(array)
                if not ours.is_floating_point():  # Places of what is compared.
                    continue
                mask = inputs["attention_mask"].bool()
                if ours.shape[: mask.dim()] == mask.shape:  # Rows of padding hold no meaning.
                    ours, theirs = ours[mask], theirs[mask]
                error = (ours.double() - theirs.double()).abs() / ours.abs().clamp(min=1)
                worst = max(worst, error.max().item())
    if not worst <= TOLERANCE:  # NaN fails too.
        raise RuntimeError(f"onnxruntime's outputs differ from the model's by {worst:.1e}")
    return worst


# Files


def _publish(directory: Path, write: Callable[[Path], None], graph: str | None = None) -> None:
    """Moves what `write` puts into an empty directory to `directory`, once it is complete.

    graph: the file that may name others, which is then never seen with another's.
    """
    directory.mkdir(parents=True, exist_ok=True)
    fresh = directory / f".{graph or 'export'}.new"
    with atomic_directory(fresh) as unfinished:
        write(unfinished)
    names = sorted((file.name for file in fresh.iterdir()), key=lambda name: name == graph)
    if graph is not None and ((directory / f"{graph}.data").exists() or len(names) > 1):
        (directory / graph).unlink(missing_ok=True)
        (directory / f"{graph}.data").unlink(missing_ok=True)
    for name in names:
        (fresh / name).replace(directory / name)
    fresh.rmdir()


def _write_companions(model: Model, source: Path, directory: Path) -> None:
    write_config(model, directory)
    _copy_tokenizer(source, directory)


def _copy_tokenizer(source: Path, directory: Path) -> None:
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, directory / name)


def _local(model: str | Path) -> Path:
    """The directory with a checkpoint's config and tokenizer."""
    if Path(model).is_dir():
        return Path(model)
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(str(model), allow_patterns=["config.json", *TOKENIZER_FILES]))
    except (ImportError, OSError, ValueError):
        return Path(model)  # from_pretrained says what is wrong with it.


def _named_head(source: Path) -> str | None:
    """The head that a checkpoint's config names."""
    try:
        config = Config.load(source)
    except (FileNotFoundError, ValueError):
        return None  # Of another layout, or damaged, which from_pretrained says.
    return layouts.named_head(config)
