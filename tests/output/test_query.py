"""Queries over a wide table: the grammar, what they find, and that none of a user's words becomes SQL."""

from __future__ import annotations

import math
import operator as operators
import re
import unicodedata

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qvsplit.errors import UsageError
from qvsplit.output import query as query_module
from qvsplit.output.query import (
    MOST_NESTED,
    OPERATORS,
    AllOf,
    AnyOf,
    Comparison,
    Not,
    captions_of,
    checks_of,
    columns_of,
    find,
    parse,
)

CHOICES = {"animal": ("yes", "no"), "place": ("sea", "city")}


def wide(**columns: list) -> pa.Table:
    """A wide table of as many rows as the columns have: named texts, scores, and columns that every one has."""
    number = len(next(iter(columns.values())))
    fixed = {
        "root": pa.array(["/r"] * number), "path": pa.array([f"{one:03d}.jpg" for one in range(number)]),
        "kind": pa.array(["image"] * number), "part": pa.array([0] * number, pa.int32()),
        "start": pa.array([None] * number, pa.float64()), "end": pa.array([None] * number, pa.float64()),
        "sha256": pa.array(["ab"] * number), "verdict": pa.array(["pass"] * number),
    }  # fmt: skip
    made = {
        name: pa.array(values, pa.float64() if name.endswith("_score") else pa.string())
        for name, values in columns.items()
    }
    return pa.table(fixed | made)


TABLE = wide(
    animal=["yes", "no", "unsure", None, "Yes"], animal_score=[0.9, 0.8, 0.5, None, 0.6],
    place=["sea", "sea", "city", "sea", None], place_score=[0.9, 0.9, 0.9, 0.9, None],
    people=["3", "12", "a few", None, "3.0"], caption=["A dog.", "unsure", "It's a \"café\"", "and", ""],
)  # fmt: skip


