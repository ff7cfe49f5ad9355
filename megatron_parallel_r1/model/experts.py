"""Megatron's mixture of experts: experts that are chosen from outside, and a loss that balances their load.

Shapes: L tokens of this rank, X layers of the model, E experts of a layer, C experts of a token, S traces.
"""

from __future__ import annotations

from copy import copy
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction
from torch import Tensor, nn


class ChosenExperts(MoELayer):
    """A MoELayer whose `padding_mask`, which Megatron carries to it as it does the layout, is such a choice.

    It is int16 [L, X, C], or None: the router chooses. With a balance loss it is what `with_traces` returns.
    """

    chosen_LC: Tensor | None = None
    segment_L: Tensor | None = None

    def forward(
        self, hidden_states: Tensor, intermediate_tensors: Any = None, padding_mask: Tensor | None = None
    ) -> Any:
        """Overrides MoELayer's. A copy holds the choice, for a recomputation comes after other passes."""
        if padding_mask is None:
            return super().forward(hidden_states, intermediate_tensors)
        assert self.layer_number is not None
        here = copy(self)
        if self.config.moe_aux_loss_coeff:
            here.segment_L, padding_mask = padding_mask[:, -1, 0].long(), padding_mask[:, :-1]
        if padding_mask.shape[1]:
            here.chosen_LC = padding_mask[:, self.layer_number - 1].long()
        return MoELayer.forward(here, hidden_states, intermediate_tensors)

    def route(self, hidden_states: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Overrides MoELayer's, which has the router choose."""
        replay: RouterReplay = self.router.router_replay
        if self.chosen_LC is not None:
            replay.target_topk_idx = self.chosen_LC
            replay.set_router_replay_action(RouterReplayAction.REPLAY_FORWARD)
        self.router.segment_L = self.segment_L
        try:
            return super().route(hidden_states)
        finally:
            if self.chosen_LC is not None:
                replay.clear_indices()
                replay.clear_router_replay_action()
            self.router.segment_L = None


class BalancingRouter(TopKRouter):
    """A router with a balance loss, whose gradient it adds in backward.

    Attributes:
        segment_L: the trace of each token that predicts a target, -1 for other tokens; None: no loss.
    """

    segment_L: Tensor | None = None

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Overrides TopKRouter's."""
        weights_LE, chosen_LE = super().routing(logits, padding_mask)
        if self.segment_L is None or not torch.is_grad_enabled():
            return weights_LE, chosen_LE
        scores_LE = logits.view(-1, self.num_experts).float().softmax(-1)
        loss = balance_loss(scores_LE, chosen_LE, self.segment_L, self.tp_cp_group)
        return MoEAuxLossAutoScaler.apply(weights_LE, self.config.moe_aux_loss_coeff * loss), chosen_LE


def balance_loss(scores_LE: Tensor, chosen_LE: Tensor, segment_L: Tensor, group: dist.ProcessGroup) -> Tensor:
    """This rank's part of the balance loss of a layer, summed over the tokens that predict targets.

    The sequence-wise balance loss of DeepSeek-V3 (arXiv 2412.19437, equations 17 to 20) of each trace times
    its targets: E / C x sum over experts of (share of the trace's targets at the expert) x (sum of its
    scores). It is 1 a target where all experts have as many. Traces, unlike micro-batches, are the same under
    every parallel layout and packing.

    Args:
        scores_LE: softmax of the router's logits, float32.
        chosen_LE: bool, the experts that each token goes through.
        segment_L: int64, the trace of each token that predicts a target, -1 for other tokens.
        group: the ranks that hold parts of the same row.
    """
    experts = scores_LE.shape[1]
    # A bound on the number of traces that all ranks know without asking the device.
    counts_SE = scores_LE.new_zeros(len(segment_L) * group.size() + 1, experts)
    # The others count in a last row of their own.
    counts_SE.index_add_(0, segment_L.where(segment_L >= 0, len(counts_SE) - 1), chosen_LE.to(counts_SE))
    if group.size() > 1:
        dist.all_reduce(counts_SE, group=group)
    shares_SE = experts * counts_SE / counts_SE.sum(-1, keepdim=True).clamp(min=1)
    balanced_LE = (scores_LE * shares_SE[segment_L]).where(segment_L[:, None] >= 0, 0.0)
    return balanced_LE.sum()


def with_traces(experts_LXC: Tensor | None, segment_L: Tensor, per_token: int) -> Tensor:
    """What layers with a balance loss take of a row: its experts, if chosen, and the trace of each target.

    Args:
        per_token: C.

    Returns:
        int16 [L, X + 1, C], or [L, 1, C] if the router chooses.
    """
    traces_L1C = segment_L.short()[:, None, None].expand(-1, 1, per_token)
    return traces_L1C if experts_LXC is None else torch.cat([experts_LXC, traces_L1C], dim=1)


def take_choices(model: nn.Module) -> None:
    """Lets a model's mixtures of experts take a choice; call it once, after the model is built.

    Named in the spec, the class would get no process groups: Megatron compares it with its own.
    """
    for module in model.modules():
        if isinstance(module, MoELayer):
            module.__class__ = ChosenExperts
            if module.config.moe_aux_loss_coeff:
                module.router.__class__ = BalancingRouter
    # Megatron's list of all routers that were ever built.
    RouterReplay.clear_global_router_replay_instances()
