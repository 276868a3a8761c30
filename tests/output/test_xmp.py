"""XMP sidecars: what other programs wrote stays byte for byte, ours is replaced, and other programs read it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qvsplit.errors import DiskError
from qvsplit.output import xmp as xmp_module
from qvsplit.output.xmp import DC, HIERARCHIES, OWN, RDF, SidecarRefused, merged, sidecar_of, write_sidecar

LR, DK = "http://ns.adobe.com/lightroom/1.0/", "http://www.digikam.org/ns/1.0/"
# as darktable, digiKam and Lightroom write them: one description, with attributes, in lists of their own
DARKTABLE = b"""<?xml version="1.0" encoding="UTF-8"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/" x:xmptk="XMP Core 4.4.0-Exiv2">
 <rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
  <rdf:Description rdf:about=""
    xmlns:dc="http://purl.org/dc/elements/1.1/"
    xmlns:lr="http://ns.adobe.com/lightroom/1.0/"
    xmlns:darktable="http://darktable.sf.net/"
   darktable:xmp_version="5"
   darktable:note='a > b, "quoted"'>
   <dc:subject>
    <rdf:Bag>
     <rdf:li>beach &amp; sea</rdf:li>
    </rdf:Bag>
   </dc:subject>
   <lr:hierarchicalSubject>
    <rdf:Bag>
     <rdf:li>places|beach &amp; sea</rdf:li>
    </rdf:Bag>
   </lr:hierarchicalSubject>
   <darktable:history>
    <rdf:Seq>
     <rdf:li
      darktable:num="0"
      darktable:params="gz08eJxjYGBg"/>
    </rdf:Seq>
   </darktable:history>
   <!-- a comment > with <tags/> -->
  </rdf:Description>
 </rdf:RDF>
</x:xmpmeta>
"""
DIGIKAM = (
    b'<?xpacket begin="\xef\xbb\xbf" id="W5M0MpCehiHzreSzNTczkc9d"?>\r\n'
    b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><r:RDF xmlns:r="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    b'<r:Description r:about="uuid:1" xmlns:d="http://purl.org/dc/elements/1.1/" xmlns:k="http://www.digikam.org/ns/1.0/">'
    b"<k:TagsList><r:Seq><r:li>People/Anna</r:li></r:Seq></k:TagsList>"
    b"<d:subject><r:Bag><r:li>Anna</r:li></r:Bag></d:subject>"
    b'<d:description><r:Alt><r:li xml:lang="x-default">Anna\xe2\x80\x99s dog</r:li></r:Alt></d:description>'
    b'</r:Description></r:RDF></x:xmpmeta>\r\n<?xpacket end="w"?>'
)
COMPACT = b"""\xef\xbb\xbf<x:xmpmeta xmlns:x="adobe:ns:meta/">
 <RDF xmlns="http://www.w3.org/1999/02/22-rdf-syntax-ns#" xmlns:a="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
  <Description a:about="" xmlns:xmp="http://ns.adobe.com/xap/1.0/" xmp:Rating="5"/>
  <Description a:about="" xmlns:dc="http://purl.org/dc/elements/1.1/">
   <dc:subject><Bag/></dc:subject>
   <dc:title><![CDATA[a <b> c]]></dc:title>
  </Description>
 </RDF>
