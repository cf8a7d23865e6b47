"""Files from the Hugging Face hub, by huggingface_hub: tried again where that may help, and failing in one line."""

import logging
from functools import partial
from pathlib import Path

import httpx2
import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError

from gpt2_ladder import files
from gpt2_ladder.config import UserError
from gpt2_ladder.sources import downloads
from gpt2_ladder.sources.downloads import Unreachable


def probe(url: str) -> None:
    """Ask the hub, with a short clock, whether it answers for `url`.

    Raises:
        Unreachable: no answer.
        UserError: an answer, but an error.
    """
    if constants.HF_HUB_OFFLINE:
        raise Unreachable("HF_HUB_OFFLINE is set")
    for handler in logging.getLogger("huggingface_hub").handlers:
        handler.addFilter(_hide)
    downloads.probe(url)


def fetch(
    repository: str, name: str, revision: str | None, mend: str, folder: Path | None = None, kind: str = "model"
) -> str:
    """Bring the file `name` of a `repository` of that `kind` into `folder`, or the hub's cache; return where it lies.

    `mend`: what a user may do where neither another try nor a mirror helps. `probe` comes first.

    Raises:
        UserError: the file did not come.
    """
    fetch_once = partial(
        huggingface_hub.hf_hub_download, repository, name, repo_type=kind, revision=revision, local_dir=folder
    )
    try:
        return downloads.retry(fetch_once, _is_transient)
    except Exception as error:  # it believes the hub's addresses, sizes and pauses, so a wrong word may raise anything
        if files.disk_is_full(error):
            raise
        cause = error.__cause__ or error
        reason = " ".join(f"{type(cause).__name__}: {cause}".split())
        url = huggingface_hub.hf_hub_url(repository, name, repo_type=kind, revision=revision)
        raise UserError(
            f"{downloads.hidden(url)}: the hub answered, but the file did not come: {downloads.hidden(reason)}; "
            f"run again, set HF_ENDPOINT to a mirror, or {mend}"
        ) from None


def _hide(record: logging.LogRecord) -> bool:
    """Have huggingface_hub's warnings name the hub without the password in HF_ENDPOINT."""
    record.msg, record.args = downloads.hidden(record.getMessage()), None
    return True


def _is_transient(error: Exception) -> bool:
    """Tell what is worth another call of huggingface_hub's.

    It tries again itself, and goes on where it was, after a time-out, a cut connection and a 429; not so after a reset,
    a 5xx or a wrong size, whose OSError has no number. A wrong hash of 0.5 GB that had the right size is final.
    """
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in downloads.RETRIED - {429}
    return isinstance(error, httpx2.ReadError) or (type(error) is OSError and error.errno is None)
