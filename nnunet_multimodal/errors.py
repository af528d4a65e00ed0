"""What a user can mend."""

from collections.abc import Sequence

SHOWN = 20


class UserError(ValueError):
    """Wrong input: the message names value, file and remedy, and the command shows it without a traceback."""


def refuse(problems: Sequence[str]) -> None:
    """Before anything is written: raise a UserError if there are problems, with the first of them."""
    if problems:
        more = [f"... and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        raise UserError("\n".join(["nothing is written:", *problems[:SHOWN], *more]))
