"""The chunked algorithm of SSD, forward and back, for rows whose heads share B and C.

Source: Dao and Gu 2024, section 6: within a chunk of tokens the scan is a masked product of
matrices, between chunks it is a recurrence of states. The backward pass recomputes both.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from kernels.runtime import Path, define_operator, path_of

# Numbers of a working tensor: few enough for a core's cache; on other devices enough to fill them.
_WORKING_ON_CPU = 2**18
_WORKING_ELSEWHERE = 2**26

# Logarithms of decays are cut here. A smaller decay counts for nothing, but the denormal numbers
# that it leads to make exponentials and products a hundred times slower.
_FLOOR = {torch.float32: -60.0, torch.float64: -600.0}


class Rows(NamedTuple):
    """Some rows of the inputs."""

    values: Float[Tensor, "B L H P"]
    dt: Float[Tensor, "B L H"]
    A: Float[Tensor, "B H"]
    B: Float[Tensor, "B L N"]
    C: Float[Tensor, "B L N"]
    initial: Float[Tensor, "B N H P"] | None
    documents: Int[Tensor, "B L"] | None


class Gradients(NamedTuple):
    """Where the gradients of some rows go; `state` is the final state's to begin with."""

    values: Float[Tensor, "B L H P"]
    dt: Float[Tensor, "B L H"]
    B: Float[Tensor, "B L N"]
    C: Float[Tensor, "B L N"]
    A: Float[Tensor, "B H"]
    state: Float[Tensor, "B N H P"]


class _Chunks(NamedTuple):
    """Consecutive chunks of some rows, the chunk first.

    Attributes:
        log_decay: sum of dt A over the document's tokens in the chunk, up to the token's own.
        rounding: what the dtype of `log_decay` left out, so that differences lose nothing.
        pairs: products of C and B where the later token sees the earlier, else zero.
        entering: decay from the state before the chunk to each token, zero in other documents.
        leaving: decay from each token to the state after the chunk, zero in other documents.
        share: dt times that.
    """

    values: Float[Tensor, "K B Q H P"]
    dt: Float[Tensor, "K B H Q"]
    B: Float[Tensor, "K B Q N"]
    C: Float[Tensor, "K B Q N"]
    log_decay: Float[Tensor, "K B H Q"]
    rounding: Float[Tensor, "K B H Q"]
    pairs: Float[Tensor, "K B 1 Q Q"]
    entering: Float[Tensor, "K B Q H 1"]
    leaving: Float[Tensor, "K B Q H 1"]
    share: Float[Tensor, "K B Q H 1"]

    def piece(self, span: slice) -> "_Chunks":
        """Some of the chunks."""
        return _Chunks(*(x[span] for x in self))

    def kept(self) -> Float[Tensor, "K B 1 H 1"]:
        """Decay from the state before each chunk to that after it."""
        return self.entering[:, :, -1:]


class _Partial(NamedTuple):
    """What the gradients of some chunks are put together from.

    Attributes:
        inside: of the logarithm of each token's decay, from pairs inside a chunk.
        heard: of the logarithm of `entering`.
        left: of the logarithm of `leaving`.
        kept: of the logarithm of the decay from before to after the chunk.
        dt: from what the token adds to the state.
    """

    values: Float[Tensor, "K B Q H P"]
    pairs: Float[Tensor, "K B 1 Q Q"]
    B: Float[Tensor, "K B Q N"]
    C: Float[Tensor, "K B Q N"]
    inside: Float[Tensor, "K B H Q"]
    heard: Float[Tensor, "K B Q H"]
    left: Float[Tensor, "K B Q H"]
    kept: Float[Tensor, "K B H"]
    dt: Float[Tensor, "K B Q H"]

    def piece(self, span: slice) -> "_Partial":
        """Those of some of the chunks."""
        return _Partial(*(x[span] for x in self))


