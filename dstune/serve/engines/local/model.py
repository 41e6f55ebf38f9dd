"""The language model of the local engine, with its adapters by name."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dstune.config.architectures import mark_vision, vision_of
from dstune.core.errors import Problem, UserError, first_line
from dstune.data.chat.prompt import ChatPrompts
from dstune.data.chat.template import ChatTemplate
from dstune.data.control import ControlTokens
from dstune.data.images.positions import three_positions
from dstune.data.images.processor import INPUTS, ImageProcessor, Inputs, processor_of, refusal
from dstune.data.problems import RowError
from dstune.data.stopping import stop_token_ids
from dstune.inference.resolve_model import check_adapter
from dstune.inference.voices import BASE, OWN, Speaker, Voice, voice_of
from dstune.models.generation import end_tokens, placed_images


@dataclass(frozen=True)
class _Tongue:
    """A voice with what renders and reads for it."""

    voice: Voice
    control: ControlTokens
    prompts: ChatPrompts | None
    ends: frozenset[int]
    adapter: str
    """Peft's name of it, which no other one ever has; empty for the model without any."""


@dataclass(frozen=True)
class SeenImages:
    """What a model gets of the images of one prompt."""

    inputs: Inputs
    last: int
    """Tokens up to the last one of an image: they are read in one go."""
    positions: torch.Tensor | None = None
    """Of models that count time, height and width apart, int64 [3, tokens]."""

    @property
    def bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.inputs.values())

    @property
    def shift(self) -> int:
        """Return by how much the positions behind the prompt are ahead of the number of tokens."""
        return 0 if self.positions is None else int(self.positions.max()) + 1 - self.positions.shape[1]

    def beside(self, start: int, end: int) -> Inputs:
        """Return the inputs beside the tokens from `start` to `end`, of which all images are in the first part."""
        inputs = {name: value if name in INPUTS else value[:, :end] for name, value in self.inputs.items() if not start}
        return inputs if self.positions is None else inputs | {"position_ids": self.positions[:, None, start:end]}


