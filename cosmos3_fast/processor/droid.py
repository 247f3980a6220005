"""The recipe of the released DROID joint policy (docs/model.md, 4): settings, state row, reply."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from cosmos3_fast.processor.actions import action_rows

VIEW_DESCRIPTION = (
    "The top row is from the wrist-mounted camera. The bottom row contains two horizontally "
    "concatenated third-person perspective views of the scene from opposite sides, with the robot "
    "visible."
)


@dataclass(frozen=True)
class DROID:
    """Every setting of the recipe, and the conversions between robot and model.

    A model row is [7 joints in radians, 1 - gripper]; nothing is normalised.
    """

    domain_name: str = "droid_lerobot"
    raw_action_dim: int = 8
    action_chunk_size: int = 32
    fps: float = 15.0
    image_size: int = 480
    view_point: str = "concat_view"
    view_description: str = VIEW_DESCRIPTION
    num_inference_steps: int = 4
    guidance_scale: float = 3.0
    schedule: str = "native"
    flow_shift: float = 5.0

    def processor_arguments(self) -> dict[str, Any]:
        """Keyword arguments of Cosmos3PolicyProcessor (besides tokenizer, device and dtype)."""
        names = ("domain_name", "raw_action_dim", "action_chunk_size", "fps", "image_size")
        return {name: getattr(self, name) for name in (*names, "view_point", "view_description")}

    def request_arguments(self) -> dict[str, Any]:
        """Keyword arguments of Cosmos3ActionRequest that the recipe fixes."""
        names = ("fps", "num_inference_steps", "guidance_scale")
        return {name: getattr(self, name) for name in names}

    def engine_arguments(self) -> dict[str, Any]:
        """The forced schedule, for Engine.from_pretrained or Cosmos3PolicyWNArgs."""
        return {"schedule": self.schedule, "flow_shift": self.flow_shift}

    def encode_state(self, joints: Sequence[float], gripper: float) -> torch.Tensor:
        """Request field `clean_action` [1,1,8] float32 from 7 joints (radians) and the gripper, in
        [0, 1]; ValueError for other values.
        """
        row = action_rows([[*map(float, joints), 1.0 - float(gripper)]], "state")
        if row.shape[1] != self.raw_action_dim:
            raise ValueError(
                f"state needs {self.raw_action_dim - 1} joints and the gripper, "
                f"got {row.shape[1] - 1} joints"
            )
        if not 0 <= float(gripper) <= 1:
            raise ValueError(f"the gripper of a state must lie in [0, 1], got {float(gripper):g}")
        return row[None]

    def decode_action(self, action: torch.Tensor) -> torch.Tensor:
        """Robot commands from the model's rows [..., 8]: a copy with 1 - x in the last column."""
        return self._turned(action)

    def encode_action(self, action: torch.Tensor) -> torch.Tensor:
        """The model's rows from robot commands [..., 8], for `cond_action`: the inverse of
        `decode_action`, which gives back its own commands bit for bit, others up to rounding.
        """
        return self._turned(action)

    def _turned(self, action: torch.Tensor) -> torch.Tensor:
        if action.shape[-1] != self.raw_action_dim:
            raise ValueError(
                f"DROID actions have {self.raw_action_dim} columns, got {action.shape[-1]}"
            )
        return torch.cat([action[..., :-1], 1 - action[..., -1:]], dim=-1)
