"""Inference on the CPU: an encoder's layers on packed weights, without padding.

Where nothing needs a gradient, both our encoder and transformers' (once accelerated) run here
instead of layer by layer as modules. Weights are copied once into oneDNN's own layout, query, key
and value as one product; position projections are kept; padding is cut off before the first layer
and put back after the last.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .op import disentangled_attention
from .packing import Packing, PaddedStates
from .relative_position import RelativePosition

_DTYPES = (torch.float32, torch.bfloat16)

# Classes whose arithmetic is repeated here. A subclass from elsewhere may compute something else.
_KNOWN = (
    "fastdeberta.",
    "torch.nn.modules.",
    "transformers.activations",
    "transformers.models.deberta.",
    "transformers.models.deberta_v2.",
    "transformers.models.electra.",
)

_NORMS = ("LayerNorm", "DebertaLayerNorm")

# Activations that oneDNN applies to a product before writing it: its names, and what they compute.
_FUSED: dict[tuple[str, str], Callable[[Tensor], Tensor]] = {
    ("none", ""): lambda x: x,
    ("gelu", "none"): nn.functional.gelu,
    ("gelu", "tanh"): lambda x: nn.functional.gelu(x, approximate="tanh"),
    ("relu", ""): nn.functional.relu,
    ("swish", ""): nn.functional.silu,
    ("tanh", ""): torch.tanh,
}


class Inference:
    """One encoder's way through its layers without modules, and what is prepared for it.

    The first call copies the weights of every linear layer, which doubles their memory, and
    projects the position table of every layer. Copies are made anew when a parameter has been
    written to or replaced, and released by the first call in training mode or on another device.

    Of a write that autograd does not count (through `.data`, to parameters made under
    torch.inference_mode, by a fused optimiser outside of training mode) only one value of each
    parameter tells: an optimiser's step shows, a write to one row may not.

    Copying or pickling an Inference gives an empty one.
    """

    def __init__(self) -> None:
        self._prepared: _Prepared | None = None

    def __reduce__(self):
        return Inference, ()

    def run(
        self,
        encoder: Any,
        table: Callable[[], Tensor | None],
        x: Tensor,
        mask: Tensor | None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        rows: Tensor | None = None,
    ) -> Sequence[Tensor] | None:
        """The embeddings and every layer's output, or None where the modules must run.

        Modules must run in training mode (of any part), with gradients, under autocast, in
        compiled or traced code, on another device than the CPU, in another dtype than float32 and
        bfloat16, with a mask that is not [B, L], and where a part has hooks or is of a class that
        is not known here (adapters, quantised layers).

        Args:
            encoder: has `layer`, a list of layers with transformers' attribute names around a
                DisentangledAttention (or a class of this package with its `joint_projection`,
                `project_positions` and sizes), and may have `conv`.
            table: gives the relative table, [2 * span, hidden] or None.
            x: [B, L, hidden]; or packed [T, hidden] with `cu_seqlens`.
            mask: [B, L] (or [T]), nonzero = a token to attend to; None: all are.
            rows: int64 [N], tokens of the flattened batch: only the last layer's output of these
                is returned.

        Returns:
            States like x. Rows that the mask of a padded batch leaves out are zeros, except in
            the embeddings, which are x itself. With `rows`: one state, [N, hidden].
        """
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return None
        if type(x) is not Tensor or x.dim() != (3 if cu_seqlens is None else 2) or not x.numel():
            return None
        if encoder.training or x.device.type != "cpu" or x.dtype not in _DTYPES:
            self._prepared = None
            return None
        if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
            return None
        if mask is not None and mask.shape != x.shape[:-1]:
            return None
        layers = self._layers(encoder, table, x.dtype)
        if layers is None:
            return None
        packing = Packing.of(mask) if cu_seqlens is None else None
        if packing is not None:
            packed = packing.pack(x)
            tokens = _Tokens(
                packed.shape[:-1], packing.key_mask, packing.cu_seqlens, packing.max_seqlen
            )
        else:
            packed = x.flatten(0, -2)
            tokens = _Tokens(
                x.shape[:-1], None if cu_seqlens is None else mask, cu_seqlens, max_seqlen
            )
        conv = getattr(encoder, "conv", None)
        # The convolution reads every token's output of the first layer.
        early = rows is not None and packing is None and (conv is None or len(layers) > 1)
        states: list[Tensor] = []
        for layer in layers:
            if len(packed):
                last = len(states) == len(layers) - 1
                packed = layer(packed, tokens, rows if early and last else None)
            if conv is not None and not states:
                packed = _convolved(conv, x, packed, mask, packing, cu_seqlens)
            states.append(packed)
        if early:
            return states[-1:]
        if packing is not None:
            whole: Sequence[Tensor] = PaddedStates(states, packing, first=x)
        else:
            whole = [x, *(state.view(x.shape) for state in states)]
        return whole if rows is None else [whole[-1].flatten(0, -2).index_select(0, rows)]

    def _layers(
        self, encoder: Any, table: Callable[[], Tensor | None], dtype: torch.dtype
    ) -> "list[_Layer] | None":
        prepared = self._prepared
        if prepared is not None and not prepared.watch.unchanged(encoder):
            prepared = self._prepared = None
        if prepared is not None:
            return None if prepared.dtype != dtype or prepared.watch.busy() else prepared.layers
        if not _repeatable(encoder, dtype):
            return None
        watch = _Watch(encoder)
        if watch.busy():
            return None
        relative = table()
        layers = [_Layer(layer, relative) for layer in encoder.layer]
        self._prepared = _Prepared(dtype, watch, layers)
        return layers


def _convolved(
    conv: Any,
    x: Tensor,
    packed: Tensor,
    mask: Tensor | None,
    packing: Packing | None,
    cu_seqlens: Tensor | None,
) -> Tensor:
    """The first layer's output [T, hidden] after the convolution, which reads the embeddings x."""
    if packing is not None:
        return packing.pack(conv(x, packing.pad(packed), mask))
    if cu_seqlens is not None:  # Only our own convolution meets packed sequences.
        return conv(x, packed, mask, cu_seqlens)
    return conv(x, packed.view(x.shape), mask).flatten(0, -2)


