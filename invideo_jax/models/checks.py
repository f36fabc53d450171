"""Attributes of models that must fit together."""

from invideo_jax.errors import UserError


def check_multiple(name: str, value: int, unit_name: str, unit: int) -> None:
    """Raises UserError unless `value` is a positive multiple of `unit`."""
    if value <= 0 or value % unit:
        near = max(value // unit, 1) * unit
        raise UserError(
            f"{name} must be a multiple of {unit_name}; got {name}={value}, {unit_name}={unit}. "
            f"Use {name}={near}, or change {unit_name}."
        )
