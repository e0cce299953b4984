"""Mix each document by itself: for what cannot be masked, such as an FFT or a table of places."""

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor

from models.sequences.documents import put_back, stacks_of
from models.sequences.whole import WholeSequence


def by_document(
    tensors: tuple[Float[Tensor, "B L ..."], ...],
    sequence: WholeSequence,
    mix: Callable[..., Float[Tensor, "N T H P"]],
) -> Float[Tensor, "B L H P"]:
    """Run `mix` on the features of documents, each from its place 0, with zeros behind its end.

    Args:
        tensors: features of the tokens; `mix` gets those of N documents of similar lengths.
        sequence: says which documents there are.
        mix: what it returns behind a document's end is dropped.
    """
    stacks = stacks_of(sequence)
    parts = [mix(*(stack.take(x) for x in tensors)) for stack in stacks]
    return put_back(parts, stacks, sequence)
