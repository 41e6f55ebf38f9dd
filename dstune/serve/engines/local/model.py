"""The language model of the local engine and its named adapters."""

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
from dstune.generation.answers import end_tokens, placed_images
from dstune.inference.resolve_model import check_adapter
from dstune.inference.voices import BASE, OWN, Speaker, Voice, voice_of
from dstune.models.peft_load import load_peft_adapter


@dataclass(frozen=True)
class _ServedName:
    """A served name: its voice, and what renders and tokenizes its prompts."""

    voice: Voice
    control: ControlTokens
    prompts: ChatPrompts | None
    ends: frozenset[int]
    adapter: str
    """peft's name of the adapter, which is never reused; empty for the model without an adapter."""


@dataclass(frozen=True)
class ImageInputs:
    """A model's inputs for the images of one prompt."""

    inputs: Inputs
    last: int
    """Tokens up to the end of the last image, which are prefilled in one chunk."""
    positions: torch.Tensor | None = None
    """For models with separate positions of time, height and width: int64 [3, tokens]."""

    @property
    def bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.inputs.values())

    @property
    def shift(self) -> int:
        """Return the offset of the positions after the prompt from its token count."""
        return 0 if self.positions is None else int(self.positions.max()) + 1 - self.positions.shape[1]

    def inputs_for(self, start: int, end: int) -> Inputs:
        """Return the inputs, other than token ids, for the tokens from `start` to `end`. All images are in the first chunk."""
        inputs = {name: value if name in INPUTS else value[:, :end] for name, value in self.inputs.items() if not start}
        return inputs if self.positions is None else inputs | {"position_ids": self.positions[:, None, start:end]}