</x:xmpmeta>
"""
EMPTY = b"\n   <dc:subject><Bag/></dc:subject>"  # of COMPACT: in its place goes a list that is not
FOREIGN = {"darktable": DARKTABLE, "digikam": DIGIKAM, "compact": COMPACT}


def words(text: bytes, namespace: str = DC, name: str = "subject") -> list[str]:
    """The items of a list, by a parser of another kind."""
    root = ElementTree.fromstring(text)
    return [
        item.text or ""
        for one in root.iter(f"{{{namespace}}}{name}")
        for item in one.iter(f"{{{RDF}}}li")
    ]  # fmt: skip


def is_subsequence(part: bytes, whole: bytes) -> bool:
    rest = iter(whole)
    return all(byte in rest for byte in part)


def test_a_new_sidecar():
    text = merged(xmp_module._NEW, ["animal=yes", "place=sea"], "A dog\nat the <sea> & \x00 more")
    assert words(text) == ["animal=yes", "place=sea"]
    assert words(text, DC, "description") == ["A dog at the <sea> & \ufffd more"]
    assert b'xml:lang="x-default"' in text
    assert text.startswith(b'<?xml version="1.0" encoding="UTF-8"?>\n<x:xmpmeta ')


@pytest.mark.parametrize("name", FOREIGN)
def test_what_others_wrote_stays_byte_for_byte(name):
    before = FOREIGN[name]
    theirs = words(before)
    after = merged(before, ["animal=yes", "place=sea"], "A dog")
    assert words(after) == [*theirs, "animal=yes", "place=sea"]
    assert is_subsequence(before.replace(EMPTY, b""), after)
    assert merged(after, ["animal=yes", "place=sea"], "A dog") == after  # a rerun writes nothing
    changed = merged(after, ["animal=no", "place=sea"], "No dog")
    assert sorted(words(changed)) == sorted([*theirs, "animal=no", "place=sea"])
    assert merged(changed, ["animal=yes", "place=sea"], "A dog").count(b"animal=") == after.count(b"animal=")
    undone = merged(changed, [])
    assert undone == before.replace(EMPTY, b"") if name == "compact" else undone == before


def test_lists_that_hide_dc_subject_hold_ours_too():
    after = merged(DARKTABLE, ["animal=yes", "beach-dogs"])
    assert words(after, LR, "hierarchicalSubject") == ["places|beach & sea", "qvsplit|animal|yes", "qvsplit|beach-dogs"]
    after = merged(DIGIKAM, ["animal=a/b"])
    assert words(after, DK, "TagsList") == ["People/Anna", "qvsplit/animal/a b"]
    after = merged(after, ["animal=no"])
    assert words(after, DK, "TagsList") == ["People/Anna", "qvsplit/animal/no"]
    assert words(merged(after, []), DK, "TagsList") == ["People/Anna"]
    # and where there is none it is not made: it would hide what dc:subject has
    assert all(name.split(" ")[0].encode() not in merged(COMPACT, ["animal=yes"]) for name in HIERARCHIES)


def test_a_users_keyword_and_description_stay_a_users():
    theirs = merged(xmp_module._NEW, []).replace(
        b" </rdf:RDF>",
        b'<rdf:Description rdf:about="" xmlns:dc="http://purl.org/dc/elements/1.1/"><dc:subject><rdf:Bag>'
        b"<rdf:li>animal=yes</rdf:li></rdf:Bag></dc:subject></rdf:Description> </rdf:RDF>",
    )
    after = merged(theirs, ["animal=yes", "place=sea"])
    assert words(after).count("animal=yes") == 1
    assert words(merged(after, ["place=city"])) == ["animal=yes", "place=city"]
    assert words(merged(DIGIKAM, [], "A dog"), DC, "description") == ["Anna\u2019s dog"]
    ours = merged(xmp_module._NEW, [], "A dog")
    edited = ours.replace(b'x-default">A dog<', b'x-default">Rex<')
    assert words(merged(edited, [], "A cat"), DC, "description") == ["Rex"]
    assert words(merged(merged(edited, [], "A cat"), []), DC, "description") == ["Rex"]
    assert words(merged(ours, [], "A cat"), DC, "description") == ["A cat"]
    assert words(merged(ours, []), DC, "description") == []
    as_attribute = COMPACT.replace(b'xmp:Rating="5"', b'xmlns:d="http://purl.org/dc/elements/1.1/" d:description="Rex"')
    assert words(merged(as_attribute, [], "A dog"), DC, "description") == []


def test_what_is_cut_takes_nothing_else_with_it():
    ours = merged(xmp_module._NEW, ["animal=yes"])
    rated = ours.replace(b'rdf:about=""', b'rdf:about="" xmlns:xmp="http://ns.adobe.com/xap/1.0/" xmp:Rating="5"')
    assert b'xmp:Rating="5"' in merged(rated, [])
    empty = b'<rdf:Description rdf:about="" xmlns:dc="http://purl.org/dc/elements/1.1/"><dc:subject><rdf:Bag><rdf:li/></rdf:Bag></dc:subject></rdf:Description> </rdf:RDF>'
    text = xmp_module._NEW.replace(b"</rdf:RDF>", empty)  # a tag that is its own end, right before another's end
    assert words(merged(text, ["animal=yes"])) == ["", "animal=yes"]
    assert merged(merged(text, ["animal=yes"]), []) == text


def test_albums_and_answers_do_not_touch_each_others_keywords():
    text = merged(DARKTABLE, ["animal=yes"], "A dog")
    text = merged(text, ["dogs"], only={"dogs"})
    text = merged(text, ["sea"], only={"sea"})
    assert words(text) == ["beach & sea", "animal=yes", "dogs", "sea"]
    text = merged(text, ["animal=no"], "No dog")
    assert sorted(words(text)) == ["animal=no", "beach & sea", "dogs", "sea"]
    text = merged(text, [], only={"dogs"})
    assert sorted(words(text)) == ["animal=no", "beach & sea", "sea"]
    assert words(text, DC, "description") == ["No dog"]
    assert sorted(words(merged(text, []))) == ["beach & sea", "sea"]


HOSTILE = b"""<?xml version="1.0"?><!DOCTYPE x [<!ENTITY a "aaaa">%s]>
<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"> </rdf:RDF></x:xmpmeta>"""


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (DARKTABLE[:-20], "no well-formed XML"),
        (DARKTABLE.replace(b"</dc:subject>", b"", 1), "no well-formed XML"),
        (b"not XML", "no well-formed XML"),
        (DARKTABLE.replace(b"beach", b"be\xe9ch", 1), "no well-formed XML"),
        (b"<a/>", "no XMP"),
        (b'<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"/>', "no XMP"),
        (DARKTABLE.decode().replace("UTF-8", "UTF-16").encode("utf-16"), "not in UTF-8"),
        (DIGIKAM.decode()[55:].encode("utf-16-le"), "not in UTF-8"),
        (DARKTABLE.replace(b"UTF-8", b"ISO-8859-1", 1), "in ISO-8859-1, not in UTF-8"),
        (HOSTILE % b"", "DTD"),
        (HOSTILE % b'<!ENTITY b "&a;&a;&a;"><!ENTITY c SYSTEM "file:///etc/passwd">', "DTD"),
        (HOSTILE.replace(b" [<!ENTITY a \"aaaa\">%s]", b' SYSTEM "http://127.0.0.1:9/x.dtd"'), "DTD"),
    ],
)  # fmt: skip
def test_what_cannot_be_changed_safely_is_refused_and_left_as_it_is(tmp_path, text, said):
    sidecar = tmp_path / "a.jpg.xmp"
    sidecar.write_bytes(text)
    with pytest.raises(SidecarRefused, match=said):
        write_sidecar(sidecar, ["animal=yes"], "A dog")
    assert sidecar.read_bytes() == text
    assert os.listdir(tmp_path) == ["a.jpg.xmp"]