class _Workspace:
    """Working tensors by name, used again from piece to piece: fresh memory costs page faults."""

    def __init__(self, like: Tensor) -> None:
        self._like = like
        self._tensors: dict[str, Tensor] = {}

    def take(self, name: str, *shape: int) -> Tensor:
        """A tensor of that shape, which holds anything."""
        tensor = self._tensors.get(name)
        if tensor is None or tensor.shape != shape:
            tensor = self._tensors[name] = self._like.new_empty(shape)
        return tensor


def scan(inputs: Rows, chunk: int) -> tuple[Tensor, Tensor]:
    """Outputs (B, L, H, P) and final states (B, N, H, P), by chunks of so many tokens."""
    outputs = torch.empty_like(inputs.values, memory_format=torch.contiguous_format)
    final, work = _initial_states(inputs), _Workspace(inputs.values)
    for rows in _blocks(inputs, chunk):
        _scan_block(_take_rows(inputs, rows), outputs[rows], final[rows], chunk, work)
    return outputs, final


def scan_back(
    inputs: Rows, d_outputs: Float[Tensor, "B L H P"], d_final: Float[Tensor, "B N H P"], chunk: int
) -> Gradients:
    """Gradients of the inputs, and in place of `d_final` that of the initial states."""
    values, dt, B, C = (torch.empty_like(x) for x in (inputs.values, inputs.dt, *inputs[3:5]))
    gradients = Gradients(values, dt, B, C, torch.zeros_like(inputs.A), d_final)
    work = _Workspace(inputs.values)
    for rows in _blocks(inputs, chunk):
        into = Gradients(*(x[rows] for x in gradients))
        _scan_block_back(_take_rows(inputs, rows), d_outputs[rows], into, chunk, work)
    return gradients


def _scan_block(rows: Rows, outputs: Tensor, final: Tensor, chunk: int, work: _Workspace) -> None:
    """Write the outputs piece after piece, and move the states to behind them."""
    state = final
    for span, Q in _sections(rows, chunk):
        chunks, to = _cut(rows, span, Q), _chunked(outputs, span, Q)
        for piece in _pieces(chunks):
            state = _write(chunks.piece(piece), to[piece], state, work)
    final.copy_(state)


def _write(chunks: _Chunks, to: Tensor, state: Tensor, work: _Workspace) -> Tensor:
    """Write the outputs of some chunks; return the state behind them."""
    K, B, Q, H, P = chunks.values.shape
    states = work.take("states", K + 1, *state.shape)
    states[0].copy_(state)
    _advance(chunks, states, work)
    values, matrix = _by_head(chunks.values, "steps", work), _matrix(chunks, work)
    inside = work.take("heads", K, B, H, Q, P)
    torch.bmm(_flat(matrix), _flat(values), out=_flat(inside))
    heard = _product(chunks.C, states[:K], work.take("tokens", K, B, Q, H, P))
    torch.addcmul(inside.transpose(2, 3), chunks.entering, heard, out=to)
    return states[K]


def _scan_block_back(
    rows: Rows, d_outputs: Tensor, into: Gradients, chunk: int, work: _Workspace
) -> None:
    """Recompute the states before all chunks, then walk back over the pieces."""
    state, sections = _initial_states(rows), []
    for span, Q in _sections(rows, chunk):
        chunks = _cut(rows, span, Q)
        states = into.state.new_empty(len(chunks.values) + 1, *into.state.shape)
        states[0] = state
        for piece in _pieces(chunks):
            _advance(chunks.piece(piece), states[piece.start : piece.stop + 1], work)
        state = states[-1]
        sections.append((span, Q, chunks, states))
    for span, Q, chunks, states in reversed(sections):
        d_out, partial = _chunked(d_outputs, span, Q), _new_partial(chunks, into, span)
        for piece in reversed(list(_pieces(chunks))):
            part = chunks.piece(piece), partial.piece(piece)
            _between_back(*part, states[piece], d_out[piece], into.state, work)
            _inside_back(*part, d_out[piece], work)
        _put_together(rows, chunks, partial, into, span)


