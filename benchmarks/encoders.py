"""The rivals in whole encoders, one function each. Each takes a Batch, on any device, prepares what
may be prepared and returns a call, which gives the last hidden state [B, L, hidden].

Optional packages are imported where they are needed.
"""

import copy
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

import fastdeberta
from fastdeberta.attention import set_backend

from .cases import RULE, Shape
from .race import Out

VOCABULARY = 1000
LONGEST = 4096


class Batch(NamedTuple):
    """A batch without padding, and the folder where models are kept. mask: ones, as a
    tokenizer returns it. dtype: of the model."""

    input_ids: Tensor
    mask: Tensor
    dtype: torch.dtype
    directory: Path

    @classmethod
    def random(
        cls, shape: Shape, dtype: torch.dtype, directory: Path, device: str = "cpu"
    ) -> "Batch":
        input_ids = torch.randint(1, VOCABULARY, (shape.batch, shape.length), device=device)
        return cls(input_ids, torch.ones_like(input_ids), dtype, directory)

    @property
    def feed(self) -> dict:
        return {"input_ids": self.input_ids.numpy(), "attention_mask": self.mask.numpy()}


@cache
def deberta():
    """transformers' model in v3-base's shape, random weights."""
    from transformers import DebertaV2Config, DebertaV2Model

    torch.manual_seed(0)
    config = DebertaV2Config(
        vocab_size=VOCABULARY,
        hidden_size=768,
        num_hidden_layers=12,
        num_attention_heads=12,
        intermediate_size=3072,
        relative_attention=True,
        position_biased_input=False,
        pos_att_type=["p2c", "c2p"],
        position_buckets=RULE.buckets,
        max_position_embeddings=RULE.max_distance,
        share_att_key=True,
        norm_rel_ebd="layer_norm",
        type_vocab_size=0,
    )
    model = DebertaV2Model(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "query_proj" in name or "key_proj" in name:
                parameter.mul_(2)  # At initialisation scores are too small to matter.
    return model


@cache
def bert():
    """transformers' BERT in the same shape, with torch's SDPA."""
    from transformers import BertConfig, BertModel

    config = BertConfig(vocab_size=VOCABULARY, max_position_embeddings=LONGEST)
    config._attn_implementation = "sdpa"
    return BertModel(config, add_pooling_layer=False).eval()


def ours(batch: Batch, backend: str = "auto") -> Callable[[], Tensor]:
    directory = batch.directory / "deberta"
    if not directory.exists():
        deberta().save_pretrained(directory)
    model = _placed(fastdeberta.models.from_pretrained(directory), batch).eval()
    set_backend(model, backend)
    return _torch_encoder(model, batch)


def accelerated(batch: Batch, backend: str = "auto") -> Callable[[], Tensor]:
    model = fastdeberta.accelerate(_copied(deberta, batch), backend=backend)
    return _torch_encoder(model, batch)


def eager(batch: Batch) -> Callable[[], Tensor]:
    return _torch_encoder(_copied(deberta, batch), batch)


def sdpa_bert(batch: Batch) -> Callable[[], Tensor]:
    return _torch_encoder(_copied(bert, batch), batch)


def disentangled_flash(batch: Batch) -> Callable[[], Tensor]:
    """disentangled-flash: its kernels on a GPU, its composed PyTorch on a CPU."""
    from disentangled_flash import optimize_deberta

    model, length = _copied(deberta, batch), batch.input_ids.size(1)
    backend = "triton" if batch.input_ids.is_cuda else "torch"
    optimize_deberta(model, backend=backend, sequence_lengths=length, assume_unpadded=True)
    return _torch_encoder(model, batch)


def flash_deberta(batch: Batch) -> Callable[[], Tensor]:
    """FlashDeBERTa, whose kernels need CUDA."""
    from flashdeberta import FlashDebertaV2Model

    model = FlashDebertaV2Model(deberta().config).eval()
    model.load_state_dict(deberta().state_dict())
    return _torch_encoder(_placed(model, batch), batch)


def onnxruntime(batch: Batch, model: Callable = deberta) -> Callable[[], Tensor]:
    """onnxruntime with all graph optimisations; its threads spin or sleep, whichever is faster."""
    import onnxruntime

    from fastdeberta.timing import interleaved

    if batch.dtype != torch.float32:
        raise Out("onnxruntime's CPU provider has no bfloat16")
    file = exported(model, batch.directory)

    def session(spinning: bool) -> Callable[[], Tensor]:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        entry = "session.intra_op.allow_spinning"
        options.add_session_config_entry(entry, str(int(spinning)))
        made = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        return lambda: torch.from_numpy(made.run(None, batch.feed)[0])

    sessions = {spinning: session(spinning) for spinning in (True, False)}
    times = interleaved(sessions, seconds=0.5, least=2, turn=0.1, rest=0.05)
    return sessions[min(times, key=times.__getitem__)]


def openvino(batch: Batch, model: Callable = deberta) -> Callable[[], Tensor]:
    """OpenVINO, compiled for the one shape, in float32 or bfloat16."""
    import openvino

    core = openvino.Core()
    graph = core.read_model(exported(model, batch.directory))
    graph.reshape({name: list(value.shape) for name, value in batch.feed.items()})
    options = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": "f32" if batch.dtype == torch.float32 else "bf16",
    }
    request = core.compile_model(graph, "CPU", options).create_infer_request()

    def call() -> Tensor:
        outputs = request.infer(batch.feed, share_inputs=True, share_outputs=True)
        return torch.from_numpy(next(iter(outputs.values())))

    return call


@cache
def exported(model: Callable, directory: Path) -> Path:
    """An ONNX file of a model, any batch and length."""
    import onnxscript  # noqa: F401  Named here, lest the exporter say something less plain.

    class LastHiddenState(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model()

        def forward(self, input_ids, attention_mask):
            return self.model(input_ids, attention_mask=attention_mask).last_hidden_state

    file = directory / f"{model.__name__}.onnx"
    ids = torch.ones(2, 40, dtype=torch.long)
    sizes = {0: torch.export.Dim("batch", max=64), 1: torch.export.Dim("length", max=LONGEST)}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Of the exporter about itself.
        torch.onnx.export(
            LastHiddenState().eval(),
            (ids, torch.ones_like(ids)),
            file,
            input_names=["input_ids", "attention_mask"],
            dynamo=True,
            dynamic_shapes=(sizes, sizes),
            verbose=False,
        )
    return file


def _copied(model: Callable[[], nn.Module], batch: Batch) -> nn.Module:
    return _placed(copy.deepcopy(model()), batch)


def _placed(model: nn.Module, batch: Batch) -> nn.Module:
    return model.to(batch.input_ids.device, batch.dtype)


def _torch_encoder(model: nn.Module, batch: Batch) -> Callable[[], Tensor]:
    def call() -> Tensor:
        with torch.no_grad():
            return model(batch.input_ids, attention_mask=batch.mask).last_hidden_state

    return call
