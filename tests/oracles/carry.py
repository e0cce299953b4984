"""States before the tokens of each rank, rank after rank, from what the tokens do to any state."""

import torch
from torch import Tensor


def states_before(
    logs: list[Tensor], keep: list[list[bool]], states: list[Tensor], *, turned: bool
) -> list[Tensor]:
    """Walk over the ranks: after = exp(log) * before, where it is kept, + state.

    Args:
        logs: of the decays over each rank's tokens, which broadcast to the states.
        keep: by rank and row.
        states: what each rank's tokens leave from zero, rows first.
        turned: whether the last rank comes first.
    """
    before = [torch.zeros_like(states[0]) for _ in states]
    order = list(range(len(states)))
    if turned:
        order.reverse()
    carried = [torch.zeros_like(row) for row in states[0]]
    for rank in order:
        before[rank] = torch.stack(carried)
        decays = torch.exp(logs[rank]).expand(states[rank].shape)
        carried = [
            (decays[row] * carried[row] if keep[rank][row] else 0) + states[rank][row]
            for row in range(len(carried))
        ]
    return before
