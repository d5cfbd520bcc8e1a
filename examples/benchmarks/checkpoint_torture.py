"""How checkpoints stand up to readers beside writers, to kills, and to damage.

Readers: restores in one process, while another saves to the same path without a pause, with both storages in turn.
Kills: a process that saves is killed just before and just after every operation on files with which it publishes, and
at random times; what is at the path must then be the old tree or the new one, and the next save must clean up. Damage:
changed, cut, swapped, emptied, linked and special files, of both storages; a restore must fail with `CheckpointError`
or give back the same bits, and end within seconds. Older formats have no checksum of the manifest, so that a change may
go unnoticed there; they must fail with the same error, if they fail.

    python examples/benchmarks/checkpoint_torture.py [--quick]

Needs `os.fork`. Everything that must be 0 is in `faults` of the last line.
"""

import argparse
import collections
import contextlib
import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import flax.nnx  # noqa: F401  # what a save imports, once, before the forks
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint  # noqa: F401

from jaxcompress._src.coding.codes import encode_codes
from jaxcompress.arrays import QuantizedArray
from jaxcompress.checkpoint import CheckpointError, restore, save

OPERATIONS = ("rename", "replace", "unlink", "rmdir", "mkdir", "open", "fsync")
STORAGES = ("orbax", "entropy")
SECONDS = 20
"""A restore of a few kilobytes that takes longer hangs."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few of each, in seconds")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    # The coder makes its tables once.
    encode_codes(np.arange(16).reshape(4, 4))
    quick, rng = arguments.quick, random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        figures = {
            "readers": readers(folder / "readers", 8 if quick else 500),
            "kills": kills(folder / "kills", rng, quick=quick),
            "damage": in_child(damage, folder / "damage", 60 if quick else 2000, arguments.seed),
            "damage of older formats": in_child(damage_older, folder / "older", 20 if quick else 1000, arguments.seed),
        }
    for name, found in figures.items():
        print(f"{name}: {found}")
    faults = sum(figures[part][name] for part in figures for name in figures[part] if name in FAULTS)
    print(json.dumps(figures | {"faults": faults}))


FAULTS = ("mixed", "errors", "neither", "leftovers", "other", "raw", "hangs")


def tree(number: int) -> Any:
    """A tree that tells which save it is from, in every leaf."""

    def full(*shape: int) -> jax.Array:
        return jnp.asarray(np.full(shape, number, np.float32))

    codes = jnp.asarray((np.arange(256).reshape(32, 8) + number) % 16, jnp.uint8)
    levels = tuple(np.linspace(-1, 1, 16).tolist())
    kernel = QuantizedArray(data=codes, scale=full(4, 8), levels=levels, dtype=jnp.dtype("float32"))
    return {"dense": {"kernel": kernel, "bias": full(8)}, "big": full(64, 65)}


def which(params: Any, info: Any) -> int | None:
    """The number of the save that everything is from; None if it is from several."""
    number = info.metadata["number"]
    expected = jax.tree.leaves(tree(number))
    found = jax.tree.leaves(params)
    same = len(found) == len(expected) and all(map(np.array_equal, found, expected))
    return number if same and type(number) is int else None


# Readers beside a writer


def readers(folder: Path, count: int) -> dict[str, int]:
    """At least `count` restores during at least `count` saves."""
    folder.mkdir()
    in_child(save_number, folder / "c", 0)
    saves = multiprocessing.get_context("fork").Value("i", 0)
    done = multiprocessing.get_context("fork").Event()

    def write() -> None:
        while not done.is_set():
            saves.value += 1
            save_number(folder / "c", saves.value, STORAGES[saves.value % 2])

    with child(write):
        found = in_child(read_beside, folder / "c", count, saves)
        done.set()
    found["leftovers"] = len(leftovers(folder / "c"))
    return found


def read_beside(path: Path, count: int, saves: Any) -> dict[str, int]:
    found = collections.Counter(restores=0, mixed=0, errors=0, versions=0)
    last = None
    while found["restores"] < count or saves.value < count:
        found["restores"] += 1
        try:
            number = which(*restore(path))
        except Exception:
            traceback.print_exc()
            found["errors"] += 1
            continue
        found["mixed"] += number is None
        found["versions"] += number != last
        last = number
    return dict(found) | {"saves": saves.value}


# Kills


def kills(folder: Path, rng: random.Random, *, quick: bool) -> dict[str, int]:
    """Kills at every operation of every way to publish, and at random times."""
    folder.mkdir()
    paths = []
    ways: list[tuple[str | None, str]] = [("orbax", "orbax"), ("orbax", "entropy")]
    for before, after in ways if quick else [*ways, *itertools.product((None, "entropy"), STORAGES)]:
        base = folder / f"{before}-{after}"
        base.mkdir()
        if before:
            in_child(save_number, base / "c", 0, before)
        names = operations(base, after)
        for at in publishing(names) if quick else range(len(names)):
            for late in (True,) if quick else (False, True):
                paths.append(trial(base, after, kill_at(at, late)))
    for _ in range(2 if quick else 200):
        paths.append(trial(folder / "orbax-orbax", "orbax", kill_later(rng.uniform(0, 0.6))))
    return in_child(judge, paths)


def operations(base: Path, storage: str) -> list[tuple[str, str]]:
    """Names and paths of all operations on files of one save."""
    return in_child(record, copied(base) / "c", storage)


def publishing(names: list[tuple[str, str]]) -> list[int]:
    """Which operations change what is at the path."""
    changes = ("rename", "replace", "unlink", "rmdir")
    return [at for at, (name, where) in enumerate(names) if name in changes and "orbax-checkpoint-tmp" not in where]


def record(path: Path, storage: str) -> list[tuple[str, str]]:
    names = []
    watch(lambda name, where, late: None if late else names.append((name, where)), str(path.parent))
    save_number(path, 1, storage)
    return names


def trial(base: Path, storage: str, plan: Callable[[Path], None]) -> tuple[Path, bool, bool]:
    """The path to which a process saved, whether there was something, and whether it was killed."""
    folder = copied(base)
    was = (folder / "c").exists()

    def victim() -> None:
        plan(folder)
        save_number(folder / "c", 1, storage)

    process = multiprocessing.get_context("fork").Process(target=victim)
    process.start()
    process.join()
    return folder / "c", was, process.exitcode == -signal.SIGKILL


def judge(paths: list[tuple[Path, bool, bool]]) -> dict[str, int]:
    """What is at the paths, and what is left there after a restore (if there is something) and a save."""
    found = collections.Counter(saves=len(paths), kills=0, old=0, new=0, neither=0, leftovers=0)
    for path, was, killed in paths:
        found["kills"] += killed
        try:
            number = which(*restore(path))
            found["new" if number == 1 else "old" if number == 0 else "neither"] += 1
        except FileNotFoundError:
            # Whole or not at all: nothing is right where nothing was.
            found["neither" if was else "old"] += 1
            save_number(path, 2)
        except Exception:
            traceback.print_exc()
            found["neither"] += 1
        found["leftovers"] += len(leftovers(path))
    return dict(found)


def kill_at(number: int, late: bool) -> Callable[[Path], None]:
    def plan(folder: Path) -> None:
        seen = iter(range(number + 1))
        reached = [False]

        def at(name: str, where: str, after: bool) -> None:
            if not after:
                reached[0] = next(seen, None) == number
            if reached[0] and after == late:
                os.kill(os.getpid(), signal.SIGKILL)

        watch(at, str(folder))

    return plan


def kill_later(seconds: float) -> Callable[[Path], None]:
    def plan(folder: Path) -> None:
        signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        signal.setitimer(signal.ITIMER_REAL, seconds)

    return plan


def watch(call: Callable[[str, str, bool], None], folder: str) -> None:
    """Calls `call` before and after every operation of this process on files below a folder."""
    names: dict[int, str] = {}

    def wrap(name: str, function: Any) -> Any:
        def wrapped(first: Any, *args: Any, **kwargs: Any) -> Any:
            where = names.get(first, "") if isinstance(first, int) else str(first)
            mine = where.startswith(folder) and not (name == "open" and not args[0] & os.O_CREAT)
            if mine:
                call(name, where, False)
            result = function(first, *args, **kwargs)
            if mine:
                call(name, where, True)
            if name == "open":
                names[result] = str(first)
            return result

        return wrapped

    for name in OPERATIONS:
        setattr(os, name, wrap(name, getattr(os, name)))


# Damage


def damage(folder: Path, count: int, seed: int) -> dict[str, int]:
    """Restores of `count` damaged checkpoints."""
    folder.mkdir()
    originals = []
    for storage in STORAGES:
        save_number(folder / f"{storage}-other", 5, storage)
        save_number(folder / storage, 3, storage)
        originals.append((folder / storage, folder / f"{storage}-other"))
    found = collections.Counter(refused=0, equal=0, other=0, raw=0, hangs=0)
    found.update(damage_each(folder, originals, count, seed, lambda *restored: which(*restored) == 3))
    return dict(found)


def damage_older(folder: Path, count: int, seed: int) -> dict[str, int]:
    """The same, of the checkpoints that the tests keep."""
    golden = Path(__file__).parents[2] / "tests" / "checkpoint" / "golden"
    originals = [(golden / name, golden / name) for name in ("format_1", "format_2")]
    found = collections.Counter(refused=0, restored=0, raw=0, hangs=0)
    found.update(damage_each(folder, originals, count, seed, lambda *_: True))
    found["restored"] = found.pop("equal", 0)
    return dict(found)


def damage_each(
    folder: Path, originals: list[tuple[Path, Path]], count: int, seed: int, is_right: Callable[..., bool]
) -> collections.Counter[str]:
    rng, found = random.Random(seed), collections.Counter[str]()
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGALRM, hang)
    for at in range(count):
        original, foreign = originals[at % len(originals)]
        path = folder / "damaged" / "c"
        shutil.copytree(original, path)
        what = rng.choice(DAMAGES)
        what(path, foreign, rng)
        signal.alarm(SECONDS)
        try:
            right = is_right(*restore(path))
            found["equal" if right else "other"] += 1
            if not right:
                print("other:", what.__name__)
        except (CheckpointError, FileNotFoundError):
            found["refused"] += 1
        except TimeoutError:
            found["hangs"] += 1
            print("hangs:", what.__name__)
        except Exception:
            found["raw"] += 1
            traceback.print_exc()
        signal.alarm(0)
        shutil.rmtree(folder / "damaged", ignore_errors=True)
    return found


def hang(*_: Any) -> None:
    raise TimeoutError


def any_file(path: Path, rng: random.Random) -> Path:
    files = sorted(file for file in path.rglob("*") if file.is_file())
    # The manifest is as likely as all others together.
    manifest = next(path.glob("manifest.*"))
    return manifest if rng.random() < 0.5 else rng.choice(files)


def flip_bit(path: Path, foreign: Path, rng: random.Random) -> None:
    file = any_file(path, rng)
    data = bytearray(file.read_bytes() or b"\0")
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    file.write_bytes(data)


def replace_bytes(path: Path, foreign: Path, rng: random.Random) -> None:
    file = any_file(path, rng)
    data = bytearray(file.read_bytes() or b"\0")
    at = rng.randrange(len(data))
    data[at : at + rng.randint(1, 9)] = rng.randbytes(rng.randint(0, 9))
    file.write_bytes(data)


def cut(path: Path, foreign: Path, rng: random.Random) -> None:
    file = any_file(path, rng)
    data = file.read_bytes()
    file.write_bytes(data[: rng.randint(0, len(data))])


def append(path: Path, foreign: Path, rng: random.Random) -> None:
    with any_file(path, rng).open("ab") as file:
        file.write(rng.randbytes(rng.randint(1, 40)))


def remove(path: Path, foreign: Path, rng: random.Random) -> None:
    any_file(path, rng).unlink()


def swap(path: Path, foreign: Path, rng: random.Random) -> None:
    first, second = any_file(path, rng), any_file(path, rng)
    one, two = first.read_bytes(), second.read_bytes()
    first.write_bytes(two)
    second.write_bytes(one)


def from_another(path: Path, foreign: Path, rng: random.Random) -> None:
    files = sorted(file.relative_to(foreign) for file in foreign.rglob("*") if file.is_file())
    shutil.copy(foreign / rng.choice(files), any_file(path, rng))


def add_file(path: Path, foreign: Path, rng: random.Random) -> None:
    (any_file(path, rng).parent / rng.choice(["x", "manifest.z", "manifest.json", "_METADATA", ".zarray"])).write_bytes(
        rng.randbytes(20)
    )


def special(path: Path, foreign: Path, rng: random.Random) -> None:
    file = any_file(path, rng)
    file.unlink()
    kind = rng.randrange(6)
    if kind == 0:
        os.mkfifo(file)
    elif kind == 1:
        file.symlink_to("/dev/zero")
    elif kind == 2:
        file.symlink_to(file)
    elif kind == 3:
        file.symlink_to(path / "nothing")
    elif kind == 4:
        file.mkdir()
    else:
        file.symlink_to(path)


def edit_json(path: Path, foreign: Path, rng: random.Random) -> None:
    """Another value somewhere in the manifest, well-formed; the checksum stays."""
    file = path / "manifest.json"
    if not file.exists():
        flip_bit(path, foreign, rng)
        return
    content = json.loads(file.read_text())
    place, key = content, rng.choice(sorted(content))
    while isinstance(place[key], dict | list) and place[key] and rng.random() < 0.9:
        place = place[key]
        key = rng.choice(sorted(place)) if isinstance(place, dict) else rng.randrange(len(place))
    choices = [
        None,
        0,
        1,
        -1,
        2**70,
        0.5,
        "",
        "float32",
        [],
        {},
        [[1], {}],
        [1] * 70,
        [2**40, 2**40],
        {"leaf": 0},
        True,
    ]
    if rng.random() < 0.2:
        del place[key]
    else:
        place[key] = rng.choice(choices)
    file.write_text(json.dumps(content))


DAMAGES = (flip_bit, replace_bytes, cut, append, remove, swap, from_another, add_file, special, edit_json, edit_json)


# Processes and files


def save_number(path: Path, number: int, storage: Any = "orbax") -> None:
    save(path, tree(number), metadata={"number": number}, overwrite=True, storage=storage)


def leftovers(path: Path) -> list[str]:
    """What is beside a checkpoint, or in it without being a part of it."""
    return sorted(set(os.listdir(path.parent)) - {path.name}) + sorted(os.listdir(path))[2:]


def copied(base: Path) -> Path:
    return Path(shutil.copytree(base, base.parent / f"{len(os.listdir(base.parent))}"))


@contextlib.contextmanager
def child(function: Callable[..., None], *args: Any) -> Iterator[None]:
    process = multiprocessing.get_context("fork").Process(target=function, args=args)
    process.start()
    try:
        yield
    finally:
        process.join(60)
        process.kill()


def in_child(function: Callable[..., Any], *args: Any) -> Any:
    """The result of a function in a process of its own: this one must not start JAX, or it could not be forked."""
    receive, send = multiprocessing.get_context("fork").Pipe(duplex=False)
    with child(lambda: send.send(function(*args))):
        send.close()
        return receive.recv()


if __name__ == "__main__":
    warnings.simplefilter("ignore", RuntimeWarning)
    main()
