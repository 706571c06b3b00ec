"""Where tests/mutants.py plants nothing, and that the place beside it is one for a fault."""

import ast

import pytest
from mutants import OWN_TESTS, ROOT, left_out

SOURCE = """\
Pair = int | str
limit: int | None = 3 | 4


@dataclass(frozen=True, order=False)
class Row:
    kept: bool = True


class Player(Protocol):
    count: int = 5

    def play(self, often: int = 6) -> int:
        return 7


class Plain(Base):
    count: int = 8


def joined(a, /, b: int | None = 9, *, c: int = -10, **more) -> int | None:
    for x, y in zip(a, b, strict=True):
        check(x, strict=False)
    if a == "word" or b != 11 or a == b:
        return a * b / c
"""


def planted(text: str, within: str, operator: str = "core/Any") -> bool:
    """Whether a fault may stand at `text`, which begins in this line of the source."""
    lines = SOURCE.splitlines()
    (number,) = (n for n, line in enumerate(lines) if within in line)
    place = (number + 1, lines[number].index(within) + within.index(text))
    return not any(span.holds(place, operator) for span in left_out(SOURCE))


@pytest.mark.parametrize(
    ("kind", "none", "fault"),
    [
        ("annotation", ("| None", "int | None = 3"), ("|", "3 | 4")),
        ("annotation of a result", ("| None", "-> int | None"), ("|", "int | str")),
        ("strict of a zip", ("True", "strict=True"), ("False", "strict=False")),
        ("argument of a dataclass", ("True", "frozen=True"), ("True", "bool = True")),
        ("another of a dataclass", ("False", "order=False"), ("@", "@dataclass")),
        ("star in a signature", ("*", "*, c"), ("*", "a * b")),
        ("stars in a signature", ("**", "**more"), ("-", "-10")),
        ("slash in a signature", ("/", "/, b"), ("/", "/ c")),
        ("default in a protocol", ("6", "often: int = 6"), ("9", "= 9")),
        ("body of a protocol", ("7", "return 7"), ("8", "int = 8")),
        ("field of a protocol", ("5", "int = 5"), ("8", "int = 8")),
    ],
)
def test_a_place_without_fault_is_left_out_and_its_neighbour_is_not(
    kind: str, none: tuple[str, str], fault: tuple[str, str]
) -> None:
    assert not planted(*none), kind
    assert planted(*fault), kind


@pytest.mark.parametrize(
    ("sign", "within", "operator"),
    [("==", 'a == "word"', "core/X_Eq_Is"), ("!=", "b != 11", "core/X_NotEq_IsNot")],
)
def test_beside_a_literal_only_identity_is_left_out(sign: str, within: str, operator: str) -> None:
    assert not planted(sign, within, operator)
    assert planted("==", "a == b", operator)
    for other in ("core/X_Eq_NotEq", "core/X_Eq_LtE", "core/X_NotEq_Is", "core/X_Eq_IsNot"):
        assert planted(sign, within, other)


def swallowed(source: str) -> list[int]:
    """Lines of the statements that are left out as a whole, definitions apart."""
    spans = left_out(source)
    statements = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.stmt)]
    plain = [node for node in statements if not isinstance(node, ast.FunctionDef | ast.ClassDef)]
    begins = [(node.lineno, node.col_offset) for node in plain]
    return [line for line, at in begins if any(span.holds((line, at), "") for span in spans)]


@pytest.mark.parametrize("path", OWN_TESTS)
def test_no_whole_statement_is_left_out_but_a_protocols(path: str) -> None:
    source = (ROOT / path).read_text(encoding="utf-8")
    protocol = source.find("(Protocol):")
    first = source[:protocol].count("\n") + 1 if protocol >= 0 else 10**6
    assert all(line > first for line in swallowed(source))
