"""What is carried from step to step, and through a checkpoint."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self


@dataclass
class TrainState:
    """How far a run is.

    Attributes:
        step: optimizer steps done.
        certificate: sum of the hashes of all samples seen, modulo 2^64.
        skipped_in_row: steps skipped since the last one that was applied.
    """

    step: int = 0
    certificate: int = 0
    skipped_in_row: int = 0

    @classmethod
    def of_manifest(cls, manifest: Mapping) -> Self:
        """The state that a checkpoint's manifest holds."""
        return cls(manifest["step"], int(manifest["certificate"], 16), manifest["skipped_in_row"])

    @property
    def certificate_hex(self) -> str:
        """The certificate as records and manifests write it."""
        return f"{self.certificate:016x}"
