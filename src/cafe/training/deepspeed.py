"""DeepSpeed's ZeRO, stages 1 and 2, where accelerate's configuration asks for it.

accelerate's own wrapper updates the weights at the end of a backward pass. Here the step tells the
engine which backward of a batch is the last, and the loop decides when to update, after it has
checked the losses. The engine does not handle weights, forwards and autocast: it partitions AdamW's
moments over the ranks, and in stage 2 the gradients.
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
    """DeepSpeed's `zero_optimization` in accelerate's configuration; None without DeepSpeed.

    Raises:
        RecipeError: The configuration or the recipe asks for something that cafe does not support
            with DeepSpeed.
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
        raise RecipeError(f"accelerate is set to use DeepSpeed, and cafe does not support {wrong}")
    return settings


@contextmanager
def hidden_from_accelerate() -> Iterator[None]:
    """A context in which accelerate joins the processes as it does without DeepSpeed."""
    value = os.environ.pop(_SWITCH, None)
    try:
        yield
    finally:
        if value is not None:
            os.environ[_SWITCH] = value


class ZeroOptimizer:
    """AdamW partitioned by ZeRO, with the interface of a plain AdamW.

    param_groups   as AdamW's, with the model's own parameters

    `state_dict` and `load_state_dict` are collectives of all ranks.
    """

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, zero: dict[str, Any], max_norm: float | None
    ) -> None:
        deepspeed = import_module("deepspeed")
        self.param_groups = [
            {**group, "params": list(group["params"])} for group in optimizer.param_groups
        ]
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            config={
                "train_micro_batch_size_per_gpu": 1,  # for its own loader, which is not used
                "gradient_clipping": max_norm or 0.0,
                "zero_optimization": zero,
                "zero_allow_untested_optimizer": True,
                "zero_force_ds_cpu_optimizer": False,
            },
        )
        self.backward = self._engine.backward
        # Zero moments before the first step, because DeepSpeed only initializes the first group's.
        for shard in self._optimizer.single_partition_of_fp32_groups:
            zeros = {name: torch.zeros_like(shard) for name in _MOMENTS}
            self._optimizer.optimizer.state[shard] = {"step": torch.zeros(()), **zeros}
        self._optimizer._lazy_init_hp_params_optimizer_state()

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """The context of a backward that is not the last of its batch."""
        self._engine.set_gradient_accumulation_boundary(False)
        yield
        self._engine.set_gradient_accumulation_boundary(True)

    def zero_grad(self) -> None:
        self._optimizer.zero_grad()

    def norm(self) -> float:
        """The norm of the gradients that `step` will clip; not finite if one of them is not."""
        norm = float(self._optimizer.scaled_global_norm())
        return norm if norm >= 0 else float("nan")  # negative stands for "not finite"

    def step(self) -> None:
        for own, group in zip(self.param_groups, self._optimizer.param_groups, strict=True):
            group["lr"] = own["lr"]
        self._engine.step()

    def state_dict(self) -> dict[str, Any]:
        """The state in AdamW's format."""
        full_state = import_module("deepspeed.utils").safe_get_full_optimizer_state
        state: dict[int, dict[str, Tensor]] = {}
        steps = [values["step"] for values in self._optimizer.optimizer.state.values()]
        groups = []
        for group in self.param_groups:
            numbers = range(len(state), len(state) + len(group["params"]))
            groups.append({**group, "params": [*numbers]})
            for number, parameter in zip(numbers, group["params"], strict=True):
                moments = {name: full_state(parameter, name) for name in _MOMENTS}
                state[number] = {"step": steps[0].clone(), **moments}
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a state of AdamW or of this class. The weights must be loaded before."""
        set_state = import_module("deepspeed.utils").safe_set_full_optimizer_state
        self._optimizer.refresh_fp32_params()
        steps = [values["step"] for values in state["state"].values()]
        for values in self._optimizer.optimizer.state.values():
            values["step"].fill_(steps[0])
        parameters = [p for group in self.param_groups for p in group["params"]]
        for number, parameter in enumerate(parameters):
            for name in _MOMENTS:
                if number in state["state"]:
                    set_state(parameter, state["state"][number][name].to(parameter.device), name)
