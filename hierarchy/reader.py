"""A reader: what lets a language model read a memory, its passages as text and its embeddings of all levels as vectors.

It has three parts, learned by `treemem.training.reader`: a projection of embeddings to the width of the model's token
embeddings, and two adapters of the model's own weights (LoRA, Hu et al. 2021), one for answering from text alone and
one for answering from vectors, with or without text. Projected vectors stand where tokens would stand, at a marked
place of the prompt, as in LLaVA (Liu et al. 2023) and xRAG (Cheng et al. 2024).
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, get_args
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int64
from safetensors import SafetensorError
from torch import Tensor, nn

from treemem.errors import InputError, ModelError
from treemem.hierarchy.context import GatheredVectors, PassageText
from treemem.hierarchy.embed import EncoderInfo
from treemem.hierarchy.generate import Decoding, LanguageModel, LocalModel
from treemem.hierarchy.prompt import Message, neutralise, one_line, shown_text

if TYPE_CHECKING:
    from collections.abc import Callable

How = Literal["text", "vectors", "both"]
HOW: tuple[How, ...] = get_args(How)
"""What a model is given of the memory: passages, embeddings, or embeddings and then passages."""
READER_VERSION = 2
CONFIG_FILE = "config.json"
PROJECTION_FILE = "projection.safetensors"
CARD_FILE = "README.md"
ADAPTERS = ("text", "vectors")
"""Folders of the adapters, in peft's format."""
DEFAULT_READER = "default"
NO_READER = "none"
DEFAULT_FOLDER = Path(__file__).parent / "default_reader"
"""The packaged reader of the packaged models; its card is `README.md` there."""

SYSTEM = "Answer from the memory in a few words."
_PLACE = "\ue000"
"""Stands for the user's turn while the chat template is rendered; it is no character of any text."""
RANKS = 32
"""How many ranks are told apart."""
PLACES = 8
"""How many windows of a chunk are told apart."""


@dataclass(frozen=True)
class ReaderConfig:
    """What a reader was made for, and its shape."""

    encoder: EncoderInfo
    """Encoder 1 whose embeddings it reads."""
    model: str
    """Identity of the language model, see `model_id`."""
    model_name: str
    width: int
    """Of the language model's token embeddings."""
    hidden: int = 1024
    levels: int = 6
    """How many levels are told apart; higher ones are read as the last."""
    rank: int = 16
    """Of the adapters."""
    chunks: int = 8
    """How many of the best chunks are read, as passages or window by window."""
    more: int = 2
    """How many chunks after them are read as their one search vector."""
    nodes: int = 2
    """How many nodes of each upper level are read."""
    best: How = "text"
    """What `auto` chooses: what measured best."""
    reads: tuple[How, ...] = HOW
    """What it has learned to read; one that reads text alone is saved without the other parts."""

    def __post_init__(self) -> None:
        for field, least in {
            "width": 1,
            "hidden": 1,
            "levels": 2,
            "rank": 1,
            "chunks": 1,
            "more": 0,
            "nodes": 0,
        }.items():
            if getattr(self, field) < least:
                raise InputError(f"{field} = {getattr(self, field)}: it must be at least {least}")
        if self.best not in self.reads or not set(self.reads) <= set(HOW):
            raise InputError(f"best = {self.best!r}, reads = {self.reads}: they must be among {', '.join(HOW)}")


def model_id(model: LocalModel) -> str:
    """What tells one language model from another: its kind, its shape, how it cuts text, some of its weights."""
    config = model.model.config.get_text_config()
    table = model.model.get_input_embeddings().weight
    rows = torch.linspace(0, len(table) - 1, 64, device=table.device).long()
    sample = table.detach()[rows].to(torch.bfloat16).float().cpu().numpy()  # the same in whichever precision it is held
    digest = hashlib.sha256(sample.tobytes())
    digest.update(repr(model.encode("The quick brown Fox: 3.14 naïve café")).encode())
    kind = getattr(config, "model_type", "unknown")
    return f"{kind}-{config.hidden_size}x{config.num_hidden_layers}-{digest.hexdigest()[:16]}"


# ---------------------------------------------------------------------------------------------------------------------
# The prompt


