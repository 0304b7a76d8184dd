"""The archive of an exported program, written anew from what torch may be given of it.

`torch.export.load` trusts what it reads: it evaluates the sizes of a graph as Python, looks operators up as attributes
of torch, makes Python code of names and conditions, unpickles tensors of some kinds, and its reader of zip files may
find other entries than Python's. Here the entries are read once, by Python; the graph is held against what a program
of ours consists of, by an own list for each kind of text; and torch reads an archive of what was checked.
"""

from __future__ import annotations

import ast
import io
import json
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch

from tuner.errors import FormatError, first_line

# What torch 2.15 reads without unpickling; of its other kinds, some are pickles and some compiled code.
_ENTRY: Final = re.compile(
    r"(?P<top>\w+)/(?P<name>models/model\.json|data/weights/(weight_\d+|model_weights_config\.json)"
    r"|data/constants/(tensor_\d+|model_constants_config\.json)"
    r"|data/sample_inputs/model\.pt|archive_format|archive_version|byteorder|\.data/(version|serialization_id))"
)
_MODEL, _EMPTY = "models/model.json", "data/sample_inputs/model.pt"
MAX_GRAPH_BYTES: Final = 1 << 28

# Names become variables of the code that torch makes of a graph.
_NAME: Final = re.compile(r"(?!__)[A-Za-z_]\w{0,500}", re.ASCII)
_PATH: Final = re.compile(r"((?!__)\w{1,500}\.)*(?!__)\w{1,500}|", re.ASCII)
_WORD: Final = re.compile(r"[\w.+:-]{0,200}", re.ASCII)
_LABEL: Final = re.compile(r"[^\"'\\\n\r{}]{0,500}")
_TEXT: Final = re.compile(r"[^\\\n\r]{0,2000}")  # it is quoted in code

# Of names with two underscores in front those of the operators on bits, as a & b, which masks are made with.
_ATEN: Final = re.compile(
    r"torch\.ops\.aten\.(?P<op>(?!__)\w+|__i?(and|or|xor|lshift|rshift)__)\.(?P<overload>(?!__)\w+)", re.ASCII
)
_OTHER_OPERATORS: Final = re.compile(
    r"_operator\.(add|sub|mul|truediv|floordiv|mod|pow|neg|pos|eq|ne|lt|le|gt|ge|and_|or_|getitem)"
    r"|math\.(ceil|floor|trunc|sqrt)"
    r"|torch\.(sym_(int|float|max|min|not|ite|sum)|_sym_sqrt)"
    r"|torch\.ops\.higher_order\.(wrap_with_set_grad_enabled|wrap_with_autocast|cond|while_loop|scan|map_impl"
    r"|associative_scan)"
)
_WORDS_OF_OPERATORS: Final = frozenset(
    {
        "activation",
        "algorithm",
        "api_name",
        "approximate",
        "assert_msg",
        "device_type",
        "driver",
        "equation",
        "indexing",
        "interpolation",
        "mode",
        "norm",
        "ord",
        "p",
        "pad_mode",
        "padding",
        "padding_side",
        "reduce",
        "rounding_mode",
        "side",
        "UPLO",
    }
)
"""The arguments of PyTorch's operators that are text and choose a variant. Others name files, or are printed."""

# How sympy writes sizes: Add(Mul(Integer(2), Symbol('s40', positive=True, integer=True)), Integer(1)).
_SIZE_FUNCTIONS: Final = frozenset(
    {
        "Add",
        "And",
        "CeilDiv",
        "CeilToInt",
        "CleanDiv",
        "Eq",
        "Equality",
        "FloatTrueDiv",
        "FloorDiv",
        "FloorToInt",
        "Ge",
        "GreaterThan",
        "Gt",
        "Identity",
        "Integer",
        "IntTrueDiv",
        "Le",
        "LessThan",
        "Lt",
        "Max",
        "Min",
        "Mod",
        "ModularIndexing",
        "Mul",
        "Ne",
        "Not",
        "Or",
        "Pow",
        "PowByNatural",
        "PythonMod",
        "Rational",
        "RoundToInt",
        "StrictGreaterThan",
        "StrictLessThan",
        "ToFloat",
        "TruncToInt",
        "Unequality",
    }
)
_SYMBOL: Final = re.compile(r"[a-z]{1,3}\d{1,6}", re.ASCII)
_SYMBOL_FACTS: Final = frozenset({"positive", "integer", "nonnegative", "real", "finite"})
_MAX_SIZE_CHARS, _MAX_WHOLE = 10_000, 2**63
_CONTAINERS: Final = (None, "builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict")


