"""The origin of a document, and the line before the document that names it (MeCo, arXiv 2501.01956, section 2)."""

import functools
import hashlib
import ipaddress
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from jaxtyping import Bool, Integer

from slm_jax.configurable import Count, OneOf, configurable
from slm_jax.data.segments import positions_from_segments

FORMS = ("host", "url", "domain", "suffix")
UNKNOWN = "unknown"

# Scheme and user information, host, port, and the rest. Only after a scheme can there be user information:
# mailto:name@example.org is not a page.
_URL = re.compile(
    r"(?:(?:[a-z][a-z0-9+.-]*:)?//(?:[^/?#@\s]*@)?)?(?P<host>\[[0-9a-f:.]+\]|[^/?#@:\s\[\]]+)(?::\d*)?(?:[/?#][^\r\n]*)?",
    re.IGNORECASE,
)
_LABEL = re.compile(r"(?:[\w-]|[^\x00-\x7f]){1,63}")  # \w lacks some letters of some scripts


@configurable
@dataclass(frozen=True)
class Metadata:
    """The metadata placed before a document: `NAME: VALUE` and an empty line.

    Attributes:
      form: which part of the URL: 'host' (en.wikipedia.org), 'url' (as given), 'domain' (wikipedia.org) or 'suffix'
        (org).
      field: another field of the records instead of the URL, as a dotted path, such as 'topic'; `form` does not apply.
      name: the NAME; None is 'URL', or the last word of `field`, capitalised.
      hashed: replace each value by a random-looking string, always the same for the same value.
      top: keep only this many of the corpus' most frequent values; the others become 'unknown'. None keeps all.
      missing: for documents without a readable URL or field: 'unknown' takes its place, 'none' omits the prefix.
    """

    form: Annotated[str, OneOf(FORMS)] = "host"
    field: str | None = None
    name: str | None = None
    hashed: bool = False
    top: Count | None = None
    missing: Annotated[str, OneOf((UNKNOWN, "none"))] = UNKNOWN

    @property
    def label(self) -> str:
        """`name`, or its default."""
        return self.name or (self.field.split(".")[-1].capitalize() if self.field else "URL")

    @property
    def what(self) -> str:
        """Where the value comes from, for messages."""
        return f"field {self.field!r}" if self.field else "URL"

    def own_value(self, url: str, field: str) -> str | None:
        """The value of a document's URL or field; None where it is missing or malformed."""
        if self.field:
            return field or None
        return {"host": host, "url": _whole, "domain": domain, "suffix": suffix}[self.form](url)

    def shown(self, value: str | None, kept: frozenset[str] | None = None) -> str | None:
        """The value that a document shows, None for no prefix. `kept`: the values that stay; None for all."""
        if value is None:
            return UNKNOWN if self.missing == UNKNOWN else None
        if kept is not None and value not in kept:
            return UNKNOWN
        return hashed(value) if self.hashed else value

    def prefix(self, shown: str | None) -> str:
        """The text before the document."""
        return "" if shown is None else f"{self.label}: {shown}\n\n"


def host(url: str) -> str | None:
    """The host of a URL, with www. and subdomains, in lower case; None if it has none.

    The paper drops the scheme and takes everything before the first '/'. User information, a port and a final dot are
    dropped too. A URL without a scheme begins with its host. International names stay as written, in Unicode or in
    Punycode; IPv6 addresses keep their brackets. A name without a dot is not a host.
    """
    found = _URL.fullmatch(url.strip())
    if not found:
        return None
    name = found["host"].lower().removesuffix(".")
    if name.startswith("["):
        return name if _is_address(name[1:-1]) else None
    labels = name.split(".")
    return name if len(labels) > 1 and len(name) <= 253 and all(map(_LABEL.fullmatch, labels)) else None


def domain(url: str) -> str | None:
    """The registered domain with its public suffix, bbc.co.uk of www.bbc.co.uk; an address stays as it is."""
    name = host(url)
    if name is None or _is_address(name.strip("[]")):
        return name
    return _split(name).top_domain_under_public_suffix or None


def suffix(url: str) -> str | None:
    """The public suffix, co.uk of www.bbc.co.uk; addresses have none."""
    name = host(url)
    return _split(name).suffix or None if name else None


def hashed(value: str) -> str:
    """A random-looking string such as 7dsjuj3a-olp0, the same for a value on every machine."""
    number = int.from_bytes(hashlib.sha256(value.encode("utf-8")).digest(), "big")
    letters = [np.base_repr(number // 36**place % 36, 36).lower() for place in range(12)]
    return "".join(letters[:8]) + "-" + "".join(letters[8:])


def most_frequent(values: Iterable[str | None], top: int) -> frozenset[str]:
    """The `top` values that occur most often; ties are broken alphabetically."""
    counts = Counter(value for value in values if value is not None)
    return frozenset(sorted(counts, key=lambda value: (-counts[value], value))[:top])


def with_metadata(
    rows: Iterable[dict[str, Any]], metadata: Metadata | None, kept: frozenset[str] | None, without: Counter
) -> Iterator[dict[str, Any]]:
    """Adds `metadata`, the value shown (None for none), and `prefix` to the rows of `read_documents`.

    Args:
        rows: documents.
        metadata: None adds None and ''.
        kept: the values that stay; None for all.
        without: counts, by source and reason, the documents that show no value of their own.
    """
    for row in rows:
        if metadata is None:
            yield row | {"metadata": None, "prefix": ""}
            continue
        value, reason = metadata.own_value(row["url"], row["field"]), ""
        if value is None:
            reason = f"{'malformed' if row['url'] and not metadata.field else 'no'} {metadata.what}"
        elif kept is not None and value not in kept:
            reason = f"rare {metadata.what}"
        if reason:
            without[f"{row['source'].partition('/')[0]}: {reason}"] += 1
        shown = metadata.shown(value, kept)
        yield row | {"metadata": shown, "prefix": metadata.prefix(shown)}


def prefix_tokens(
    segment_ids: Integer[np.ndarray, "B L"], loss_mask: Bool[np.ndarray, "B L"]
) -> Bool[np.ndarray, "B L"]:
    """Which tokens of packed rows are metadata: without loss, in a segment, and not its first, which is the BOS.

    Packing 'split' may cut a prefix; the remainder then begins a segment, whose first token is not counted.
    """
    return ~loss_mask & (positions_from_segments(segment_ids) > 0)


def _whole(url: str) -> str | None:
    return url.strip() if host(url) else None


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


# The hosts of a corpus repeat, and a look-up costs more than everything else done to a URL.
@functools.lru_cache(maxsize=1 << 16)
def _split(name: str):
    return _extractor()(name)


@functools.cache
def _extractor():
    import tldextract  # slow to import, and training does not need it

    # The list that comes with the package: no network, no cache on disk, and the same answer on every machine.
    return tldextract.TLDExtract(suffix_list_urls=(), cache_dir=None)