@dataclass(frozen=True)
class Segment:
    """A run of the prompt's tokens and what it is."""

    kind: Literal["template", "vectors", "passage", "question"]
    begin: int
    end: int
    number: int = 0
    """Of the passage, from 1."""


@dataclass(frozen=True)
class ReaderPrompt:
    """Token ids of a whole prompt; at the vectors' place stand as many of `0`, which are replaced."""

    ids: tuple[int, ...]
    segments: tuple[Segment, ...]

    @property
    def vectors(self) -> range:
        """Places of the vectors, empty where there are none."""
        for segment in self.segments:
            if segment.kind == "vectors":
                return range(segment.begin, segment.end)
        return range(0)


_frames: WeakKeyDictionary[LocalModel, tuple[list[int], list[int], list[int]]] = WeakKeyDictionary()


def _frame(model: LocalModel) -> tuple[list[int], list[int], list[int]]:
    """What the chat template puts before and after the user's turn, and what introduces vectors."""
    if model not in _frames:
        rendered = model.render([Message("system", SYSTEM), Message("user", _PLACE)])
        before, found, after = rendered.partition(_PLACE)
        if not found:
            raise ModelError(f"language model {model.name!r}: its chat template drops what the user says")
        _frames[model] = model.encode(before), model.encode(after), model.encode("Memory: ")
    return _frames[model]


def passage_ids(model: LocalModel, passages: Sequence[PassageText]) -> list[list[int]]:
    """Passages as they stand in a prompt, without their numbers.

    Raises ModelError where one holds control tokens that cannot be broken.
    """
    texts = []
    for passage in passages:
        title, text = (shown_text(own, model.control_markers) for own in (passage.title, passage.text))
        texts.append(f" {title}: {text}" if title else f" {text}")
    return [_checked(model, ids) for ids in model.encode_many(texts)]


def reader_prompt(
    model: LocalModel,
    question: str,
    passages: Sequence[PassageText] = (),
    vectors: int = 0,
    most: int | None = None,
    cut: Callable[[LocalModel, Sequence[PassageText]], list[list[int]]] = passage_ids,
) -> ReaderPrompt:
    """A question with passages, a place for vectors, or both.

    Each part is cut into tokens by itself, so that a part is the same wherever it stands.

    Args:
        model: whose chat template and tokenizer are used.
        question: any text; control tokens in it and in the passages are broken.
        passages: best first; those that do not fit any more are left out.
        vectors: how many embeddings are to be put in.
        most: tokens of the prompt; None for what the model's context holds beside a short reply.
        cut: gives the tokens of passages: `passage_ids`, or one that remembers.

    Raises:
        ModelError: a text holds control tokens that cannot be broken, or even the question does not fit.
    """
    most = model.context_tokens - 64 if most is None else most
    before, after, introduced = _frame(model)
    said = f"Question: {neutralise(one_line(question), model.control_markers)}"
    asked = _checked(model, model.encode(f"\n\n{said}" if passages or vectors else said))
    rest = most - len(before) - len(after) - (len(introduced) + vectors if vectors else 0)
    if rest < 8:
        raise ModelError(f"language model {model.name!r}: {vectors} vectors do not fit into {most} tokens of prompt")
    asked = asked[:rest]
    rest -= len(asked)
    ids: list[int] = []
    segments: list[Segment] = []

    def put(kind: Any, more: Sequence[int], number: int = 0) -> None:
        if more:
            segments.append(Segment(kind, len(ids), len(ids) + len(more), number))
            ids.extend(more)

    put("template", before)
    if vectors:
        put("template", introduced)
        put("vectors", [0] * vectors)
    for number, words in enumerate(cut(model, passages), 1):
        own = [*model.encode(f"\n[{number}]" if number > 1 or vectors else f"[{number}]"), *words]
        if len(own) > rest:
            if number > 1 or rest < 8:
                break
            own = own[:rest]
        rest -= len(own)
        put("passage", own, number)
    put("question", asked)
    put("template", after)
    return ReaderPrompt(tuple(ids), tuple(segments))


def _checked(model: LocalModel, ids: list[int]) -> list[int]:
    if model.controls(ids):
        raise ModelError(
            f"language model {model.name!r}: a passage or the question holds control tokens that cannot be broken; "
            "ask with another model or 'none'"
        )
    return ids


