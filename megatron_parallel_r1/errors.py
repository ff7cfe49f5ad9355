"""The one error that a user can cause and mend."""


class UserError(Exception):
    """Something that the user gave cannot work: a file, a setting, a checkpoint.

    The message says what is wrong, where, and what to do. The command line prints it without a traceback
    and exits with code 2.
    """
