"""The exception for mistakes that a user can correct."""


class UserError(ValueError):
    """A mistake in the input, the settings or the environment.

    Attributes:
      code: names the kind of mistake, for example `corpus-not-found`; stable, so that programs and tests can rely on
        it.

    The text is one line that names the thing and the remedy. The command line prints it without a traceback.
    """

    def __init__(self, code: str, text: str | None = None):
        self.code = code if text is not None else "unspecified"
        super().__init__(code if text is None else text)