# ---------------------------------------------------------------------------------------------------------------------
# The projection


def _quiet_network(dimension: int, hidden: int, width: int) -> nn.Sequential:
    """Two layers that give zeros until they are trained."""
    last = nn.Linear(hidden, width)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(nn.Linear(dimension, hidden), nn.GELU(), last)


class Projection(nn.Module):
    """Embeddings of all levels to vectors of the width and scale of a model's token embeddings.

    Each level has a linear map and a network of two layers beside it, which adds nothing at first; to what they give
    are added what stands for the level, the rank of the element among those gathered, the window of the chunk and the
    score. The sum is brought to the root mean square of the model's token embeddings, times a learned gain of the
    level.
    """

    def __init__(self, dimension: int, width: int, hidden: int, levels: int, scale: float = 1.0) -> None:
        """Make an untrained projection.

        Args:
            dimension: of the embeddings.
            width: of the model's token embeddings.
            hidden: between the two layers.
            levels: how many are told apart.
            scale: root mean square of the model's token embeddings.
        """
        super().__init__()
        self.levels = levels
        self.dimension = dimension
        self.maps = nn.ModuleList(nn.Linear(dimension, width, bias=False) for _ in range(levels))
        self.networks = nn.ModuleList(_quiet_network(dimension, hidden, width) for _ in range(levels))
        self.level = nn.Embedding(levels, width)
        self.rank = nn.Embedding(RANKS, width)
        self.place = nn.Embedding(PLACES, width)
        self.score = nn.Linear(1, width)
        for table in (self.level, self.rank, self.place):
            nn.init.normal_(table.weight, std=0.1)
        self.gain = nn.Parameter(torch.zeros(levels))
        self.scale: Tensor
        self.register_buffer("scale", torch.tensor(float(scale)))

    def forward(
        self,
        vectors: Float[Tensor, "n d"],
        levels: Int64[Tensor, " n"],
        ranks: Int64[Tensor, " n"],
        places: Int64[Tensor, " n"],
        scores: Float[Tensor, " n"],
    ) -> Float[Tensor, "n width"]:
        """Project elements, whichever prompts they belong to.

        Args:
            vectors: embeddings; only their directions count.
            levels: 0 for windows of a chunk, 1 for chunks, from 2 on for nodes; best on the CPU, where a GPU need not
                be waited for to know which are there.
            ranks: of an element's chunk or node among those gathered of its level, from 0.
            places: of a window in its chunk; 0 for others.
            scores: of the walk.
        """
        levels = levels.clamp(max=self.levels - 1)
        inputs = nn.functional.normalize(vectors, dim=-1) * self.dimension**0.5
        by_level = [torch.nonzero(levels == level)[:, 0].to(inputs.device) for level in range(self.levels)]
        levels = levels.to(inputs.device)
        tags = self.level(levels) + self.rank(ranks.clamp(max=RANKS - 1)) + self.place(places.clamp(max=PLACES - 1))
        out = tags + self.score(scores[:, None])
        for rows, linear, network in zip(by_level, self.maps, self.networks, strict=True):
            if len(rows):
                own = inputs[rows]
                out = out.index_add(0, rows, (linear(own) + network(own)).to(out.dtype))
        size = out.float().pow(2).mean(-1, keepdim=True).add(1e-6).sqrt()
        return out.float() / size * self.scale * self.gain[levels].exp()[:, None]


def embedding_scale(model: Any) -> float:
    """Root mean square of a model's token embeddings."""
    table = model.get_input_embeddings()
    ids = torch.linspace(0, table.weight.shape[0] - 1, 4096, device=table.weight.device).long()
    with torch.no_grad():
        return float(table(ids).float().pow(2).mean().sqrt())