def plain_archive(file: Path | io.BytesIO, name: str) -> io.BytesIO:
    """Return an archive of the same program for torch to read, which holds nothing that could be run or unpickled.

    What a program computes does not need, such as traces of the source, is left out. Raises FormatError that names
    `name` and what it holds that a program of ours does not.
    """
    try:
        top, entries = _entries(file)
        for kind, content in entries.items():
            if kind == _MODEL:
                entries[kind] = _graph(content)
            elif kind.endswith("_config.json"):
                _check_weights(content)
    except zipfile.BadZipFile as error:
        raise FormatError(f"{name} needs to be an archive of torch.export, got one that is damaged: {error}") from error
    except (ForeignError, RecursionError) as error:
        raise FormatError(
            f"{name} needs to hold plain tensors and a program, got {str(error)[:200] or 'brackets too deep'}:"
            " loading it could unpickle or run code that came with it"
        ) from error
    plain = io.BytesIO()
    with zipfile.ZipFile(plain, "w") as archive:
        for kind, content in entries.items():
            archive.writestr(f"{top}/{kind}", content)
    plain.seek(0)
    return plain


class ForeignError(Exception):
    """An archive holds what a program of ours does not."""


def _entries(file: Path | io.BytesIO) -> tuple[str, dict[str, bytes]]:
    """Return the archive's directory and what lies in it by name. Raises ForeignError, and BadZipFile."""
    entries: dict[str, bytes] = {}
    top = ""
    with zipfile.ZipFile(file) as archive:
        for entry in archive.infolist():
            matched = _ENTRY.fullmatch(entry.filename)
            if matched is None or matched["top"] != (top := top or matched["top"]) or matched["name"] in entries:
                raise ForeignError(f"the entry {entry.filename!r}")
            if entry.compress_type != zipfile.ZIP_STORED or (matched["name"] == _EMPTY and entry.file_size):
                raise ForeignError(f"the entry {entry.filename!r}, compressed or a pickle")
            entries[matched["name"]] = archive.read(entry)
    return top, entries


def _parsed(content: bytes) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ForeignError(f"JSON that cannot be read ({first_line(error)})") from error


def _check_weights(content: bytes) -> None:
    document = _parsed(content)
    if not isinstance(document, dict) or not isinstance(document.get("config"), dict):
        raise ForeignError("tensors without their description")
    for path, its in document["config"].items():
        if not isinstance(its, dict) or its.get("use_pickle") is not False:
            raise ForeignError("a tensor that is a pickle")
        _check(_PATH, path, "the name of a tensor")
    _walk(document["config"], _VALUES)


def _graph(content: bytes) -> bytes:
    if len(content) > MAX_GRAPH_BYTES:
        raise ForeignError(f"a graph of {len(content)} bytes")
    return json.dumps(_walk(_parsed(content), _VALUES)).encode()


def _check(wanted: re.Pattern[str], value: Any, what: str) -> str:
    if not isinstance(value, str) or not wanted.fullmatch(value):
        raise ForeignError(f"{what} {value!r}")
    return value


def _of(wanted: re.Pattern[str], what: str) -> Callable[[Any], Any]:
    return lambda value: value if value is None else _check(wanted, value, what)


def _operator(value: Any) -> str:
    if not isinstance(value, str):
        raise ForeignError(f"the operator {value!r}")
    matched = _ATEN.fullmatch(value)
    if matched is None:
        return _check(_OTHER_OPERATORS, value, "the operator")
    found = getattr(getattr(torch.ops.aten, matched["op"], None), matched["overload"], None)
    if not isinstance(found, torch._ops.OpOverload) or any(map(_is_foreign_argument, found._schema.arguments)):
        raise ForeignError(f"the operator {value!r}")
    return value


