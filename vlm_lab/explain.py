"""A configuration error of Hydra, OmegaConf or pydantic as one line: which field, what is wrong, the way out."""

import difflib
import re

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError

CONFIG_ERRORS = (HydraException, OmegaConfBaseException, ValueError)


def explain(error: BaseException) -> str:
    if isinstance(error, ValidationError):
        return explain_type(error)
    if missing := re.search(r"[Mm]issing mandatory value: (\S+)", str(error)):
        field = missing.group(1)
        return f"{field} must be given, for example: python train.py ... {field}=VALUE"
    if isinstance(error, HydraException):
        return explain_composition(error)
    return " ".join(str(error).split())


def explain_type(error: ValidationError) -> str:
    errors = error.errors()
    fields = [[str(part) for part in each["loc"] if "[" not in str(part)] for each in errors]  # not a union's types
    deepest = max((path for path in fields if path[: len(fields[0])] == fields[0]), key=len)
    first, where = errors[fields.index(deepest)], ".".join(deepest)
    if first["type"] == "extra_forbidden":
        return f"{where}: no such setting"
    if first["type"] == "value_error":
        return f"{where}: {first['ctx']['error']}"
    return f"{where} = {first['input']!r}: {first['msg'][0].lower()}{first['msg'][1:]}"


def explain_composition(error: HydraException) -> str:
    text = str(error)
    if option := re.search(r"Could not find '(\S+?)/(\S+)'", text):
        group, name = option.groups()
        options = re.findall(r"^\t(\S+)$", text.split("Config search path", maxsplit=1)[0], re.M)
        return f"{group}={name}: no such option{close(name, options)}; there are {', '.join(sorted(options))}"
    if setting := re.search(r"Could not override '(\S+?)'", text):
        path = setting.group(1)
        siblings = list(getattr(error.__cause__, "parent_node", None) or ())
        known = f"; there are {', '.join(map(str, siblings))}" if siblings else ""
        return f"{path}: no such setting{close(path.split('.')[-1], siblings)}{known}"
    return " ".join(text.split())


def close(name: str, options: list[str]) -> str:
    match = difflib.get_close_matches(name, [str(option) for option in options], n=1)
    return f", did you mean {match[0]}?" if match else ""