class LocalModel:
    """A decoder of transformers. Only the computing thread may call what changes adapters."""

    def __init__(self, speaker: Speaker, served_name: str, trained: str | None):
        """served_name: name under which the model is served. trained: name of the adapter that its own folder is, if it is one."""
        from dstune.models.peft_import import peft

        model = speaker.model
        self._peft = model if isinstance(model, peft.PeftModel) else None
        self.model = model.get_base_model() if self._peft is not None else model
        if self.model.config.is_encoder_decoder:
            reason = "is an encoder-decoder, which the local engine does not serve"
            raise UserError(Problem("MODEL", reason, "dstune generate answers files of prompts", served_name))
        self._tongues: dict[str, _Tongue] = {}
        self._base = speaker.voices[BASE].tokenizer
        self._processor: ImageProcessor | None = None
        for name, voice in speaker.voices.items():
            if name == OWN and trained is not None:
                self._know(trained, voice, OWN)
            elif name == BASE:
                self._know(served_name, voice, "")
        self._refuse_prompts()
        self._numbers = itertools.count()
        self._retired: set[str] = set()
        """Adapters whose names were given to others while answers may still be written by them."""
        self._active: str | None = None  # unknown
        self.damaged = False
        """Whether an adapter that did not fit has left the model another one than it was."""

    @property
    def names(self) -> list[str]:
        return list(self._tongues)

    @property
    def dtype(self) -> str:
        return str(next(self.model.parameters()).dtype).removeprefix("torch.")

    @property
    def limit(self) -> int:
        """Tokens that a prompt and its answer may have together."""
        return int(getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or 1 << 20)

    @property
    def vocabulary(self) -> int:
        return int(self.model.get_input_embeddings().num_embeddings)

    def defaults(self) -> Mapping[str, Any]:
        """Return what the model's own generation settings say about sampling."""
        generation = self.model.generation_config
        if not generation.do_sample:
            return {}
        names = ("temperature", "top_p", "top_k", "repetition_penalty")
        return {name: value for name in names if (value := getattr(generation, name, None)) is not None}

    # -- adapters

    def load(self, name: str, folder: Path) -> None:
        """Raises UserError where the adapter does not fit."""
        from dstune.models.peft_import import peft

        voice = voice_of(folder, self._base)
        if (vision := vision_of(self._base)) is not None:
            mark_vision(voice.tokenizer, vision)
        if len(voice.tokenizer) > self.vocabulary:
            reason = "its tokenizer has more tokens than the model that is served"
            raise UserError(Problem(name, reason, "serve it merged: dstune export RUN --merge", str(folder)))
        check_adapter(folder, self.model, name)
        adapter = f"adapter_{next(self._numbers)}"
        self._active = None
        try:
            if self._peft is None:
                self.damaged = True  # peft puts its layers in before it reads the weights
                self._peft = peft.PeftModel.from_pretrained(self.model, folder, adapter_name=adapter)
                self.damaged = False
            else:
                self._peft.load_adapter(folder, adapter_name=adapter)
        except (RuntimeError, ValueError, KeyError) as error:
            if self._peft is not None:
                with suppress(RuntimeError, ValueError, KeyError):
                    self._peft.delete_adapter(adapter)
            reason = f"does not fit the model: {first_line(error)}"
            raise UserError(Problem(name, reason, value=str(folder))) from error
        self.model.eval()
        if (earlier := self._tongues.get(name)) is not None:
            self._retired.add(earlier.adapter)
        self._know(name, voice, adapter)

    def forget_retired(self, used: Collection[str]) -> None:
        """Remove adapters whose names were given to others. used: those that sequences are still written by."""
        for adapter in self._retired - set(used):
            self._retired.discard(adapter)
            self._active = None
            if self._peft is not None:
                self._peft.delete_adapter(adapter)

    def unload(self, name: str) -> None:
        tongue = self._tongues.pop(name, None)
        self._active = None
        if tongue is not None and tongue.adapter and self._peft is not None:
            self._peft.delete_adapter(tongue.adapter)

    def adapter(self, name: str) -> str:
        """Return what `speaking` makes of the model for requests to `name`: another one once the name was given to another
        adapter."""
        return self._tongues[name].adapter

    @contextmanager
    def speaking(self, adapter: str) -> Iterator[None]:
        """Let the model be that adapter, or none, within the block."""
        if adapter and adapter not in self._retired and all(one.adapter != adapter for one in self._tongues.values()):
            raise ValueError("the model was removed")
        if self._peft is not None and self._active != adapter:
            if adapter:
                self._peft.base_model.enable_adapter_layers()
                self._peft.set_adapter(adapter)
            else:
                self._peft.base_model.disable_adapter_layers()
            self._active = adapter
        yield

    def _know(self, name: str, voice: Voice, adapter: str) -> None:
        tokenizer = voice.tokenizer
        prompts = ChatPrompts(tokenizer, voice.date) if voice.chat else None
        ends = frozenset(end_tokens(self.model, stop_token_ids(tokenizer)))
        self._tongues[name] = _Tongue(voice, ControlTokens(tokenizer), prompts, ends, adapter)

    def _refuse_prompts(self) -> None:
        if self._peft is not None and getattr(self._peft.active_peft_config, "num_virtual_tokens", None):
            reason = "what was trained stands in front of each row, which the local engine does not serve"
            raise UserError(Problem("MODEL", reason, "dstune generate answers files of prompts"))

    # -- text and tokens

    def chats(self, name: str) -> bool:
        return self._tongues[name].prompts is not None

    def template(self, name: str) -> ChatTemplate | None:
        prompts = self._tongues[name].prompts
        return None if prompts is None else prompts.template

    def ends(self, name: str) -> frozenset[int]:
        return self._tongues[name].ends

    def conversation_ids(
        self,
        name: str,
        messages: list[dict[str, Any]],
        tools: Any,
        arguments: Mapping[str, Any],
        place_images: Callable[[str], str] | None = None,
    ) -> list[int]:
        """Return the prompt's tokens, as in training. place_images: puts what stands for images into the rendered text. Raises
        RenderError, RowError, TooManyTokens."""
        prompts = self._tongues[name].prompts
        assert prompts is not None, "only a model with a template is asked with messages"
        return prompts.ids(messages, tools=tools, arguments=arguments, most=self.limit, place_images=place_images)

    def text_ids(self, name: str, text: str) -> list[int]:
        """Return tokens of a text that the model is to continue. Raises TooManyTokens."""
        from dstune.data.special_tokens import first_special_tokens

        tongue = self._tongues[name]
        tongue.control.check_length(text, self.limit)
        ids = tongue.control.ids(text)
        prefix = first_special_tokens(tongue.voice.tokenizer)
        return ids if ids[: len(prefix)] == prefix else [*prefix, *ids]

    def decode(self, name: str, ids: Sequence[int], *, special: bool = False) -> str:
        tokenizer = self._tongues[name].voice.tokenizer
        text: str = tokenizer.decode(list(ids), skip_special_tokens=not special)
        return text

    # -- images

    def image_processor(self, name: str) -> ImageProcessor:
        """Return what makes inputs of images: the same for all adapters. Raises RowError where the model sees none, UserError where
        something is missing that it needs."""
        vision = vision_of(self._base)
        if refused := refusal(vision, f"the model {name}"):
            raise RowError(f"they show an image; {refused}")
        if "pixel_values" not in inspect.signature(self.model.forward).parameters:
            raise RowError(
                f"they show an image; of the model {name} only the part for text is loaded, as its adapter needs it"
            )
        assert vision is not None
        if self._processor is None:
            self._processor = processor_of(vision)
        return self._processor

    def seen(self, ids: Sequence[int], inputs: Inputs, processor: ImageProcessor) -> SeenImages:
        """Return the images of a prompt of these tokens. inputs: what `PromptImages` makes of them."""
        is_image = np.isin(np.asarray(ids, dtype=np.int64), processor.image_tokens)
        positions = None
        if processor.family.three_positions:
            grids = inputs["image_grid_thw"].numpy()
            positions = torch.from_numpy(three_positions(is_image, grids, processor.merge))
        return SeenImages(inputs, int(np.flatnonzero(is_image)[-1]) + 1, positions)

    def logprobs(self, name: str, ids: Sequence[int], seen: SeenImages | None = None) -> list[float]:
        """Return the log-probability of each token but the first, given those before it. For the computing thread."""
        device = next(self.model.parameters()).device
        beside = {} if seen is None else placed_images(seen.beside(0, len(ids)), self.model)
        with torch.inference_mode(), self.speaking(self.adapter(name)):
            tokens = torch.tensor([list(ids)], device=device)
            logits = self.model(input_ids=tokens, use_cache=False, **beside).logits[0]
        logprobs = logits[:-1].float().log_softmax(-1)
        targets = torch.tensor(list(ids[1:]), device=logprobs.device)
        values: list[float] = logprobs.gather(1, targets[:, None])[:, 0].tolist()
        return values
