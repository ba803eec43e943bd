"""The card of a trained hierarchy: what it is, what it was trained on and what came of it, for people."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from treemem.hierarchy.weights import Hierarchy


def card_text(hierarchy: Hierarchy) -> str:
    """The card as Markdown, from the hierarchy's `card` and its shape."""
    config, card = hierarchy.config, hierarchy.card
    weights = sum(parameter.numel() for parameter in hierarchy.parameters())
    lines = [
        "# A trained hierarchy for treemem",
        "",
        str(card.get("summary", "Untrained.")),
        "",
        f"Encoder 1: `{config.encoder.name}` (weights {config.encoder.weights}). Levels: {config.levels}. "
        f"{weights:,} weights, float16.",
        "",
        "    treemem build my.memory PATH --hierarchy FOLDER",
    ]
    for title, key in (("Trained on", "data"), ("Settings", "settings")):
        if card.get(key):
            lines += ["", f"## {title}", "", *_table(card[key])]
    if card.get("figures"):
        lines += ["", "## Held-out questions, before and after", "", *_figures(card["figures"])]
    return "\n".join(lines) + "\n"


def _table(values: dict[str, Any]) -> list[str]:
    return ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in values.items())]


def _figures(figures: dict[str, Any]) -> list[str]:
    lines = ["| figure | before | after |", "|---|---|---|"]
    return lines + [f"| {name} | {before:.3f} | {after:.3f} |" for name, (before, after) in figures.items()]
