"""Every figure of a report, in the order of the page."""

from analysis import figures
from analysis.findings import Findings
from analysis.plates import Plate, draw_points
from analysis.plates_effect import draw_effects
from analysis.plates_law import draw_laws
from analysis.study import Study


def draw(study: Study, found: Findings | None) -> list[Plate]:
    """The figures that a sweep's points allow; without findings, those of the points alone."""
    plates = draw_points(study)
    if found is None:
        return plates
    with figures.styled():
        return [*plates, *draw_effects(study, found), *draw_laws(study, found)]
