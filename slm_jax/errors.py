"""The one exception that speaks to the user."""


class UserError(ValueError):
    """A mistake in the input, the settings or the environment.

    The message is one line that names the thing and the remedy; the command line prints it without a traceback.
    """