def _new_partial(chunks: _Chunks, into: Gradients, span: slice) -> _Partial:
    K, B, Q, H, _ = chunks.values.shape
    by_token = (torch.empty_like(chunks.dt).view(K, B, Q, H) for _ in range(3))
    heard, left, dt = by_token
    return _Partial(
        values=_chunked(into.values, span, Q),
        pairs=torch.empty_like(chunks.pairs),
        B=torch.empty_like(chunks.B),
        C=torch.empty_like(chunks.C),
        inside=torch.empty_like(chunks.dt),
        heard=heard,
        left=left,
        kept=chunks.dt.new_empty(K, B, H),
        dt=dt,
    )


def _between_back(
    chunks: _Chunks,
    into: _Partial,
    states: Float[Tensor, "K B N H P"],
    d_out: Float[Tensor, "K B Q H P"],
    d_state: Float[Tensor, "B N H P"],
    work: _Workspace,
) -> None:
    """Go back through the states between chunks; `d_state` moves to before the first of them."""
    K, B, Q, H, P = d_out.shape
    heard = torch.mul(d_out, chunks.entering, out=work.take("heard", K, B, Q, H, P))
    d_states = work.take("d_states", K + 1, *d_state.shape)
    d_states[K] = d_state
    _product(chunks.C.mT, heard, d_states[:K])
    for k, kept in reversed(list(enumerate(chunks.kept()))):
        d_states[k].addcmul_(kept, d_states[k + 1])
    d_state.copy_(d_states[0])
    after, tokens = d_states[1:], work.take("tokens", K, B, Q, H, P)
    torch.bmm(_wide(heard), _wide(states).mT, out=into.C.flatten(0, 1))
    _dots(_product(chunks.C, states, tokens), heard, into.heard)
    left = torch.mul(chunks.values, chunks.share, out=work.take("left", K, B, Q, H, P))
    torch.bmm(_wide(left), _wide(after).mT, out=into.B.flatten(0, 1))
    _dots(_product(chunks.B, after, tokens), left, into.left)
    kept = work.take("kept", K, B, states.shape[2], H)
    torch.sum(_dots(states, after, kept), 2, out=into.kept)


def _inside_back(
    chunks: _Chunks, into: _Partial, d_out: Float[Tensor, "K B Q H P"], work: _Workspace
) -> None:
    """Go back through the matrices inside chunks, and put together what the values get."""
    K, B, Q, H, P = d_out.shape
    heads, values = _by_head(d_out, "heads", work), _by_head(chunks.values, "steps", work)
    matrix = work.take("matrix", K, B, H, Q, Q)
    torch.bmm(_flat(heads), _flat(values).mT, out=_flat(matrix))
    _matrix_back(chunks, matrix, into, work)
    spoken, d_steps = work.take("tokens", K, B, Q, H, P), values
    torch.bmm(_flat(matrix).mT, _flat(heads), out=_flat(d_steps))
    _steps_back(chunks, d_steps, spoken, into)


def _put_together(
    rows: Rows, chunks: _Chunks, partial: _Partial, into: Gradients, span: slice
) -> None:
    """Write the gradients of all inputs but the values."""
    K, B, Q, _ = chunks.B.shape
    pairs = _hide(partial.pairs, rows.documents, span).view(K * B, Q, Q)
    d_B = partial.B.flatten(0, 1).baddbmm_(pairs.mT, chunks.C.flatten(0, 1))
    d_C = partial.C.flatten(0, 1).baddbmm_(pairs, chunks.B.flatten(0, 1))
    _chunked(into.B, span, Q).copy_(d_B.view(chunks.B.shape))
    _chunked(into.C, span, Q).copy_(d_C.view(chunks.C.shape))
    heard, left = partial.heard.transpose(2, 3), partial.left.transpose(2, 3)
    kept = partial.kept * chunks.kept()[:, :, 0, :, 0]
    d_log = partial.inside + _sum_from(heard) + _sum_before(left) + kept[..., None]
    by_log = (rows.A[:, :, None] * d_log).transpose(2, 3)
    _chunked(into.dt, span, Q).copy_(partial.dt + by_log)
    into.A.add_((chunks.dt * d_log).sum(dim=(0, 3)))


