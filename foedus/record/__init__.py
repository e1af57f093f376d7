"""The record of a run: plain, documented files (docs/reference/run-folder.md), the same for every way to run."""

from foedus.record.checkpoint import Checkpoint
from foedus.record.folder import Record, RunFolder

__all__ = ["Checkpoint", "Record", "RunFolder"]
