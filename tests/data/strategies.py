"""Strategies: documents as ids, token streams of them, and sources that hold the same tokens in different places."""

from hypothesis import strategies as st

from dualscan.data.packing import TokenStream

EOS = 99
# Documents of no token occur: a text that a tokenizer drops whole.
document_ids = st.lists(st.lists(st.integers(0, 98), max_size=12), min_size=1, max_size=8)


@st.composite
def streams(draw: st.DrawFn) -> TokenStream:
    """A token stream of one to eight short documents."""
    return TokenStream.from_ids(draw(document_ids), eos_id=EOS)


# Any text UTF-8 can write: all of Unicode but the surrogates.
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
