"""How a page of the documentation reads: its paragraphs, sentences, words and numbers, without code and tables."""

from __future__ import annotations

import re

# What is no prose: code in fences or set in, comments, tables, headings, pictures, tags of HTML.
NO_PROSE = re.compile(
    r"^```.*?^```$|<!--.*?-->|^\s*\|.*?$|^ {4}.*?$|^#.*?$|^!\[.*?\]\(.*?\)$|</?(?:details|summary|p|img|picture)[^>]*>",
    re.MULTILINE | re.DOTALL,
)
ITEM = re.compile(r"^\s*(?:[-*]|\d+\.)\s+", re.MULTILINE)
LINK = re.compile(r"!?\[([^\]]*)\]\([^)]*\)")
# Names that hold digits: a table or section of a paper, an equation, an arXiv number, a version; seed 2, dim 96.
NAMES = re.compile(
    r"(?:Tables?|Figures?|Algorithm|eq\.|§+|Listing|arXiv|Python|version|blocks?|seeds?|heads?|dims?|ranks?|epochs?)"
    r"\s*\d[\w.,]*(?:(?:,| and| to|–|-)\s*\d[\w.]*)*"
)
NUMBER = re.compile(r"(?<![\w.^/-])[+−-]?\d[\d,.]*+(?:e[+−-]?\d+)?(?![A-Za-z·])(?:\s*±\s*\d[\d.]*)?(?:/\d+)*")
END = re.compile(r"(?<=[.!?])[)\"”*]*\s+(?=[A-ZÀ-ÖΑ-Ωα-ω`*(\"“\[_σφψ])")


def paragraphs(page: str) -> list[str]:
    """The text of a page, item by item and paragraph by paragraph."""
    text = NO_PROSE.sub("\n\n", page)
    blocks = re.split(r"\n\s*\n", ITEM.sub("\n\n", text))
    return [" ".join(block.split()) for block in blocks if re.search(r"\w", block)]


def sentences(paragraph: str) -> list[str]:
    """Its sentences, links as what they are called."""
    plain = LINK.sub(r"\1", paragraph)
    return [sentence for sentence in END.split(plain) if re.search(r"\w", sentence)]


def words(text: str) -> int:
    """Their number; a piece of code is one word.

    >>> words("Run `make test -j 2` twice.")
    3
    """
    return len([word for word in re.sub(r"`[^`]+`", "code", LINK.sub(r"\1", text)).split() if re.search(r"\w", word)])


def numbers(sentence: str) -> int:
    """How many figures are in a sentence: a mean and its error are one, and those in names or code are none.

    >>> numbers("Of 5 runs (Table 3, `--seeds 5`) G3B ends at 61.2 ± 0.4, 2 points above.")
    3
    """
    return len(NUMBER.findall(NAMES.sub("", re.sub(r"`[^`]+`", "", sentence))))
