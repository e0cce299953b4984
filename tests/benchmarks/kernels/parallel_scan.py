"""A peer of the selective scan: the work-efficient parallel scan in plain torch.

Source: Blelloch 1990, "Prefix Sums and Their Applications", section 1.4, on all states of all
tokens at once, which is what plain torch can do without a loop over the tokens. The adjoint of the
recurrence is the same scan, run backwards.
"""

import torch
import torch.nn.functional as F


def parallel_selective_scan(values, dt, A, B, C):
    """What `kernels.scans.selective_scan` gives without an initial state, one document a row."""
    x, steps, enter, leave = (tensor.transpose(0, 1) for tensor in (values, dt, B, C))
    decays = torch.exp(steps[..., None] * A)
    added = (steps * x)[..., None] * enter[:, :, None]
    states = _Scan.apply(decays, added)
    return (states * leave[:, :, None]).sum(-1).transpose(0, 1)


class _Scan(torch.autograd.Function):
    """h[t] = decays[t] h[t-1] + added[t], the time in front."""

    @staticmethod
    def forward(ctx, decays, added):
        states = sweep(decays.clone(), added.clone())
        ctx.save_for_backward(decays, states)
        return states

    @staticmethod
    def backward(ctx, d_states):
        decays, states = ctx.saved_tensors
        later = torch.cat([decays[1:], torch.zeros_like(decays[:1])]).flip(0)
        d_added = sweep(later, d_states.flip(0)).flip(0)
        d_decays = torch.zeros_like(decays)
        torch.mul(d_added[1:], states[:-1], out=d_decays[1:])
        return d_decays, d_added


def sweep(decays, states):
    """Scan both, which are overwritten; lengths that are no powers of two are filled up."""
    length = len(states)
    missing = (1 << (length - 1).bit_length()) - length
    if missing:
        behind = (*[0, 0] * (states.ndim - 1), 0, missing)
        decays, states = F.pad(decays, behind), F.pad(states, behind)
    reach = 1
    while reach < len(states):
        _combine(decays, states, slice(reach - 1, None, 2 * reach), 2 * reach - 1, 2 * reach)
        reach *= 2
    reach //= 4
    while reach >= 1:
        left = slice(2 * reach - 1, len(states) - reach, 2 * reach)
        _combine(decays, states, left, 3 * reach - 1, 2 * reach)
        reach //= 2
    return states[:length]


def _combine(decays, states, left, first, step):
    """Put what `left` did before what every `step`-th element from `first` on does."""
    right = slice(first, None, step)
    states[right].addcmul_(decays[right], states[left])
    decays[right].mul_(decays[left])