class Reader(nn.Module):
    """The projection and the adapters of one encoder and one language model."""

    def __init__(
        self,
        config: ReaderConfig,
        scale: float = 1.0,
        card: Mapping[str, Any] | None = None,
        adapters: Mapping[str, Path] | None = None,
    ) -> None:
        """Make an untrained reader; `load_reader` reads a trained one.

        Args:
            config: what for.
            scale: see `Projection`.
            card: what it was trained on and what came of it.
            adapters: folders of the adapters in peft's format, of those that there are.
        """
        super().__init__()
        self.config = config
        self.card = dict(card or {})
        self.adapters = dict(adapters or {})
        self.projection = Projection(config.encoder.dimension, config.width, config.hidden, config.levels, scale)

    def project(self, given: GatheredVectors, device: Any) -> Float[Tensor, "n width"]:
        """What a model reads of gathered vectors."""
        projected: Tensor = self.projection(*tensors(given, device))
        return projected

    def fits(self, encoder: EncoderInfo, model: LocalModel) -> bool:
        """Whether it was trained for this encoder and this language model."""
        return encoder.weights == self.config.encoder.weights and model_id(model) == self.config.model

    def check(self, encoder: EncoderInfo, model: LocalModel) -> None:
        """Raise InputError where the memory's encoder or the language model is not the one it was trained for."""
        if encoder.weights != self.config.encoder.weights:
            raise InputError(
                f"reader: it reads embeddings of encoder {self.config.encoder.name!r} "
                f"({self.config.encoder.weights[:8]}), the memory's are of {encoder.name!r} ({encoder.weights[:8]}); "
                "train one with treemem train-reader, or ask with --reader none"
            )
        if model_id(model) != self.config.model:
            raise InputError(
                f"reader: it was trained for the language model {self.config.model_name!r} ({self.config.model}), "
                f"not for {model.name!r} ({model_id(model)}); train one with treemem train-reader, or ask with "
                "--reader none"
            )