class LocalModel:
    """A decoder of transformers. Only the computing thread may call methods that change adapters."""

    def __init__(self, speaker: Speaker, served_name: str, trained: str | None):
        """served_name: the name under which the model is served. trained: name of the adapter that its folder is, if it is one."""
        from dstune.models.peft_import import peft

        model = speaker.model
        self._peft = model if isinstance(model, peft.PeftModel) else None
        self.model = model.get_base_model() if self._peft is not None else model
        if self.model.config.is_encoder_decoder:
            reason = "is an encoder-decoder, which the local engine does not serve"
            raise UserError(Problem("MODEL", reason, "dstune generate answers files of prompts", served_name))
        self._served: dict[str, _ServedName] = {}
        self._base = speaker.voices[BASE].tokenizer
        self._processor: ImageProcessor | None = None
        for name, voice in speaker.voices.items():
            if name == OWN and trained is not None:
                self._register(trained, voice, OWN)
            elif name == BASE:
                self._register(served_name, voice, "")
        self._refuse_prompts()
        self._numbers = itertools.count()
        self._retired: set[str] = set()
        """Adapters whose names have been reassigned while answers may still use them."""
        self._active: str | None = None  # unknown
        self.damaged = False
        """Whether a failed adapter has left the model modified."""

    @property
    def names(self) -> list[str]:
        return list(self._served)

    @property
    def dtype(self) -> str:
        return str(next(self.model.parameters()).dtype).removeprefix("torch.")

    @property
    def limit(self) -> int:
        """The context length: tokens of a prompt and its answer together."""
        return int(getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or 1 << 20)

    @property
    def vocabulary(self) -> int:
        return int(self.model.get_input_embeddings().num_embeddings)

    def defaults(self) -> Mapping[str, Any]:
        """Return the sampling defaults of the model's generation settings."""
        generation = self.model.generation_config
        if not generation.do_sample:
            return {}
        names = ("temperature", "top_p", "top_k", "repetition_penalty")
        return {name: value for name in names if (value := getattr(generation, name, None)) is not None}

    # -- adapters

    def load(self, name: str, folder: Path) -> None:
        """Load the adapter in `folder` under `name`. Raises UserError if it does not fit the model."""
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
            self.damaged = self._peft is None  # peft inserts its layers before it reads the weights
            self._peft = load_peft_adapter(self._peft or self.model, folder, adapter)
            self.damaged = False
        except (RuntimeError, ValueError, KeyError) as error:
            if self._peft is not None:
                with suppress(RuntimeError, ValueError, KeyError):
                    self._peft.delete_adapter(adapter)
            reason = f"does not fit the model: {first_line(error)}"
            raise UserError(Problem(name, reason, value=str(folder))) from error
        self.model.eval()
        if (earlier := self._served.get(name)) is not None:
            self._retired.add(earlier.adapter)
        self._register(name, voice, adapter)

    def forget_retired(self, used: Collection[str]) -> None:
        """Delete adapters whose names have been reassigned. used: those that sequences still use."""
        for adapter in self._retired - set(used):
            self._retired.discard(adapter)
            self._active = None
            if self._peft is not None:
                self._peft.delete_adapter(adapter)

    def unload(self, name: str) -> None:
        served = self._served.pop(name, None)
        self._active = None
        if served is not None and served.adapter and self._peft is not None:
            self._peft.delete_adapter(served.adapter)

    def adapter(self, name: str) -> str:
        """Return peft's name of the adapter that serves `name`; it changes when the name is reassigned."""
        return self._served[name].adapter

    @contextmanager
    def use_adapter(self, adapter: str) -> Iterator[None]:
        """Activate the adapter, or the model without one, within the block."""
        if (
            adapter
            and adapter not in self._retired
            and all(served.adapter != adapter for served in self._served.values())
        ):
            raise ValueError("the model was removed")
        if self._peft is not None and self._active != adapter:
            if adapter:
                self._peft.base_model.enable_adapter_layers()
                self._peft.set_adapter(adapter)
            else:
                self._peft.base_model.disable_adapter_layers()
            self._active = adapter
        yield

    def _register(self, name: str, voice: Voice, adapter: str) -> None:
        tokenizer = voice.tokenizer
        prompts = ChatPrompts(tokenizer, voice.date) if voice.chat else None
        ends = frozenset(end_tokens(self.model, stop_token_ids(tokenizer)))
        self._served[name] = _ServedName(voice, ControlTokens(tokenizer), prompts, ends, adapter)

    def _refuse_prompts(self) -> None:
        if self._peft is not None and getattr(self._peft.active_peft_config, "num_virtual_tokens", None):
            reason = "what was trained stands in front of each row, which the local engine does not serve"
            raise UserError(Problem("MODEL", reason, "dstune generate answers files of prompts"))

    # -- text and tokens

    def chats(self, name: str) -> bool:
        return self._served[name].prompts is not None

    def template(self, name: str) -> ChatTemplate | None:
        prompts = self._served[name].prompts
        return None if prompts is None else prompts.template

    def ends(self, name: str) -> frozenset[int]:
        return self._served[name].ends

    def conversation_ids(
        self,
        name: str,
        messages: list[dict[str, Any]],
        tools: Any,
        arguments: Mapping[str, Any],
        place_images: Callable[[str], str] | None = None,
    ) -> list[int]:
        """Return the prompt's tokens, as in training. place_images: inserts the image placeholders into the rendered text. Raises
        RenderError, RowError, TooManyTokens."""
        prompts = self._served[name].prompts
        assert prompts is not None, "only a model with a template is asked with messages"
        return prompts.ids(messages, tools=tools, arguments=arguments, most=self.limit, place_images=place_images)

    def text_ids(self, name: str, text: str) -> list[int]:
        """Return the tokens of a text to be continued. Raises TooManyTokens."""
        from dstune.data.special_tokens import first_special_tokens

        served = self._served[name]
        served.control.check_length(text, self.limit)
        ids = served.control.ids(text)
        prefix = first_special_tokens(served.voice.tokenizer)
        return ids if ids[: len(prefix)] == prefix else [*prefix, *ids]

    def decode(self, name: str, ids: Sequence[int], *, special: bool = False) -> str:
        tokenizer = self._served[name].voice.tokenizer
        text: str = tokenizer.decode(list(ids), skip_special_tokens=not special)
        return text

    # -- images

    def image_processor(self, name: str) -> ImageProcessor:
        """Return the processor that turns images into inputs; all adapters share it. Raises RowError if the model accepts no
        images, UserError if a dependency or file is missing."""
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

    def image_inputs(self, ids: Sequence[int], inputs: Inputs, processor: ImageProcessor) -> ImageInputs:
        """Return the image inputs of a prompt with these tokens. inputs: from `PromptImages`."""
        is_image = np.isin(np.asarray(ids, dtype=np.int64), processor.image_tokens)
        positions = None
        if processor.family.three_positions:
            grids = inputs["image_grid_thw"].numpy()
            positions = torch.from_numpy(three_positions(is_image, grids, processor.merge))
        return ImageInputs(inputs, int(np.flatnonzero(is_image)[-1]) + 1, positions)

    def logprobs(self, name: str, ids: Sequence[int], image_inputs: ImageInputs | None = None) -> list[float]:
        """Return the log-probability of each token but the first, given the tokens before it. Call it from the computing thread."""
        device = next(self.model.parameters()).device
        inputs = {} if image_inputs is None else placed_images(image_inputs.inputs_for(0, len(ids)), self.model)
        with torch.inference_mode(), self.use_adapter(self.adapter(name)):
            tokens = torch.tensor([list(ids)], device=device)
            logits = self.model(input_ids=tokens, use_cache=False, **inputs).logits[0]
        logprobs = logits[:-1].float().log_softmax(-1)
        targets = torch.tensor(list(ids[1:]), device=logprobs.device)
        values: list[float] = logprobs.gather(1, targets[:, None])[:, 0].tolist()
        return values
