"""What a user can mend."""


class UserError(ValueError):
    """Wrong input: the message names value, file and remedy, and the command shows it without a traceback."""