def _is_foreign_argument(argument: Any) -> bool:
    kind = str(argument.type)
    return ("str" in kind and argument.name not in _WORDS_OF_OPERATORS) or "Storage" in kind or "Stream" in kind


def _size(value: Any) -> str:
    if not isinstance(value, str) or len(value) > _MAX_SIZE_CHARS:
        raise ForeignError("a size that is no text, or a long one")
    try:
        _check_size(ast.parse(value, mode="eval").body)
    except (SyntaxError, ValueError, MemoryError) as error:
        raise ForeignError(f"the size {value!r}") from error
    except ForeignError as error:
        raise ForeignError(f"the size {value!r}") from error
    return value


def _check_size(node: ast.expr) -> None:
    match node:
        case ast.Constant(value=bool() | float()):
            return None
        case ast.Constant(value=int(whole)) if abs(whole) <= _MAX_WHOLE:
            return None
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return _check_size(operand)
        case ast.Call(func=ast.Name(id="Symbol"), args=[ast.Constant(value=str(name))], keywords=facts):
            stated = {fact.arg for fact in facts if isinstance(fact.value, ast.Constant) and fact.value.value is True}
            if _SYMBOL.fullmatch(name) and len(stated) == len(facts) and stated <= _SYMBOL_FACTS:
                return None
        case ast.Name(id=name) if _SYMBOL.fullmatch(name) or name in ("true", "false"):
            return None
        case ast.Call(func=ast.Name(id=function), args=args, keywords=[]) if function in _SIZE_FUNCTIONS:
            for arg in args:
                _check_size(arg)
            return None
    raise ForeignError


def _containers(value: Any) -> str:
    """Check how inputs or outputs are nested, as torch's pytree writes it."""
    version_and_spec = _parsed(value.encode()) if isinstance(value, str) else None
    match version_and_spec:
        case [int(), spec]:
            _check_containers(spec)
            return str(value)
    raise ForeignError(f"the nesting {value!r}")


def _check_containers(spec: Any) -> None:
    match spec:
        case {"type": kind, "context": None | str() as context, "children_spec": list(children), **others}:
            keys = None if context is None else _parsed(context.encode())
            if kind not in _CONTAINERS or others or not (keys is None or isinstance(keys, list)):
                raise ForeignError(f"the container {kind!r}")
            for key in keys or ():
                if not isinstance(key, int):
                    _check(_LABEL, key, "the name of an input or output")
            for child in children:
                _check_containers(child)
        case _:
            raise ForeignError("a container that is none")


def _empty(value: Any) -> Any:
    if value:
        raise ForeignError("objects of a library")
    return value


# By the key of the JSON object that a value stands in. What is not listed is walked through, and text in it is a word.
_VALUES: Final[dict[str, Callable[[Any], Any]]] = {
    "target": _operator,
    "as_operator": _operator,
    "expr_str": _size,
    "in_spec": _containers,
    "out_spec": _containers,
    "as_string": _of(_TEXT, "the text"),
    "name": lambda value: value if value in ("", None) else _check(_NAME, value, "the name"),
    "as_name": _of(_NAME, "the name"),
    "parameter_name": _of(_PATH, "the name of a parameter"),
    "buffer_name": _of(_PATH, "the name of a buffer"),
    "tensor_constant_name": _of(_PATH, "the name of a constant"),
    "user_input_name": _of(_NAME, "the name of an input"),
    "fqn": _of(_PATH, "the name of a module"),
    "custom_obj_values": _empty,
    "as_custom_obj": _empty,
    "custom_obj": _empty,
    "treespec_namedtuple_fields": _empty,
    # Of no consequence for what is computed, and parts of it become code.
    "metadata": lambda _: {},
    "guards_code": lambda _: [],
}


def _walk(value: Any, rules: dict[str, Callable[[Any], Any]]) -> Any:
    if isinstance(value, dict):
        return {
            _check(_PATH, key, "the key"): rules[key](its) if key in rules else _walk(its, rules)
            for key, its in value.items()
        }
    if isinstance(value, list):
        return [_walk(its, rules) for its in value]
    return _check(_WORD, value, "the text") if isinstance(value, str) else value
