"""The checkpoint that a daemon publishes to itself when nothing on the node holds one."""

from __future__ import annotations

import os
from pathlib import Path

from pydantic import Field, ValidationInfo, field_validator

from cpe_daemon.config.section import Section


class BootstrapConfig(Section):
    """A checkpoint for the start: published when this node has no version of the model, and its engines hold no other.

    After a restart it brings the version that was live back to memory, if it is that one. It never replaces newer ones.
    """

    dir: str = Field(
        default="",
        description='Directory with the checkpoint in safetensors, as `cpe publish` takes it; "": none is published.',
    )
    model: str = Field(default="", max_length=256, description="The model's name, as its engines know it.")
    run: str = Field(
        default="bootstrap",
        min_length=1,
        max_length=256,
        description="The run that the number counts in. With a run of its own, the first version of a trainer's run "
        "takes its place for good; with the trainer's run, the trainer goes on from the number.",
    )
    number: int = Field(default=0, ge=0, le=2**63 - 1, description="The version's number in the run.")

    @field_validator("dir")
    @classmethod
    def _readable(cls, value: str) -> str:
        if value:
            check_checkpoint(Path(value))
        return value

    @field_validator("model")
    @classmethod
    def _named(cls, value: str, info: ValidationInfo) -> str:
        if not value and info.data.get("dir"):
            raise ValueError("a bootstrap needs the name of its model; set it, or leave bootstrap.dir empty")
        return value


def check_checkpoint(path: Path) -> None:
    """Refuse what is no directory with a checkpoint that this process may read.

    Raises:
        ValueError: says what is wrong with it.
    """
    if not path.is_absolute():
        raise ValueError(f"{str(path)!r} is relative; write an absolute path")
    try:
        names = os.listdir(path)
    except OSError as error:
        raise ValueError(f"cannot read the directory {path}: {error.strerror}") from None
    files = [path / name for name in names if name.endswith(".safetensors")]
    if not files:
        raise ValueError(f"{path} holds no *.safetensors file")
    if closed := [file.name for file in files if not os.access(file, os.R_OK)]:
        raise ValueError(f"cannot read {closed[0]} in {path}: let this user read it")
