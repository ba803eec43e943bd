"""What fine-tuning adds to encoder 1: differences of its matrices, in low rank or whole, kept with the hierarchy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from treemem.errors import ModelError
from treemem.hierarchy.embed import Encoder


@dataclass(frozen=True)
class AdapterConfig:
    """Which parameters of encoder 1 are changed."""

    shapes: Mapping[str, Sequence[int]]
    """By the parameter's name."""
    rank: int | None = None
    """Of each difference, a product of two matrices (LoRA: Hu et al. 2021); None where differences are kept whole."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "shapes", {name: tuple(shape) for name, shape in self.shapes.items()})


class Adapter(nn.Module):
    """Differences between a fine-tuned encoder 1 and the one that a memory records."""

    def __init__(self, config: AdapterConfig) -> None:
        """An adapter that changes nothing."""
        super().__init__()
        self.config = config
        for name, shape in config.shapes.items():
            if config.rank is None:
                self.register_buffer(_key(name), torch.zeros(shape))
            else:
                rows, columns = shape
                self.register_buffer(f"{_key(name)}|a", torch.zeros(config.rank, columns))
                self.register_buffer(f"{_key(name)}|b", torch.zeros(rows, config.rank))

    @classmethod
    def of(cls, differences: Mapping[str, Tensor | tuple[Tensor, Tensor]]) -> Adapter:
        """From whole differences, or from pairs (b, a) of matrices whose products they are, all of one rank."""
        low = {name: given for name, given in differences.items() if isinstance(given, tuple)}
        if low:
            ranks = {b.shape[1] for b, _ in low.values()}
            if len(low) < len(differences) or len(ranks) > 1:
                raise ValueError("differences must be all whole or all of one rank")
            made = cls(AdapterConfig({name: (len(b), a.shape[1]) for name, (b, a) in low.items()}, ranks.pop()))
            state = {f"{_key(name)}|b": b for name, (b, _) in low.items()}
            state |= {f"{_key(name)}|a": a for name, (_, a) in low.items()}
        else:
            whole = {name: given for name, given in differences.items() if isinstance(given, Tensor)}
            made = cls(AdapterConfig({name: tuple(given.shape) for name, given in whole.items()}))
            state = {_key(name): given for name, given in whole.items()}
        made.load_state_dict({name: tensor.detach().cpu().float() for name, tensor in state.items()})
        return made

    def differences(self) -> dict[str, Tensor]:
        """Whole differences by the parameter's name, float32."""
        own = dict(self.named_buffers())
        if self.config.rank is None:
            return {name: own[_key(name)] for name in self.config.shapes}
        return {name: own[f"{_key(name)}|b"] @ own[f"{_key(name)}|a"] for name in self.config.shapes}

    def after(self, earlier: Adapter | None) -> Adapter:
        """One adapter that changes as much as an earlier one and then this one."""
        if earlier is None:
            return self
        ranks = self.config.rank, earlier.config.rank
        if None not in ranks and self.config.shapes == earlier.config.shapes:
            now, then = dict(self.named_buffers()), dict(earlier.named_buffers())
            return Adapter.of(
                {
                    name: (
                        torch.cat([then[f"{_key(name)}|b"], now[f"{_key(name)}|b"]], 1),
                        torch.cat([then[f"{_key(name)}|a"], now[f"{_key(name)}|a"]], 0),
                    )
                    for name in self.config.shapes
                }
            )
        total = {name: difference.clone() for name, difference in earlier.differences().items()}
        for name, difference in self.differences().items():
            total[name] = total[name] + difference if name in total else difference
        return Adapter.of(total)

    def applied(self, encoder: Encoder) -> Encoder:
        """The fine-tuned encoder, a copy.

        Raises ModelError where the encoder lacks a parameter, or has it in another shape.
        """
        changed = encoder.copy()
        parameters = dict(changed.model.named_parameters())
        with torch.no_grad():
            for name, difference in self.differences().items():
                if name not in parameters or parameters[name].shape != difference.shape:
                    raise ModelError(f"encoder {encoder.name!r} has no {name} as the hierarchy has tuned it")
                parameters[name].add_(difference.to(parameters[name]))
        return changed


def _key(name: str) -> str:
    return name.replace(".", "/")