def found(text: str, table: pa.Table = TABLE) -> list[int]:
    return [int(row["path"][:3]) for row in find(table, text, CHOICES).rows]


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("animal = yes", [0, 4]),
        ("animal = YES and place = sea", [0]),
        ("animal = no or place = city", [1, 2]),
        ("place = sea and animal = no or people = 3", [0, 1]),
        ("people = 3 or place = sea and animal = no", [0, 1]),
        ("place = sea and (animal = no or people = 3)", [0, 1]),
        ("(animal=yes)", [0, 4]),
        # what is not known is neither the value nor another, whatever stands before it
        ("animal != yes", [1]),
        ("not animal = yes", [1]),
        ("not (animal = no or place = city)", [0]),
        ("animal = unsure", [2]),
        ("animal != unsure", [0, 1, 4]),
        ("not animal = UNSURE", [0, 1, 4]),
        # but in the model's own words that is an answer like any other
        ("caption != 'A dog.'", [1, 2, 3, 4]),
        ("caption = ''", [4]),
        ("animal_score >= 0.8", [0, 1]),
        ("animal_score = .9", [0]),
        ("not animal_score < 6e-1", [0, 1, 4]),
        ("part = 0", [0, 1, 2, 3, 4]),
        ("start > 0", []),
        ("people > 3", [1]),
        ("people <= 3", [0, 4]),
        ("people = 3", [0]),
        ("caption = 'a dog.'", [0]),
        ('caption = "It\'s a ""Café"""', [2]),
        ("caption = 'it''s a \"CAFÉ\"'", [2]),
        ('caption = "it\'s a ""cafe\u0301"""', [2]),
        ("caption = 'and'", [3]),
        ("'animal'='no'", [1]),
        ("ANIMAL = no", [1]),
        ("path = 003.jpg", [3]),
        ("path = 003.JPG", []),
        ("root = /r and not path = 003.jpg", [0, 1, 2, 4]),
        ("NOT animal = yes AND place = sea", [1]),
        ("not not animal = yes", [0, 4]),
        ("verdict = PASS and kind = image", [0, 1, 2, 3, 4]),
    ],
)
def test_what_is_found(text, rows):
    assert found(text) == rows


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "expected a name: ^"),
        ("animal", "expected one of = != < <= > >= after animal: animal ^"),
        ("animal = ", "expected a value after =: animal = ^"),
        ("animal = and place = sea", "expected a value after = (`and` itself is written in quotes): animal = ^and place = sea"),
        ("animal yes", "expected one of = != < <= > >= after animal: animal ^yes"),
        ("= yes", "expected a name: ^= yes"),
        ("animal == yes", "expected a value after =: animal = ^= yes"),
        ("animal = yes place = sea", "expected `and`, `or` or the end: animal = yes ^place = sea"),
        ("animal = yes)", "expected `and`, `or` or the end: animal = yes ^)"),
        ("(animal = yes", "this ( is not closed: ^(animal = yes"),
        ("(animal = yes place", "expected `and`, `or` or ): (animal = yes ^place"),
        ("animal = yes and", "expected a name: animal = yes and ^"),
        ("not", "expected a name: not ^"),
        ("or = 3", "expected a name (`or` itself is written in quotes): ^or = 3"),
        ("animal = 'yes", "the quote is not closed: animal = ^'yes"),
        ("animal ! yes", "! means nothing here: animal ^! yes"),
        ("anmal = yes", "there is no column anmal (did you mean animal?; there are animal, place, people, caption, root, path, kind, part, start, end, sha256, verdict; and NAME_score of each with choices): ^anmal = yes"),
        ("place = sea and colour = red", "there is no column colour (a name with blanks is written in quotes; there are "),
        ("animal < yes", "< compares numbers; expected one: animal < ^yes"),
        ("people > nan", "> compares numbers; expected one: people > ^nan"),
        ("people > 1e999", "> compares numbers; expected one: people > ^1e999"),
        ("animal_score = yes", "animal_score is a number; expected one: animal_score = ^yes"),
        ("animal_score = ٣", "animal_score is a number; expected one: animal_score = ^٣"),
        (f"{'x' * 60} =", f"expected a value after =: …{'x' * 27} = ^"),
        ("(" * (MOST_NESTED + 1) + "animal = yes" + ")" * (MOST_NESTED + 1), "nested more than 100 times"),
        ("not " * 100_000 + "animal = yes", "nested more than 100 times"),
    ],
)  # fmt: skip
def test_an_error_is_one_line_that_points_at_the_place(text, said):
    with pytest.raises(UsageError) as raised:
        find(TABLE, text, CHOICES)
    assert str(raised.value).startswith(f"find: {said}")
    assert "\n" not in str(raised.value)


def test_names_that_differ_only_in_case_are_told_apart():
    table = wide(Animal=["a", "b"], animal=["b", "a"])
    assert found("Animal = a", table) == [0]
    assert found("animal = a", table) == [1]
    with pytest.raises(UsageError, match="which of Animal and animal"):
        found("ANIMAL = a", table)


def test_the_kinds_of_columns():
    columns = columns_of(TABLE, CHOICES)
    assert checks_of(columns) == ["animal", "place"]
    assert captions_of(columns) == ["people", "caption"]


def test_a_value_that_no_answer_can_have_is_noted():
    def notes(text: str) -> list[str]:
        return find(TABLE, text, CHOICES).notes

    assert notes("animal = yess") == ["animal is never yess (did you mean yes?): it is one of yes, no, unsure"]
    assert notes("animal != cat or animal = cat") == ["animal is never cat: it is one of yes, no, unsure"]
    assert notes("verdict = pas and kind = video") == [
        "verdict is never pas (did you mean pass?): it is one of pass, info, warn, uncertain, error, block"
    ]
    assert notes("animal = YES and people = many and animal = unsure and place > 3") == []


