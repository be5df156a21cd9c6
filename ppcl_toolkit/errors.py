"""What a user sees: the one exception, and the one warning."""


class PpclError(Exception):
    """A user's mistake, or the machine's: one sentence with the value, the rule and the choices."""


class PpclWarning(UserWarning):
    """What a user should know, and what is no mistake."""
