"""A Jinja environment for templates that come with a model, which are as untrusted as its weights.

Jinja's immutable sandbox keeps a template away from Python's internals. It does not keep it from running for ever or
from filling the memory, so here every loop turn and call is counted, and every operation that can make a text longer is
checked before it does.
"""

from __future__ import annotations

import functools
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextvars import ContextVar
from datetime import datetime
from typing import Any, NoReturn, cast

import jinja2
from jinja2 import nodes, pass_environment
from jinja2.ext import Extension
from jinja2.filters import do_round, do_sum, make_attrgetter
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_STEPS = 500_000
"""Loop turns and calls in one rendering."""
MAX_CHARACTERS = 16_000_000
"""Characters written in one rendering, and the length of any text or list made in it."""
MAX_MADE = 32 * MAX_CHARACTERS
"""Characters of all texts, and items of all lists, that are made on the way to it."""
MAX_SECONDS = 10.0
MAX_DIGITS = 100
"""That a number is rounded to."""

_GROWING_METHODS = frozenset({"center", "expandtabs", "join", "ljust", "replace", "rjust", "zfill"})
_GROWING_FILTERS = frozenset({"batch", "center", "format", "indent", "join", "replace", "slice", "wordwrap"})
# These make a text of whatever they are given.
_TEXT_FILTERS = frozenset({
    "capitalize", "e", "escape", "forceescape", "lower", "pprint", "safe", "string", "striptags", "title", "trim",
    "truncate", "upper", "urlencode", "urlize", "wordcount",
})  # fmt: skip


class TemplateLimitError(jinja2.TemplateRuntimeError):
    """The template ran or wrote more than a chat template has any reason to."""


class Budget:
    """What one rendering may still use."""

    def __init__(self) -> None:
        self._steps = 0
        self._characters = self._made = 0
        self._deadline = time.monotonic() + MAX_SECONDS

    def step(self) -> None:
        """Count one loop turn or call."""
        self._steps += 1
        if self._steps > MAX_STEPS:
            raise TemplateLimitError(f"more than {MAX_STEPS} loop turns and calls")
        if self._steps % 1024 == 0 and time.monotonic() > self._deadline:
            raise TemplateLimitError(f"more than {MAX_SECONDS:g} s")

    def make(self, size: int) -> None:
        """Count the characters or items of a value that is about to be made."""
        self._made += size
        if self._made > MAX_MADE:
            raise TemplateLimitError(f"texts and lists of more than {MAX_MADE} items in all")

    def write(self, characters: int) -> None:
        """Count written characters."""
        self._characters += characters
        if self._characters > MAX_CHARACTERS:
            raise TemplateLimitError(f"more than {MAX_CHARACTERS} characters")


_budget: ContextVar[Budget | None] = ContextVar("pagedllm_template_budget", default=None)


def render_bounded(template: jinja2.Template, variables: dict[str, Any]) -> str:
    """Render within the bounds.

    Raises:
        TemplateLimitError: The template exceeds a bound.
        jinja2.TemplateError: It is wrong, tries to escape, or refuses the messages.
    """
    token = _budget.set(Budget())
    try:
        return template.render(variables)
    finally:
        _budget.reset(token)


@functools.lru_cache(maxsize=64)
def compile_template(source: str) -> jinja2.Template:
    """Compile a chat template; the same source is compiled once.

    Raises:
        jinja2.TemplateSyntaxError: The source is not a Jinja template.
    """
    return _environment().from_string(source)


class _BoundedEnvironment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"*", "**", "+", "%"})

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for loop in tree.find_all(nodes.For):
            loop.iter = _filter(cast(nodes.Expr, loop.iter), "_counted", loop.lineno)
        _bound_concatenations(tree)
        tree.set_environment(self)
        return tree

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Refuse operations whose result would be too large, before it exists."""
        _step()
        if operator == "%" and isinstance(left, str):
            _check_format(left, right)
        elif operator == "**":
            _check_size(_integer(left).bit_length() * abs(_integer(right)) // 3)
        elif operator == "*":
            _make(_weight(left) * _weight(right) if isinstance(left, Sized) or isinstance(right, Sized) else 0)
        elif operator == "+":
            _make(sum(len(side) for side in (left, right) if isinstance(side, Sized)))
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Count calls, and check the methods that can make a text longer."""
        _step()
        name, text = getattr(__obj, "__name__", ""), getattr(__obj, "__self__", None)
        if isinstance(text, str) and name in _GROWING_METHODS:
            _check_growth(text, *args, *kwargs.values())
        return super().call(__context, __obj, *args, **kwargs)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """The sandbox's own form of `str.format`, with its widths checked."""
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None

        @functools.wraps(wrapped)
        def checked(*args: Any, **kwargs: Any) -> str:
            _check_format(value.__self__, (*args, *kwargs.values()))
            return wrapped(*args, **kwargs)

        return checked