def tensors(given: GatheredVectors, device: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gathered vectors as `Projection` takes them."""
    return (
        torch.from_numpy(given.vectors).to(device),
        torch.from_numpy(given.levels).to(device),
        torch.from_numpy(given.ranks).to(device),
        torch.from_numpy(given.places).to(device),
        torch.from_numpy(given.scores).to(device),
    )


# ---------------------------------------------------------------------------------------------------------------------
# Files


def save_reader(reader: Reader, folder: str | Path) -> None:
    """Write `config.json`, `projection.safetensors` (float16) and the card; adapters are put beside them by training.

    Raises InputError where the folder cannot be written.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if reader.config.reads != ("text",):
            weights = reader.projection.state_dict()
            state = {name: value.detach().half().contiguous().cpu() for name, value in weights.items()}
            save_file(state, folder / PROJECTION_FILE)
        described = {"version": READER_VERSION, **asdict(reader.config), "card": reader.card}
        (folder / CONFIG_FILE).write_text(json.dumps(described, indent=1) + "\n")
        (folder / CARD_FILE).write_text(card_text(reader))
    except (OSError, SafetensorError) as error:
        raise InputError(f"{folder}: the reader cannot be written there ({error})") from error


def load_reader(name: str | Path) -> Reader | None:
    """A reader by name: `default` (packaged; None where this installation has none), or a folder.

    Raises InputError where there is no reader at that place, or it is damaged.
    """
    from safetensors.torch import load_file

    if name == DEFAULT_READER and not (DEFAULT_FOLDER / CONFIG_FILE).exists():
        return None
    folder = DEFAULT_FOLDER if name == DEFAULT_READER else Path(os.path.expanduser(name))
    try:
        described = json.loads((folder / CONFIG_FILE).read_text())
        if described.pop("version") != READER_VERSION:
            raise InputError(f"{folder}: it was written by another version of treemem; train it anew")
        card = described.pop("card")
        encoder, reads = EncoderInfo(**described["encoder"]), tuple(described["reads"])
        config = ReaderConfig(**{**described, "encoder": encoder, "reads": reads})
        adapters = {name: folder / name for name in ADAPTERS if (folder / name / "adapter_config.json").exists()}
        reader = Reader(config, card=card, adapters=adapters)
        if config.reads != ("text",):
            reader.projection.load_state_dict({k: v.float() for k, v in load_file(folder / PROJECTION_FILE).items()})
    except FileNotFoundError as error:
        missing = Path(str(error.filename)).name
        raise InputError(
            f"{folder}: no reader there ({missing} is missing); give text, vectors, both, none, auto or a folder"
        ) from error
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise InputError(f"{folder}: no reader that can be used ({error})") from error
    return reader.eval()


def card_text(reader: Reader) -> str:
    """The card of a reader as Markdown."""
    config, card = reader.config, reader.card
    lines = [
        "# A reader for treemem",
        "",
        str(card.get("summary", "Untrained.")),
        "",
        f"Reads embeddings of `{config.encoder.name}` (weights {config.encoder.weights}) for the language model "
        f"`{config.model_name}` ({config.model}). `auto` gives it: {config.best}.",
        "",
        '    treemem ask my.memory "…" --reader FOLDER',
    ]
    for title, key in (("Trained on", "data"), ("Settings", "settings")):
        if card.get(key):
            rows = card[key].items()
            lines += ["", f"## {title}", "", "| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]
    figures: Mapping[str, Mapping[str, float]] = card.get("figures", {})
    if figures:
        names = list(next(iter(figures.values())))
        lines += [
            "",
            "## Held-out questions",
            "",
            "| given | " + " | ".join(names) + " |",
            "|---" * (len(names) + 1) + "|",
        ]
        lines += [
            f"| {given} | " + " | ".join(f"{own[name]:.3f}" for name in names) + " |" for given, own in figures.items()
        ]
    return "\n".join(lines) + "\n"


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


# ---------------------------------------------------------------------------------------------------------------------
# At work


def adapted(model: LocalModel, folder: Path) -> LocalModel:
    """The same model with an adapter merged into a copy of its weights."""
    from peft import PeftModel

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what one library deprecates for the other
            with model.turn:
                own = copy.deepcopy(model.model)
            merged = PeftModel.from_pretrained(own, str(folder)).merge_and_unload()
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(f"{folder}: the adapter cannot be used ({str(error).splitlines()[0]})") from error
    return LocalModel(
        model.name, merged.eval(), model.tokenizer, context_tokens=model.context_tokens, decoding=Decoding()
    )


class ReadingModel:
    """A language model on this machine together with a reader; the adapted copies are made when first needed."""

    def __init__(self, model: LocalModel, reader: Reader) -> None:
        """Put both together; `Reader.check` has seen to it that they belong together."""
        self.model = model
        self.reader = reader
        self._adapted: dict[str, LocalModel] = {}
        self._lock = threading.Lock()
        self._device = model.model.device
        self.projection = copy.deepcopy(reader.projection).to(self._device).eval()

    def model_for(self, how: How) -> LocalModel:
        """The model as it was trained to answer from text, or from vectors."""
        name = "text" if how == "text" else "vectors"
        with self._lock:
            if name not in self._adapted:
                folder = self.reader.adapters.get(name)
                self._adapted[name] = self.model if folder is None else adapted(self.model, folder)
            return self._adapted[name]

    def embedded(self, how: How, prompt: ReaderPrompt, given: GatheredVectors | None) -> Float[Tensor, "1 n width"]:
        """The prompt as the model's input embeddings, vectors in their places."""
        return embed_prompts(self.model_for(how).model, self.projection, [prompt], [given])[0]

    def stream(
        self,
        how: How,
        prompt: ReaderPrompt,
        given: GatheredVectors | None,
        max_tokens: int,
        ids: list[int] | None = None,
    ) -> Iterator[str]:
        """Pieces of the reply as they come; closing the iterator stops the model.

        Args:
            how: what the prompt holds.
            prompt: of `reader_prompt`.
            given: the vectors that belong in it, None where it has no place for any.
            max_tokens: most tokens of the reply.
            ids: is given the reply's tokens as they come.

        Raises:
            ModelError: the model fails.
        """
        model = self.model_for(how)
        return model.stream_embedded(self.embedded(how, prompt, given), max_tokens, ids)


_reading: WeakKeyDictionary[LanguageModel, dict[str, ReadingModel]] = WeakKeyDictionary()
_reading_lock = threading.Lock()


def choose_reader(choice: str, model: LanguageModel | None, encoder: EncoderInfo) -> tuple[ReadingModel, How] | None:
    """What reads the memory, and how; None where the model is asked as it is.

    Args:
        choice: `none`; `auto`: the packaged reader where it fits model and encoder, as its card says; `text`, `vectors`
            or `both`: that way with the packaged reader; a folder: that reader as its card says; `vectors@FOLDER` and
            the like: that reader that way.
        model: the language model, None where answers are quoted.
        encoder: of the memory.

    Raises:
        InputError: there is no such reader, or it belongs to another model or encoder.
    """
    if choice == NO_READER or (choice == "auto" and not isinstance(model, LocalModel)):
        return None
    how, _, place = choice.partition("@") if choice.partition("@")[0] in HOW else ("", "", choice)
    folder = DEFAULT_READER if choice == "auto" or not place else place
    if not isinstance(model, LocalModel):
        raise InputError(f"reader = {choice!r}: it needs a language model on this machine; ask with --reader none")
    with _reading_lock:
        known = _reading.setdefault(model, {})
        if folder not in known:
            reader = load_reader(folder)
            if reader is None:
                if choice == "auto":
                    return None
                raise InputError(
                    f"reader = {choice!r}: this installation has no packaged reader; name a folder, or train one with "
                    "treemem train-reader"
                )
            known[folder] = ReadingModel(model, reader)
        reading = known[folder]
    if choice == "auto" and not reading.reader.fits(encoder, model):
        return None
    reading.reader.check(encoder, model)
    chosen = cast(How, how) if how else reading.reader.config.best
    if chosen not in reading.reader.config.reads:
        raise InputError(
            f"reader = {choice!r}: it has learned to read {' and '.join(reading.reader.config.reads)} alone; train one "
            "that reads vectors with treemem train-reader"
        )
    return reading, chosen


def embed_prompts(
    model: Any,
    projection: Projection | Callable[..., Tensor],
    prompts: Sequence[ReaderPrompt],
    given: Sequence[GatheredVectors | None],
) -> tuple[Float[Tensor, "b n width"], Int64[Tensor, "b n"]]:
    """Prompts as input embeddings, padded on the left, and which places hold anything.

    Args:
        model: of transformers, whose token embeddings are used.
        projection: of the vectors.
        prompts: one or more.
        given: the vectors of each.
    """
    table = model.get_input_embeddings()
    device = table.weight.device
    longest = max(len(prompt.ids) for prompt in prompts)
    ids = torch.zeros((len(prompts), longest), dtype=torch.long)
    mask = torch.zeros_like(ids)
    places: list[tuple[int, int]] = []
    for row, prompt in enumerate(prompts):
        shift = longest - len(prompt.ids)
        ids[row, shift:] = torch.tensor(prompt.ids)
        mask[row, shift:] = 1
        places += [(row, shift + place) for place in prompt.vectors]
    embeds = table(ids.to(device))
    parts = [own for own, prompt in zip(given, prompts, strict=True) if own is not None and len(prompt.vectors)]
    if places:
        stacked = [torch.cat(columns) for columns in zip(*(tensors(own, device) for own in parts), strict=True)]
        rows, columns = torch.tensor(places, device=device).T
        embeds = embeds.index_put((rows, columns), projection(*stacked).to(embeds.dtype))
    return embeds, mask.to(device)


def generate_many(
    model: LocalModel,
    projection: Projection,
    prompts: Sequence[ReaderPrompt],
    given: Sequence[GatheredVectors | None],
    max_tokens: int,
    batch_tokens: int = 16384,
    told: Callable[[int], None] | None = None,
) -> list[str]:
    """Replies to many prompts, the likeliest token always, in batches of similar length.

    Args:
        model: what replies.
        projection: of the vectors, where the model is.
        prompts: any number.
        given: the vectors of each.
        max_tokens: most tokens of a reply.
        batch_tokens: most tokens of the prompts of a batch, padding included.
        told: how many are done, after each batch.
    """
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i].ids))
    out = [""] * len(prompts)
    start = 0
    while start < len(order):
        count = max(1, batch_tokens // max(1, len(prompts[order[start]].ids)))
        rows = order[start : start + count]
        with torch.inference_mode():
            embeds, mask = embed_prompts(model.model, projection, [prompts[i] for i in rows], [given[i] for i in rows])
            ids = model.model.generate(
                inputs_embeds=embeds, attention_mask=mask, max_new_tokens=max_tokens, do_sample=False
            )
        texts = model.tokenizer.batch_decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        for row, text in zip(rows, texts, strict=True):
            out[row] = text.strip()
        start += len(rows)
        if told is not None:
            told(start)
    return out