def test_what_was_found_and_what_was_not_in_the_order_of_paths():
    result = find(TABLE, "place = sea and animal_score > 0 or place = city", CHOICES)
    assert [row["path"] for row in result.rows] == ["000.jpg", "001.jpg", "002.jpg"]
    assert [row["path"] for row in result.others] == ["003.jpg", "004.jpg"]
    assert result.names == ["place", "animal_score"]
    assert result.rows[0]["caption"] == "A dog." and set(result.rows[0]) == set(TABLE.column_names)
    assert find(TABLE.take([4, 2, 0, 1, 3]), "place = sea", CHOICES).rows == find(TABLE, "place = sea", CHOICES).rows


def test_a_query_of_many_terms():
    many = " or ".join(f"people = {number}" for number in range(5000))
    assert found(many) == [0, 1]


# -- none of a user's words becomes SQL -------------------------------------------------------------------------------

HOSTILE = [
    "yes' OR 1=1 --", "'; DROP TABLE items; --", '" OR 1=1 --', "') OR (1=1", "$1", "?", "\\", "%", "c0", "yes\x00",
    "read_csv('/etc/passwd')", "(SELECT 1)", "/*", "*/", "\u2019 OR 1=1", "items", "null", "true",
]  # fmt: skip


def quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_values_are_values(text):
    table = wide(caption=["yes", text, None], c0=["x", "x", "x"])
    assert found(f"caption = {quoted(text)}", table) == [1]
    assert found(f"caption != {quoted(text)}", table) == [0]


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_names_are_names(text):
    table = wide(**{"caption": ["yes", "no"], text: ["no", "yes"], text + "_score": [0.1, 0.2]})
    assert found(f"{quoted(text)} = yes", table) == [1]
    assert found(f"{quoted(text + '_score')} < 0.15", table) == [0]
    with pytest.raises(UsageError, match="there is no column"):
        found(f"{quoted(text)} = yes")


def test_the_statement_holds_no_word_of_the_user(monkeypatch):
    statements = []
    matching = query_module._matching
    monkeypatch.setattr(query_module, "_matching", lambda *given: statements.append(given[1:]) or matching(*given))
    table = wide(caption=["yes"], zq=["zq"], zq_score=[0.5])
    find(table, "zq = zq and zq_score > 0.25 and not (zq != xk or zq > 7) and path = zq", {})
    ((condition, parameters),) = statements
    assert parameters == ["zq", 0.25, "xk", 7.0, "zq"]
    assert set(re.findall(r"[A-Za-z]+\w*", condition)) <= {
        "AND", "OR", "NOT", "lower", "nfc_normalize", "VARCHAR", "nullif", "unsure", "CASE", "WHEN", "isfinite",
        "TRY_CAST", "AS", "DOUBLE", "THEN", "END", *(f"c{number}" for number in range(12)),
    }  # fmt: skip


def test_the_database_has_no_access_to_anything_outside(monkeypatch, tmp_path):
    """Were there a hole, SQL could read no file, load no extension, and change none of that."""
    import duckdb

    (tmp_path / "secret.csv").write_text("a,b\n1,2\n")
    scope = pa.table({"a": ["x"]})
    for attempt in (
        f"c0 IN (SELECT 'x' FROM read_csv('{tmp_path}/secret.csv'))",
        f"c0 IN (SELECT 'x' FROM '{tmp_path}/secret.csv')",
        "c0 IN (SELECT a FROM scope)",  # a variable of this function, were Python's scope searched
        "c0 = getenv('HOME')",
    ):
        with pytest.raises(duckdb.Error):
            query_module._matching(TABLE, attempt, [])
    for more in ("SET enable_external_access = true", "INSTALL httpfs", f"COPY items TO '{tmp_path}/out.csv'"):
        with pytest.raises(duckdb.Error):
            query_module._matching(TABLE, f"true; {more}", [])
    assert len(scope) == 1 and not (tmp_path / "out.csv").exists()


# -- against an evaluation in Python ----------------------------------------------------------------------------------

