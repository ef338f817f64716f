"""The rivals, one function each. Each prepares what may be prepared and returns a call.

Attention: takes Inputs, calls give [B, L, H * D]. Encoders: take a Batch, calls give the last
hidden state [B, L, hidden]. Optional packages are imported where they are needed.
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

from .cases import RULE, Shape
from .race import Out


class Inputs(NamedTuple):
    """One layer's projected tensors: [B, L, H, D], and [2 * span, H, D], which both position terms
    read, as with one table for all layers."""

    query: Tensor
    key: Tensor
    value: Tensor
    table: Tensor

    @classmethod
    def random(cls, shape: Shape, dtype: torch.dtype, training: bool = False) -> "Inputs":
        size = (shape.heads, shape.head_dim)

        def tensor(*leading: int) -> Tensor:
            return torch.randn(*leading, *size).to(dtype).requires_grad_(training)

        content = [tensor(shape.batch, shape.length) for _ in range(3)]
        return cls(*content, tensor(2 * RULE.span))

    @property
    def scale(self) -> float:
        return (3 * self.query.size(-1)) ** -0.5


def step(
    make: Callable[[Inputs], Callable[[], Tensor]], x: Inputs, part: str
) -> Callable[[], object]:
    """One pass of a rival: "forward"; "forward+backward" or "backward", which give the gradients
    of all inputs, None for those that the rival does not use."""
    attention = make(x)
    same = torch.Generator().manual_seed(1)  # For every rival.
    dout = torch.randn(x.query.flatten(2).shape, generator=same).to(x.query.dtype)

    def forward() -> object:
        with torch.no_grad():
            return attention()

    def backward(out: Tensor, keep: bool = False) -> object:
        return torch.autograd.grad(out, x, dout, retain_graph=keep, allow_unused=True)

    if part == "forward":
        return forward
    if part == "forward+backward":
        return lambda: backward(attention())
    out = attention()
    return lambda: backward(out, keep=True)


class Given(nn.Module):
    """Stands for a projection whose result is given."""

    def __init__(self, result: Tensor):
        super().__init__()
        self.result = [result]  # In a list: no parameter of this module.

    def forward(self, x: Tensor) -> Tensor:
        return self.result[0]


def ours(x: Inputs, backend: str = "auto", key_mask: Tensor | None = None) -> Callable[[], Tensor]:
    def call() -> Tensor:
        out = fastdeberta.disentangled_attention(
            *x, x.table, relative_position=RULE, key_mask=key_mask, backend=backend
        )
        return out.flatten(2)

    return call


def eager(x: Inputs) -> Callable[[], Tensor]:
    """transformers' own attention; projections pass through, positions and mask are ready."""
    from transformers.models.deberta_v2 import modeling_deberta_v2 as module

    attention = module.DisentangledSelfAttention(_attention_config(x)).eval()
    attention.query_proj = attention.key_proj = nn.Identity()
    attention.pos_key_proj = attention.pos_query_proj = nn.Identity()
    query, key, value, table = (tensor.flatten(-2) for tensor in x)
    distances = module.build_relative_position(
        query, key, bucket_size=RULE.buckets, max_position=RULE.max_distance
    )
    attention.value_proj = Given(value)
    batch, length, _ = query.shape
    mask = torch.ones(batch, 1, length, length, dtype=torch.bool)

    def call() -> Tensor:
        return attention(
            key, mask, query_states=query, relative_pos=distances, rel_embeddings=table
        )[0]

    return call


def sdpa(x: Inputs) -> Callable[[], Tensor]:
    """torch's attention without positions: what they cost, at the least."""
    query, key, value = (tensor.transpose(1, 2) for tensor in x[:3])

    def call() -> Tensor:
        out = nn.functional.scaled_dot_product_attention(query, key, value)
        return out.transpose(1, 2).flatten(2)

    return call


def flex(x: Inputs) -> Callable[[], Tensor]:
    """torch's FlexAttention, compiled: positions are gathered from two ordinary products."""
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.reset()  # Each shape compiles anew, and there is a limit to that.
    query, key, value = (tensor.transpose(1, 2) for tensor in x[:3])
    table, length = x.table.permute(1, 2, 0), x.query.size(1)
    rows = RULE.row(torch.arange(1 - length, length))

    # Products inside would be left unmade where score_mod reads them, which does not compile.
    @torch.compile(dynamic=False)
    def attention(query, key, value, c2p, p2c):
        def add_positions(score, b, h, i, j):
            row = rows[i - j + length - 1]
            return score + (c2p[b, h, i, row] + p2c[b, h, j, row]) * x.scale

        return flex_attention(query, key, value, score_mod=add_positions, scale=x.scale)

    def call() -> Tensor:
        out = attention(query, key, value, query @ table, key @ table)
        return out.transpose(1, 2).flatten(2)

    return call


