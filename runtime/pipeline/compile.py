"""Engines compiled before they are needed, here or for a GPU elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from edgemuse.engines.errors import OutputError
from edgemuse.engines.protocol import EngineOptions
from edgemuse.engines.registry import build_engine, choose, statuses
from edgemuse.runtime.model.bundle import Bundle
from edgemuse.runtime.model.cascade import Cascade
from edgemuse.runtime.model.precision import stored_precision


@dataclass(frozen=True)
class Build:
    """An engine to compile.

    Attributes:
        role: of the network in a cascade, `mask` or `regions`; empty for a bundle alone.
        bundle: that holds the network.
        options: backend and precision.
        capability: CUDA compute capability of the GPU, such as `8.6`; None: for this machine.
    """

    role: str
    bundle: Bundle
    options: EngineOptions
    capability: str | None

    @property
    def target(self) -> str:
        """What it is for, in words."""
        return self.capability or "this machine"

    def __str__(self) -> str:
        return f"{self.role} {self.options.precision} for {self.target}".lstrip()

    def run(self, folder: Path, progress: Callable[[str, int, int], None]) -> Path:
        """Compile it into `folder`, which is where `segment` finds it; returns the file.

        `progress` is told the phase, how many steps of it are done and of how many.

        Raises:
            BackendError: the backend cannot build it.
            OutputError: the folder cannot be written to.
        """
        graph = self.bundle.graph(stored_precision(self.options.precision))
        shape = (1, 1, *self.bundle.manifest.network.patch)
        try:
            return build_engine(graph, shape, self.options, folder, self.capability, progress)
        except OSError as error:
            raise OutputError(f"engine not written: {error}; choose another folder with --output") from error


def builds(
    model: Bundle | Cascade, backend: str, precisions: Sequence[str] = (), capabilities: Sequence[str] = ()
) -> Iterator[Build]:
    """An engine for each network, precision and GPU.

    Args:
        model: the bundle, or the cascade of which both networks are built.
        backend: by its name, or `auto`.
        precisions: none: all that the bundle stores and the backend offers here.
        capabilities: CUDA compute capabilities, for which TensorRT builds; none: for this machine.
    """
    options = EngineOptions("tensorrt" if capabilities else backend)
    for role, bundle in (model.bundles if isinstance(model, Cascade) else {"": model}).items():
        for precision in precisions or _stored(bundle, options, bool(capabilities)):
            for capability in capabilities or (None,):
                yield Build(role, bundle, replace(options, precision=precision), capability)


def _stored(bundle: Bundle, options: EngineOptions, ahead: bool) -> list[str]:
    """The precisions of the bundle's graphs, without those that the backend does not offer here."""
    stored = list(bundle.manifest.graphs)
    if ahead:
        return stored
    chosen = choose(options)[1]
    (status,) = statuses(chosen.backend)
    return [precision for precision in stored if precision in status.devices[chosen.device]]