def _sum_from(x: Float[Tensor, "*rest Q"]) -> Float[Tensor, "*rest Q"]:
    """The sum of each entry and those after it."""
    return x.flip(-1).cumsum(-1).flip(-1)


def _sum_before(x: Float[Tensor, "*rest Q"]) -> Float[Tensor, "*rest Q"]:
    """The sum of the entries before each."""
    return F.pad(x[..., :-1].cumsum(-1), (1, 0))


def _cut(rows: Rows, span: slice, Q: int) -> _Chunks:
    """Cut some tokens into chunks of Q, and compute what is small."""
    values, dt, B, C = (_chunked(x, span, Q) for x in (rows.values, rows.dt, rows.B, rows.C))
    dt, B, C = dt.transpose(2, 3).contiguous(), B.contiguous(), C.contiguous()
    pairs = _hide((C @ B.mT)[:, :, None], rows.documents, span)
    exponents = dt.double() * rows.A[:, :, None]
    if rows.documents is None:
        exact = exponents.cumsum(-1)
    else:
        exact = sum_in_documents(exponents, _chunked(rows.documents, span, Q)[:, :, None])
    log_decay = exact.to(dt.dtype)
    rounding = (exact - log_decay).to(dt.dtype)
    entering, leaving = _decay(log_decay.clone()), _decay((exact[..., -1:] - exact).to(dt.dtype))
    if rows.documents is not None:
        ids, before = _chunked(rows.documents, span, Q)[:, :, None], _ids_before(rows, span, Q)
        entering.masked_fill_(ids != before, 0.0)
        leaving.masked_fill_(ids != ids[..., -1:], 0.0)
    by_token = (_by_token(x).contiguous() for x in (entering, leaving, leaving * dt))
    return _Chunks(values, dt, B, C, log_decay, rounding, pairs, *by_token)


def _hide(
    pairs: Float[Tensor, "K B 1 Q Q"], documents: Int[Tensor, "B L"] | None, span: slice
) -> Float[Tensor, "K B 1 Q Q"]:
    """Set to zero, in place, the pairs in which the first token does not see the second."""
    if documents is not None:
        ids = _chunked(documents, span, pairs.shape[-1])[:, :, None]
        pairs.masked_fill_(ids[..., :, None] != ids[..., None, :], 0.0)
    return pairs.tril_()


def _ids_before(rows: Rows, span: slice, Q: int) -> Int[Tensor, "K B 1 1"]:
    """The document of the token before each chunk; before the first token it is 0."""
    assert rows.documents is not None
    ids = F.pad(rows.documents, (1, 0))
    return ids[:, span.start : span.stop : Q].T[:, :, None, None]


def sum_in_documents(
    x: Float[Tensor, "*batch Q"], ids: Int[Tensor, "*rows Q"]
) -> Float[Tensor, "*batch Q"]:
    """The running sum that starts anew with each document, in doubling strides."""
    stride = 1
    while stride < x.shape[-1]:
        same = ids[..., stride:] == ids[..., :-stride]
        added = x[..., stride:] + torch.where(same, x[..., :-stride], 0.0)
        x = torch.cat([x[..., :stride], added], dim=-1)
        stride *= 2
    return x


def _matrix(chunks: _Chunks, work: _Workspace) -> Float[Tensor, "K B H Q Q"]:
    """The matrix from values to outputs inside each chunk: decay, product of C and B, step."""
    out = work.take("matrix", *chunks.dt.shape, chunks.dt.shape[-1])
    if path_of(out) is Path.NATIVE:
        _native_matrix(chunks.log_decay, chunks.rounding, chunks.dt, chunks.pairs, out)
        return out
    return _decays(chunks, out).mul_(chunks.pairs).mul_(chunks.dt[..., None, :])


