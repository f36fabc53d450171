"""Errors that are for the person at the keyboard."""


class UserError(ValueError):
    """Something the user typed, wrote or pointed at is wrong; the message says what and how to mend it.

    The command lines print the message alone, without a traceback, and exit with code 2.
    """

    exit_code = 2
