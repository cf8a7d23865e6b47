"""Download files from the Hugging Face hub with huggingface_hub; retry, and report errors in one line."""

import logging
import sys
from functools import partial
from pathlib import Path

import httpx2
import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError

from gpt2_ladder import files
from gpt2_ladder.config import UserError
from gpt2_ladder.sources import downloads


class HubUnreachable(UserError):
    """The hub does not respond."""


def fetch(
    repository: str, name: str, revision: str | None, fix: str, folder: Path | None = None, kind: str = "model"
) -> Path:
    """Download a file of a hub repository into `folder`, or into the hub's cache, and return its path.

    Raise HubUnreachable if the hub does not respond, and UserError if the download fails; the message has the `fix`.
    """
    url = huggingface_hub.hf_hub_url(repository, name, repo_type=kind, revision=revision)
    for handler in logging.getLogger("huggingface_hub").handlers:
        handler.addFilter(_mask_passwords)
    try:
        if constants.HF_HUB_OFFLINE:
            raise downloads.Unreachable("HF_HUB_OFFLINE is set")
        downloads.probe(url)
    except downloads.Unreachable as failure:
        fixes = f"check the network or HF_ENDPOINT, or {fix}"
        raise HubUnreachable(f"{repository}: the hub cannot be reached: {failure}; {fixes}") from None
    print(f"{name}: fetching from {downloads.mask_passwords(url)}", file=sys.stderr, flush=True)
    fetch_once = partial(huggingface_hub.hf_hub_download, repository, name, repo_type=kind, revision=revision)
    try:
        return Path(downloads.retry(partial(fetch_once, local_dir=folder), _is_transient))
    except Exception as error:  # a wrong address, size or pause in a response can raise any error
        if files.disk_is_full(error):
            raise
        cause = error.__cause__ or error
        reason = " ".join(f"{type(cause).__name__}: {cause}".split())
        message = downloads.mask_passwords(f"{url}: the hub responded, but the download failed: {reason}")
        raise UserError(f"{message}; run again, set HF_ENDPOINT to a mirror, or {fix}") from None


def _mask_passwords(record: logging.LogRecord) -> bool:
    """Hide a password in HF_ENDPOINT from huggingface_hub's warnings."""
    record.msg, record.args = downloads.mask_passwords(record.getMessage()), None
    return True


def _is_transient(error: Exception) -> bool:
    """Return whether to call huggingface_hub again: not if only the hash is wrong, because a file may have 0.5 GB.

    huggingface_hub itself retries after a timeout, a cut connection and status 429. Call it again after a connection
    reset, status 5xx or a wrong size, which raises an OSError without errno.
    """
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in downloads.RETRIED - {429}
    return isinstance(error, httpx2.ReadError) or (type(error) is OSError and error.errno is None)