def _matrix_back(
    chunks: _Chunks, scores: Float[Tensor, "K B H Q Q"], into: _Partial, work: _Workspace
) -> None:
    """Go back through the matrix; without step sizes, it takes the place of the scores.

    The scores are the products of gradients of outputs and of values. Between them and the
    gradient of a token's log decay lie the pairs of an earlier token and itself or a later one.
    Differences of row and column sums would be cheaper, but lose what strong decays leave.
    """
    if path_of(scores) is Path.NATIVE:
        of_chunks = chunks.log_decay, chunks.rounding, chunks.dt, chunks.pairs
        _native_matrix_back(*of_chunks, scores, into.pairs, into.inside)
        return
    decays = _decays(chunks, work.take("decays", *scores.shape))
    torch.sum(scores.mul_(decays).mul_(chunks.dt[..., None, :]), 2, keepdim=True, out=into.pairs)
    scores.mul_(chunks.pairs)
    earlier = torch.cumsum(scores, dim=-1, out=scores).tril_(-1).sum(dim=-2)
    into.inside.copy_(F.pad(earlier[..., :-1], (1, 0)))
    torch.mul(decays, chunks.pairs, out=scores)


def _steps_back(
    chunks: _Chunks,
    inside: Float[Tensor, "K B H Q P"],
    behind: Float[Tensor, "K B Q H P"],
    into: _Partial,
) -> None:
    """Put together what each token's addition to the state gets, and hand it to values and dt."""
    if path_of(inside) is Path.NATIVE:
        factors = chunks.leaving, chunks.dt, chunks.values
        _native_steps_back(inside, behind, *factors, into.values, into.dt)
        return
    d_steps = torch.addcmul(inside.transpose(2, 3), chunks.leaving, behind, out=behind)
    torch.mul(d_steps, _by_token(chunks.dt), out=into.values)
    _dots(d_steps, chunks.values, into.dt)


def _dots(
    x: Float[Tensor, "K B S H P"], y: Float[Tensor, "K B S H P"], out: Float[Tensor, "K B S H"]
) -> Float[Tensor, "K B S H"]:
    """Multiply and sum over the last dimension."""
    if path_of(out) is Path.NATIVE:
        _native_dots(x, y, out)
        return out
    return torch.sum(x * y, -1, out=out)


def _decays(chunks: _Chunks, out: Float[Tensor, "K B H Q Q"]) -> Float[Tensor, "K B H Q Q"]:
    """The decay from each token (last) to each later one, at most 1 elsewhere."""
    log, rounding = chunks.log_decay, chunks.rounding
    torch.sub(log[..., :, None], log[..., None, :], out=out)
    return _decay(out.add_(rounding[..., :, None]).sub_(rounding[..., None, :]))


def _decay(exponents: Tensor) -> Tensor:
    """The exponential, in place; only exponents of hidden pairs are above 0."""
    return exponents.clamp_(_FLOOR[exponents.dtype], 0.0).exp_()


def _advance(chunks: _Chunks, states: Float[Tensor, "K1 B N H P"], work: _Workspace) -> None:
    """Fill in the states after each chunk from the one before the first."""
    left = torch.mul(chunks.values, chunks.share, out=work.take("tokens", *chunks.values.shape))
    _product(chunks.B.mT, left, states[1:])
    for k, kept in enumerate(chunks.kept()):
        states[k + 1].addcmul_(kept, states[k])


def _by_head(
    x: Float[Tensor, "K B Q H P"], name: str, work: _Workspace
) -> Float[Tensor, "K B H Q P"]:
    """A copy in which the tokens of each head stand together."""
    K, B, Q, H, P = x.shape
    return work.take(name, K, B, H, Q, P).copy_(x.transpose(2, 3))


def _product(
    factor: Float[Tensor, "K B M S"],
    x: Float[Tensor, "K B S H P"],
    out: Float[Tensor, "K B M H P"],
) -> Float[Tensor, "K B M H P"]:
    """Multiply all heads of each chunk and row by one matrix."""
    torch.bmm(factor.flatten(0, 1), _wide(x), out=_wide(out))
    return out


