"""A linter: no name becomes part of a path unless it is a literal, or proven to stay inside.

python -m tests.written_paths

A path is made where something is joined to a folder: `folder / name`, `path.with_name(name)`,
`joinpath`, `Path(row["name"])`. What is joined must be a literal, a constant in capitals, numbers
between literals, the path's own name, or lie within `untrusted.paths.inside` or `plain_name`.
`TRUSTED` lists the rest, with the reason.
"""

import ast
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = (
    "analysis", "data_pipelines", "kernels", "launch", "models", "sweeps", "trainer", "untrusted",
)  # fmt: skip
FOLDERS = {
    "aside", "at", "cache", "capsule", "checkpoints", "claims", "data", "data_root", "default",
    "file", "final", "folder", "home", "into", "out", "parent", "partial", "path", "place", "raw",
    "report", "root", "runs", "scattered", "scratch", "study", "sweep", "target", "there", "tmp",
    "trunk", "trunk_folder", "where",
}  # fmt: skip
"""Names that the product gives to paths, with or without a leading underscore."""
JOINING = {"with_name", "with_stem", "with_suffix", "joinpath"}
PROVING = {"inside", "plain_name", "step_name"}
"""Functions whose result is a proven path or name; `step_name` makes a name of a number."""
_LITERAL = "literals of the code, listed beside it"
_MANIFEST = "read_manifest proves every name of the data set's manifest"
_CHECKPOINT = "read_manifest of the checkpoint proves every name, list_files lists what is there"
_NUMBER = "a number"
TRUSTED: Mapping[str, str] = {
    "analysis/figures/report_figure.py:ReportFigure.save: self.name": _LITERAL,
    "analysis/inference/cluster_robust.py:projection: singular[keep]": "a division of numbers",
    "analysis/report/write.py:_write_tables: name": _LITERAL,
    "analysis/tables/capsule.py:_contents: name": _LITERAL,
    "analysis/tables/capsule.py:unpack: name": "read only, and _index compared it with the members",
    "data_pipelines/build.py:build_dataset: config.name": "a lock, after inside proved the name",
    "data_pipelines/build.py:build_dataset: leftover": _LITERAL,
    "data_pipelines/installed.py:write_raw: domain": _LITERAL,
    "data_pipelines/installed.py:_files: sysconfig.get_paths()['stdlib']": "the interpreter's own",
    "data_pipelines/packing.py:_Writer.__init__: split": _LITERAL,
    "data_pipelines/packing.py:iterate_blocks: split": _LITERAL,
    "data_pipelines/shards.py:open_shards: described.folder": _MANIFEST,
    "data_pipelines/shards.py:CheckedShard.__init__: shard.name": _MANIFEST,
    "data_pipelines/sources.py:_walk: name": "a name that the walk over the folder found",
    "data_pipelines/stream.py:_Blocks.__init__: d.folder": _MANIFEST,
    "data_pipelines/verify.py:_decompress: shard.name": _MANIFEST,
    "data_pipelines/verify.py:_has_its_size: shard.name": _MANIFEST,
    "data_pipelines/verify.py:_raw_is_right: shard.name": _MANIFEST,
    "data_pipelines/verify.py:_read_compressed: shard.zip_name": _MANIFEST,
    "data_pipelines/verify.py:_verify_index: stream.folder": _MANIFEST,
    "data_pipelines/verify.py:missing_file: name": _MANIFEST,
    "data_pipelines/verify.py:verify_dataset: shard.name": _MANIFEST,
    "kernels/ahead_of_time.py:_assembler: name": _LITERAL,
    "kernels/native_library.py:cache_folder: version": "the version of Python and torch",
    "kernels/native_library.py:_own_temporary: os.getuid()": _NUMBER,
    "launch/measurements.py:write_measurements: target": _LITERAL,
    "launch/swap.py:main: plate.name": _LITERAL,
    "trainer/checkpoint.py:_begin: final.name": "step_name of a number",
    "trainer/checkpoint.py:_begin: owner.incarnation": _NUMBER,
    "trainer/checkpoint.py:_hash_share: name": _CHECKPOINT,
    "trainer/checkpoint.py:_quarantine: rejected.reason": _LITERAL,
    "trainer/checkpoint.py:_quarantine: taken": _NUMBER,
    "trainer/checkpoint.py:_write_and_sync: name": _CHECKPOINT,
    "trainer/heartbeat.py:Heartbeat.__init__: rank": _NUMBER,
    "trainer/manifest.py:list_files: name": _CHECKPOINT,
    "trainer/manifest.py:verified_file: name": _CHECKPOINT,
    "trainer/manifest.py:verify_files: name": _CHECKPOINT,
    "trainer/manifest.py:verify_sizes: name": _CHECKPOINT,
    "trainer/record.py:RunRecord.__init__: name": _LITERAL,
}
"""Function and what it joins -> why that stays inside."""


