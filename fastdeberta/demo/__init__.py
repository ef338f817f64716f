"""`fastdeberta demo`: the main job on the embedded text, in a given time."""

from .run import run

__all__ = ["run"]
