"""A sequence that never ends: the state is a value of constant size, so memory does not grow with what was read.

Run: python examples/stream.py
"""

import torch

from dualscan import MambaLM, preset
from dualscan.models.accounting import state_bytes


def main() -> None:
    """Reads pieces of any length one after the other, and compares with reading them at once."""
    torch.manual_seed(0)
    config = preset("tiny")
    model = MambaLM(config).eval()
    tokens = torch.randint(config.vocab_size, (1, 1000))
    with torch.inference_mode():
        whole = model(tokens).logits
        state, pieces = None, []
        for piece in tokens.split([1, 500, 7, 491, 1], dim=1):
            logits, state = model(piece, state=state)
            pieces.append(logits)
    difference = (torch.cat(pieces, dim=1) - whole).abs().max()
    print(f"five pieces differ from the whole by {difference:.1e}")
    print(f"the state takes {state_bytes(config)} bytes after 1000 tokens, and after any other number")


if __name__ == "__main__":
    main()
