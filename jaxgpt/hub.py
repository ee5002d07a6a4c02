"""The Hugging Face Hub: a model's files by org/name, and the upload of a model.

A model there has one exact form, hf://org/name@COMMIT or hf://org/name@COMMIT/file.gguf, which
`files.path` opens and which a run writes down. The cache, the token and the address are
huggingface_hub's own: HF_HOME, HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE.
"""

import contextlib
import functools
import glob
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

SCHEME = "hf://"
NAME = re.compile(
    r"(?P<scheme>hf://)?(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[^:]+?))?"
    r"(/(?P<file>[^:]+\.gguf)|:(?P<part>[^:]+))?"
)
COMMIT = re.compile(r"[0-9a-f]{40}")
# What else has two names and a slash between them: our own runs, and files that are missing.
OURS = re.compile(r"runs/.*|.*\.(gguf|bin|safetensors|json|jsonl|pt|pth|txt)")
INDEX = "model.safetensors.index.json"
SMALL = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model",
    "tekken.json", "chat_template.jinja", "adapter_config.json", "lineage.json", INDEX,
)  # fmt: skip
WEIGHTS = ("model.safetensors", "adapter_model.safetensors")
LOGIN = "give a token by HF_TOKEN, or by the command hf auth login"
CARD = "README.md"
OWN_CARD = "library_name: jaxgpt"


def find(setting: str, name: str | Path) -> str | Path:
    """The exact form of a model on the Hub; a path that is here, or can be no name, as it is.

    Args:
        name: org/name, org/name@revision; of GGUF files org/name:file.gguf, org/name/file.gguf, or
            org/name:Q4_K_M for the one file with that in its name.

    Raises:
        ValueError: naming the setting: no such model, or it cannot be had.
    """
    text = str(name)
    asked = NAME.fullmatch(text)
    if asked is None or not is_asked(text):
        return name
    repo, revision, file = asked["repo"], asked["revision"], asked["file"] or asked["part"]
    with _told(f"{setting}={text}", repo):
        if not COMMIT.fullmatch(revision or ""):
            # Of GGUF files there may be many: first a small one, which is in every repository.
            revision = _snapshot(repo, revision, [".gitattributes"] if file else SMALL).name
        pinned = f"{SCHEME}{repo}@{revision}"
        if not asked["part"]:
            return f"{pinned}/{file}" if file else pinned
        names = _names(repo, revision)
    parts = re.compile(r"-(?!00001)\d{5}-of-\d{5}\.gguf$")
    models = [name for name in names if name.endswith(".gguf") and not parts.search(name)]
    near = [name for name in models if file.lower() in Path(name).name.lower()]
    fitting = [file] if file in models else near
    if len(fitting) != 1:
        has = ", ".join(models[:12]) or "no GGUF file"
        raise ValueError(f"{setting}={text}: must name one file of {repo}, which has {has}")
    return f"{pinned}/{fitting[0]}"


def is_asked(name: str) -> bool:
    """Whether a name asks for the Hub: it could be one of there, and is no path that is here."""
    asked = NAME.fullmatch(name)
    if asked is None or asked["scheme"]:
        return asked is not None
    return not OURS.fullmatch(asked["repo"]) and not Path(name).exists()


@functools.cache
def path(name: str, weights: bool = True) -> Path:
    """Where the files of a model in its exact form are on this machine, fetched if need be.

    Args:
        weights: False: the small files are enough.

    Raises:
        ValueError: the Hub does not give them.
    """
    asked = NAME.fullmatch(name)
    if asked is None or not COMMIT.fullmatch(asked["revision"] or ""):
        raise ValueError(f"{name}: names no commit of a model on the Hub")
    repo, commit, file = asked["repo"], asked["revision"], asked["file"]
    with _told(name, repo):
        if file:  # with its other parts, if it is one of several
            pattern = re.sub(r"-\d{5}-of-", "-*-of-", glob.escape(file))
            found = _snapshot(repo, commit, [pattern], shows=not cached(name)) / file
        else:
            found = _snapshot(repo, commit, SMALL)
            shards = _shards(found / INDEX)
            there = [(found / file).exists() for file in shards or WEIGHTS]
            if weights and not (all(there) if shards else any(there)):
                escaped = [glob.escape(shard) for shard in shards]
                found = _snapshot(repo, commit, escaped or WEIGHTS, shows=True)
        whole = found.exists() and (file or not weights or any(found.glob("*.safetensors")))
        names = "" if whole else ", ".join(_names(repo, commit)[:12])
    if not whole:
        what = file or "safetensors"
        raise ValueError(f"{name}: has no {what}, but {names}; name a GGUF as {repo}:FILE.gguf")
    return found


