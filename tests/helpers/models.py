"""A small random model of the real class, and how to make it exact."""

from __future__ import annotations

from typing import Any

SMALL = {"vision_layers": 1, "vision_width": 64, "language_layers": 2, "language_width": 64}


def build_small_model(**sizes: Any) -> Any:
    """A random LLaVA-OneVision of about 0.2M parameters, in evaluation mode."""
    import torch

    from cafe.model.tiny import tiny_model, tiny_processor
    from cafe.model.vlm import CAFe

    torch.manual_seed(0)
    processor = tiny_processor(
        ["Describe this image.", "a big red cat at the top left", "yes no", "Compress this in one"],
        patch_pixels=16,  # an image alone takes 78 tokens, beside others 37
    )
    return CAFe(tiny_model(processor, **{**SMALL, **sizes}), processor).eval()


def with_latent_mean(model: Any, count: int) -> Any:
    """The model, its embeddings being the mean of `count` latent tokens' states."""
    import torch

    from cafe.model.latent import add_latent_tokens
    from cafe.model.vlm import CAFe

    torch.manual_seed(0)
    add_latent_tokens(model.model, model.processor, count, "mean")
    return CAFe(model.model, model.processor).eval()


def with_token_vectors(model: Any) -> Any:
    """The model with a random projection of its tokens' states to 16 coordinates."""
    import torch

    from cafe.model.multi_vector import add_token_projection, new_token_projection

    torch.manual_seed(3)
    add_token_projection(model.model, new_token_projection(SMALL["language_width"], 16))
    return model


def in_float64(model: Any) -> Any:
    """The model in float64, its RMS norms too, which compute in float32 whatever they are given.

    Rotations of the Qwen towers stay in float32: there, equal inputs give equal outputs, and
    gradients agree to about 1e-6. transformers' gated delta rule computes in float32, too: in its
    place the recurrence is written out, token by token.
    """
    import types

    import torch

    def exact(norm: Any, hidden: torch.Tensor) -> torch.Tensor:
        epsilon = norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps
        weight = getattr(norm, "weight", None)
        if not hasattr(norm, "variance_epsilon") and not hasattr(norm, "with_scale"):
            weight = weight + 1.0  # Gemma 3 and Qwen3.5 save the difference from one
        return torch.nn.functional.rms_norm(hidden, hidden.shape[-1:], weight, epsilon)

    def exact_gated(norm: Any, hidden: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        normed = torch.nn.functional.rms_norm(
            hidden, hidden.shape[-1:], norm.weight, norm.variance_epsilon
        )
        return normed * torch.nn.functional.silu(gate)

    model = model.double()
    write_out_delta_rules(model.model.get_decoder())
    if hasattr(model.model.config.get_text_config(), "num_experts"):
        model.model.set_experts_implementation("eager")  # the grouped product knows no float64
    for norm in [m for m in model.modules() if type(m).__name__.endswith("RMSNormGated")]:
        norm.forward = types.MethodType(exact_gated, norm)
    norms = [m for m in model.modules() if type(m).__name__.endswith("RMSNorm")]
    assert norms
    for norm in norms:
        norm.forward = types.MethodType(exact, norm)
    return model


def write_out_delta_rules(decoder: Any) -> None:
    """Compute gated delta rules in float64 by their recurrence, where transformers is called."""
    import sys

    import torch

    for layer in decoder.layers:
        module: Any = sys.modules[type(layer).__module__]
        own = getattr(module, "torch_chunk_gated_delta_rule", None)
        if own is None or hasattr(own, "_written_out"):
            continue

        def rule(query: Any, *args: Any, own: Any = own, **kwargs: Any) -> Any:
            plain = query.dtype == torch.float64 and "segments" not in kwargs
            return (recurrence if plain else own)(query, *args, **kwargs)

        rule._written_out = True  # type: ignore[attr-defined]
        rule._cafe_branches = True  # type: ignore[attr-defined]
        module.torch_chunk_gated_delta_rule = rule


def recurrence(
    query: Any,
    key: Any,
    value: Any,
    *,
    g: Any,
    beta: Any,
    initial_state: Any = None,
    use_qk_l2norm_in_kernel: bool = False,
    **_: Any,
) -> tuple[Any, Any]:
    """The gated delta rule, one token after the other, as its definition says."""
    import torch

    heads = value.shape[2] // key.shape[2]
    query, key = (x.repeat_interleave(heads, dim=2) for x in (query, key))
    if use_qk_l2norm_in_kernel:
        query, key = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (query, key))
    state = initial_state
    if state is None:
        n, _, heads, size = key.shape
        state = value.new_zeros(n, heads, size, value.shape[3])
    outputs = []
    for t in range(query.shape[1]):
        state = state * g[:, t].exp()[..., None, None]
        known = torch.einsum("nhkv,nhk->nhv", state, key[:, t])
        change = beta[:, t, :, None] * (value[:, t] - known)
        state = state + torch.einsum("nhk,nhv->nhkv", key[:, t], change)
        outputs.append(torch.einsum("nhkv,nhk->nhv", state, query[:, t]))
    return torch.stack(outputs, dim=1) / key.shape[3] ** 0.5, state