def unproven(root: Path = ROOT, trusted: Mapping[str, str] = TRUSTED) -> list[str]:
    """One line for each unproven part of a path, and for each entry of TRUSTED without one."""
    found = {
        f"{place}: {ast.unparse(part)}": line
        for file in sorted(each for p in PACKAGES for each in (root / p).rglob("*.py"))
        for place, line, part in _unproven_parts(file, root)
    }
    lines = [
        f"{key} (line {line}) becomes part of a path; make the path with untrusted.paths.inside, "
        "or give a reason in tests/written_paths.py"
        for key, line in found.items()
        if key not in trusted
    ]
    stale = (key for key in trusted if key not in found)
    return [*lines, *(f"{key} of TRUSTED is not there; remove it" for key in stale)]


def _unproven_parts(file: Path, root: Path) -> Iterator[tuple[str, int, ast.expr]]:
    name = file.relative_to(root).as_posix()
    yield from _within(ast.parse(file.read_text()), f"{name}")


def _within(node: ast.AST, place: str) -> Iterator[tuple[str, int, ast.expr]]:
    for child in ast.iter_child_nodes(node):
        inner = place
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            inner = f"{place}:{child.name}" if ":" not in place else f"{place}.{child.name}"
        if isinstance(child, ast.expr):
            for part in _joined(child):
                if not _is_proven(part):
                    yield place, child.lineno, part
        yield from _within(child, inner)


def _joined(expression: ast.expr) -> Iterator[ast.expr]:
    """What an expression joins to a path."""
    if isinstance(expression, ast.BinOp) and isinstance(expression.op, ast.Div):
        if _is_path(expression.left):
            yield from _pieces(expression.right)
    elif isinstance(expression, ast.Call):
        name = _name_of(expression.func)
        if name in JOINING and isinstance(expression.func, ast.Attribute):
            own = f"{ast.unparse(expression.func.value)}.name"
            parts = (piece for each in expression.args for piece in _pieces(each))
            yield from (part for part in parts if ast.unparse(part) != own)
        elif name == "Path":
            yield from (piece for each in expression.args[1:] for piece in _pieces(each))
            yield from (each for each in expression.args[:1] if isinstance(each, ast.Subscript))
        elif ast.unparse(expression.func) == "open":
            yield expression


def _pieces(part: ast.expr) -> Iterator[ast.expr]:
    """The parts of a text that is put together."""
    if isinstance(part, ast.JoinedStr):
        values = [each for each in part.values if isinstance(each, ast.FormattedValue)]
        # A format of a number, such as :05d, leaves nothing but digits.
        yield from (each.value for each in values if not _is_number(each))
    elif isinstance(part, ast.BinOp | ast.IfExp):
        yield from _pieces(part.left if isinstance(part, ast.BinOp) else part.body)
        yield from _pieces(part.right if isinstance(part, ast.BinOp) else part.orelse)
    elif isinstance(part, ast.Starred):
        yield from _pieces(part.value)
    else:
        yield part


def _is_number(value: ast.FormattedValue) -> bool:
    spec = "" if value.format_spec is None else ast.unparse(value.format_spec)
    return spec.rstrip("'\"").endswith("d")


def _is_proven(part: ast.expr) -> bool:
    if isinstance(part, ast.Constant):
        return True
    if isinstance(part, ast.Call):
        return _name_of(part.func) in PROVING or ast.unparse(part.func) == "os.getpid"
    return _name_of(part).isupper()


def _is_path(expression: ast.expr) -> bool:
    if isinstance(expression, ast.BinOp):
        return isinstance(expression.op, ast.Div) and _is_path(expression.left)
    if isinstance(expression, ast.Call):
        return _name_of(expression.func) in {"Path", "inside", "resolve", "absolute", *JOINING}
    name = _name_of(expression)
    return name.isupper() or name.lstrip("_") in FOLDERS


def _name_of(expression: ast.expr) -> str:
    if isinstance(expression, ast.Attribute):
        return expression.attr
    return expression.id if isinstance(expression, ast.Name) else ""


def main() -> int:
    """Run the command; returns the exit code."""
    lines = unproven()
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
