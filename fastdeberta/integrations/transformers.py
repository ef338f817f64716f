"""accelerate() and restore(): a loaded transformers DeBERTa on our attention, in place."""

from functools import partial
from typing import Any, TypeVar

from torch import nn

from ..attention import DisentangledAttention
from ..backends import MODULES
from ..inference import Inference, States

M = TypeVar("M", bound=nn.Module)

# transformers' attention classes: the modules of these names are the same arithmetic.
_PACKAGES = ("transformers.models.deberta.", "transformers.models.deberta_v2.")
_ATTENTION = "DisentangledSelfAttention"
_ENCODERS = ("DebertaEncoder", "DebertaV2Encoder")
_MODELS = ("DebertaModel", "DebertaV2Model")


def accelerate(model: M, backend: str = "auto", inference: bool = True) -> M:
    """Puts every DeBERTa (v1, v2, v3) attention inside a transformers model on our op, in place.

    Parameters stay the same objects under the same names: state_dict, optimisers and saving are
    untouched. Encoders stop building [L, L] positions and [B, L, L] masks for a [B, L] mask.

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
            elif _is(child, _ATTENTION):
                setattr(module, name, _replacement(child, _config(module, child), backend))
                found += 1
    for module in model.modules():
        if any(_is(module, name) for name in _ENCODERS):
            _quiet(module)
            _infer(module, inference)
        elif any(_is(module, name) for name in _MODELS):
            _unhook(module)
            if inference:
                module.register_forward_hook(_plain_states)
        elif "inference" in module.__dict__:  # An encoder of fastdeberta.models.
            module.__dict__["inference"] = Inference() if inference else None
    if not found:
        raise ValueError(
            f"model: no DeBERTa attention to accelerate in {type(model).__name__}; expected "
            "transformers' DebertaModel or DebertaV2Model, or a model that contains one"
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
            original = child.__dict__.get("_original")
            if original is not None:
                original[0].train(child.training)
                setattr(module, name, original[0])
                found += 1
        if any(_is(module, name) for name in _ENCODERS):
            for name in ("get_rel_pos", "get_attention_mask", "forward", "inference"):
                module.__dict__.pop(name, None)
        _unhook(module)
    if not found:
        raise ValueError(f"model: {type(model).__name__} holds no accelerated attention")
    return model


def _is(module: nn.Module, name: str) -> bool:
    kind = type(module)
    return kind.__name__ == name and kind.__module__.startswith(_PACKAGES)


def _config(parent: nn.Module, attention: nn.Module):
    config = getattr(parent, "config", None)
    if config is None:
        raise ValueError(
            f"model: cannot accelerate {type(attention).__name__} inside "
            f"{type(parent).__name__}, which has no config"
        )
    return config


def _replacement(original: nn.Module, config, backend: str) -> DisentangledAttention:
    """A DisentangledAttention around the original's own submodules and parameters."""
    ours = DisentangledAttention(config)
    for name, part in original.named_children():
        setattr(ours, name, part)
    for name, parameter in original.named_parameters(recurse=False):
        setattr(ours, name, parameter)
    ours.backend = backend
    ours.train(original.training)
    ours.__dict__["_original"] = (original,)  # In a tuple, so that it is no submodule.
    return ours


def _quiet(encoder: nn.Module) -> None:
    """Lets an encoder pass on the mask and the position rule it was given, unexpanded."""
    rules = [
        module.relative_position
        for module in encoder.modules()
        if isinstance(module, DisentangledAttention) and module.relative_attention
    ]
    # Functions of this module, so that the model can still be pickled and copied.
    encoder.__dict__["get_rel_pos"] = partial(_get_rel_pos, rules[0] if rules else None)
    encoder.__dict__["get_attention_mask"] = partial(_get_attention_mask, encoder)


def _get_rel_pos(rule, hidden_states, query_states=None, relative_pos=None):
    return rule if relative_pos is None else relative_pos


def _get_attention_mask(encoder: Any, attention_mask):
    if attention_mask.dim() == 2:
        return attention_mask
    return type(encoder).get_attention_mask(encoder, attention_mask)


def _infer(encoder: nn.Module, inference: bool) -> None:
    """Gives an encoder another way through its layers for calls that need no gradient."""
    for name in ("forward", "inference"):
        encoder.__dict__.pop(name, None)
    if inference:
        encoder.__dict__["inference"] = Inference()
        encoder.__dict__["forward"] = partial(_forward, encoder)


def _forward(
    encoder: Any,
    hidden_states,
    attention_mask,
    output_hidden_states=True,
    output_attentions=False,
    query_states=None,
    relative_pos=None,
    return_dict=True,
):
    states = None
    if not output_attentions and query_states is None and relative_pos is None:
        states = encoder.inference.run(
            encoder, encoder.get_rel_embedding, hidden_states, attention_mask
        )
    if states is None:
        return type(encoder).forward(
            encoder,
            hidden_states,
            attention_mask,
            output_hidden_states,
            output_attentions,
            query_states,
            relative_pos,
            return_dict,
        )
    from transformers.modeling_outputs import BaseModelOutput

    last = states[-1]
    # transformers' models ask for all states and use the last: those of padding are put off.
    every: Any = states if isinstance(states, States) else tuple(states)
    if not return_dict:
        return (last, every) if output_hidden_states else (last,)
    return BaseModelOutput(
        last_hidden_state=last, hidden_states=every if output_hidden_states else None
    )


def _plain_states(model: nn.Module, args, output):
    """A forward hook: hidden states that leave a model are a tuple."""
    if isinstance(output, tuple):
        return tuple(tuple(x) if isinstance(x, States) else x for x in output)
    if isinstance(output.hidden_states, States):
        output.hidden_states = tuple(output.hidden_states)
    return output


def _unhook(module: nn.Module) -> None:
    hooks = module._forward_hooks
    for key in [key for key, hook in hooks.items() if hook is _plain_states]:
        del hooks[key]
