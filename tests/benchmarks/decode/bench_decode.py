"""Tokens a second of decoding, with a cache and without: `make decode`.

python -m tests.benchmarks.decode.bench_decode
    about two minutes; writes reports/decode.json
python -m tests.benchmarks.decode.bench_decode --quick
    short contexts; writes reports/decode_quick.json

A hybrid of window and recurrence, each of its branches alone, and full attention, all small and
of random weights, which decode as fast as trained ones. With a cache a step reads one token from
the state of those before; without, it reads all of them anew. Both are timed at the same contexts
and in turns, in the opposite order every other round, so that a busy machine slows all alike.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from jaxtyping import Float, Int
from rich.console import Console
from torch import Tensor

from analysis.benchmarks.decode import COPIED, draw, ratios, summarise
from launch.measurements import Measurement, write_measurements
from models.backbone import Backbone, BackboneConfig, BlockConfig, build_backbone
from models.channel import SwiGLUConfig
from models.generate import Sampling, generate, next_logits
from models.mixer import MixerConfig
from models.mixers.composed.hybrid import HybridConfig
from models.mixers.softmax.attention import AttentionConfig
from models.sequences.continued import DecodingState
from models.sequences.whole import WholeSequence
from trainer.record import write_atomically

ROOT = Path(__file__).parents[3]
D_MODEL, D_HIDDEN, N_LAYERS, VOCABULARY = 96, 256, 4, 257
N_HEADS, WINDOW, SEED = 4, 64, 17
MIXERS: dict[str, MixerConfig] = {
    "hybrid": HybridConfig(N_HEADS, WINDOW),
    "attention": AttentionConfig(N_HEADS),
    "window": HybridConfig(N_HEADS, WINDOW, branches="window"),
    "recurrence": HybridConfig(N_HEADS, WINDOW, branches="recurrence"),
}
TOKEN_SECONDS = 2.0
"""No model without a cache goes on to contexts where a token is expected to take longer."""
SPELL_SECONDS = 0.25
"""A turn ends after the token that exceeds this."""
REPLAY_EVERY = 10
COLUMNS = ("kind", "model", "mode", "context", "round", "tokens_per_second", "state_bytes")


@dataclass(frozen=True)
class Plan:
    """How much is measured.

    Attributes:
        rounds: turns of every contender at every context, after one for warming up.
        steps: tokens in a turn, at most.
        prompt, tokens: of the generation that stands for the post's.
        generations: rounds of that.
    """

    target: str
    contexts: tuple[int, ...]
    rounds: int
    steps: int
    prompt: int
    tokens: int
    generations: int


FULL = Plan("decode", (64, 128, 256, 512, 1024, 2048, 4096, 8192), 7, 16, 7, 100, 5)
QUICK = Plan("decode_quick", (16, 64), 2, 2, 3, 20, 2)


class DecodeBench:
    """All contenders at all contexts.

    Attributes:
        rounds: one row for each turn: what was timed, and tokens a second.
        misses: for each model and context, the largest difference between the logits with and
            without a cache, relative to the largest logit.
    """

    def __init__(self, plan: Plan, say: Callable[[str], None]) -> None:
        self.rounds: list[dict[str, object]] = []
        self.misses: dict[tuple[str, int], float] = {}
        self.backbones = {name: small_backbone(mixer) for name, mixer in MIXERS.items()}
        self._plan, self._say = plan, say
        self._latest: dict[str, tuple[int, float]] = {}

    @torch.no_grad()
    def run(self) -> None:
        """Measure."""
        for context in self._plan.contexts:
            begin = time.perf_counter()
            self._time_steps(context)
            self._say(f"context {context}: {time.perf_counter() - begin:.0f} s")
        self._time_generations()

    def _time_steps(self, context: int) -> None:
        text, contenders, held = some_text(context), {}, {}
        for name, backbone in self.backbones.items():
            _, state = next_logits(backbone, text[:, :-1], None)
            contenders[name, "cached"] = lambda b=backbone, s=state: next_logits(b, text[:, -1:], s)
            held[name] = state.bytes()
            if self._expected(name, context) <= TOKEN_SECONDS:
                contenders[name, "uncached"] = lambda b=backbone: fresh_logits(b, text)
                self.misses[name, context] = _miss(
                    contenders[name, "cached"]()[0], contenders[name, "uncached"]()
                )
            if name == "attention":
                contenders[name, COPIED] = lambda s=state: copy_cache(s)
        for round_, (name, mode), run in in_turns(contenders, self._plan.rounds):
            speed = 1 / seconds_per_token(run, self._plan.steps)
            self._note("step", name, mode, context, round_, speed, held[name])
            if mode == "uncached":
                self._latest[name] = (context, 1 / speed)

    def _expected(self, name: str, context: int) -> float:
        """Seconds of a token without a cache if they grow with the context, as they do at least."""
        before, seconds = self._latest.get(name, (context, 0.0))
        return seconds * context / before

    def _time_generations(self) -> None:
        prompt, count = some_text(self._plan.prompt), self._plan.tokens
        contenders = {}
        for name, backbone in self.backbones.items():
            contenders[name, "cached"] = lambda b=backbone: list(
                generate(b, prompt, count, Sampling(temperature=0.0))
            )
            contenders[name, "uncached"] = lambda b=backbone: fresh_generation(b, prompt, count)
        for name in ("hybrid", "attention"):
            backbone = self.backbones[name]
            contenders[name, "replayed"] = lambda b=backbone: replay(b, self._plan)
        for round_, (name, mode), run in in_turns(contenders, self._plan.generations):
            begin = time.perf_counter()
            run()
            tokens = len(replay_lengths(self._plan)) if mode == "replayed" else count
            speed = tokens / (time.perf_counter() - begin)
            self._note("generation", name, mode, self._plan.prompt + count, round_, speed, 0)

    def _note(self, *row: object) -> None:
        self.rounds.append(dict(zip(COLUMNS, row, strict=True)))


def small_backbone(mixer: MixerConfig) -> Backbone:
    """The same stack around any mixer, at its initial weights."""
    block = BlockConfig(mixer, SwiGLUConfig(D_HIDDEN))
    return build_backbone(BackboneConfig({"a": block}, "a", N_LAYERS, D_MODEL, VOCABULARY), SEED)


def some_text(tokens: int) -> Int[Tensor, "1 L"]:
    """Tokens drawn evenly."""
    generator = torch.Generator().manual_seed(SEED)
    return torch.randint(VOCABULARY, (1, tokens), generator=generator)


@torch.no_grad()
def fresh_logits(backbone: Backbone, text: Int[Tensor, "1 L"]) -> Float[Tensor, "1 V"]:
    """Logits of the token after a text that is read as a whole, with nothing kept of before."""
    sequence = WholeSequence(torch.zeros(text.shape, dtype=torch.int32))
    return backbone.head(backbone(text, sequence)[:, -1]).float()


def fresh_generation(
    backbone: Backbone, prompt: Int[Tensor, "1 L"], tokens: int
) -> Int[Tensor, "1 S"]:
    """The prompt and the likeliest tokens after it, the whole text read anew for each."""
    text = prompt
    for _ in range(tokens):
        chosen = fresh_logits(backbone, text).argmax(dim=-1, keepdim=True)
        text = torch.cat([text, chosen], dim=1)
    return text


def replay_lengths(plan: Plan) -> range:
    """Every tenth text of a generation, from the middle of the first ten."""
    return range(plan.prompt + REPLAY_EVERY // 2, plan.prompt + plan.tokens, REPLAY_EVERY)


def replay(backbone: Backbone, plan: Plan) -> None:
    """Find some tokens of a generation by reading each text anew, in a loop over its tokens."""
    for length in replay_lengths(plan):
        state: DecodingState | None = None
        for token in some_text(length).split(1, dim=1):
            _, state = next_logits(backbone, token, state)


def copy_cache(state: DecodingState) -> list[Tensor]:
    """What a step of attention does to its cache alone: copy all of it beside one more token."""
    return [torch.cat([kept, kept[:, :1]], dim=1) for layer in state.layers for kept in layer]


def seconds_per_token(run: Callable[[], object], steps: int) -> float:
    """Mean time of up to `steps` tokens."""
    begin, taken, seconds = time.perf_counter(), 0, 0.0
    while taken < steps and seconds < SPELL_SECONDS:
        run()
        taken, seconds = taken + 1, time.perf_counter() - begin
    return seconds / taken


def in_turns(
    contenders: dict[tuple[str, str], Callable[[], object]], rounds: int
) -> Iterator[tuple[int, tuple[str, str], Callable[[], object]]]:
    """Every contender in every round, in the opposite order every other one, after a first call."""
    order = list(contenders)
    for run in contenders.values():
        run()
    for round_ in range(rounds):
        for name in order:
            yield round_, name, contenders[name]
        order.reverse()


def measurements(bench: DecodeBench, rounds: pd.DataFrame) -> Iterator[Measurement]:
    """The rows of the report."""
    for row in summarise(rounds).to_dict("records"):
        name = f"{row['kind']}, {row['model']} {row['mode']}, context {row['context']}"
        yield from _spread(name, row, "tokens_per_second", "tokens/s")
        if row["kind"] == "step" and row["mode"] == "cached":
            yield Measurement(f"{name}: state", row["state_bytes"], "bytes")
    for row in ratios(rounds).to_dict("records"):
        name = f"{row['kind']}, {row['upper']} over {row['lower']}, context {row['context']}"
        yield from _spread(name, row, "ratio", "ratio")
    for (name, context), miss in bench.misses.items():
        named = f"step, {name}, context {context}: difference of logits, cached and uncached"
        yield Measurement(named, miss, "relative")
    for name, backbone in bench.backbones.items():
        count = sum(p.numel() for p in backbone.parameters())
        yield Measurement(f"{name}: parameters", count, "parameters")


def _spread(name: str, row: dict, column: str, unit: str) -> Iterator[Measurement]:
    yield Measurement(name, row[column], unit)
    yield Measurement(f"{name}, lower quartile", row["low"], unit)
    yield Measurement(f"{name}, upper quartile", row["high"], unit)


def _miss(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


def measure(plan: Plan, root: Path, console: Console) -> None:
    """Measure everything, write the report and the figure, and say what they show."""
    begin, load = time.monotonic(), os.getloadavg()[0]
    reports = root / "reports"
    reports.mkdir(parents=True, exist_ok=True)
    bench = DecodeBench(plan, lambda line: console.print(line, highlight=False))
    bench.run()
    rounds = pd.DataFrame(bench.rounds)
    rows = [
        *measurements(bench, rounds),
        Measurement("threads", torch.get_num_threads(), "threads"),
        Measurement("load average at the start", load, "processes"),
        Measurement("load average at the end", os.getloadavg()[0], "processes"),
        Measurement("benchmark", time.monotonic() - begin, "s"),
    ]
    path = write_measurements(plan.target, rows, root)
    circumstances = _circumstances(plan, load)
    stored = json.loads(path.read_text())
    write_atomically(path, json.dumps({**stored, "circumstances": circumstances}, indent=1) + "\n")
    draw(rounds, plan.target).save(reports)
    console.print(circumstances, highlight=False)
    console.print(f"written to {path}, with .csv, .png and .svg beside it", highlight=False)


def _circumstances(plan: Plan, load: float) -> str:
    return (
        f"Measured on one thread of a CPU at a load of {load:.1f} on {os.cpu_count()} cores, with "
        f"random weights, d_model {D_MODEL}, {N_LAYERS} layers, {N_HEADS} heads, window {WINDOW}, "
        f"vocabulary {VOCABULARY}; medians of {plan.rounds} rounds in turns of up to "
        f"{plan.steps} tokens, {plan.generations} rounds of generations."
    )


def main(words: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.decode.bench_decode", description=__doc__
    )
    parser.add_argument("--quick", action="store_true", help="a few rounds at short contexts")
    parser.add_argument("--root", type=Path, default=ROOT, help="folder that gets reports/")
    options = parser.parse_args(words)
    torch.set_num_threads(1)
    console = Console(width=None if sys.stdout.isatty() else 130)
    measure(QUICK if options.quick else FULL, options.root, console)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
