"""Averages of the weights over the steps of training."""

import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from pyrovae.training.state import ModelState, Snapshot


class Average:
    r"""An exponential moving average of parameters and buffers, which changes places with them between epochs.

    .. math:: a_1 = \theta_1, \qquad a_t = d\, a_{t-1} + (1 - d)\, \theta_t

    Buffers that are not floating-point numbers, such as counters, are those of the last step.

    Args:
        state: the parameters and buffers.
        decay: :math:`d`.
    """

    def __init__(self, state: ModelState, decay: float):
        self._update = get_ema_multi_avg_fn(decay)
        self.kept = state.snapshot()  # the average in training; between epochs the weights to train
        live = {"params": state.params, "buffers": state.buffers}
        pairs = [(t, self.kept[group][key]) for group, tensors in live.items() for key, t in tensors.items()]
        self.pairs = list({id(t): (t, kept) for t, kept in pairs}.values())  # several names may share a parameter
        self.groups: dict[tuple[torch.device, torch.dtype], list[tuple[Tensor, Tensor]]] = {}
        for t, kept in self.pairs:
            self.groups.setdefault((t.device, t.dtype), []).append((t, kept))

    @torch.no_grad()
    def start(self) -> None:
        """Sets the average to the present weights, after the first step."""
        for live, kept in self.pairs:
            kept.copy_(live)

    @torch.no_grad()
    def update(self) -> None:
        """Takes the present weights into the average."""
        for (_, dtype), pairs in self.groups.items():
            if dtype.is_floating_point:
                self._update([kept for _, kept in pairs], [live for live, _ in pairs], 0)
            else:
                for live, kept in pairs:
                    kept.copy_(live)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchanges the weights of the model and those that are kept."""
        for live, kept in self.pairs:
            before = live.clone()
            live.copy_(kept)
            kept.copy_(before)

    def load(self, snapshot: Snapshot) -> None:
        """Restores what is kept."""
        for group, tensors in self.kept.items():
            for key, t in tensors.items():
                t.copy_(snapshot[group][key])
