"""The drop-in processor: an observation and an instruction in, the fields of a request out."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import index
from typing import Any

import torch

from cosmos3_fast import ops
from cosmos3_fast.numeric import is_integer
from cosmos3_fast.processor.actions import ActionPad, action_rows
from cosmos3_fast.processor.arguments import check_arguments
from cosmos3_fast.processor.canvas import Canvas
from cosmos3_fast.processor.domains import resolve_domain_id, resolve_raw_action_dim
from cosmos3_fast.processor.images import fit_length, load_frames, video_length
from cosmos3_fast.processor.prompt import Caption
from cosmos3_fast.processor.stats import check_normalization, load_stats
from cosmos3_fast.request import MODES, TEMPORAL_FACTOR, pixel_to_latent_shape
from cosmos3_fast.tokenizer import PromptTokenizer, check_unicode

logger = logging.getLogger(__name__)


@dataclass
class Cosmos3PolicyProcessedInputs:
    """What a Cosmos3ActionRequest is made of.

    pixel_values [1,3,T,H,W]: the canvas in [-1,1], params_dtype, on the processor's device; T
    frames are what the clean latent frames need. text_ids, text_mask, neg_text_ids, neg_text_mask
    [1,n]: int64 on the CPU. cond_action: float32 [1,action_chunk,action_dim] on the CPU, in the
    model's units, or None.
    video_shape (frames, content_h, content_w) in pixels: `pixel_to_latent_shape(*video_shape)` is
    the request's. caption: the text that was tokenised. fps in frames a second.
    """

    pixel_values: torch.Tensor
    text_ids: torch.Tensor
    text_mask: torch.Tensor
    neg_text_ids: torch.Tensor
    neg_text_mask: torch.Tensor
    cond_action: torch.Tensor | None
    domain_id: int
    mode: str
    action_chunk: int
    raw_action_dim: int
    video_shape: tuple[int, int, int]
    caption: str
    cond_frame_indexes: tuple[int, ...] | None
    fps: float


class Cosmos3PolicyProcessor:
    """Builds requests for the policy engine and finishes its results.

    Canvas: height x width, or with `image_size` (a tier: 256, 480, 704, 720, 768) the tier's
    canvas of the nearest aspect. The video spans action_chunk_size + 1 frames; num_frames=1 gives
    one, any other value is ignored. A `raw_action_dim` that the domain's table does not list needs
    `allow_width=True`, or the domain as an id. With `action_stats_path` (statistics) given actions
    are normalised with them, results denormalised: both are in the robot's units; without, both
    are the model's own numbers. ValueError for every argument that does not fit, before anything
    is read from a request.
    """

    def __init__(
        self,
        *,
        tokenizer_name_or_path: str | os.PathLike[str],
        height: int = 480,
        width: int = 832,
        num_frames: int | None = None,
        mode: str = "policy",
        domain_name: str | int = "agibotworld",
        action_chunk_size: int = 16,
        raw_action_dim: int | None = None,
        action_dim: int = 64,
        negative_prompt: str = "",
        fps: float = 24.0,
        image_size: int | None = None,
        append_metadata: bool = True,
        prompt_format: str = "plain",
        view_point: str | None = "ego_view",
        view_description: str | None = None,
        cond_frame_indexes: Sequence[int] | None = None,
        action_stats_path: str | os.PathLike[str] | None = None,
        action_normalization: str = "minmax",
        device: torch.device | str = "cpu",
        params_dtype: torch.dtype = torch.bfloat16,
        allow_width: bool = False,
    ) -> None:
        check_arguments(locals())
        check_normalization(action_normalization)
        self.mode = _known_mode(mode)
        self.domain_name = domain_name
        self.action_chunk_size = _chunk(action_chunk_size)
        self.num_frames = _video_frames(num_frames, self.action_chunk_size)
        self.action_dim = int(action_dim)
        self.allow_width = allow_width
        self._given_width = raw_action_dim
        self.raw_action_dim = self._width(domain_name)
        self.cond_frame_indexes = _frame_indexes(cond_frame_indexes, self.num_frames)
        self.fps = float(fps)
        self.device = torch.device(device)
        self.params_dtype = params_dtype
        self._canvas = Canvas(height, width, image_size)
        self._caption = Caption(
            prompt_format,
            view_point,
            view_description,
            self.action_chunk_size + 1,
            self.fps,
            append_metadata,
        )
        self._pad = ActionPad(self.action_chunk_size, self.action_dim)
        self._stats = (
            None
            if action_stats_path is None
            else load_stats(action_stats_path, action_normalization)
        )
        self.tokenizer = PromptTokenizer(tokenizer_name_or_path)
        self.negative_prompt = negative_prompt
        self._negative_ids = self.tokenizer.encode(negative_prompt)

    @property
    def action_width(self) -> int:
        """Columns of actions in the robot's units: the statistics' where there are any."""
        return self.raw_action_dim if self._stats is None else self._stats.width

    def preprocess(self, inputs: Mapping[str, Any]) -> Cosmos3PolicyProcessedInputs:
        """One request's inputs.

        `inputs`: "images" (what `images.load_frames` takes), "task" or "prompt" (str),
        "cond_action" or "action" (rows for forward_dynamics, otherwise not used; in the robot's
        units where there are statistics), and optionally "domain_name" or "domain_id", and "mode",
        which replace the processor's own for this call. Frames and rows that are missing (the last
        is repeated) or left over are said in a warning. ValueError names what was expected and
        what came.
        """
        if not isinstance(inputs, Mapping):
            raise ValueError(f"preprocess needs a mapping of inputs, got {type(inputs).__name__}")
        mode = _known_mode(inputs.get("mode", self.mode))
        domain = _first(inputs, "domain_name", "domain_id")
        domain = self.domain_name if domain is None else domain
        width = self._width(domain)
        if self._stats is not None and self._stats.width > width:
            raise ValueError(
                f"action stats have {self._stats.width} channels, more than raw_action_dim {width}"
            )
        task = _task(inputs)
        cond_action = self._conditioning(mode, _first(inputs, "cond_action", "action"), width)
        placed, content = self._canvas(self._observation(inputs, mode))
        caption = self._caption(task, (int(placed.shape[1]), int(placed.shape[2])))
        text_ids, text_mask = _row(self.tokenizer.encode(caption))
        neg_text_ids, neg_text_mask = _row(self._negative_ids)
        pixels = ops.image_to_tensor(placed.to(self.device))
        return Cosmos3PolicyProcessedInputs(
            pixel_values=pixels[None].to(self.params_dtype),
            text_ids=text_ids,
            text_mask=text_mask,
            neg_text_ids=neg_text_ids,
            neg_text_mask=neg_text_mask,
            cond_action=cond_action,
            domain_id=resolve_domain_id(domain),
            mode=mode,
            action_chunk=self.action_chunk_size,
            raw_action_dim=width,
            video_shape=(self.num_frames, *content),
            caption=caption,
            cond_frame_indexes=self.cond_frame_indexes,
            fps=self.fps,
        )

    def frames_read(self, mode: str | None = None) -> int:
        """How many frames of an observation a request of `mode` (None: the processor's own) reads:
        1 + 4·last, those that the clean latent frames up to `last` depend on.
        """
        last = pixel_to_latent_shape(self.num_frames, 1, 1)[0] - 1
        if self.cond_frame_indexes is not None:
            last = max(self.cond_frame_indexes, default=0)
        elif (mode or self.mode) != "inverse_dynamics":
            last = 0
        return 1 + TEMPORAL_FACTOR * last

    def postprocess(
        self, output: Mapping[str, Any] | torch.Tensor, *, raw_action_dim: int | None = None
    ) -> dict[str, Any]:
        """A result on the CPU: {"action" [B,chunk,raw], and "video" and "pixels" when they came}.

        `output` is `engine.step`'s dict or an action tensor alone. Actions keep their own width,
        which in the engine's result is that of its request, whatever domain this processor was made
        for; `raw_action_dim` cuts actions that are still padded. With action stats they are brought
        to the robot's units (float32, cut to the width of the stats), forward_dynamics' given ones
        back to what was given. ValueError for anything else, and when an action is narrower than
        the stats or not finite.
        """
        finished = {name: tensor.cpu() for name, tensor in _tensors(output).items()}
        if "action" in finished:
            finished["action"] = self._finish(finished["action"], raw_action_dim)
        return finished

    def _width(self, domain: str | int) -> int:
        width = resolve_raw_action_dim(domain, self._given_width, allow_width=self.allow_width)
        if width > self.action_dim:
            raise ValueError(f"raw_action_dim {width} exceeds action_dim {self.action_dim}")
        return width

    def _conditioning(self, mode: str, actions: Any, width: int) -> torch.Tensor | None:
        if mode != "forward_dynamics":
            if actions is not None:
                logger.warning("mode %s does not use cond_action; it is ignored", mode)
            return None
        if actions is None:
            raise ValueError(
                f"forward_dynamics needs cond_action with {width} columns; none was given"
            )
        rows = action_rows(actions)
        return self._pad(rows if self._stats is None else self._stats.normalize(rows), width)

    def _observation(self, inputs: Mapping[str, Any], mode: str) -> torch.Tensor:
        """The frames that the request reads: uint8 [frames_read,H,W,3]."""
        if inputs.get("images") is None:
            raise ValueError(f"preprocess needs 'images'; the inputs hold {sorted(inputs)}")
        images, count = inputs["images"], self.frames_read(mode)
        frames = load_frames(images, count + 1)  # one more tells whether any are left over
        if len(frames) < count:
            logger.warning("%d of %d frames given; the last is repeated", len(frames), count)
        if len(frames) > count:
            warn_of_surplus(mode, count, images)
        return fit_length(frames, count)

    def _finish(self, action: torch.Tensor, width: int | None) -> torch.Tensor:
        if action.ndim != 3 or 0 in action.shape:
            raise ValueError(f"the action must have shape [B, chunk, raw], got {[*action.shape]}")
        if width is not None:
            if not is_integer(width) or not 1 <= width <= action.shape[-1]:
                raise ValueError(
                    f"raw_action_dim must be an integer in [1, {action.shape[-1]}], the width of "
                    f"the actions, got {width!r}"
                )
            action = action[..., :width]
        if self._stats is not None:
            action = self._stats.denormalize(action)
        if not bool(torch.isfinite(action).all()):
            raise ValueError("the action holds values that are not finite; it must not be used")
        return action


def _row(ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and their all-ones mask: int64 [1,n] each."""
    row = torch.tensor([ids], dtype=torch.int64, device="cpu")
    return row, torch.ones_like(row)


def _first(inputs: Mapping[str, Any], *keys: str) -> Any:
    """The first of the keys that is there and not None, else None."""
    return next((inputs[key] for key in keys if inputs.get(key) is not None), None)


def _tensors(output: Any) -> dict[str, torch.Tensor]:
    """The named tensors of a result; a bare one is the action."""
    if isinstance(output, torch.Tensor):
        return {"action": output}
    if not isinstance(output, Mapping):
        raise ValueError(
            f"postprocess needs the engine's dict or an action tensor, got {type(output).__name__}"
        )
    found = {name: output[name] for name in ("action", "pixels", "video") if name in output}
    if not found:
        raise ValueError(f"a result must hold action, pixels or video; it holds {list(output)}")
    for name, value in found.items():
        if not isinstance(value, torch.Tensor):
            raise ValueError(f"{name} must be a tensor, got {type(value).__name__}")
    return found


def warn_of_surplus(mode: str, count: int, images: Any) -> None:
    """Log that `mode` reads `count` frames of `images` (a video's path, frames), which are more."""
    logger.warning(
        "mode %s reads %d of %s; the others are dropped", mode, count, _frames_given(images, count)
    )


def _frames_given(images: Any, count: int) -> str:
    """A clip in words; three pictures may have been meant as DROID's three views."""
    if isinstance(images, (str, os.PathLike)):
        length = video_length(images) or 0
        number = str(length) if length > count else f"more than {count}"  # a header may be wrong
        return f"{number} frames of {os.fspath(images)!r}"
    hint = " (a clip; three cameras' views go through compose_droid_views)"
    return f"{len(images)} frames{hint if len(images) == 3 else ''}"


def _task(inputs: Mapping[str, Any]) -> str:
    task = _first(inputs, "task", "prompt")
    if isinstance(task, (list, tuple)):
        if len(task) != 1:
            raise ValueError(f"batch size must be 1, got {len(task)} tasks")
        task = task[0]
    if not isinstance(task, str) or not task.strip():
        raise ValueError(f"'task' must be an instruction that is not empty, got {task!r}")
    check_unicode(task, "'task'")
    return task


def _known_mode(mode: str) -> str:
    if mode not in MODES:
        raise ValueError(f"unknown mode {mode!r}; expected one of {list(MODES)}")
    return mode


def _chunk(size: int) -> int:
    if size < 1 or (size % TEMPORAL_FACTOR and size != 1):
        raise ValueError(
            f"action_chunk_size must be 1 or a positive multiple of {TEMPORAL_FACTOR}, got {size}"
        )
    return int(size)


def _video_frames(asked: int | None, chunk: int) -> int:
    """chunk + 1, or 1 when that is asked for; another wish is ignored with a log line."""
    if asked == 1:
        return 1
    if asked is not None and asked != chunk + 1:
        logger.warning(
            "num_frames %d is ignored: a chunk of %d actions spans %d frames",
            asked,
            chunk,
            chunk + 1,
        )
    return chunk + 1


def _frame_indexes(indexes: Sequence[int] | None, frames: int) -> tuple[int, ...] | None:
    if indexes is None:
        return None
    try:
        found = tuple(index(i) for i in indexes)
    except TypeError as error:
        raise ValueError(f"cond_frame_indexes must be integers, got {indexes!r}") from error
    count = pixel_to_latent_shape(frames, 1, 1)[0]
    if any(not 0 <= frame < count for frame in found):
        raise ValueError(
            f"cond_frame_indexes {list(found)} out of range: {frames} frames have {count} latent "
            f"frames, 0 to {count - 1}"
        )
    return found
