"""Hydra's ablation in float64: matrices entry by entry, and the block around them, from weights.

Definitions are those of Hwang et al. 2024, sections 2 and 3, for one document at a time; what is
scaled is divided by the root of the number of tokens that a token may see.
"""

import math

import numpy as np

Array = np.ndarray
RESIDUAL_FREE = ("quasiseparable",)
UNSCALED = ("monarch_structured", "butterfly", "semiseparable", "quasiseparable")


def toeplitz(forward: Array, reverse: Array) -> Array:
    """m[i, j] = f[i - j], above the diagonal r[j - i]."""
    n = len(forward)
    matrix = np.zeros((n, n))
    for i in range(n):
        for j in range(n):
            matrix[i, j] = forward[i - j] if i >= j else reverse[j - i]
    return matrix


def low_rank(q: Array, k: Array) -> Array:
    """m[i, j] = q[i] . k[j]."""
    n = len(q)
    return np.array([[sum(q[i] * k[j]) for j in range(n)] for i in range(n)])


def vandermonde(q: Array, k: Array) -> Array:
    """m[i, j] = sum_d cos(2 pi q[i, d] j) - cos(2 pi k[j, d] i), both in turns for each place."""
    n = len(q)
    matrix = np.zeros((n, n))
    for i in range(n):
        for j in range(n):
            for d in range(q.shape[1]):
                matrix[i, j] += math.cos(2 * math.pi * q[i, d] * j)
                matrix[i, j] -= math.cos(2 * math.pi * k[j, d] * i)
    return matrix


def cauchy(q: Array, k: Array, c: float) -> Array:
    """m[i, j] = sum_d 1 / (q[i, d] - k[j, d] + c)."""
    n = len(q)
    matrix = np.zeros((n, n))
    for i in range(n):
        for j in range(n):
            matrix[i, j] = sum(1 / (q[i, d] - k[j, d] + c) for d in range(q.shape[1]))
    return matrix


def monarch(first: Array, second: Array, n: int) -> Array:
    """P L P R of size b^2 from permutation and block-diagonal factors; its leading part."""
    b = first.shape[0]
    left, right, swap = (np.zeros((b * b, b * b)) for _ in range(3))
    for block in range(b):
        for row in range(b):
            swap[block * b + row, row * b + block] = 1
            for column in range(b):
                right[block * b + row, block * b + column] = first[block, row, column]
                left[block * b + row, block * b + column] = second[block, row, column]
    return (swap @ left @ swap @ right)[:n, :n]


def butterfly(factors: Array, n: int) -> Array:
    """The product of sparse factors, the last one leftmost; its leading part."""
    levels, pairs = factors.shape[:2]
    size = 2**levels
    product = np.eye(size)
    for t in range(levels):
        factor = np.zeros((size, size))
        pair = 0
        for upper in range(size):
            lower = upper ^ (1 << t)
            if upper < lower:
                factor[upper, upper], factor[upper, lower] = factors[t, pair, 0]
                factor[lower, upper], factor[lower, lower] = factors[t, pair, 1]
                pair += 1
        assert pair == pairs
        product = factor @ product
    return product[:n, :n]


def semiseparable(dt: Array, rate: float, B: Array, C: Array) -> Array:
    """m[i, j] = c[i] . b[j] dt[j] exp(rate * sum of dt over j+1 ... i), for i >= j."""
    n = len(dt)
    matrix = np.zeros((n, n))
    for i in range(n):
        for j in range(i + 1):
            decay = math.exp(rate * dt[j + 1 : i + 1].sum())
            matrix[i, j] = sum(C[i] * B[j]) * decay * dt[j]
    return matrix


def quasiseparable(dt: Array, back: Array, rate: float, B: Array, C: Array, delta: Array) -> Array:
    """As Hydra: rows read with the C of the token before, or after above the diagonal."""
    n = len(dt)
    matrix = np.diag(delta).astype(float)
    for i in range(n):
        for j in range(i):
            decay = math.exp(rate * dt[j + 1 : i].sum())
            matrix[i, j] = sum(C[i - 1] * B[j]) * decay * dt[j]
        for j in range(i + 1, n):
            decay = math.exp(rate * back[i + 1 : j].sum())
            matrix[i, j] = sum(C[i + 1] * B[j]) * decay * back[j]
    return matrix


