"""The exception for mistakes that a user can correct."""


class UserError(ValueError):
    """A mistake in the input, the settings or the environment.

    Attributes:
      code: names the kind of mistake, for example `corpus-not-found`; stable, so that programs and tests can rely on
        it.

    The text is one line that names the thing and the remedy. The command line prints it without a traceback.
    """

    def __init__(self, code: str, text: str):
        super().__init__(code, text)  # both, so that a process pool can pickle it
        self.code = code

    def __str__(self) -> str:
        return self.args[1]
