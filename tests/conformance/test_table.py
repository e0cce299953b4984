"""The table of verdicts, the share that may be excused, and the command."""

import json
from pathlib import Path

import pytest

from launch.measurements import Measurement
from models.mixer import Pattern
from tests.conformance import run
from tests.conformance.case import EVERY, Case
from tests.conformance.property import Property, Reason
from tests.conformance.table import Row, Verdict, measurements, rows_of

CS, NS = Pattern.CAUSAL_SELF, Pattern.NONCAUSAL_SELF


def verdict(
    name: str, pattern: Pattern = NS, reason: Reason | None = None, failure: str | None = None
) -> Verdict:
    return Verdict("some", pattern, name, reason, failure)


def row(excused: int, duties: int, beside: int = 0) -> Row:
    found = [verdict(f"d{i}") for i in range(duties - excused)]
    found += [verdict(f"e{i}", reason=Reason.FIXED_LENGTH) for i in range(excused)]
    found += [verdict(f"p{i}", reason=Reason.PATTERN) for i in range(beside)]
    return Row("some", tuple(found))


def test_a_mixer_with_more_than_its_share_excused_does_not_hold() -> None:
    assert row(3, 20).holds
    assert not row(4, 20).holds


def test_what_speaks_of_other_patterns_is_neither_duty_nor_excuse() -> None:
    assert row(3, 20, beside=10).excused == pytest.approx(0.15)
    assert not row(4, 20, beside=10).holds


def test_one_failure_in_one_pattern_marks_the_cell() -> None:
    found = Row("some", (verdict("a"), verdict("a", CS, failure="leaks")))
    assert found.mark("a") == "X"
    assert not found.holds


def test_a_cell_applies_where_it_does_in_any_pattern() -> None:
    found = Row("some", (verdict("a", reason=Reason.PATTERN), verdict("a", CS)))
    assert found.mark("a") == "+"
    assert Row("some", found.verdicts[:1]).mark("a") == "p"


def test_what_is_kept_tells_passed_failed_and_excused_apart() -> None:
    verdicts = [
        verdict("a"),
        verdict("a", CS, failure="leaks"),
        verdict("b", reason=Reason.APPROXIMATE),
    ]
    kept = {each.name: each for each in measurements(rows_of(verdicts))}
    assert kept["some: a"] == Measurement("some: a", 1, "patterns passed", 2, "higher")
    assert kept["some: b"].unit == "not applicable: approximate by design"
    assert kept["some: b"].holds is None
    assert kept["some: failed"].holds is False


def broken(case: Case) -> None:
    """Nothing holds."""
    raise RuntimeError("no kernel\nof that name")


def test_the_command_writes_its_table_and_fails_with_a_property(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--kinds", "identity", "--root", str(tmp_path)]
    assert run.main(words) == 0
    stored = json.loads((tmp_path / "reports" / "conformance_part.json").read_text())
    assert all(each["holds"] is not False for each in stored["rows"])
    monkeypatch.setattr(run, "PROPERTIES", (Property(broken, EVERY),))
    assert run.main(words) == 1
    assert "identity causal_self broken: RuntimeError: no kernel" in capsys.readouterr().out


def test_an_unknown_mixer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        run.main(["--kinds", "manba", "--root", str(tmp_path)])