class Block:
    """One mixer: named weights, and what its configuration says of them."""

    def __init__(
        self,
        kind: str,
        weights: dict[str, Array],
        *,
        heads: int,
        causal: bool,
        aligned: bool,
        max_len: int,
    ) -> None:
        self.kind, self.heads, self.causal, self.aligned = kind, heads, causal, aligned
        self.w = {name: value.astype(np.float64) for name, value in weights.items()}
        self.inner = self.w["norm.weight"].shape[0]
        self.max_len = max_len

    def outputs(self, x: Array, documents: Array) -> Array:
        """What the mixer makes of one row (L, D)."""
        gate, values, _, _ = self._features(x, documents)
        mixed = np.zeros_like(values)
        P = self.inner // self.heads
        for h, matrix in enumerate(self.matrices(x, documents)):
            mixed[:, h * P : (h + 1) * P] = matrix @ values[:, h * P : (h + 1) * P]
        normed = mixed / np.sqrt((mixed**2).mean(axis=1, keepdims=True) + 1e-5)
        return (normed * self.w["norm.weight"] * silu(gate)) @ self.w["out_proj.weight"].T

    def matrices(self, x: Array, documents: Array) -> Array:
        """The matrix of each head (H, L, L): documents on the diagonal, nothing between them."""
        _, values, convolved, plain = self._features(x, documents)
        L = len(x)
        whole = np.zeros((self.heads, L, L))
        for document in np.unique(documents[documents >= 0]):
            (at,) = np.nonzero(documents == document)
            own = self._own(values[at], convolved[at], plain[at])
            for i, row in enumerate(at):
                for j, column in enumerate(at):
                    whole[:, row, column] = self._entry(own, i, j, len(at))
        return whole

    def _entry(self, own: Array, i: int, j: int, n: int) -> Array:
        if self.causal and j > i:
            return np.zeros(self.heads)
        seen = i + 1 if self.causal else n
        scale = 1.0 if self.kind in UNSCALED else self._gain() / math.sqrt(seen)
        return scale * own[:, i, j] + (i == j and self.kind not in RESIDUAL_FREE)

    def _gain(self) -> float:
        gains = {"dense": 1.0, "toeplitz": 0.5}
        if self.kind in gains:
            return gains[self.kind]
        twice = 2 if self.kind == "vandermonde" else 1
        return 1 / math.sqrt(twice * self._d_qk())

    def _d_qk(self) -> int:
        if not self.aligned:
            name = "q" if self.kind == "low_rank" else "rows"
            return self.w[f"{name}.values"].shape[2]
        return (len(self.w["in_proj.weight"]) - 2 * self.inner) // (2 * self.heads)

    def _features(self, x: Array, documents: Array) -> tuple[Array, Array, Array, Array]:
        E = self.inner
        channels = self.w["conv.bias"].shape[0]
        stacked = x.astype(np.float64) @ self.w["in_proj.weight"].T
        inner = convolve(
            stacked[:, E : E + channels],
            self.w["conv.weight"],
            self.w["conv.bias"],
            documents,
            causal=self.causal,
        )
        return stacked[:, :E], silu(inner[:, :E]), inner[:, E:], stacked[:, E + channels :]

    def _own(self, values: Array, convolved: Array, plain: Array) -> Array:
        """The kind's own matrices (H, n, n) of one document, neither scaled nor masked."""
        n, H = len(values), self.heads
        make = getattr(self, f"_{self.kind}")
        return np.stack([make(h, n, values, convolved, plain) for h in range(H)])

    def _dense(self, h: int, n: int, *_: Array) -> Array:
        return self.w["weight"][h, :n, :n]

    def _toeplitz(self, h: int, n: int, _v: Array, convolved: Array, _p: Array) -> Array:
        if self.aligned:
            taps = silu(convolved)
            reverse = taps[:, 0] if self.causal else taps[:, self.heads + h]
            return toeplitz(taps[:, h], reverse)
        taps = self.w["taps"][h]
        if self.causal:
            return toeplitz(taps[:n], taps[:n])
        middle = self.max_len - 1
        return toeplitz(taps[middle : middle + n], taps[middle::-1][:n])

    def _low_rank(self, h: int, n: int, _v: Array, convolved: Array, _p: Array) -> Array:
        return low_rank(*self._queries(h, n, silu(convolved), "q", "k"))

    def _vandermonde(self, h: int, n: int, _v: Array, convolved: Array, _p: Array) -> Array:
        q, k = self._queries(h, n, convolved, "rows", "columns")
        turns = 1e-3 if self.aligned else 1 / self.max_len
        return vandermonde(q * turns, k * turns)

    def _cauchy(self, h: int, n: int, _v: Array, convolved: Array, _p: Array) -> Array:
        q, k = self._queries(h, n, convolved, "rows", "columns")
        c = math.exp(self.w["log_c"]) if self.aligned else 0.0
        return cauchy(np.exp(q), -np.exp(k), c + 1e-8)

    def _monarch_structured(self, h: int, n: int, *_: Array) -> Array:
        return monarch(self.w["first"][h], self.w["second"][h], n)

    def _butterfly(self, h: int, n: int, *_: Array) -> Array:
        return butterfly(self.w["factors"][:, h], n)

    def _semiseparable(self, h: int, n: int, _v: Array, convolved: Array, plain: Array) -> Array:
        (dt,), B, C = self._recurrence(h, n, convolved, plain, 1)
        return semiseparable(dt, -math.exp(self.w["A_log"][h]), B, C)

    def _quasiseparable(self, h: int, n: int, v: Array, convolved: Array, plain: Array) -> Array:
        (dt, back), B, C = self._recurrence(h, n, convolved, plain, 2)
        if self.aligned:
            delta = v @ self.w["fc_D.weight"][h] + self.w["D"][h]
        else:
            delta = self.w["delta.values"][:n, h]
        return quasiseparable(dt, back, -math.exp(self.w["A_log"][h]), B, C, delta)

    def _queries(
        self, h: int, n: int, channels: Array, rows: str, columns: str
    ) -> tuple[Array, Array]:
        if not self.aligned:
            return self.w[f"{rows}.values"][:n, h], self.w[f"{columns}.values"][:n, h]
        d = self._d_qk()
        k = self.heads * d + h * d
        return channels[:, h * d : (h + 1) * d], channels[:, k : k + d]

    def _recurrence(
        self, h: int, n: int, convolved: Array, plain: Array, directions: int
    ) -> tuple[list[Array], Array, Array]:
        H = self.heads
        if self.aligned:
            BC = silu(convolved)
            steps = [plain[:, r * H + h] + self.w["dt_bias"][h] for r in range(directions)]
        else:
            BC = self.w["BC.values"][:n]
            steps = [self.w["dt.values"][:n, r, h] for r in range(directions)]
        N = BC.shape[1] // 2
        return [np.log1p(np.exp(s)) for s in steps], BC[:, :N], BC[:, N:]