WORDS = [
    "yes",
    "no",
    "Yes",
    "unsure",
    "3",
    "2.5",
    "-1e1",
    "nan",
    "-inf",
    "a b",
    "it's",
    'say "hi"',
    "not",
    "AND",
    "(",
    "É",
    "é",
    "",
]
NUMBERS = ["0", "0.5", "2.5", "-10", "3", "1e9"]
ROWS = st.lists(
    st.fixed_dictionaries(
        {
            "animal": st.none() | st.sampled_from(WORDS),
            "animal_score": st.none() | st.sampled_from([0.0, 0.5, 1.0, 2.5]),
            "words of a model": st.none() | st.sampled_from(WORDS),
        }
    ),
    min_size=1, max_size=6,
)  # fmt: skip
COMPARISONS = st.one_of(
    st.builds(Comparison, st.sampled_from(["animal", "words of a model"]), st.sampled_from(["=", "!="]), st.sampled_from(WORDS)),
    st.builds(Comparison, st.sampled_from(["animal", "words of a model"]), st.sampled_from(["<", "<=", ">", ">="]), st.sampled_from(NUMBERS)),
    st.builds(Comparison, st.just("animal_score"), st.sampled_from(OPERATORS), st.sampled_from(NUMBERS)),
)  # fmt: skip


def joined(of, terms):
    """Terms as the parser would join them: those of the same kind, that were written without parentheses, are one."""
    return of(tuple(terms))


QUERIES = st.recursive(
    COMPARISONS,
    lambda inner: st.one_of(
        st.builds(Not, inner),
        st.lists(inner, min_size=2, max_size=4).map(lambda terms: joined(AllOf, terms)),
        st.lists(inner, min_size=2, max_size=4).map(lambda terms: joined(AnyOf, terms)),
    ),
    max_leaves=12,
)
COMPARE = {
    "=": operators.eq, "!=": operators.ne, "<": operators.lt, "<=": operators.le, ">": operators.gt, ">=": operators.ge,
}  # fmt: skip


def written(query) -> str:
    """A query as text: parentheses wherever there is more than one term."""
    match query:
        case Not(term):
            return f"not {written(term)}"
        case AllOf(terms):
            return "(" + " and ".join(map(written, terms)) + ")"
        case AnyOf(terms):
            return "(" + " or ".join(map(written, terms)) + ")"
    bare = re.fullmatch(r"[\w.+-]+", query.value) and query.value.lower() not in ("and", "or", "not")
    return f"{quoted(query.name)} {query.operator} {query.value if bare else quoted(query.value)}"


def truth(query, row) -> bool | None:
    """The query, evaluated in three values: None is unknown."""
    match query:
        case Not(term):
            value = truth(term, row)
            return None if value is None else not value
        case AllOf(terms):
            values = [truth(term, row) for term in terms]
            return False if False in values else None if None in values else True
        case AnyOf(terms):
            values = [truth(term, row) for term in terms]
            return True if True in values else None if None in values else False
    value = row[query.name]
    if value is None:
        return None
    if query.name == "animal_score" or query.operator not in ("=", "!="):
        try:
            return COMPARE[query.operator](float(value), float(query.value)) if math.isfinite(float(value)) else None
        except ValueError:
            return None

    def folded(text: str) -> str:
        return unicodedata.normalize("NFC", text).lower()

    if query.name == "animal" and folded(value) == "unsure" != folded(query.value):
        return None
    return COMPARE[query.operator](folded(value), folded(query.value))


@given(query=QUERIES)
def test_what_is_written_is_parsed_as_it_was(query):
    assert parse(written(query)) == query


@settings(deadline=None, max_examples=150)
@given(query=QUERIES, rows=ROWS)
def test_duckdb_finds_what_an_evaluation_in_python_finds(query, rows):
    table = wide(**{name: [row[name] for row in rows] for name in rows[0]})
    expected = [number for number, row in enumerate(rows) if truth(query, row) is True]
    assert found(written(query), table) == expected


@settings(deadline=None, max_examples=300)
@given(text=st.text(alphabet="anoi lmrtdf=!<>()'\"'3\u00e9;-\\$?", max_size=30))
def test_any_text_is_a_query_or_an_error_of_one_line(text):
    try:
        find(TABLE, text, CHOICES)
    except UsageError as error:
        assert str(error).startswith("find: ") and "^" in str(error)
