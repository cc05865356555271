"""Our tokenizers as tokenizers of transformers."""

import tempfile
from typing import Any

from dualscan.data.tokenizer import HF_FILE, ByteTokenizer, HFTokenizer
from dualscan.interop.extras import require

END_OF_DOCUMENT = "<|endoftext|>"


def to_transformers_tokenizer(tokenizer: ByteTokenizer | HFTokenizer) -> Any:
    """A `PreTrainedTokenizerFast` with the same ids, for tools that take transformers' tokenizers.

    Args:
        tokenizer: of this package. Its end-of-document token becomes the end-of-sequence and padding token.

    Returns:
        The tokenizer; `save_pretrained` writes it beside a model.

    Raises:
        ImportError: transformers is not installed.

    Example:
        >>> tokenizer = to_transformers_tokenizer(ByteTokenizer())
        >>> tokenizer("né").input_ids, tokenizer.eos_token_id
        ([110, 195, 169], 256)
        >>> tokenizer.decode([110, 195, 169])
        'né'
    """
    transformers = require("transformers", "hf")
    if isinstance(tokenizer, HFTokenizer):
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save(folder)
            definition, end = (
                require("tokenizers", "data").Tokenizer.from_file(f"{folder}/{HF_FILE}"),
                tokenizer.eos_token,
            )
    else:
        definition, end = _bytes(), END_OF_DOCUMENT
    # As here, a special token that is spelt out in a text is text.
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=definition, eos_token=end, pad_token=end, split_special_tokens=True
    )


def _bytes() -> Any:
    """Bytes as a byte-level BPE without merges."""
    library = require("tokenizers", "data")
    alphabet = require("transformers.convert_slow_tokenizer", "hf").bytes_to_unicode()
    definition = library.Tokenizer(library.models.BPE({letter: byte for byte, letter in alphabet.items()}, []))
    definition.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    definition.decoder = library.decoders.ByteLevel()
    definition.add_special_tokens([END_OF_DOCUMENT])
    return definition
