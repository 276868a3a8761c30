"""XMP sidecars: keywords and a description beside an image, where programs for photographs read them. Standard library.

A sidecar that exists is changed by cutting out and inserting single elements of its text, found by a parser: all other
bytes stay as another program wrote them. What qvsplit wrote is listed in properties of its own, so that the next run
can replace that, and nothing else. DTDs are refused, and with them all entities.
"""

from __future__ import annotations

import os
import re
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from xml.parsers import expat
from xml.sax.saxutils import escape, quoteattr

from qvsplit.runtime.atomic_files import disk_errors, written_whole

RDF = "http://www.w3.org/1999/02/22-rdf-syntax-ns#"
DC = "http://purl.org/dc/elements/1.1/"
OWN = "urn:qvsplit:xmp:1.0/"
_PREFIXES = {DC: "dc", OWN: "qvsplit"}
# Properties as the parser names them: namespace and name
SUBJECT, DESCRIPTION = f"{DC} subject", f"{DC} description"
OWN_KEYWORDS, OWN_DESCRIPTION = f"{OWN} keywords", f"{OWN} description"
# Programs that find one of these, keywords with others above them, read no further: where a sidecar has one, ours must
# be in it, too. Where there is none dc:subject is read, and one with ours alone would hide what a user has there.
HIERARCHIES = {
    "http://ns.adobe.com/lightroom/1.0/ hierarchicalSubject": "|",
    "http://www.digikam.org/ns/1.0/ TagsList": "/",
}
TOP = "qvsplit"  # the keyword above all of ours in a hierarchy
_NEW = b"""<?xml version="1.0" encoding="UTF-8"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/" x:xmptk="qvsplit">
 <rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
 </rdf:RDF>
</x:xmpmeta>
"""
_START_TAG = re.compile(rb"""<([^\s/>]+)(?:"[^"]*"|'[^']*'|[^>"'])*>""")
_NOT_IN_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


class SidecarRefused(ValueError):
    """A sidecar that is left as it is, and why."""


def sidecar_of(file: str, *, replace_suffix: bool = False) -> Path:
    """Give the sidecar of a file: `IMG.jpg.xmp`, or `IMG.xmp` where `replace_suffix`."""
    return Path((os.path.splitext(file)[0] if replace_suffix else file) + ".xmp")


def write_sidecar(
    sidecar: Path, keywords: Iterable[str], description: str | None = None, *, only: Container[str] | None = None
) -> bool:
    """Bring a sidecar up to date, as `merged` says; it is there only if it has something to say.

    Returns:
        Whether the file was written.

    Raises:
        SidecarRefused: It is there, and no XMP in UTF-8.
        DiskError: It cannot be read or written.
    """
    target = Path(os.path.realpath(sidecar))
    wanted = list(keywords)
    with disk_errors(sidecar, "sidecars that were written are kept", "leave it out"):
        before = target.read_bytes() if target.exists() else b""
        if not before and not wanted and description is None:
            return False
        after = merged(before or _NEW, wanted, description, only=only)
        if after == before:
            return False
        if after == _NEW:  # it was made by this, and has nothing left to say
            target.unlink()
            return True
        with written_whole(target) as stream:
            stream.write(after)
            if (target.read_bytes() if target.exists() else b"") != before:
                raise SidecarRefused("another program has just changed it; run again")
    return True


def merged(
    text: bytes, keywords: Iterable[str], description: str | None = None, *, only: Container[str] | None = None
) -> bytes:
    """Give a sidecar's text with these keywords and this description.

    Keywords of answers, `animal=yes`, that were written before and are not among them are taken out, and a description
    that was written before is replaced. A user's keywords and description stay, and so does all else.

    Args:
        text: What is there.
        keywords: What is wanted.
        description: What is wanted; None for none.
        only: The names of albums that this is about: then it is these that are taken out where they are not wanted, and
            keywords of answers and the description stay as they are.

    Raises:
        SidecarRefused: The text is no XMP in UTF-8.
    """
    packet = _Reader(text).packet
    edits = _Edits(packet)
    ours = packet.words(OWN_KEYWORDS)
    stay = [word for word in ours if ("=" not in word if only is None else word not in only)]
    theirs = [word for word in packet.words(SUBJECT) if word not in ours]
    wanted = dict.fromkeys([*stay, *map(_as_text, keywords)])
    new = [word for word in wanted if word not in theirs]
    edits.replace(SUBJECT, ours, new)
    for name, separator in HIERARCHIES.items():
        if name in packet.properties:
            edits.replace(name, [_below_top(word, separator) for word in ours], [_below_top(w, separator) for w in new])
    edits.replace(OWN_KEYWORDS, ours, new)
    if only is None:
        _describe(packet, edits, _as_text(description or ""))
    return edits.done()