class _Generation(Extension):
    """`{% generation %}` marks the assistant's tokens for training; here it only passes its body on."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Parse up to `{% endgeneration %}`."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> _BoundedEnvironment:
    environment = _BoundedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"], finalize=_written
    )
    for name in _GROWING_FILTERS:
        environment.filters[name] = _guarded(environment.filters[name])
    for name in _TEXT_FILTERS:
        environment.filters[name] = _measured(environment.filters[name])
    environment.filters.update(tojson=_to_json, _counted=_counted, _concatenated=_concatenated)
    environment.filters.update(sum=_guarded_sum, round=_guarded_round)
    environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)
    del environment.globals["lipsum"]
    return environment


def _filter(value: nodes.Expr, name: str, lineno: int) -> nodes.Filter:
    return nodes.Filter(value, name, [], [], None, None, lineno=lineno)


def _bound_concatenations(node: nodes.Node) -> None:
    """Turn every `a ~ b` into a call that checks the length first."""
    for field, value in node.iter_fields():
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, nodes.Node):
                _bound_concatenations(child)
        if isinstance(value, nodes.Concat):
            setattr(node, field, _filter(nodes.List(value.nodes, lineno=value.lineno), "_concatenated", value.lineno))
        elif isinstance(value, list):
            value[:] = [
                _filter(nodes.List(child.nodes, lineno=child.lineno), "_concatenated", child.lineno)
                if isinstance(child, nodes.Concat)
                else child
                for child in value
            ]


def _step() -> None:
    budget = _budget.get()
    if budget is not None:
        budget.step()


def _counted(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        _step()
        yield value


def _concatenated(values: list[Any]) -> str:
    _make(sum(_extent(value) for value in values))
    return "".join(map(str, values))


def _written(value: Any) -> Any:
    budget = _budget.get()
    if budget is not None:
        budget.write(_extent(value))
    return value


def _guarded(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)  # keeps the mark by which Jinja passes its environment
    def guarded(*args: Any, **kwargs: Any) -> Any:
        _step()
        operands = [value for value in args if not isinstance(value, jinja2.Environment)] + [*kwargs.values()]
        if function.__name__ == "do_format":
            _check_format(str(operands[0]), tuple(operands[1:]))
        _check_growth(*operands)
        return function(*args, **kwargs)

    return guarded


def _measured(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def measured(*args: Any, **kwargs: Any) -> Any:
        _step()
        _make(sum(_extent(value) for value in args if not isinstance(value, jinja2.Environment | Context)))
        return function(*args, **kwargs)

    return measured


@pass_environment
def _guarded_sum(environment: jinja2.Environment, values: Any, attribute: Any = None, start: Any = 0) -> Any:
    if not isinstance(start, Sized):
        return do_sum(environment, values, attribute, start)
    total: Any = start
    for value in values if attribute is None else map(make_attrgetter(environment, attribute), values):
        _make(_weight(total) + _weight(value))  # lists are copied for each that is added
        total = total + value
    return total


def _guarded_round(value: Any, precision: int = 0, method: Any = "common") -> float:
    if abs(_integer(precision)) > MAX_DIGITS:
        raise TemplateLimitError(f"round: a precision of more than {MAX_DIGITS}")
    return do_round(value, precision, method)


def _extent(value: Any, known: dict[int, int] | None = None) -> int:
    """At least how long a value's text is; what is in it several times counts as often."""
    if isinstance(value, str):
        return len(value)
    if not isinstance(value, list | tuple | dict):
        return 1
    known = {} if known is None else known
    if id(value) not in known:
        parts = [*value, *value.values()] if isinstance(value, dict) else value
        known[id(value)] = 2 + sum(_extent(part, known) for part in parts)
    return known[id(value)]


def _integer(value: Any) -> int:
    return value if isinstance(value, int) else 1


def _weight(value: Any) -> int:
    """By how much an operand can multiply a length."""
    if isinstance(value, list | tuple):
        return max(1, sum(len(item) if isinstance(item, str) else 1 for item in value))
    if isinstance(value, Sized):
        return max(1, len(value))
    return max(1, abs(_integer(value)))


def _check_growth(*operands: Any) -> None:
    size = 1
    for operand in operands:
        size *= _weight(operand)
    _make(size)


def _check_format(text: str, values: Any) -> None:
    widths = [int(digits) for digits in re.findall(r"\d{1,18}", text)]
    widths += [value for value in (values if isinstance(values, tuple) else (values,)) if isinstance(value, int)]
    if re.search(r"\d{19}", text) or (re.search(r"[%{]", text) and max(widths, default=0) > MAX_CHARACTERS):
        raise TemplateLimitError(f"a text of more than {MAX_CHARACTERS} characters")


def _make(size: int) -> None:
    _check_size(size)  # Jinja computes what is constant while it compiles, where there is no budget
    budget = _budget.get()
    if budget is not None:
        budget.make(size)


def _check_size(size: int) -> None:
    if size > MAX_CHARACTERS:
        raise TemplateLimitError(f"a text or list of more than {MAX_CHARACTERS} items")


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own `tojson` escapes HTML, which a prompt must not have."""
    _make(_extent(value) + _integer(indent))
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)
