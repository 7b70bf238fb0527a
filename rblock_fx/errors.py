"""The errors of the package, named by the part that the user has to change."""


class RBlockError(ValueError):
    """Base of all errors; the message names the call, the place, what was expected and got, and a call that works."""


class SettingError(RBlockError):
    """A setting (method, drop_prob, block_size, ...) is outside its range."""


class SiteError(RBlockError):
    """A site is unknown, never runs, or does not return a feature map."""


class ConversionError(RBlockError):
    """The model cannot be converted, or a conversion cannot be removed."""


class PairError(RBlockError):
    """An output or a target does not have the rows of a pair of sub-models."""


class RBlockWarning(UserWarning):
    """A use that is valid but probably not intended, for example a training step without a pair."""


class VerificationError(RBlockError):
    """A converted model differs from the plain network."""


def first_line(error: BaseException) -> str:
    """The first line of another library's error, without its advice."""
    return str(error).splitlines()[0] if str(error) else ""