def test_names_of_sidecars():
    assert sidecar_of("/a/IMG.jpg") == Path("/a/IMG.jpg.xmp")
    assert sidecar_of("/a.b/IMG.jpg", replace_suffix=True) == Path("/a.b/IMG.xmp")
    assert sidecar_of("/a.b/IMG", replace_suffix=True) == Path("/a.b/IMG.xmp")
    assert os.fsencode(sidecar_of("/a/\udcff.jpg")) == b"/a/\xff.jpg.xmp"


def test_a_sidecar_is_written_only_where_something_changes(tmp_path):
    sidecar = tmp_path / "a.jpg.xmp"
    assert not write_sidecar(sidecar, [])
    assert not sidecar.exists()
    assert write_sidecar(sidecar, ["animal=yes"])
    before = sidecar.stat()
    assert not write_sidecar(sidecar, ["animal=yes"])
    assert (sidecar.stat().st_ino, sidecar.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert write_sidecar(sidecar, [])
    assert not sidecar.exists()  # it was ours alone
    assert write_sidecar(sidecar, ["animal=yes"])
    os.chmod(sidecar, 0o640)
    linked = tmp_path / "linked.xmp"
    linked.symlink_to("a.jpg.xmp")
    assert write_sidecar(linked, ["animal=no"])
    assert linked.is_symlink() and words(sidecar.read_bytes()) == ["animal=no"]
    assert sidecar.stat().st_mode & 0o777 == 0o640


def test_a_change_by_another_program_in_between_is_not_lost(tmp_path, monkeypatch):
    sidecar = tmp_path / "a.jpg.xmp"
    sidecar.write_bytes(DARKTABLE)
    original = xmp_module.merged

    def slow(*given, **named):
        sidecar.write_bytes(DIGIKAM)
        return original(*given, **named)

    monkeypatch.setattr(xmp_module, "merged", slow)
    with pytest.raises(SidecarRefused, match="another program"):
        write_sidecar(sidecar, ["animal=yes"])
    assert sidecar.read_bytes() == DIGIKAM
    monkeypatch.undo()
    assert write_sidecar(sidecar, ["animal=yes"])
    assert words(sidecar.read_bytes()) == ["Anna", "animal=yes"]


def test_a_full_disk_leaves_the_sidecar_as_it_was(tmp_path, monkeypatch):
    sidecar = tmp_path / "a.jpg.xmp"
    sidecar.write_bytes(DARKTABLE)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskError, match="a.jpg.xmp: the disk is full"):
        write_sidecar(sidecar, ["animal=yes"])
    assert sidecar.read_bytes() == DARKTABLE
    assert os.listdir(tmp_path) == ["a.jpg.xmp"]


