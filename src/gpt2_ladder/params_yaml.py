"""Read and validate params.yaml. Report each mistake in one line: file, line, key, value and the fix."""

import difflib
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap
from ruamel.yaml.error import YAMLError
from ruamel.yaml.events import CollectionEndEvent, CollectionStartEvent

from gpt2_ladder.config import UserError
from gpt2_ladder.files import printable
from gpt2_ladder.params import Params

MAX_LENGTH = 1000  # characters of a value; Python does not print integers with over 4300 digits
MAX_DEPTH = 8  # ruamel.yaml takes seconds for thousands of nested lists, and overflows Python's stack


def load(path: Path | str = "params.yaml") -> Params:
    """Read and validate `path`; raise UserError with one line for each mistake."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        _check_syntax(path, text)
        document = YAML().load(text)  # YAML 1.2, as in DVC: 6e-4 is a number; for PyYAML it is a string
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); run from the top of the repository") from None
    except UserError:
        raise
    except (YAMLError, ValueError) as error:  # ValueError: an impossible date such as 2001-99-99
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", error)
        where = f"{path}:{mark.line + 1}" if mark else path
        raise UserError(f"{where}: not valid YAML: {printable(' '.join(str(problem).split())):.500}") from None
    if not isinstance(document, CommentedMap):
        raise UserError(f"{path}: expected a map of settings, got {type(document).__name__}")
    try:
        return Params.model_validate(document)
    except ValidationError as error:
        mistakes = error.errors()  # first those of `defaults`, which all rows of `levels` repeat
        mistakes = [mistake for mistake in mistakes if mistake["loc"][:1] == ("defaults",)] or mistakes
        raise UserError("\n".join(printable(_explain(path, document, mistake)) for mistake in mistakes)) from None


def _check_syntax(path: Path | str, text: str) -> None:
    """Raise UserError for YAML that is valid but not allowed here: anchors, tags, long values, deep nesting."""
    depth = 0
    for event in YAML().parse(text):
        where, value = f"{path}:{event.start_mark.line + 1}", getattr(event, "value", None) or ""
        if getattr(event, "anchor", None):
            fix = "write the values out, because DVC does not see that a change of one row changes another"
            raise UserError(f"{where}: YAML anchor or alias {event.anchor!r:.80}: {fix}")
        if value == "<<" or getattr(event, "tag", None) or getattr(event, "version", None):
            raise UserError(f"{where}: '<<', '!' and '%YAML' are not supported: write the values out")
        depth += isinstance(event, CollectionStartEvent) - isinstance(event, CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise UserError(f"{where}: maps and lists are nested more than {MAX_DEPTH} deep; use at most 3 levels")
        if len(value) > MAX_LENGTH:
            raise UserError(f"{where}: {value[:20]!r}... is longer than {MAX_LENGTH} characters; shorten it")


def _explain(path: Path | str, document: CommentedMap, mistake: Any) -> str:
    """Return one line for one pydantic error: file:line: key = value: what is wrong, and the nearest known key."""
    keys = list(mistake["loc"])
    wrong_key = keys[-1:] == ["[key]"] and mistake["type"] != "extra_forbidden"  # pydantic's mark for one
    if wrong_key:
        keys.pop()
    if mistake["type"] == "value_error":  # raised by config.require as "key = value: what is wrong"
        name, _, message = mistake["msg"].removeprefix("Value error, ").partition(" = ")
        keys += name.split(".")
    node, line = document, 1
    for key in keys:
        if not isinstance(node, CommentedMap) or key not in node:
            break
        line, node = node.lc.key(key)[0] + 1, node[key]
    where = f"{path}:{line}: {'.'.join(map(str, keys))}" if keys else f"{path}"
    if wrong_key and mistake["type"] == "literal_error":
        return f"{where}: unknown key; known here: {mistake['ctx']['expected']}"
    if mistake["type"] == "missing":
        return f"{where}: this key is missing"
    if mistake["type"] == "extra_forbidden":
        known = _known_keys(keys[:-1])
        near = difflib.get_close_matches(str(keys[-1]), known, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"known here: {', '.join(known)}"
        return f"{where}: unknown key; {hint}"
    if mistake["type"] == "value_error":
        return f"{where} = {message}"
    return f"{where} = {mistake['input']!r:.200}: {mistake['msg']}"


def _known_keys(parents: list[Any]) -> list[str]:
    """Return the keys that are allowed below `parents`, from the JSON schema of params.yaml."""
    node = schema = Params.model_json_schema()
    for key in parents:
        child = node.get("properties", {}).get(key) or node.get("additionalProperties", {})
        node = schema["$defs"][child["$ref"].rsplit("/", 1)[-1]] if "$ref" in child else child
    return list(node.get("properties", {}))
