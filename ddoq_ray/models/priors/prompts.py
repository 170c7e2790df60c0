"""Texts as a Stable Diffusion network is conditioned on them: CLIP's last hidden states, on the CPU in float32.

Shape suffixes: T tokens of a text, D width of the text encoder.
"""

from __future__ import annotations

import logging
import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from ddoq_ray.models.folders import first_line
from ddoq_ray.models.weights_files import check_finite, check_not_pointers, variant_of

KEPT = 256  # embeddings: 0.25 MB each of SD 1.5; shards are sorted by class, so few are asked for at a time
_LOGGER = logging.getLogger(__name__)


class Prompts:
    """A tokenizer and a text encoder; each text is embedded alone, so that its rows depend on no other.

    Attributes:
        tokens: T, to which every text is cut or padded.
        width: D.
    """

    def __init__(self, tokenizer: Any, encoder: CLIPTextModel) -> None:
        """Put the two together."""
        self.tokenizer, self.encoder = tokenizer, encoder.eval().requires_grad_(False)
        config: Any = encoder.config
        self.tokens = int(min(tokenizer.model_max_length, config.max_position_embeddings))
        self.width = int(config.hidden_size)
        self._masked = bool(getattr(config, "use_attention_mask", False))  # as diffusers' pipelines ask
        self._made: OrderedDict[str, Tensor] = OrderedDict()

    @classmethod
    def from_folder(cls, folder: Path) -> Prompts:
        """Read tokenizer/ and text_encoder/ of a pipeline's folder.

        Raises:
            ValueError: one is absent or incomplete.
        """
        for part in ("tokenizer", "text_encoder"):
            if not (folder / part).is_dir():
                raise ValueError(f"prior: expected a subfolder {part}/ in {folder}, found none")
        place = folder / "text_encoder"
        check_not_pointers(place, "prior")
        bars = transformers_logging.is_progress_bar_enabled()
        transformers_logging.disable_progress_bar()
        try:
            tokenizer = CLIPTokenizer.from_pretrained(os.fspath(folder / "tokenizer"), local_files_only=True)
            # With its report asked for, what is returned is a pair, which the library's types do not say.
            loaded: Any = CLIPTextModel.from_pretrained(
                os.fspath(place), dtype=torch.float32, output_loading_info=True, local_files_only=True,
                variant=variant_of(place),
            )  # fmt: skip
            encoder, report = loaded
        except Exception as error:  # whatever the readers of a dozen formats raise
            raise ValueError(
                f"prior: the tokenizer/ and text_encoder/ of {folder} do not load as CLIP's: {first_line(error)}"
            ) from error
        finally:
            if bars:
                transformers_logging.enable_progress_bar()
        absent = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))
        if absent:
            raise ValueError(f"prior: {place} lacks {len(absent)} tensors, such as {absent[:3]}")
        check_finite(encoder.state_dict(), str(place))
        _check_vocabulary(len(tokenizer), encoder.config.vocab_size, folder)
        return cls(tokenizer, encoder)

    def identity(self) -> dict[str, Any]:
        """What stands for the tokenizer in a content digest: the vocabulary, in whichever files it came."""
        return {"vocabulary": self.tokenizer.get_vocab(), "tokens": self.tokens, "pad": self.tokenizer.pad_token_id}

    def tensors(self) -> dict[str, Tensor]:
        """The encoder's weights, by names that no version of transformers changes."""
        return {name.removeprefix("text_model."): t for name, t in self.encoder.state_dict().items()}

    @torch.inference_mode()
    def embed(self, text: str) -> Tensor:
        """float32 [T, D]."""
        if text in self._made:
            self._made.move_to_end(text)
            return self._made[text]
        how = {"padding": "max_length", "max_length": self.tokens, "truncation": True, "return_tensors": "pt"}
        found = self.tokenizer(text, **how)
        if len(self.tokenizer(text).input_ids) > self.tokens:
            _LOGGER.warning("the prompt %r is longer than %d tokens; its end is not heeded", text, self.tokens)
        mask = found.attention_mask if self._masked else None
        made = self.encoder(found.input_ids, attention_mask=mask)[0][0].clone()
        self._made[text] = made
        while len(self._made) > KEPT:
            self._made.popitem(last=False)
        return made


def _check_vocabulary(words: int, rows: int, folder: Path) -> None:
    """Refuse a tokenizer that is not the text encoder's.

    Of a folder without a vocabulary transformers makes a tokenizer of two words, in silence: the prompts of all classes
    would be one.

    Raises:
        ValueError: it knows more words than the encoder has rows, or less than half as many.
    """
    if not rows // 2 < words <= rows:
        raise ValueError(
            f"prior: the tokenizer/ in {folder} knows {words:,} tokens and the text_encoder/ {rows:,}: expected as "
            "many; take vocab.json and merges.txt from the folder that the text encoder is from"
        )