def convolve(x: Array, taps: Array, bias: Array, documents: Array, *, causal: bool) -> Array:
    """Depthwise convolution that never leaves a document, looking back or to both sides."""
    L, W = len(x), taps.shape[1]
    back = W - 1 if causal else W // 2
    out = np.tile(bias, (L, 1)).astype(float)
    for t in range(L):
        for k in range(W):
            s = t + k - back
            if 0 <= s < L and documents[s] == documents[t]:
                out[t] += taps[:, k] * x[s]
    return out


def silu(x: Array) -> Array:
    """x * sigmoid(x)."""
    return x / (1 + np.exp(-x))


def counted_fft_flops(n: int) -> float:
    """Additions and products of a radix-2 FFT of n real numbers: half of a complex one's."""
    if n == 1:
        return 0.0
    halves = 2 * counted_fft_flops(n // 2)
    # Each of n / 2 pairs has a complex product (6) and two complex sums (4).
    return halves + 10 * (n // 2) / 2


def counted_pairs(queries: int, keys: int, *, causal: bool) -> int:
    """Entries of a matrix that are seen, counted one by one."""
    count = 0
    for i in range(queries):
        for j in range(keys):
            count += not causal or j <= keys - queries + i
    return count


def counted_butterfly_flops(tokens: int, levels: int, heads: int, channels: int) -> tuple[int, int]:
    """Products with sums of 2 x 2 blocks, and pointwise products, of a padded document."""
    size = 1
    while size < tokens:
        size *= 2
    blocks, pointwise, t = 0, 0, 0
    while 2**t < size:
        for _ in range(size // 2):
            blocks += 4 * 2 * channels  # four products, each with a sum
        t += 1
    left = levels - t
    if left:
        pointwise += heads * size * (left - 1)  # the product of first entries
        pointwise += size * channels
    return blocks, pointwise