def _describe(packet: _Packet, edits: _Edits, description: str) -> None:
    """Put the description where there is none, or one of ours."""
    present, ours = packet.words(DESCRIPTION), packet.words(OWN_DESCRIPTION)
    is_theirs = DESCRIPTION in packet.attributes or bool(present and present != ours)
    new = [description] if description and not is_theirs else []
    if not is_theirs:
        edits.replace(DESCRIPTION, ours, new)
    edits.replace(OWN_DESCRIPTION, ours, new)


def _below_top(keyword: str, separator: str) -> str:
    """Give `animal=yes` in a hierarchy: below a keyword for all of ours, and one for the question."""
    return separator.join([TOP, *(part.replace(separator, " ") for part in keyword.split("=", 1))])


def _as_text(text: str) -> str:
    """Give text as XML can hold it, on one line."""
    return " ".join(_NOT_IN_XML.sub("\ufffd", text).split())


# --------------------------------------------------------------------------------------------------------- reading


@dataclass
class _Item:
    """One of a list: where it is, in bytes."""

    start: int
    end: int = 0
    text: str = ""


@dataclass
class _Property:
    """A property whose value is a list: where its element is, and where its list's end tag begins, if it has one."""

    start: int
    end: int = 0
    list_prefix: str = ""
    list_end: int | None = None
    items: list[_Item] = field(default_factory=list)


@dataclass
class _Description:
    """An element that holds properties. `is_bare` if it has no property as an attribute."""

    start: int
    is_bare: bool
    end: int = 0
    properties: list[_Property] = field(default_factory=list)


@dataclass
class _Packet:
    """What is known of a sidecar's text."""

    text: bytes
    end: int | None = None  # where the end tag of rdf:RDF begins
    about: str = ""
    attributes: set[str] = field(default_factory=set)
    properties: dict[str, list[_Property]] = field(default_factory=dict)
    descriptions: list[_Description] = field(default_factory=list)

    def words(self, name: str) -> list[str]:
        return [item.text for one in self.properties.get(name, ()) for item in one.items]


class _Reader:
    """Takes what expat finds. Positions are in bytes, as the text is UTF-8."""

    def __init__(self, text: bytes) -> None:
        self.packet = _Packet(text)
        self._open: list[re.Match[bytes]] = []  # start tags
        self._rdf_depth: int | None = None
        self._property: _Property | None = None
        self._item: _Item | None = None
        if b"\0" in text:
            raise SidecarRefused("it is not in UTF-8")
        self._parser = expat.ParserCreate("UTF-8", " ")
        self._parser.StartDoctypeDeclHandler = self._refuse_dtd
        self._parser.XmlDeclHandler = self._check_encoding
        self._parser.StartElementHandler = self._start
        self._parser.EndElementHandler = self._end
        self._parser.CharacterDataHandler = self._characters
        try:
            self._parser.Parse(text, True)
        except expat.ExpatError as error:
            raise SidecarRefused(f"it is no well-formed XML ({error})") from None
        if self.packet.end is None:
            raise SidecarRefused("it is no XMP: there is no rdf:RDF, or nothing in it")

    def _refuse_dtd(self, *declared: object) -> None:
        raise SidecarRefused("it has a DTD, which XMP has not")

    def _check_encoding(self, version: str, encoding: str | None, standalone: int) -> None:
        if encoding is not None and encoding.lower() not in ("utf-8", "us-ascii"):
            raise SidecarRefused(f"it is in {encoding}, not in UTF-8")

    def _start(self, name: str, attributes: dict[str, str]) -> None:
        at, packet = self._parser.CurrentByteIndex, self.packet
        tag = _START_TAG.match(packet.text, at)
        assert tag is not None
        if self._rdf_depth is None and name == f"{RDF} RDF":
            self._rdf_depth = len(self._open)
        level = self._level()
        self._open.append(tag)
        if level == 1:
            packet.about = attributes.pop(f"{RDF} about", packet.about)
            packet.attributes |= attributes.keys()
            packet.descriptions.append(_Description(at, is_bare=not attributes))
        elif level == 2:
            self._property = _Property(at)
            packet.descriptions[-1].properties.append(self._property)
            packet.properties.setdefault(name, []).append(self._property)
        elif level == 3 and self._property is not None:
            self._property.list_prefix = tag[1].decode().rpartition(":")[0]
        elif level == 4 and self._property is not None:
            self._item = _Item(at)
            self._property.items.append(self._item)

    def _end(self, name: str) -> None:
        start_tag, text, at = self._open.pop(), self.packet.text, self._parser.CurrentByteIndex
        level, has_end_tag = self._level(), not start_tag[0].endswith(b"/>")
        end = text.index(b">", at) + 1 if has_end_tag else start_tag.end()
        if level == 0:
            self.packet.end = at if has_end_tag else None
            self._rdf_depth = None
        elif level == 1:
            self.packet.descriptions[-1].end = end
        elif level == 2 and self._property is not None:
            self._property.end = end
            self._property = None
        elif level == 3 and self._property is not None:
            self._property.list_end = at if has_end_tag and name.startswith(RDF) else None
        elif level == 4 and self._item is not None:
            self._item.end = end
            self._item = None

    def _characters(self, text: str) -> None:
        if self._item is not None:
            self._item.text += text

    def _level(self) -> int | None:
        """Give how deep below rdf:RDF: 1 its descriptions, 2 properties, 3 their lists, 4 items; None outside of it."""
        return None if self._rdf_depth is None else len(self._open) - self._rdf_depth


