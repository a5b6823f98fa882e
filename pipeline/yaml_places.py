"""YAML text as plain values, the line of each of them, and the traps in what was written.

A duplicate key, which YAML resolves silently, and the scalars that `yaml_scalars` calls traps are problems
here rather than values. Only plain data is built: no tags, anchors or aliases, so no objects, and no values
that grow on reading.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import yaml
from yaml.reader import ReaderError

from pipeline.errors import PipelineError
from pipeline.yaml_scalars import TrapError, plain_1_1, plain_1_2

MAX_DEPTH = 20
"""An experiment nests five levels; a file that nests deeper is something else."""


@dataclass(frozen=True)
class Place:
    """Where a value was written.

    Attributes:
        line: of its key, or of itself in a list; from 1. None on the command line.
        text: a scalar as written, without its quotes; None for a section or a list.
        quoted: whether it stood in quotes or in a block.
        override: the argument of `--set` that gave it.
    """

    line: int | None = None
    text: str | None = None
    quoted: bool = False
    override: str | None = None


@dataclass(frozen=True)
class Document:
    """What one YAML text says: its value, the place of each value by JSON pointer, and its problems."""

    value: Any
    places: dict[str, Place]
    problems: list[PipelineError]


def pointer_to(*keys: str | int) -> str:
    """The JSON pointer (RFC 6901) that leads through `keys`."""
    return "".join("/" + str(key).replace("~", "~0").replace("/", "~1") for key in keys)


def read_yaml(text: str, *, override: str | None = None) -> Document:
    """Reads one YAML document.

    Args:
        text: the document.
        override: the argument of `--set` that `text` stands in, which is read by YAML 1.2's rules.

    Returns:
        The value, with text in the place of every scalar that is a problem.

    Raises:
        PipelineError: where the text is no single YAML document of plain data; its line is set, its file not.
    """
    try:
        loader = _Loader(text)
    except ReaderError as error:
        raise PipelineError(
            f"not YAML: a control character, U+{error.character:04X}",
            code="yaml-syntax",
            mend="remove the character",
            line=text.count("\n", 0, error.position) + 1,
        ) from None
    try:
        node = loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        raise _syntax_error(error) from None
    except (ValueError, OverflowError):  # PyYAML converts the digits of `\\U99999999` unchecked
        raise PipelineError(
            "not YAML: an escape or a directive is out of range",
            code="yaml-syntax",
            mend="mend the `\\U` escape, or use single quotes, where a backslash is a backslash",
            line=loader.get_mark().line + 1,
        ) from None
    builder = _Builder(override)
    value = None if node is None else builder.build(node, "", None)
    return Document(value, builder.places, builder.problems)


class _Loader(yaml.SafeLoader):
    """Composes nodes, never deeper than `MAX_DEPTH`, without tags, anchors and aliases."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            raise PipelineError(
                f"anchors and aliases (`&{event.anchor}`, `*{event.anchor}`) are not read",
                code="yaml-alias",
                mend="write the value out where it is used; text that starts with & or * needs quotes",
                line=line,
            )
        if event.tag is not None:
            raise PipelineError(
                f"tags (`{event.tag.replace('tag:yaml.org,2002:', '!!')}`) are not read",
                code="yaml-tag",
                mend="remove the tag; text that starts with ! needs quotes",
                line=line,
            )
        if self.depth >= MAX_DEPTH:
            raise PipelineError(
                f"nested deeper than {MAX_DEPTH} levels",
                code="too-deep",
                mend="is this an experiment file? Close the brackets, or mend the indentation",
                line=line,
            )
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


