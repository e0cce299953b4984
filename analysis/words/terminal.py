"""Tables on a terminal, in a pipe or in a file, with every value whole."""

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

MOST_COLUMNS = 400


def print_whole(console: Console, table: Table) -> None:
    """Print a table as wide as its values: on a narrow terminal lines wrap, no value is cut."""
    options = console.options.update(width=MOST_COLUMNS)
    needed = Measurement.get(console, options, table).maximum
    Console(width=max(console.width, needed), file=console.file).print(table, highlight=False)
