"""Whether every text of a figure lies inside it."""

from matplotlib.figure import Figure


def assert_text_inside(figure: Figure) -> None:
    """Fail if a title, a label or a text of a panel is cut off at the figure's edge."""
    figure.draw_without_rendering()
    width, height = figure.canvas.get_width_height()
    for ax in figure.axes:
        for text in [*ax.texts, ax.title, ax.xaxis.label, ax.yaxis.label]:
            if text.get_text():
                box = text.get_window_extent()
                assert box.x0 >= -1
                assert box.x1 <= width + 1
                assert box.y0 >= -1
                assert box.y1 <= height + 1
