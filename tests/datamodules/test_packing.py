"""Documents divided into strips, without losing or mixing anything."""

from itertools import pairwise

import pytest
import regex

from datamodules.packing import (
    Block,
    BlockBuilder,
    cut_word,
    document_ids,
    greedy_starts,
    split_lines,
    split_sentences,
)
from datamodules.rendering import TextRenderer
from tests.datamodules.pixel_fakes import Bars

FAMILY = "👩‍👩‍👧"
ACCENTED = "e\u0301"


def test_groups():
    assert greedy_starts([3, 3, 3, 9, 1, 1], 6).tolist() == [0, 2, 3, 4, 6]
    assert greedy_starts([3, 3, 3], 7, gap=1).tolist() == [0, 2, 3]
    assert greedy_starts([3, 3, 3], 6, gap=1).tolist() == [0, 1, 2, 3]
    assert greedy_starts([], 6).tolist() == [0]
    assert greedy_starts([0, 0, 0], 0).tolist() == [0, 3]


def test_lines_and_sentences():
    assert split_lines(" a\tb \n\n\x00c\r\nd\u2028e ") == ["a b", "c", "d", "e"]
    assert split_sentences('He said "no." Why? 3.5 is e.g. fine…  “Yes!” ok') == [
        'He said "no."',
        "Why?",
        "3.5 is e.g.",
        "fine…",
        "“Yes!”",
        "ok",
    ]


def test_ids_of_documents():
    assert document_ids([2, 1, 3]).tolist() == [0, 0, 1, 2, 2, 2]
    assert document_ids([]).tolist() == []


# Bars draws 8 pixels per character on strips of 8 patches of 8 pixels: 6 characters do not fill 8*8 - 2*8 = 48 pixels,
# of which only less than all may be used.


def texts(builder, document):
    return [block.text for block in builder.blocks(document)]


def test_lines_are_joined_while_they_fit():
    builder = BlockBuilder(Bars())
    assert texts(builder, "ab\ncd\nef") == ["ab cd", "ef"]
    assert texts(builder, "abcde\nf") == ["abcde", "f"]
    assert texts(builder, "a\nb\nc") == ["a b c"]
    assert builder.blocks("ab\ncd") == [Block("ab cd", 7)]


def test_recipe_of_pixel():
    """Summed widths of the lines stay below p*S - 2p, and the next line would have reached it."""
    renderer = Bars(max_seq_length=20)
    lines = [letter * (1 + number % 5) for number, letter in enumerate("abcdefghijklmnopqrstuvwxyz")]
    blocks = texts(BlockBuilder(renderer), "\n".join(lines))
    limit = renderer.patch_size * renderer.max_seq_length - 2 * renderer.patch_size
    assert " ".join(blocks).split() == lines
    for block, following in pairwise(blocks):
        assert sum(renderer.width(line) for line in block.split()) < limit
        assert renderer.width(f"{block} {following.split()[0]}") >= limit


def test_long_parts_are_divided_further():
    builder = BlockBuilder(Bars())
    assert texts(builder, "Go. We go.") == ["Go.", "We", "go."]  # a sentence stays whole where it fits
    assert texts(builder, "a b. c d.") == ["a b.", "c d."]
    assert texts(builder, "a bb ccc") == ["a bb", "ccc"]
    assert texts(builder, "abcdefghijkl mn") == ["abcde", "fghij", "kl mn"]


def test_nothing_to_draw():
    for builder in (BlockBuilder(Bars()), BlockBuilder(Bars(), split_long=False)):
        assert builder.blocks("") == builder.blocks(" \n\t\x00 ") == []


def test_long_documents_may_be_left_whole():
    whole = BlockBuilder(Bars(), split_long=False)
    assert whole.blocks("abcdef\nghijkl") == [Block("abcdef ghijkl", 8)]
    assert BlockBuilder(Bars(), split_long=False, measure=False).blocks("abc") == [Block("abc", 0)]


@pytest.mark.filterwarnings("ignore:renderer.fonts. no font has")
@pytest.mark.parametrize("unit", [FAMILY, ACCENTED, "क्षि", "🇪🇸"])
def test_characters_stay_whole(unit):
    renderer = TextRenderer(max_seq_length=6)
    pieces = cut_word(unit * 40, renderer, 60)
    assert "".join(pieces) == unit * 40
    assert len(pieces) > 3
    assert all(renderer.width(piece) <= 60 for piece in pieces)
    assert all(set(regex.findall(r"\X", piece)) <= set(regex.findall(r"\X", unit)) for piece in pieces)


def test_character_wider_than_a_strip():
    assert cut_word("abc", Bars(), 3) == ["a", "b", "c"]


def test_pieces_of_a_word_are_as_long_as_they_can_be():
    renderer = TextRenderer()
    word = "aWil" * 300
    pieces = cut_word(word, renderer, 200)
    assert "".join(pieces) == word
    for piece, following in pairwise(pieces):
        assert renderer.width(piece) <= 200 < renderer.width(piece + following[0])


DOCUMENT = (
    """The plot makes no sense, and the music is far too loud. I liked it (twice!) nevertheless.
A line

Ein Satz mit Ümläuten — и по-русски. שלום עולם hello.
"""
    + "Donaudampfschiffahrtsgesellschaftskapitän" * 3
)


@pytest.mark.parametrize("mode", ["continuous", "words", "mono", "bigrams"])
@pytest.mark.parametrize("length", [8, 33])
def test_drawn_blocks_lose_nothing(mode, length):
    renderer = TextRenderer(max_seq_length=length, mode=mode)
    blocks = BlockBuilder(renderer).blocks(DOCUMENT)
    assert "".join(block.text for block in blocks).replace(" ", "") == "".join(DOCUMENT.split())
    for block in blocks:
        strip = renderer.render(block.text)
        assert strip.num_attended == block.patches
        assert renderer.width(block.text) < 16 * length - 32
    assert blocks == BlockBuilder(renderer).blocks(DOCUMENT)