def _wide(x: Float[Tensor, "K B S H P"]) -> Float[Tensor, "KB S HP"]:
    """All heads side by side, for products that they share."""
    return x.view(-1, x.shape[2], x.shape[3] * x.shape[4])


def _flat(x: Float[Tensor, "K B H Q S"]) -> Float[Tensor, "KBH Q S"]:
    """One matrix after the other."""
    return x.view(-1, *x.shape[3:])


def _by_token(x: Float[Tensor, "K B H Q"]) -> Float[Tensor, "K B Q H 1"]:
    """A factor for each head of each token."""
    return x.transpose(2, 3)[..., None]


def _chunked(x: Tensor, span: slice, Q: int) -> Tensor:
    """Some tokens of (B, L, ...) as (K, B, Q, ...), a view."""
    return x[:, span].unflatten(1, (-1, Q)).transpose(0, 1)


def _blocks(inputs: Rows, chunk: int) -> Iterator[slice]:
    """Rows that are worked on together."""
    (rows, L, H, P), N = inputs.values.shape, inputs.B.shape[2]
    together = max(1, _working(inputs.values) // _numbers(min(L, chunk), H, P, N))
    return (slice(i, i + together) for i in range(0, rows, together))


def _sections(rows: Rows, chunk: int) -> Iterator[tuple[slice, int]]:
    """The tokens of whole chunks, then those left over as a shorter chunk; with chunk lengths."""
    L = rows.values.shape[1]
    whole = L - L % chunk
    if whole:
        yield slice(0, whole), chunk
    if whole < L:
        yield slice(whole, L), L - whole


def _pieces(chunks: _Chunks) -> Iterator[slice]:
    """Chunks that are worked on together."""
    K, B, Q, H, P = chunks.values.shape
    size = max(1, _working(chunks.values) // (B * _numbers(Q, H, P, chunks.B.shape[3])))
    return (slice(k, min(k + size, K)) for k in range(0, K, size))


def _numbers(length: int, heads: int, width: int, states: int) -> int:
    """Numbers of the largest tensor that a chunk of one row needs."""
    return heads * max(length * length, length * width, states * width)


def _working(x: Tensor) -> int:
    return _WORKING_ON_CPU if x.device.type == "cpu" else _WORKING_ELSEWHERE


def _initial_states(inputs: Rows) -> Float[Tensor, "B N H P"]:
    """A copy of the initial states."""
    values = inputs.values
    if inputs.initial is None:
        return values.new_zeros(values.shape[0], inputs.B.shape[2], *values.shape[2:])
    return inputs.initial.clone(memory_format=torch.contiguous_format)


def _take_rows(inputs: Rows, rows: slice) -> Rows:
    values, dt, A, B, C = (x[rows] for x in inputs[:5])
    initial = None if inputs.initial is None else inputs.initial[rows]
    documents = None if inputs.documents is None else inputs.documents[rows]
    return Rows(values, dt, A, B, C, initial, documents)


def _nothing(*_: Tensor) -> None:
    """What operators return that write to their last arguments."""


_native_matrix = define_operator(
    "ssd_matrix(Tensor log_decay, Tensor rounding, Tensor dt, Tensor pairs, Tensor(a!) out) -> ()",
    _nothing,
)
_native_matrix_back = define_operator(
    "ssd_matrix_back(Tensor log_decay, Tensor rounding, Tensor dt, Tensor pairs, "
    "Tensor(a!) scores, Tensor(b!) d_pairs, Tensor(c!) d_log) -> ()",
    _nothing,
)
_native_dots = define_operator("ssd_dots(Tensor x, Tensor y, Tensor(a!) out) -> ()", _nothing)
_native_steps_back = define_operator(
    "ssd_steps_back(Tensor inside, Tensor behind, Tensor leaving, Tensor dt, Tensor values, "
    "Tensor(a!) d_values, Tensor(b!) d_dt) -> ()",
    _nothing,
)
