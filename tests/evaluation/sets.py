"""A small evaluation set about countries, written as files in any of the layouts."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import zstandard

# Country, capital, river, dish.
COUNTRIES = (
    ("Norway", "Oslo", "Glomma", "brunost"), ("Sweden", "Stockholm", "Klaralven", "meatballs"),
    ("Finland", "Helsinki", "Kemijoki", "rye bread"), ("Denmark", "Copenhagen", "Gudena", "smorrebrod"),
    ("Iceland", "Reykjavik", "Thjorsa", "skyr"), ("Ireland", "Dublin", "Shannon", "colcannon"),
    ("Portugal", "Lisbon", "Tagus", "salted cod"), ("Spain", "Madrid", "Ebro", "paella"),
    ("France", "Paris", "Loire", "ratatouille"), ("Italy", "Rome", "Po", "risotto"),
    ("Austria", "Vienna", "Danube", "schnitzel"), ("Poland", "Warsaw", "Vistula", "pierogi"),
    ("Hungary", "Budapest", "Tisza", "goulash"), ("Greece", "Athens", "Haliacmon", "moussaka"),
    ("Turkey", "Ankara", "Kizilirmak", "lahmacun"), ("Egypt", "Cairo", "Nile", "koshari"),
    ("Kenya", "Nairobi", "Tana", "ugali"), ("Ghana", "Accra", "Volta", "fufu"),
    ("Peru", "Lima", "Ucayali", "ceviche"), ("Chile", "Santiago", "Loa", "empanadas"),
    ("Brazil", "Brasilia", "Amazon", "feijoada"), ("Canada", "Ottawa", "Mackenzie", "poutine"),
    ("Mexico", "Mexico City", "Rio Grande", "tamales"), ("Japan", "Tokyo", "Shinano", "ramen"),
    ("Korea", "Seoul", "Nakdong", "kimchi"), ("Thailand", "Bangkok", "Chi", "pad thai"),
    ("Vietnam", "Hanoi", "Mekong", "pho"), ("Nepal", "Kathmandu", "Karnali", "dal bhat"),
    ("Australia", "Canberra", "Murray", "lamingtons"), ("Samoa", "Apia", "Vaisigano", "palusami"),
)  # fmt: skip


def sentences(country: str, capital: str, river: str, dish: str) -> tuple[str, str, str]:
    return (
        f"The seat of government of {country} lies in the city of {capital}, its capital.",
        f"The longest river that flows through {country} is called the {river}.",
        f"A dish that many people in {country} like to eat on holidays is {dish}.",
    )


def corpus() -> list[dict[str, Any]]:
    return [{"id": row[0].lower(), "title": row[0], "text": "\n".join(sentences(*row))} for row in COUNTRIES]


def sections() -> list[dict[str, Any]]:
    out = []
    for row in COUNTRIES:
        start = 0
        for name, sentence in zip(("capital", "river", "dish"), sentences(*row), strict=True):
            place = {"section": name, "start": start, "end": start + len(sentence)}
            out.append({"id": f"{row[0].lower()}#{name}", "parent": row[0].lower(), **place})
            start += len(sentence) + 1
    return out


def queries() -> list[dict[str, Any]]:
    """Capitals are judged by evidence, rivers by sections, dishes by documents; one has no judgement at all."""
    out: list[dict[str, Any]] = []
    for number, (country, capital, river, dish) in enumerate(COUNTRIES):
        name = country.lower()
        split = "dev" if number % 3 else "test"
        end = len(sentences(country, capital, river, dish)[0])
        evidence = [{"doc": name, "start": end - len(capital) - 15, "end": end}]
        out += [
            {"id": f"{name}-capital", "text": f"What is the capital of {country}?", "answers": [capital],
             "evidence": evidence, "source": "capitals", "split": split},
            {"id": f"{name}-river", "text": f"Which is the longest river of {country}?", "answers": [river],
             "source": "rivers", "split": split},
            {"id": f"{name}-dish", "text": f"What do people eat in {country}?", "source": "dishes"},
        ]  # fmt: skip
    return [*out, {"id": "unanswerable", "text": "What is the capital of Atlantis?", "split": "dev"}]


def write_jsonl(folder: Path, name: str, records: list[dict[str, Any]], packed: str) -> None:
    data = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()
    if packed == ".gz":
        data = gzip.compress(data)
    if packed == ".zst":  # two frames, as appending to a file makes them
        half = len(data) // 2
        data = zstandard.compress(data[:half]) + zstandard.compress(data[half:])
    (folder / f"{name}.jsonl{packed}").write_bytes(data)


def write_table(path: Path, rows: list[tuple[str, str, int]]) -> None:
    path.parent.mkdir(exist_ok=True)
    lines = ["query-id\tcorpus-id\tscore", *("\t".join(map(str, row)) for row in rows)]
    path.write_text("\n".join(lines) + "\n")


def write_set(folder: Path, packed: str = "", beir: bool = False) -> Path:
    """The whole set; `beir`: only what BEIR knows, with `_id` and one file of judgements per split."""
    folder.mkdir()
    asked = queries()
    rows = [(query["id"], query["id"].split("-")[0], 1) for query in asked[:-1]]
    if beir:
        write_jsonl(folder, "corpus", [{"_id": record.pop("id"), **record} for record in corpus()], packed)
        plain = [{"_id": query["id"], "text": query["text"], "metadata": {"url": "x"}} for query in asked]
        write_jsonl(folder, "queries", plain, packed)
        write_table(folder / "qrels" / "train.tsv", rows[:60])
        write_table(folder / "qrels" / "test.tsv", [*rows[60:], ("unanswerable", "norway", 0)])
        return folder
    write_jsonl(folder, "corpus", corpus(), packed)
    write_jsonl(folder, "queries", asked, packed)
    write_jsonl(folder, "sections", sections(), packed)
    write_table(folder / "qrels.tsv", rows)
    rivers = [(query["id"], query["id"].split("-")[0] + "#river", 1) for query in asked if "-river" in query["id"]]
    write_table(folder / "qrels_sections.tsv", rivers)
    return folder
