"""Networks on the Hugging Face Hub: repositories that hold weights and their card, by the address hf://OWNER/NAME.

The library `huggingface_hub` (`pip install "segdeconv[hub]"`) is imported, and a connection opened, only for such an
address.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from segdeconv.checkpoints import cards
from segdeconv.errors import CheckpointError, UsageError

WEIGHTS = Path(f"model{cards.SUFFIX}")  # the file in a repository, and in a folder that `save_pretrained` writes
ADDRESS = re.compile(r"hf:/+([\w.-]+/[\w.-]+?)(?:@([\w./-]+))?/?")  # a Path has one slash
MAX_REASON = 200  # characters of a message of the library
EXAMPLE = "hf://OWNER/NAME or hf://OWNER/NAME@REVISION"


def is_address(path: str | Path) -> bool:
    """Return whether a CHECKPOINT argument is an address of the Hub."""
    return str(path).startswith("hf:/")


def fetch(address: str | Path) -> Path:
    """Download the network of an address into the cache of the Hub's library, unless it is there already.

    Args:
        address: hf://OWNER/NAME, followed by @REVISION for a commit, branch or tag in place of the newest commit.

    Returns:
        The .safetensors file, with its card beside it; nothing has checked them.

    Raises:
        UsageError: The address is malformed, does not exist or is not accessible, or `huggingface_hub` is missing.
        CheckpointError: The repository has no network of segdeconv.
    """
    match = ADDRESS.fullmatch(str(address))
    if match is None:
        raise UsageError(f"{address} is not an address of the Hub - write {EXAMPLE}")
    name, revision = match.groups()
    shown = f"hf://{name}" + (f"@{revision}" if revision else "")
    hub = _library(shown)
    with _explained(shown):
        card = Path(hub.hf_hub_download(name, cards.card_of(WEIGHTS).name, revision=revision, library_name="segdeconv"))
        commit = card.parent.name  # of the card, so that the weights are of the same commit
        return Path(hub.hf_hub_download(name, WEIGHTS.name, revision=commit, library_name="segdeconv"))


def push(weights: Path, name: str, *, private: bool | None, revision: str | None, message: str, token: Any) -> str:
    """Upload weights and their card as one commit of a repository, which is created if it does not exist.

    Args:
        weights: The .safetensors file, with its card beside it.
        name: OWNER/NAME.
        private: Whether a new repository is private; None for the default of the owner.
        revision: The branch, which is created if it does not exist; None for main.
        message: The message of the commit.
        token: See `huggingface_hub.HfApi`; None for the token of `hf auth login`.

    Returns:
        The address of the commit, hf://OWNER/NAME@COMMIT.

    Raises:
        UsageError: The name is malformed, the Hub refuses the upload, or `huggingface_hub` is missing.
    """
    match = ADDRESS.fullmatch(name if is_address(name) else f"hf://{name}")
    if match is None or match[2]:
        raise UsageError(f"{name} is not the name of a repository - write OWNER/NAME")
    name = match[1]
    hub = _library(f"hf://{name}")
    with _explained(f"hf://{name}"):
        api = hub.HfApi(token=token, library_name="segdeconv")
        api.create_repo(name, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(name, branch=revision, exist_ok=True)
        files = {WEIGHTS.name: weights, cards.card_of(WEIGHTS).name: cards.card_of(weights)}
        additions = [hub.CommitOperationAdd(inside, str(file)) for inside, file in files.items()]
        commit = api.create_commit(name, additions, commit_message=message, revision=revision)
    return f"hf://{name}@{commit.oid}"


def _library(address: str) -> Any:
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # asking for a network is no consent to anything else
    try:
        import huggingface_hub
    except ModuleNotFoundError as error:
        raise UsageError(f'{address} needs huggingface_hub - pip install "segdeconv[hub]"') from error
    return huggingface_hub


@contextmanager
def _explained(address: str) -> Iterator[None]:
    """Turn errors of the Hub and its library into one line."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as error:
        raise UsageError(
            f"{address} asks for consent - accept its terms on its page, then run hf auth login"
        ) from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        what = "revision" if isinstance(error, errors.RevisionNotFoundError) else "repository"
        raise UsageError(
            f"{address} not found: the Hub has no such {what} - correct it or, for a private one, run hf auth login"
        ) from error
    except errors.RemoteEntryNotFoundError as error:
        raise CheckpointError(
            f"{address} has no {WEIGHTS} with its card {cards.card_of(WEIGHTS)} - give a network that push_to_hub of "
            "segdeconv wrote"
        ) from error
    except Exception as error:  # the library passes on those of its HTTP client
        first = error.__cause__ or error
        reason = " ".join((str(first) or type(first).__name__).split())[:MAX_REASON].rstrip(".:")
        raise UsageError(
            f"{address}: the Hub cannot be used ({reason}) - check the connection, or give a file or folder"
        ) from error
