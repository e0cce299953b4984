"""Checks that the fields of config classes share; each names the field, its value and the range."""

from data_pipelines.config import LABEL_RULE, is_label


def require_names(config: object, *names: str) -> None:
    """Check that fields of a config are words that a report can print.

    Raises:
        ValueError: one is empty, too long, or holds a character that a report cannot show.
    """
    for name in names:
        value = getattr(config, name)
        if not is_label(value):
            raise ValueError(f"{name} {value[:80]!r} is no name; {LABEL_RULE}")


def require_positive(config: object, *names: str) -> None:
    """Check that fields of a config are above 0.

    Raises:
        ValueError: one is not.
    """
    for name in names:
        if not getattr(config, name) > 0:
            raise ValueError(
                f"{name} {getattr(config, name)} is not above 0; choose a positive value"
            )


def require_default(config: object, *names: str, because: str) -> None:
    """Check that fields which have no part in a config keep their defaults.

    Args:
        config: the config.
        names: of the fields.
        because: why they have no part, for the message.

    Raises:
        ValueError: one has another value.
    """
    for name in names:
        value = getattr(config, name)
        if value != getattr(type(config), name):
            raise ValueError(f"{name} is {value}, but {because}; remove it")


def require_within(config: object, low: float, high: float, *names: str) -> None:
    """Check that fields of a config are within a range.

    Raises:
        ValueError: one is not.
    """
    for name in names:
        if not low <= getattr(config, name) <= high:
            raise ValueError(
                f"{name} {getattr(config, name)} is outside {low} to {high}; choose within it"
            )
