"""Names how a query was spoken: one analyzer per attribute (paper section 2)."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from paras2s_jax.judge.classifier import WaveClassifier


class StyleAnalyzers(Mapping[str, WaveClassifier]):
    """Attribute → its analyzer; `Judge` takes it as it is."""

    def __init__(self, analyzers: Mapping[str, WaveClassifier]):
        self._analyzers = dict(analyzers)

    def name_styles(
        self, waves: Sequence[np.ndarray], attribute: str
    ) -> tuple[list[str], np.ndarray]:
        """waves: float32[L] each. Returns: labels, and probabilities float32[B, C]."""
        return self[attribute].name(waves)

    def __getitem__(self, attribute: str) -> WaveClassifier:
        if attribute not in self._analyzers:
            raise KeyError(f"no analyzer for '{attribute}'; there are {sorted(self._analyzers)}.")
        return self._analyzers[attribute]

    def __iter__(self) -> Iterator[str]:
        return iter(self._analyzers)

    def __len__(self) -> int:
        return len(self._analyzers)

    def save(self, folder: str | Path) -> None:
        """Writes one file per attribute."""
        for attribute, analyzer in self._analyzers.items():
            analyzer.save(self.path_of(folder, attribute))

    @staticmethod
    def path_of(folder: str | Path, attribute: str) -> Path:
        """Where the analyzer of an attribute is saved."""
        return Path(folder) / f"{attribute}.safetensors"

    @classmethod
    def load(
        cls, folder: str | Path, attributes: Sequence[str], *, batch_size: int = 16
    ) -> "StyleAnalyzers":
        """Reads what `save` wrote."""
        return cls(
            {
                attribute: WaveClassifier.load(
                    cls.path_of(folder, attribute), batch_size=batch_size
                )
                for attribute in attributes
            }
        )
