"""Files from the Hugging Face hub, by huggingface_hub: tried again where that may help, and failing in one line."""

import logging
from functools import partial
from pathlib import Path

import httpx2
import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError

from gpt2_ladder import artifacts
from gpt2_ladder.config import UserError


def fetch(repository: str, name: str, revision: str, folder: Path, mend: str, kind: str = "model") -> Path:
    """Bring the file `name` of a `repository`, of models or datasets, into `folder`, and return where it lies.

    `mend`: what the user can do where it does not come.

    Raises:
        UserError: it did not come.
    """
    for handler in logging.getLogger("huggingface_hub").handlers:
        handler.addFilter(_hide)
    fetch_once = partial(
        huggingface_hub.hf_hub_download, repository, name, repo_type=kind, revision=revision, local_dir=folder
    )
    try:
        artifacts.patiently(fetch_once, _may_pass)
    except Exception as error:  # it believes the hub's addresses, sizes and pauses, so a wrong word may raise anything
        if "No space left on device" in str(error):
            raise
        cause = error.__cause__ or error
        reason = " ".join(f"{type(cause).__name__}: {cause}".split())
        url = huggingface_hub.hf_hub_url(repository, name, repo_type=kind, revision=revision)
        raise UserError(
            f"{artifacts.hidden(url)}: the hub answered, but the file did not come: {artifacts.hidden(reason)}; "
            f"run again, {mend}"
        ) from None
    return folder / name


def _hide(record: logging.LogRecord) -> bool:
    """Have huggingface_hub's warnings name the hub without the password in HF_ENDPOINT."""
    record.msg, record.args = artifacts.hidden(record.getMessage()), None
    return True


def _may_pass(error: Exception) -> bool:
    """Tell what is worth another call of huggingface_hub's.

    It tries again itself, and goes on where it was, after a time-out, a cut connection and a 429; not so after a reset,
    a 5xx or a wrong size, whose OSError has no number. A wrong hash of 0.5 GB that had the right size is final.
    """
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in artifacts.RETRIED - {429}
    return isinstance(error, httpx2.ReadError) or (type(error) is OSError and error.errno is None)