class PackedLinear:
    """x @ weight.T + bias and an activation, on a copy of the weight in oneDNN's own layout.

    Without oneDNN, or for a dtype that it lacks on this machine, the weight is taken as it is.

    Args:
        weight: [out, in], float32 or bfloat16. bias: [out].
        activation: any elementwise function; fused with the product where oneDNN has it.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        activation: Callable[[Tensor], Tensor] | None = None,
    ):
        self.bias = None if bias is None else bias.detach()
        self.packed = _packable(weight.dtype)
        self.fused, self.activation = ("none", ""), activation
        if self.packed:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach())
            fused = None if activation is None else _fused(activation)
            if fused is not None:
                self.fused, self.activation = fused, None
        else:
            self.weight = weight.detach()

    def __call__(self, x: Tensor) -> Tensor:
        """[T, in] -> [T, out], a new tensor."""
        if self.packed:
            name, algorithm = self.fused
            x = torch.ops.mkldnn._linear_pointwise.default(
                x, self.weight, self.bias, name, [], algorithm
            )
        else:
            x = nn.functional.linear(x, self.weight, self.bias)
        return x if self.activation is None else self.activation(x)


class _Layer:
    """One transformer layer on packed rows [T, hidden]; with `rows`, what of it they need."""

    def __init__(self, layer: Any, table: Tensor | None):
        attention = self.attention = layer.attention.self
        self.qkv = PackedLinear(*attention.joint_projection())
        self.heads = (3, attention.num_attention_heads, attention.attention_head_size)
        self.rule: RelativePosition | None = None
        if attention.relative_attention:
            self.rule = attention.relative_position
        self.pos_key, self.pos_query = attention.project_positions(table, self.rule)
        self.softmax_scale = attention.softmax_scale
        self.context = _linear(layer.attention.output.dense)
        self.attention_norm = layer.attention.output.LayerNorm
        self.up = _linear(layer.intermediate.dense, _activation(layer.intermediate))
        self.down = _linear(layer.output.dense)
        self.norm = layer.output.LayerNorm

    def __call__(self, x: Tensor, tokens: "_Tokens", rows: Tensor | None = None) -> Tensor:
        qkv = self.qkv(x).view(*tokens.shape, *self.heads)
        query, key, value = qkv.unbind(-3)
        context: Any = disentangled_attention(
            query,
            key,
            value,
            self.pos_key,
            self.pos_query,
            relative_position=self.rule,
            key_mask=tokens.key_mask,
            cu_seqlens=tokens.cu_seqlens,
            max_seqlen=tokens.max_seqlen,
            softmax_scale=self.softmax_scale,
            backend=self.attention.backend,
        )
        context = context.view(x.size(0), -1)
        if rows is not None:
            context, x = context.index_select(0, rows), x.index_select(0, rows)
        x = _normalized(self.context(context).add_(x), self.attention_norm)
        return _normalized(self.down(self.up(x)).add_(x), self.norm)


class _Prepared(NamedTuple):
    dtype: torch.dtype
    watch: "_Watch"
    layers: list[_Layer]


class _Watch:
    """Whether a module still has the parts, and those the values, that it had."""

    def __init__(self, root: nn.Module):
        self.modules = list(root.modules())
        self.classes = list(map(type, self.modules))
        self.parts = [m.__dict__ for m in self.modules[1:]]
        self.hooks = [
            d[h].values() for d in self.parts for h in ("_forward_hooks", "_forward_pre_hooks")
        ]
        self.trees = [m._modules for m in self.modules if m._modules]
        self.tables = [m._parameters for m in self.modules if m._parameters]
        self.children = _values(self.trees)
        self.parameters = _values(self.tables)
        self.tensors = [p for p in self.parameters if p is not None and p.numel()]
        self.addresses = [p.data_ptr() for p in self.tensors]
        self.versioned = [p for p in self.tensors if not p.is_inference()]
        self.versions = [p._version for p in self.versioned]
        # Fused optimisers raise no version: one value of each parameter shows their steps. These
        # views also hold the memory, lest the next owner of an address be taken for its last.
        middles = [tuple(n // 2 for n in p.shape) for p in self.tensors]
        self.samples = [p.detach()[i].view(1) for p, i in zip(self.tensors, middles, strict=True)]
        self.values = torch.cat(self.samples)

    def unchanged(self, root: nn.Module) -> bool:
        # A shallow copy of a module (as DataParallel makes) shares its Inference.
        return (
            root is self.modules[0]
            and _same(self.classes, list(map(type, self.modules)))
            and _same(self.children, _values(self.trees))
            and _same(self.parameters, _values(self.tables))
            and self.versions == [p._version for p in self.versioned]
            and self.addresses == [p.data_ptr() for p in self.tensors]
            and torch.equal(self.values, torch.cat(self.samples))
        )

    def busy(self) -> bool:
        """Whether a part trains, has hooks, or has a forward of its own."""
        hooked = any(self.hooks) and any(map(_changes, chain.from_iterable(self.hooks)))
        return hooked or any(d["training"] or "forward" in d for d in self.parts)


def _changes(hook: Callable) -> bool:
    # transformers leaves hooks behind that record outputs when a call asks for them: these calls
    # do not come here.
    return getattr(hook, "__module__", None) != "transformers.utils.output_capturing"


def _values(tables: Iterable[dict[str, Any]]) -> list[Any]:
    return list(chain.from_iterable(table.values() for table in tables))


def _same(a: list[Any], b: list[Any]) -> bool:
    return len(a) == len(b) and all(map(is_, a, b))


class _Tokens(NamedTuple):
    """What rows [T, hidden] of the layers' input are to attention.

    shape: (B, L), or (T,) of packed sequences. The others: see `disentangled_attention`.
    """

    shape: Sequence[int]
    key_mask: Tensor | None
    cu_seqlens: Tensor | None
    max_seqlen: int | None


def _repeatable(encoder: Any, dtype: torch.dtype) -> bool:
    """Whether _Layer computes what the encoder's layers do, in `dtype`."""
    return (
        len(encoder.layer) > 0
        and any(True for _ in encoder.parameters())  # DataParallel's copies have none.
        and all(type(m).__module__.startswith(_KNOWN) for m in encoder.modules())
        and all(_is_plain(p, dtype) for p in encoder.parameters())
        and all(map(_is_repeatable, encoder.layer))
    )


