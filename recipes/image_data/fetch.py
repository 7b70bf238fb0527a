"""How the files of a data set come to lie in its folder: downloaded, checked, extracted, whole or not at all."""

import os
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.error import URLError

from filelock import FileLock
from torchvision.datasets.utils import check_integrity, download_url, extract_archive
from training.settings import Config, RecipeError

BROKEN = (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, OSError)  # what unpacking damaged files raises


def folder_of(config: Config) -> Path:
    """Where the files of a data set lie."""
    return Path(config.data_dir or "data").expanduser()


def missing(config: Config, expected: str, source: str) -> RecipeError:
    """The error for files that are not there and may not be downloaded."""
    return RecipeError(
        f"{config.dataset} is not in {folder_of(config)}: expected {expected} there (from {source}); name the folder "
        f"that has it with --data_dir, or have it downloaded with --download true"
    )


@contextmanager
def staging(folder: Path) -> Iterator[Path]:
    """A temporary folder inside folder, whose contents are moved out when whole and else vanish with it.

    Only one process at a time gets in; the others wait and should then look whether the work is done.

    Raises:
        RecipeError: folder cannot be written to, or a download or disk fails.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock"), TemporaryDirectory(prefix=".staging-", dir=folder) as temporary:
            yield Path(temporary)
    except OSError as error:
        raise RecipeError(f"cannot write to data_dir {folder}: {error}; name another with --data_dir") from error


@contextmanager
def downloading(url: str, config: Config) -> Iterator[None]:
    """Tell a failed download in one line.

    Raises:
        RecipeError: it failed.
    """
    try:
        yield
    except (URLError, OSError, RuntimeError) as error:  # RuntimeError: torchvision's, of a checksum
        reason = " ".join(str(error).split())
        raise RecipeError(
            f"cannot download {config.dataset} from {url}: {reason}; try again, or put the file in "
            f"{folder_of(config)} yourself"
        ) from error


def fetch_folder(config: Config, member: str, url: str, md5: str) -> Path:
    """data_dir/member, extracted from the archive in data_dir, which is downloaded first if it is not there.

    Raises:
        RecipeError: there is nothing and download is off, the download fails, the archive is damaged.
    """
    folder = folder_of(config)
    target, archive = folder / member, folder / url.rpartition("/")[2]
    if target.is_dir():
        return target
    if not archive.is_file() and not config.download:
        raise missing(config, f"{member}/ or {archive.name}", url)
    with staging(folder) as temporary:
        if target.is_dir():  # another process was quicker
            return target
        if not archive.is_file():
            with downloading(url, config):
                download_url(url, temporary, archive.name, md5)
            os.replace(temporary / archive.name, archive)
        if not check_integrity(archive, md5):
            raise RecipeError(f"{archive} is damaged: its MD5 is not {md5}; delete it and fetch it again from {url}")
        try:
            extract_archive(archive, temporary)
        except BROKEN as error:
            raise RecipeError(f"cannot extract {archive}: {error}; delete it and fetch it again from {url}") from error
        if not (temporary / member).is_dir():
            raise RecipeError(f"{archive} holds no {member}/; delete it and fetch it again from {url}")
        os.replace(temporary / member, target)
    return target
