"""Every figure of a report, in the order of the page."""

from analysis.figures import panels
from analysis.figures.effect_figures import draw_effects
from analysis.figures.law_figures import draw_laws
from analysis.figures.point_figures import draw_points
from analysis.figures.report_figure import ReportFigure
from analysis.figures.size_figures import draw_effects_by_size
from analysis.study.findings import Findings
from analysis.study.study import Study


def draw(study: Study, findings: Findings | None) -> list[ReportFigure]:
    """The figures that a sweep's points allow; without findings, those of the points alone."""
    plates = [*draw_effects_by_size(study), *draw_points(study)]
    if findings is None:
        return plates
    with panels.styled():
        return [*plates, *draw_effects(study, findings), *draw_laws(study, findings)]
