"""accelerate() and restore(): transformers' DeBERTa and ELECTRA on our attention, in place."""

from importlib import import_module
from typing import Any, TypeVar

from torch import nn

from ..attention import DisentangledAttention
from ..backends import MODULES
from ..inference import Inference
from ..packing import PaddedStates

M = TypeVar("M", bound=nn.Module)

# transformers' classes, by module below transformers.models and name. DeBERTa's attention is
# replaced by a DisentangledAttention, which takes over its parts.
_REPLACED = {
    ("deberta.modeling_deberta", "DisentangledSelfAttention"),
    ("deberta_v2.modeling_deberta_v2", "DisentangledSelfAttention"),
}
# Modules of these classes stay, and get the subclass of that name in a module of this package.
_SUBCLASSED = {
    ("deberta.modeling_deberta", "DebertaEncoder"): "deberta",
    ("deberta_v2.modeling_deberta_v2", "DebertaV2Encoder"): "deberta",
    ("electra.modeling_electra", "ElectraSelfAttention"): "electra",
    ("electra.modeling_electra", "ElectraEncoder"): "electra",
}
_HOOKED = {
    ("deberta.modeling_deberta", "DebertaModel"),
    ("deberta_v2.modeling_deberta_v2", "DebertaV2Model"),
}


def accelerate(model: M, backend: str = "auto", inference: bool = True) -> M:
    """Puts every DeBERTa (v1, v2, v3) and ELECTRA attention inside a model on our op, in place.

    Parameters stay the same objects under the same names: state_dict, optimisers and saving are
    untouched, adapters (peft) can be added before or after. Encoders of DeBERTa stop building
    [L, L] positions and [B, L, L] masks for a [B, L] mask. What the op does not cover runs as
    before: attention probabilities, a cache, causal and cross-attention of ELECTRA as a decoder.
    So does, on torch's scaled_dot_product_attention, a padded batch of ELECTRA outside of
    `inference`: in transformers its padding attends too, which losses over all tokens read.

    With `inference`, an encoder in eval mode without gradients, on the CPU, in float32 or bfloat16,
    also runs the rest of its layers faster: weights packed for oneDNN, query, key and value in one
    product, position projections kept, padding cut off before the first layer. Hidden states of
    padding are then zeros. The packed copies take as much memory again as the weights of the
    layers, until the first call in training mode. They follow the weights; only after writing to a
    part of a parameter through `.data` call `accelerate` again.

    Args:
        model: a transformers model, or any module that contains one (GLiNER, CrossEncoder, ...).
        backend: of the attention, see `disentangled_attention`.
        inference: False changes the attention alone; padding is as transformers has it. Models of
            `fastdeberta.models` can be given too, to switch this or the backend.

    Returns:
        The same model.

    Raises:
        ValueError: unknown backend, or nothing in the model could be patched.
    """
    if backend != "auto" and backend not in MODULES:
        raise ValueError(f"backend must be one of {', '.join(['auto', *MODULES])}; got {backend!r}")
    found = 0
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, DisentangledAttention):  # Accelerated before: only the backend.
                child.backend = backend
                found += 1
            elif _key(child) in _REPLACED:
                setattr(module, name, _replacement(child, _config(module, child), backend))
                found += 1
    for module in model.modules():
        subclass = _subclass(module)
        if subclass is not None and subclass.fits(module):
            module.__class__ = subclass
            subclass.accelerated(module, backend, inference)
            found += 1
        elif _key(module) in _HOOKED:
            _unhook(module)
            if inference:
                module.register_forward_hook(plain_states)
        elif "inference" in module.__dict__:  # An encoder of fastdeberta.models.
            module.__dict__["inference"] = Inference() if inference else None
    if not found:
        raise ValueError(
            f"model: no DeBERTa or ELECTRA attention to accelerate in {type(model).__name__}; "
            "expected transformers' DebertaModel, DebertaV2Model or ElectraModel, one of their "
            "For... classes, or a model that contains one"
        )
    return model


def restore(model: M) -> M:
    """Undoes `accelerate`, in place; parameters keep their values. Returns the model.

    Raises:
        ValueError: the model is not accelerated.
    """
    found = 0
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if "_original" in child.__dict__:
                setattr(module, name, _restored(child))
                found += 1
        if type(module).__module__.startswith(f"{__package__}."):
            kind: Any = type(module)
            kind.restored(module)
            module.__class__ = kind.__bases__[-1]
            found += 1
        _unhook(module)
    if not found:
        raise ValueError(f"model: {type(model).__name__} holds no accelerated attention")
    return model


def _key(module: nn.Module) -> tuple[str, str]:
    package, _, path = type(module).__module__.partition(".models.")
    return (path if package == "transformers" else ""), type(module).__name__


def _subclass(module: nn.Module) -> Any:
    """Our subclass for a module of transformers, or that it already has."""
    if type(module).__module__.startswith(f"{__package__}."):
        return type(module)
    name = _SUBCLASSED.get(_key(module))
    if name is None:
        return None
    # Only now: these modules import transformers' models.
    return getattr(import_module(f"{__package__}.{name}"), type(module).__name__)


def _config(parent: nn.Module, attention: nn.Module):
    config = getattr(parent, "config", None)
    if config is None:
        raise ValueError(
            f"model: cannot accelerate {type(attention).__name__} inside "
            f"{type(parent).__name__}, which has no config"
        )
    return config


def _replacement(original: nn.Module, config, backend: str) -> DisentangledAttention:
    """A DisentangledAttention around the original's own submodules, parameters and hooks."""
    ours = DisentangledAttention(config)
    _hand_over(original, ours)
    ours.backend = backend
    ours.train(original.training)
    ours.__dict__["_original"] = (original,)  # In a tuple, so that it is no submodule.
    return ours


def _restored(ours: nn.Module) -> nn.Module:
    """The original, with what became of its parts: adapters, parameters loaded by assignment."""
    (original,) = ours.__dict__["_original"]
    _hand_over(ours, original)
    return original.train(ours.training)


def _hand_over(source: nn.Module, target: nn.Module) -> None:
    for name, part in source.named_children():
        setattr(target, name, part)
    for name, parameter in source.named_parameters(recurse=False):
        setattr(target, name, parameter)
    for name, value in source.__dict__.items():
        # The same dictionaries, so that handles still remove.
        if name.endswith("_hooks") or "_hooks_" in name or name == "_is_full_backward_hook":
            target.__dict__[name] = value


def _unhook(module: nn.Module) -> None:
    hooks = module._forward_hooks
    for key in [key for key, hook in hooks.items() if hook is plain_states]:
        del hooks[key]


def plain_states(model: nn.Module, args, output):
    """A forward hook of DeBERTa models: hidden states that leave them are a tuple."""
    if isinstance(output, tuple):
        return tuple(tuple(x) if isinstance(x, PaddedStates) else x for x in output)
    if isinstance(output.hidden_states, PaddedStates):
        output.hidden_states = tuple(output.hidden_states)
    return output