def cached(name: str) -> Path | None:
    """Where the files of a model in its exact form are, if they were fetched before."""
    asked = NAME.fullmatch(name)
    if asked is None:
        return None
    import huggingface_hub

    names = [asked["file"]] if asked["file"] else [INDEX, *WEIGHTS]
    load = functools.partial(huggingface_hub.try_to_load_from_cache, asked["repo"])
    there = [
        found for name in names if isinstance(found := load(name, revision=asked["revision"]), str)
    ]
    found = Path(there[0]) if there else None
    return found.parent if found and not asked["file"] else found


def check_push(repo: str) -> None:
    """Raises ValueError unless a model may be put there: a name, a token, and no foreign files."""
    import huggingface_hub

    asked = NAME.fullmatch(repo)
    if asked is None or asked["repo"] != repo:
        raise ValueError(f"push={repo}: must be org/name")
    if not huggingface_hub.get_token():
        raise ValueError(f"push={repo}: {LOGIN}")
    api = huggingface_hub.HfApi()
    with _told(f"push={repo}", repo, pushing=True):
        api.whoami()
        names = _names(repo, "main") if api.repo_exists(repo) else []
        ours = CARD in names and OWN_CARD in Path(api.hf_hub_download(repo, CARD)).read_text()
    if not ours and (others := ", ".join({*names} - {".gitattributes"})):
        raise ValueError(
            f"push={repo}: holds other than jaxgpt's files ({others:.200}); give another"
        )


def push(repo: str, place: Path, card: str, public: bool = False) -> str:
    """Puts a file, or a folder's files, there with a card in one commit, whose address comes back.

    Raises:
        ValueError: the Hub does not take them.
    """
    import huggingface_hub

    api = huggingface_hub.HfApi()
    with _told(f"push={repo}", repo, pushing=True):
        api.create_repo(repo, private=not public, exist_ok=True)
        root, found = (place, place.rglob("*")) if place.is_dir() else (place.parent, [place])
        held = {file.relative_to(root).as_posix(): file for file in found if file.is_file()}
        content = {**held, CARD: card.encode()}.items()
        added = [huggingface_hub.CommitOperationAdd(name, held) for name, held in content]
        return str(api.create_commit(repo, added, commit_message="Upload by jaxgpt").commit_url)


def _snapshot(
    repo: str, revision: str | None, patterns: Sequence[str], shows: bool = False
) -> Path:
    """The folder of a commit with the files of these names; its name is the commit.

    Args:
        shows: bars of progress.
    """
    import huggingface_hub
    from tqdm import tqdm

    class Quiet(tqdm):
        def __init__(self, *args: Any, **settings: Any) -> None:
            super().__init__(*args, **settings | {"disable": True})

    bar: Any = None if shows else Quiet
    return Path(
        huggingface_hub.snapshot_download(
            repo, revision=revision, allow_patterns=[*patterns], tqdm_class=bar
        )
    )


def _names(repo: str, revision: str) -> list[str]:
    """The files of a commit; those of the cache, where the Hub is out of reach."""
    import huggingface_hub
    from huggingface_hub import errors

    try:
        return sorted(huggingface_hub.HfApi().list_repo_files(repo, revision=revision))
    except errors.OfflineModeIsEnabled:
        folder = _snapshot(repo, revision, [])
        return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def _shards(index: Path) -> list[str]:
    """The files that an index names, if there is one."""
    held = json.loads(index.read_bytes()).get("weight_map") if index.is_file() else None
    names = held.values() if isinstance(held, dict) else ()
    return sorted({name for name in names if isinstance(name, str)})


@contextlib.contextmanager
def _told(what: str, repo: str, pushing: bool = False) -> Iterator[None]:
    """Turns what huggingface_hub and its connection raise into one line."""
    try:
        yield
    except Exception as error:  # no network, no such model, no permission: dozens of kinds
        if isinstance(error, OSError) and error.errno:  # of this machine, such as a full disk
            raise
        away = "" if pushing else "is no file or folder here, and "
        raise ValueError(f"{what}: {_reason(error, repo, away)}") from error


def _reason(error: BaseException, repo: str, away: str) -> str:
    from huggingface_hub import constants, errors

    if isinstance(error, errors.EntryNotFoundError) and error.__cause__:
        return _reason(error.__cause__, repo, away)  # why the cache was asked instead
    if isinstance(error, errors.GatedRepoError):
        return f"is gated: ask for access at {constants.ENDPOINT}/{repo}, and {LOGIN}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"{away}the Hub shows no model of that name; for a private one {LOGIN}"
    if isinstance(error, errors.RevisionNotFoundError):
        return "the Hub has the model, but not that revision of it"
    if isinstance(error, errors.HfHubHTTPError):
        return f"the Hub answers {error.response.status_code}: {error.server_message or error}"
    why = "HF_HUB_OFFLINE is set" if isinstance(error, errors.OfflineModeIsEnabled) else error
    why = " ".join(str(why).split())[:200] or type(error).__name__
    cache = "it is not whole in the Hub's cache, and " if away else ""
    return f"{away.removesuffix('and ')}{cache}the Hub cannot be reached ({why})"