TEXTS = st.text(st.characters(codec="utf-8"), max_size=12)


@given(
    foreign=st.sampled_from(sorted(FOREIGN)),
    runs=st.lists(st.tuples(st.lists(TEXTS.map(lambda t: f"k={t}"), max_size=4), st.none() | TEXTS), max_size=4),
)
def test_any_keywords_and_descriptions(foreign, runs):
    """Whatever is written, in whatever order, it is read again, and what others wrote is there."""
    before = merged(FOREIGN[foreign], [])
    text = before
    for keywords, description in runs:
        text = merged(text, keywords, description)
        expected = {" ".join(xmp_module._NOT_IN_XML.sub("\ufffd", word).split()) for word in keywords}
        assert set(words(text)) == {*words(before), *expected}
        assert len(set(words(text))) == len(words(text))
        assert set(words(text, OWN, "keywords")) == expected
    assert merged(text, []) == before


exiftool = pytest.mark.skipif(shutil.which("exiftool") is None, reason="exiftool is not installed")


@exiftool
@pytest.mark.parametrize("name", ["new", "darktable", "digikam"])  # of COMPACT it reads nothing, with us or without
def test_exiftool_reads_what_was_written(tmp_path, name):
    sidecar = tmp_path / "IMG é.jpg.xmp"
    if name != "new":
        sidecar.write_bytes(FOREIGN[name])
    theirs = words(FOREIGN[name]) if name != "new" else []
    for keywords, description in (
        (["animal=no"], "Nothing"),
        (["animal=yes", "place=<sea> & more"], "A dog at the sea"),
    ):
        write_sidecar(sidecar, keywords, description)
        done = subprocess.run(
            ["exiftool", "-json", "-validate", "-warning", "-a", "-XMP-dc:all", "-XMP-lr:all", "-XMP-digiKam:all", sidecar],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        (read,) = json.loads(done.stdout)
        subject = read["Subject"] if isinstance(read["Subject"], list) else [read["Subject"]]
        assert subject == [*theirs, *keywords]
        assert read["Description"] == ("Anna\u2019s dog" if name == "digikam" else description)
        assert "Warning" not in read, read
        if name == "darktable":
            assert "qvsplit|animal|" + keywords[0][7:] in read["HierarchicalSubject"]
        if name == "digikam":
            assert "qvsplit/animal/" + keywords[0][7:] in read["TagsList"]


@exiftool
def test_what_exiftool_writes_into_a_sidecar_of_ours_stays_a_users(tmp_path):
    """It writes the whole file anew, in its own form: ours is known all the same."""
    sidecar = tmp_path / "a.xmp"
    write_sidecar(sidecar, ["animal=yes"], "A dog")
    subprocess.run(["exiftool", "-q", "-overwrite_original", "-XMP-dc:Subject+=Rex", sidecar], check=True)
    assert sorted(words(sidecar.read_bytes())) == ["Rex", "animal=yes"]
    assert write_sidecar(sidecar, ["animal=no"], "A cat")
    assert sorted(words(sidecar.read_bytes())) == ["Rex", "animal=no"]
    assert words(sidecar.read_bytes(), DC, "description") == ["A cat"]
