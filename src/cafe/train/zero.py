"""DeepSpeed's ZeRO, stages 1 and 2, where accelerate's configuration asks for it.

accelerate's own wrapper moves the weights at the end of a backward pass. Here the step tells the
engine which backward of a batch is the last, and the loop when to move, after it has looked at the
losses. Weights, forwards and autocast are not the engine's: it divides AdamW's moments over the
ranks, and in stage 2 the gradients.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from cafe.errors import RecipeError
from cafe.recipes import Recipe

_SWITCH = "ACCELERATE_USE_DEEPSPEED"
_MOMENTS = ("exp_avg", "exp_avg_sq")


def zero_settings(recipe: Recipe) -> dict[str, Any] | None:
    """DeepSpeed's `zero_optimization` as accelerate was told it; None where it was not told any.

    Raises RecipeError for what this library does not do with DeepSpeed.
    """
    if os.environ.get(_SWITCH, "false").lower() != "true":
        return None
    if find_spec("deepspeed") is None:
        raise RecipeError(
            "accelerate is set to use DeepSpeed, which is not installed; pip install deepspeed, or "
            "switch it off and set sharding=fsdp in the recipe"
        )
    from accelerate.utils import DeepSpeedPlugin

    settings = DeepSpeedPlugin().deepspeed_config["zero_optimization"]
    offloaded = [
        name
        for name in ("offload_optimizer", "offload_param")
        if (settings.get(name) or {}).get("device") not in (None, "none")
    ]
    objective = recipe.objective
    wrong = None
    if settings["stage"] not in (1, 2):
        wrong = f"ZeRO stage {settings['stage']}; choose stage 1 or 2, or sharding=fsdp without it"
    elif offloaded:
        wrong = f"{offloaded[0]}; leave it out, or use sharding=fsdp without DeepSpeed"
    elif recipe.sharding != "none":
        wrong = f"sharding={recipe.sharding} beside it; use one of the two"
    elif objective.learn_temperature or objective.contrastive == "sigmoid":
        wrong = "a contrastive loss that learns numbers of its own; use sharding=fsdp without it"
    if wrong:
        raise RecipeError(f"accelerate is set to use DeepSpeed, and cafe does not take {wrong}")
    return settings


@contextmanager
def unknown_to_accelerate() -> Iterator[None]:
    """Within, accelerate joins the processes as it does without DeepSpeed."""
    told = os.environ.pop(_SWITCH, None)
    try:
        yield
    finally:
        if told is not None:
            os.environ[_SWITCH] = told


class ZeroOptimizer:
    """AdamW divided by ZeRO; to the loop and to checkpoints it is one that is whole.

    param_groups   as AdamW's, with the model's own parameters

    `state_dict` and `load_state_dict` are all ranks' together.
    """

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, zero: dict[str, Any], max_norm: float | None
    ) -> None:
        deepspeed = import_module("deepspeed")
        self.param_groups = [
            {**group, "params": list(group["params"])} for group in optimizer.param_groups
        ]
        self._engine, self._pieces, _, _ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            config={
                "train_micro_batch_size_per_gpu": 1,  # of its own loader, which nothing asks
                "gradient_clipping": max_norm or 0.0,
                "zero_optimization": zero,
                "zero_allow_untested_optimizer": True,
                "zero_force_ds_cpu_optimizer": False,
            },
        )
        self.backward = self._engine.backward
        # Moments of zero before the first step, for DeepSpeed finds the first group's only.
        for piece in self._pieces.single_partition_of_fp32_groups:
            zeros = {name: torch.zeros_like(piece) for name in _MOMENTS}
            self._pieces.optimizer.state[piece] = {"step": torch.zeros(()), **zeros}
        self._pieces._lazy_init_hp_params_optimizer_state()

    @contextmanager
    def more_to_come(self) -> Iterator[None]:
        """A backward within is not the last of its batch."""
        self._engine.set_gradient_accumulation_boundary(False)
        yield
        self._engine.set_gradient_accumulation_boundary(True)

    def zero_grad(self) -> None:
        self._pieces.zero_grad()

    def norm(self) -> float:
        """Of the gradients that `step` will clip; not finite where one of them is not."""
        norm = float(self._pieces.scaled_global_norm())
        return norm if norm >= 0 else float("nan")  # its sign for "not finite"

    def step(self) -> None:
        for own, piece in zip(self.param_groups, self._pieces.param_groups, strict=True):
            piece["lr"] = own["lr"]
        self._engine.step()

    def state_dict(self) -> dict[str, Any]:
        """As AdamW's."""
        whole = import_module("deepspeed.utils").safe_get_full_optimizer_state
        state: dict[int, dict[str, Tensor]] = {}
        steps = [values["step"] for values in self._pieces.optimizer.state.values()]
        groups = []
        for group in self.param_groups:
            numbers = range(len(state), len(state) + len(group["params"]))
            groups.append({**group, "params": [*numbers]})
            for number, parameter in zip(numbers, group["params"], strict=True):
                moments = {name: whole(parameter, name) for name in _MOMENTS}
                state[number] = {"step": steps[0].clone(), **moments}
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes what AdamW or this class wrote. The weights are loaded already."""
        put = import_module("deepspeed.utils").safe_set_full_optimizer_state
        self._pieces.refresh_fp32_params()
        steps = [values["step"] for values in state["state"].values()]
        for values in self._pieces.optimizer.state.values():
            values["step"].fill_(steps[0])
        parameters = [p for group in self.param_groups for p in group["params"]]
        for number, parameter in enumerate(parameters):
            for name in _MOMENTS:
                if number in state["state"]:
                    put(parameter, state["state"][number][name].to(parameter.device), name)
