"""Megatron's mixture of experts, in which the experts of each token may be chosen from outside.

Shapes: L tokens of this rank, X layers of the model, C experts of a token.
"""

from __future__ import annotations

from copy import copy
from typing import Any

from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction
from torch import Tensor, nn


class ChosenExperts(MoELayer):
    """A MoELayer whose `padding_mask`, which Megatron carries to it as it does the layout, is such a choice.

    It is int16 [L, X, C], or None: the router chooses.
    """

    chosen_LC: Tensor | None = None

    def forward(
        self, hidden_states: Tensor, intermediate_tensors: Any = None, padding_mask: Tensor | None = None
    ) -> Any:
        """Overrides MoELayer's. A copy holds the choice, for a recomputation comes after other passes."""
        if padding_mask is None:
            return super().forward(hidden_states, intermediate_tensors)
        assert self.layer_number is not None
        here = copy(self)
        here.chosen_LC = padding_mask[:, self.layer_number - 1].long()
        return MoELayer.forward(here, hidden_states, intermediate_tensors)

    def route(self, hidden_states: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Overrides MoELayer's, which has the router choose."""
        if self.chosen_LC is None:
            return super().route(hidden_states)
        replay: RouterReplay = self.router.router_replay
        replay.target_topk_idx = self.chosen_LC
        replay.set_router_replay_action(RouterReplayAction.REPLAY_FORWARD)
        try:
            return super().route(hidden_states)
        finally:
            replay.clear_indices()
            replay.clear_router_replay_action()


def take_choices(model: nn.Module) -> None:
    """Lets a model's mixtures of experts take a choice; call it once, after the model is built.

    Named in the spec, the class would get no process groups: Megatron compares it with its own.
    """
    for module in model.modules():
        if isinstance(module, MoELayer):
            module.__class__ = ChosenExperts
    # Megatron's list of all routers that were ever built.
    RouterReplay.clear_global_router_replay_instances()