# --------------------------------------------------------------------------------------------------------- editing


class _Edits:
    """Changes of a sidecar's text, made all at once."""

    def __init__(self, packet: _Packet) -> None:
        self._packet = packet
        self._cut: list[tuple[int, int]] = []
        self._inserted: list[tuple[int, str]] = []
        self._added: list[str] = []  # properties that are not there
        self._cut_properties: list[_Property] = []

    def replace(self, name: str, old: Sequence[str], new: Sequence[str]) -> None:
        """Have the list of a property hold `new` and not `old`; those in both stay where they are, and so do others."""
        properties = self._packet.properties.get(name, [])
        present = [item.text for one in properties for item in one.items]
        missing = [word for word in new if word not in present]
        home = next((one for one in properties if one.items and one.list_end is not None), None)
        left = [word for word in present if word in new or word not in old]
        if not left:
            self._cut_properties += properties
            self._add(name, missing)
            return
        for one in properties:
            self._cut += [(item.start, item.end) for item in one.items if item.text in old and item.text not in new]
        if home is not None:
            self._insert(home, missing)

    def _insert(self, home: _Property, words: Sequence[str]) -> None:
        """Put items behind the last one of a list, on lines of their own if that is on one."""
        before, end = self._packet.text[: home.items[-1].start], home.items[-1].end
        blanks = before[len(before.rstrip(b" \t\r\n")) :].decode()
        self._inserted += [(end, blanks + _element("li", home.list_prefix, escape(word))) for word in words]

    def _add(self, name: str, words: Sequence[str]) -> None:
        """Add a property as a whole."""
        if not words:
            return
        namespace, local = name.split(" ")
        is_text = name == DESCRIPTION
        language = ' xml:lang="x-default"' if is_text else ""
        items = "".join(f"\n     <rdf:li{language}>{escape(word)}</rdf:li>" for word in words)
        of_items = _element("Alt" if is_text else "Bag", "rdf", f"{items}\n    ")
        self._added.append("\n   " + _element(local, _PREFIXES[namespace], f"\n    {of_items}\n   "))

    def done(self) -> bytes:
        """Give the text with all changes."""
        text, at = self._packet.text, 0
        changes = [(end, end, new.encode()) for end, new in self._inserted]
        changes += [(*self._with_its_line(start, end), b"") for start, end in [*self._cut, *self._whole_elements()]]
        if self._added:
            assert self._packet.end is not None
            start, _ = self._with_its_line(self._packet.end, self._packet.end)
            changes.append((start, start, self._description().encode()))
        parts = []
        for start, end, new in sorted(changes):
            parts += [text[at:start], new]
            at = end
        return b"".join([*parts, text[at:]])

    def _whole_elements(self) -> Iterable[tuple[int, int]]:
        """Give where properties are that are cut out; a description that would be left empty goes with them."""
        for one in self._packet.descriptions:
            cut = [each for each in one.properties if any(each is other for other in self._cut_properties)]
            if cut and len(cut) == len(one.properties) and one.is_bare:
                yield one.start, one.end
            else:
                yield from ((each.start, each.end) for each in cut)

    def _with_its_line(self, start: int, end: int) -> tuple[int, int]:
        """Extend what is cut to the end of the line before, if there are only blanks between."""
        before = self._packet.text[:start].rstrip(b" \t")
        if not before.endswith(b"\n"):
            return start, end
        return len(before) - (2 if before.endswith(b"\r\n") else 1), end

    def _description(self) -> str:
        names = "".join(f"\n    xmlns:{prefix}={quoteattr(name)}" for name, prefix in _PREFIXES.items())
        about = quoteattr(self._packet.about)
        return (
            f'\n  <rdf:Description xmlns:rdf="{RDF}" rdf:about={about}{names}>{"".join(self._added)}'
            "\n  </rdf:Description>"
        )


def _element(name: str, prefix: str, content: str) -> str:
    tag = f"{prefix}:{name}" if prefix else name
    return f"<{tag}>{content}</{tag}>"