class _Builder:
    """Builds plain values from nodes and notes where each was written."""

    def __init__(self, override: str | None) -> None:
        self.override = override
        self.places: dict[str, Place] = {}
        self.problems: list[PipelineError] = []

    def build(self, node: yaml.Node, pointer: str, line: int | None) -> Any:
        """The value of `node`; `line` is its key's, None for the document and in a list."""
        if self.override is None:
            line = node.start_mark.line + 1 if line is None else line
        text = node.value if isinstance(node, yaml.ScalarNode) else None
        quoted = isinstance(node, yaml.ScalarNode) and node.style is not None
        self.places[pointer] = Place(line, text, quoted, self.override)
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, pointer)
        if isinstance(node, yaml.SequenceNode):
            items = enumerate(node.value)
            return [self.build(item, pointer + pointer_to(index), None) for index, item in items]
        assert isinstance(node, yaml.ScalarNode)
        return self._scalar(node, pointer)

    def _mapping(self, node: yaml.MappingNode, pointer: str) -> dict[str, Any]:
        mapping: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = None if self.override else key_node.start_mark.line + 1
            key = self._key(key_node, pointer, line)
            if key is None:
                continue
            place = pointer + pointer_to(key)
            if key in mapping:
                first = self.places[place].line
                lines = f"at lines {first} and {line}" if first != line else "on one line"
                self._problem(
                    "duplicate-key",
                    f"`{key}` is given twice, {lines}; YAML would silently keep the last",
                    "remove one of the two",
                    place,
                    line,
                )
                continue
            mapping[key] = self.build(value_node, place, line)
        return mapping

    def _key(self, node: yaml.Node, pointer: str, line: int | None) -> str | None:
        """A mapping's key, which is text; None, with a problem, where it is anything else."""
        if not isinstance(node, yaml.ScalarNode):
            self._problem("wrong-type", "a key is a list or a section", "keys are plain text", pointer, line)
            return None
        before = len(self.problems)
        key = self._scalar(node, pointer)
        for problem in self.problems[before:]:
            problem.line = line
        if isinstance(key, str):
            return key if len(self.problems) == before else None
        shown = "null" if key is None else str(key).lower()
        self._problem(
            "yaml-bool" if isinstance(key, bool) else "wrong-type",
            f"YAML reads the key `{node.value}` as {shown}",
            f'quote it: "{node.value}":',
            pointer,
            line,
        )
        return None

    def _scalar(self, node: yaml.ScalarNode, pointer: str) -> Any:
        text: str = node.value
        if any(character == "\0" or "\ud800" <= character <= "\udfff" for character in text):
            self._problem(
                "yaml-syntax",
                "a NUL character or half of a surrogate pair stands in the text",
                "remove the escape that writes it",
                pointer,
            )
            return "?"
        if node.style is not None:
            return text
        try:
            return plain_1_1(text, node.tag) if self.override is None else plain_1_2(text)
        except TrapError as trap:
            self._problem(trap.code, trap.cause, trap.mend, pointer)
            return text

    def _problem(self, code: str, cause: str, mend: str, pointer: str, line: int | None = None) -> None:
        place = self.places.get(pointer)
        line = place.line if line is None and place is not None else line
        self.problems.append(PipelineError(cause, code=code, mend=mend, line=line, pointer=pointer))


def _syntax_error(error: yaml.MarkedYAMLError) -> PipelineError:
    mark = error.problem_mark or error.context_mark
    if error.problem == "but found another document":
        return PipelineError(
            "a second document starts here",
            code="yaml-documents",
            mend="one file holds one experiment: remove the `---` line, or make two files",
            line=mark.line + 1 if mark else None,
        )
    column = f" at column {mark.column + 1}" if mark else ""
    cause = " ".join(part for part in (error.context, error.problem) if part)
    mends = {
        "found character '\\t' that cannot start any token": "indent with spaces: YAML allows no tabs",
        "mapping values are not allowed here": "quote text that holds `: `, and check the indentation",
    }
    return PipelineError(
        f"not YAML{column}: {cause}",
        code="yaml-syntax",
        mend=mends.get(error.problem or "", "check the indentation, the quotes and the brackets there"),
        line=mark.line + 1 if mark else None,
    )
