"""params.yaml -> Params, or one line for each mistake in it: file, line, key, value, and the mend."""

import difflib
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import CollectionEndEvent, CollectionStartEvent

from gpt2_ladder.config import Params, UserError, printable

LONGEST_VALUE = 1000  # characters; Python refuses to print an integer of four times as many
DEEPEST = 8  # ruamel.yaml takes seconds for some thousand lists in each other, and then Python's whole stack


def load(path: Path | str = "params.yaml") -> Params:
    """Read and validate the whole of `path`.

    Raises:
        UserError: one line a mistake, each with file, line, key, value, what is allowed, and the nearest known key.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        depth = 0
        for event in YAML().parse(text):
            where, value = f"{path}:{event.start_mark.line + 1}", getattr(event, "value", None) or ""
            if getattr(event, "anchor", None):
                raise UserError(
                    f"{where}: YAML anchor or alias {event.anchor!r:.80}: write the values out, "
                    "DVC would not see that a row changes with another"
                )
            if value == "<<" or getattr(event, "tag", None) or getattr(event, "version", None):
                raise UserError(f"{where}: '<<', '!' and '%YAML' are not read here: write the values out")
            depth += isinstance(event, CollectionStartEvent) - isinstance(event, CollectionEndEvent)
            if depth > DEEPEST:
                raise UserError(f"{where}: more than {DEEPEST} maps and lists in each other; settings need 3")
            if len(value) > LONGEST_VALUE:
                raise UserError(f"{where}: {value[:20]!r}... is longer than any value here can be")
        document = YAML().load(text)  # YAML 1.2, so that 6e-4 is a number as it is for DVC; PyYAML reads a string
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); run from the top of the repository") from None
    except MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UserError(
            f"{path}:{line}: not valid YAML: {printable(' '.join(str(error.problem).split())):.500}"
        ) from None
    except UserError:
        raise
    except (YAMLError, ValueError) as error:  # the latter for 2001-99-99
        raise UserError(f"{path}: not valid YAML: {printable(' '.join(str(error).split())):.500}") from None
    if not isinstance(document, CommentedMap):
        raise UserError(f"{path}: expected a map of settings, got {type(document).__name__}")
    try:
        return Params.model_validate(document)
    except ValidationError as error:
        raise UserError("\n".join(printable(_explain(path, document, mistake)) for mistake in error.errors())) from None


def _explain(path: Path | str, document: CommentedMap, mistake: Any) -> str:
    """One line for one pydantic error: file:line: key = value: what is wrong, and the nearest known key."""
    keys = list(mistake["loc"])
    if (
        keys[-1:] == ["[key]"] and mistake["type"] != "extra_forbidden"
    ):  # pydantic's mark, unless the file has such a key
        keys.pop()
    message = mistake["msg"].removeprefix("Value error, ")
    if mistake["type"] == "value_error":  # our own validators write: key = value: what is wrong
        keys += message.split(" = ")[0].split(".")
        message = message.partition(" = ")[2]
    node, line = document, 1
    for key in keys:
        if not isinstance(node, CommentedMap) or key not in node:
            break
        line, node = node.lc.key(key)[0] + 1, node[key]
    where = f"{path}:{line}: {'.'.join(map(str, keys))}" if keys else f"{path}"
    if mistake["type"] == "missing":
        return f"{where}: this key is missing"
    if mistake["type"] == "extra_forbidden":
        known = _known_keys(keys[:-1])
        near = difflib.get_close_matches(str(keys[-1]), known, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"known here: {', '.join(known)}"
        return f"{where}: unknown key; {hint}"
    if mistake["type"] == "value_error":
        return f"{where} = {message}"
    return f"{where} = {mistake['input']!r:.200}: {message}"


def _known_keys(parents: list[Any]) -> list[str]:
    """Return the keys that are allowed below `parents`, looked up in the JSON schema of params.yaml."""
    schema = Params.model_json_schema()
    node = schema
    for key in parents:
        child = node.get("properties", {}).get(key) or node.get("additionalProperties", {})
        node = schema["$defs"][child["$ref"].rsplit("/", 1)[-1]] if "$ref" in child else child
    return list(node.get("properties", {}))
