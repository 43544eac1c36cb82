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
    gradients agree to about 1e-6.
    """
    import types

    import torch

    def exact(norm: Any, hidden: torch.Tensor) -> torch.Tensor:
        offset = 1.0 if not hasattr(norm, "variance_epsilon") else 0.0
        epsilon = norm.eps if offset else norm.variance_epsilon
        return torch.nn.functional.rms_norm(
            hidden, hidden.shape[-1:], norm.weight + offset, epsilon
        )

    model = model.double()
    norms = [m for m in model.modules() if type(m).__name__.endswith("RMSNorm")]
    assert norms
    for norm in norms:
        norm.forward = types.MethodType(exact, norm)
    return model