def _is_plain(parameter: Tensor, dtype: torch.dtype) -> bool:
    # A subclass of Tensor may hold its values elsewhere.
    plain = type(parameter) in (Tensor, nn.Parameter)
    return plain and parameter.device.type == "cpu" and parameter.dtype == dtype


def _is_repeatable(layer: Any) -> bool:
    attention = layer.attention.self
    outputs = (layer.attention.output, layer.output)
    return (
        type(attention).__module__.startswith("fastdeberta.")
        and getattr(attention, "head_logits_proj", None) is None
        and all(type(m) in (nn.Linear, nn.Dropout) for m in attention.children())
        and all(type(m.dense) is nn.Linear for m in (layer.intermediate, *outputs))
        and all(type(m.LayerNorm).__name__ in _NORMS for m in outputs)
    )


def _activation(intermediate: Any) -> Callable[[Tensor], Tensor]:
    ours = getattr(intermediate, "act", None)
    return intermediate.intermediate_act_fn if ours is None else ours


def _fused(activation: Callable[[Tensor], Tensor]) -> tuple[str, str] | None:
    """oneDNN's name of an activation, told by its values: one function has many classes."""
    x = torch.linspace(-20, 20, 401, dtype=torch.float32, device="cpu")
    values = activation(x)
    for name, function in _FUSED.items():
        if torch.allclose(values, function(x), rtol=0, atol=1e-6):
            return name
    return None


def _packable(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _linear(
    linear: nn.Linear, activation: Callable[[Tensor], Tensor] | None = None
) -> PackedLinear:
    return PackedLinear(linear.weight, linear.bias, activation)


def _normalized(x: Tensor, norm: Any) -> Tensor:
    # transformers' own LayerNorm, of v1, has its own name for eps.
    eps = norm.eps if isinstance(norm, nn.LayerNorm) else norm.variance_epsilon
    return nn.functional.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, eps)
