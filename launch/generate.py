"""The command that generates text with a trained run.

python launch/generate.py runs/scaling/<id> "def add(a, b):" [--tokens 200] [--temperature 0]
"""

import argparse
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape

from data_pipelines.tokenizers import Tokenizer
from launch.trained_run import TrainedRun, load_run, only_run
from models.generate import GeneratedTokens, Sampling, generate
from trainer.exit_codes import ExitCode
from trainer.schema import ConfigError

REPLACEMENT = "\ufffd"
EXAMPLES = """
examples:
  python launch/generate.py runs/scaling/<id> "def add(a, b):"
  python launch/generate.py runs/scaling/<id> "The " --tokens 400 --temperature 0.8 --top-p 0.95
  python launch/generate.py runs/scaling/<id> "import " --temperature 0      greedy decoding"""


def main(words: list[str]) -> int:
    """Run the command; returns the exit code."""
    arguments = _parse(words)
    console = Console(stderr=True)
    try:
        _check(arguments)
        torch.set_num_threads(arguments.threads)
        folder = only_run(arguments.run)
        run = load_run(folder)
        if run.config.objective != "causal_lm":
            raise ConfigError(
                f"{folder} was trained for {run.config.objective}, but only causal_lm runs can "
                "generate; choose another run"
            )
        tokenizer = run.tokenizer(arguments.data)
        sampling = Sampling(
            arguments.temperature, arguments.top_p, arguments.seed, ids=tokenizer.size
        )
        pieces = _stream(run, tokenizer, arguments, sampling)
    except (ValueError, RuntimeError, OSError) as error:
        message = escape(_shown(str(error), console.encoding))
        console.print(f"[red]error:[/red] {message}", highlight=False, soft_wrap=True)
        return int(getattr(error, "exit_code", ExitCode.BAD_CONFIG))
    except KeyboardInterrupt:
        return int(ExitCode.INTERRUPTED)
    console.print(_shown(_speeds(run, folder, pieces), console.encoding), highlight=False)
    return int(ExitCode.DONE)


def _check(arguments: argparse.Namespace) -> None:
    """Check what can be known before anything is loaded."""
    Sampling(arguments.temperature, arguments.top_p, arguments.seed)
    for name in ("tokens", "threads"):
        if getattr(arguments, name) < 1:
            raise ConfigError(f"--{name} {getattr(arguments, name)} is not above 0; take 1 or more")
    try:
        arguments.prompt.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"the prompt is not UTF-8 from character {error.start} on; give it in UTF-8"
        ) from error


def _shown(text: str, encoding: str) -> str:
    """The text with escapes for what an output cannot show, such as bytes that are no UTF-8."""
    return text.encode(encoding, errors="backslashreplace").decode(encoding)


def _write(text: str) -> None:
    sys.stdout.write(_shown(text, sys.stdout.encoding or "utf-8"))
    sys.stdout.flush()


def _stream(
    run: TrainedRun, tokenizer: Tokenizer, arguments: argparse.Namespace, sampling: Sampling
) -> tuple[int, list[GeneratedTokens]]:
    """Stream the prompt and the generated text to the terminal.

    Documents begin and end with the special token, so generation stops where the model emits it.

    Returns:
        The prompt's length and the generated pieces.
    """
    prompt = [tokenizer.special, *(int(i) for i in tokenizer.encode(arguments.prompt))]
    found = generate(run.backbone(), torch.tensor([prompt]), arguments.tokens, sampling)
    _write(arguments.prompt)
    pieces, ids, shown = [], [], ""
    for piece in found:
        pieces.append(piece)
        ids.append(int(piece.tokens))
        if ids[-1] == tokenizer.special:
            break
        # A character of several bytes is incomplete until its last byte is generated.
        text = tokenizer.decode(ids).rstrip(REPLACEMENT)
        if text.startswith(shown):
            _write(text[len(shown) :])
            shown = text
    _write(tokenizer.decode(ids)[len(shown) :] + "\n")
    return len(prompt), pieces


def _speeds(run: TrainedRun, folder: Path, generated: tuple[int, list[GeneratedTokens]]) -> str:
    length, pieces = generated
    prefill, later = pieces[0].seconds, [piece.seconds for piece in pieces[1:]]
    text = f"{folder.name}, step {run.step}: prefill {length / prefill:,.0f} tokens/s of {length}"
    if later:
        text += f", decode {len(later) / sum(later):,.0f} tokens/s of {len(later)}"
    return f"{text}, state {pieces[-1].state_bytes:,} bytes"


def _parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="launch/generate.py",
        description="Continue a prompt with the newest checkpoint of a run.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "run", type=Path, help="run folder, such as runs/scaling/<id>, or a sweep of one run"
    )
    parser.add_argument("prompt", help="text to continue; may be empty")
    parser.add_argument(
        "--tokens", type=int, default=200, help="maximum number of tokens (default: 200)"
    )
    parser.add_argument(
        "--temperature", type=float, default=0.8, help="0 for greedy (default: 0.8)"
    )
    parser.add_argument("--top-p", type=float, default=1.0, help="nucleus sampling (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="sampling seed (default: 0)")
    parser.add_argument(
        "--data", type=Path, default=Path("data"), help="folder of the datasets (default: data)"
    )
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    return parser.parse_args(words)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
