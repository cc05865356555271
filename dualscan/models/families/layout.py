"""Which tensor of another program's checkpoint is which parameter here, read in both directions.

Three relations suffice: the same tensor under another name, one tensor there that joins several here, and several
tensors there (one an expert) that are stacked here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """Tensors there and parameters here that hold the same numbers; one side has a single member.

    Attributes:
        theirs: names there.
        ours: names here.
        dim: along which theirs joins ours.
    """

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    dim: int = 0

    def shapes(self, shapes: Mapping[str, torch.Size]) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor there, given those here."""
        first = list(shapes[self.ours[0]])
        if len(self.theirs) > 1:
            return dict.fromkeys(self.theirs, tuple(first[1:]))
        first[self.dim] = sum(shapes[name][self.dim] for name in self.ours) if first else 0
        return {self.theirs[0]: tuple(first)}

    def read(self, theirs: Sequence[Tensor], shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
        """The parameters here from the tensors there."""
        if len(self.theirs) > 1:
            return {self.ours[0]: torch.stack(list(theirs))}
        if len(self.ours) == 1:
            return {self.ours[0]: theirs[0]}
        pieces = theirs[0].split([shapes[name][self.dim] for name in self.ours], dim=self.dim)
        return {name: piece.contiguous() for name, piece in zip(self.ours, pieces, strict=True)}

    def write(self, ours: Sequence[Tensor]) -> dict[str, Tensor]:
        """The tensors there from the parameters here."""
        if len(self.theirs) > 1:
            return dict(zip(self.theirs, ours[0].unbind(0), strict=True))
        return {self.theirs[0]: ours[0] if len(ours) == 1 else torch.cat(list(ours), dim=self.dim)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """The names of a whole checkpoint.

    Attributes:
        names: what a name here begins with (whole words between dots) -> what it begins with there; the longest counts.
        joined: stem there -> stems here and the dimension; `.weight`, `.bias` and so on follow the stems.
        stacked: stem here -> stems there.
    """

    names: Mapping[str, str]
    joined: Mapping[str, tuple[Sequence[str], int]] = field(default_factory=dict)
    stacked: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def parts(self, ours: Sequence[str]) -> list[Part]:
        """The relations that cover all parameters here.

        Args:
            ours: the names of all parameters.
        """
        joins = {stem: (theirs, dim) for theirs, (stems, dim) in self.joined.items() for stem in stems}
        parts: dict[tuple[str, ...], Part] = {}
        for name in ours:
            stem, _, last = name.rpartition(".")
            if stem in self.stacked:
                theirs = tuple(f"{there}.{last}" for there in self.stacked[stem])
                parts[theirs] = Part(theirs=theirs, ours=(name,))
            elif stem in joins:
                there, dim = joins[stem]
                together = tuple(f"{s}.{last}" for s in self.joined[there][0])
                parts[(f"{there}.{last}",)] = Part(theirs=(f"{there}.{last}",), ours=together, dim=dim)
            else:
                theirs = (self._rename(name),)
                parts[theirs] = Part(theirs=theirs, ours=(name,))
        return list(parts.values())

    def _rename(self, name: str) -> str:
        words = name.split(".")
        for n in range(len(words), 0, -1):
            begin = ".".join(words[:n])
            if begin in self.names:
                return ".".join([self.names[begin], *words[n:]])
        return name