def disentangled_flash(x: Inputs) -> Callable[[], Tensor]:
    """disentangled-flash's composed PyTorch; its kernels need CUDA."""
    from disentangled_flash import DisentangledFlashAttention
    from disentangled_flash._torch import TorchTrainingDisentangledSelfAttention

    training = x.query.requires_grad
    kind = TorchTrainingDisentangledSelfAttention if training else DisentangledFlashAttention
    options = {} if training else {"backend": "torch"}
    attention = kind(_attention_config(x), assume_unpadded=True, **options).to(x.query.dtype).eval()
    attention.pos_key_proj = attention.pos_query_proj = nn.Identity()
    query, key, value, table = (tensor.flatten(-2) for tensor in x)
    attention._project_qkv = lambda hidden: (query, key, value)
    mask = torch.ones(query.shape[:2], dtype=torch.bool)
    if training:
        return lambda: attention(query, mask, rel_embeddings=table)[0]
    with torch.no_grad():
        attention.prepare_for_inference(table)
        plan = attention.prepare_shape(query.size(1))
    return lambda: attention.forward_prepared(query, mask, plan)[0]


def _attention_config(x: Inputs):
    from transformers import DebertaV2Config

    heads, size = x.query.shape[-2:]
    return DebertaV2Config(
        hidden_size=heads * size,
        num_attention_heads=heads,
        relative_attention=True,
        pos_att_type=["c2p", "p2c"],
        position_buckets=RULE.buckets,
        max_position_embeddings=RULE.max_distance,
        # Two projections of positions, which can be left out; with True they are query's and key's.
        share_att_key=False,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )


class Batch(NamedTuple):
    """A batch without padding, and the folder where models are kept. mask: ones, as a
    tokenizer returns it. dtype: of the model."""

    input_ids: Tensor
    mask: Tensor
    dtype: torch.dtype
    directory: Path

    @classmethod
    def random(cls, shape: Shape, dtype: torch.dtype, directory: Path) -> "Batch":
        input_ids = torch.randint(1, VOCABULARY, (shape.batch, shape.length))
        return cls(input_ids, torch.ones_like(input_ids), dtype, directory)

    @property
    def feed(self) -> dict:
        return {"input_ids": self.input_ids.numpy(), "attention_mask": self.mask.numpy()}


VOCABULARY = 1000
LONGEST = 4096


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


def our_encoder(batch: Batch) -> Callable[[], Tensor]:
    directory = batch.directory / "deberta"
    if not directory.exists():
        deberta().save_pretrained(directory)
    model = fastdeberta.models.from_pretrained(directory).to(batch.dtype).eval()
    return _torch_encoder(model, batch)


def accelerated_encoder(batch: Batch) -> Callable[[], Tensor]:
    model = fastdeberta.accelerate(copy.deepcopy(deberta()).to(batch.dtype))
    return _torch_encoder(model, batch)


def eager_encoder(batch: Batch) -> Callable[[], Tensor]:
    return _torch_encoder(copy.deepcopy(deberta()).to(batch.dtype), batch)


def bert_encoder(batch: Batch) -> Callable[[], Tensor]:
    return _torch_encoder(copy.deepcopy(bert()).to(batch.dtype), batch)


def disentangled_flash_encoder(batch: Batch) -> Callable[[], Tensor]:
    from disentangled_flash import optimize_deberta

    model = copy.deepcopy(deberta()).to(batch.dtype)
    length = batch.input_ids.size(1)
    optimize_deberta(model, backend="torch", sequence_lengths=length, assume_unpadded=True)
    return _torch_encoder(model, batch)


def onnxruntime_encoder(batch: Batch, model: Callable = deberta) -> Callable[[], Tensor]:
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


def openvino_encoder(batch: Batch, model: Callable = deberta) -> Callable[[], Tensor]:
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


def _torch_encoder(model: nn.Module, batch: Batch) -> Callable[[], Tensor]:
    def call() -> Tensor:
        with torch.no_grad():
            return model(batch.input_ids, attention_mask=batch.mask).last_hidden_state

    return call
