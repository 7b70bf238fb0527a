"""What can go wrong, by what the user has to change."""


class RBlockError(ValueError):
    """Anything that rblock_fx refuses; the message says what, where, got, expected, and a call that works."""


class SettingError(RBlockError):
    """A setting (method, drop_prob, block_size, ...) is outside its range."""


class SiteError(RBlockError):
    """A site is unknown, never runs, or is no feature map."""


class ConversionError(RBlockError):
    """The model cannot be converted (or un-converted) as it stands."""


class PairError(RBlockError):
    """An output or a target does not have the rows of a pair of sub-models."""


class RBlockWarning(UserWarning):
    """A use that is valid but probably not intended, for example a training step without a pair."""


def first_line(error: BaseException) -> str:
    """What another library's error says, without its pages of advice."""
    return str(error).splitlines()[0] if str(error) else ""
