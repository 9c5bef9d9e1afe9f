"""Loading trained stages for evaluation and sampling."""

import dataclasses
import hashlib
import json

import jax
from jax.sharding import Mesh

from cascaded_diffusion.cascade.build import build_stage
from cascaded_diffusion.cascade.stage import Stage
from cascaded_diffusion.config.schema import StageConfig, to_dict
from cascaded_diffusion.runtime import checkpoint
from cascaded_diffusion.runtime import mesh as mesh_lib
from cascaded_diffusion.runtime.manifest import MANIFEST, finished_steps, pinned
from cascaded_diffusion.runtime.run_folder import Chosen, RunFolder
from cascaded_diffusion.types import Params


@dataclasses.dataclass(frozen=True)
class TrainedStage:
    """A stage at the checkpoint that evaluation chose in its run, and a digest of both."""

    stage: Stage
    params: Params
    chosen: Chosen
    digest: str

    @property
    def identity(self) -> str:
        """Name, step, EMA and a digest of config and weights, for records."""
        return f"{self.name}, {self.digest}"

    @property
    def name(self) -> str:
        """Name, step and EMA, for people."""
        return f"{self.stage.config.name}@{self.chosen.step}, EMA {self.chosen.ema_decay:g}"


def load_trained(
    folder: RunFolder, mesh: Mesh, *, newest_if_none_chosen: bool = False
) -> TrainedStage:
    """The stage of a run at its chosen checkpoint. Raises UserError unless that is intact.

    Where none was chosen, the newest one with its first EMA may stand in, which is printed.
    """
    config = folder.read_config()
    stage = build_stage(config.stage)
    if newest_if_none_chosen and folder.best() is None and (steps := finished_steps(folder)):
        chosen = Chosen(step=max(steps), ema_decay=config.eval.ema_decays[0])
        print(f"{folder.path}: no checkpoint was chosen yet; the newest, of step {chosen.step}")
        with pinned(folder, chosen.step):
            return _loaded(folder, stage, chosen, mesh)
    chosen = folder.chosen()
    while True:
        with pinned(folder, chosen.step) as is_there:
            # Before it was pinned, evaluation may have chosen another and the trainer deleted it.
            latest = folder.chosen()
            if not is_there and latest != chosen:
                chosen = latest
                continue
            return _loaded(folder, stage, chosen, mesh)


def _loaded(folder: RunFolder, stage: Stage, chosen: Chosen, mesh: Mesh) -> TrainedStage:
    shapes = abstract_params(stage, mesh)
    params = checkpoint.load_ema_params(folder, chosen.step, chosen.ema_decay, shapes)
    digest = checkpoint_digest(folder, stage.config, chosen.step)
    return TrainedStage(stage=stage, params=params, chosen=chosen, digest=digest)


def checkpoint_digest(folder: RunFolder, config: StageConfig, step: int) -> str:
    """12 digits of everything that samples depend on but the sampler, which records name."""
    values = to_dict(dataclasses.replace(config, sampler=None))
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode())
    digest.update((folder.checkpoints / str(step) / MANIFEST).read_bytes())
    return digest.hexdigest()[:12]


def abstract_params(stage: Stage, mesh: Mesh) -> Params:
    """Shapes of a stage's parameters, replicated on every device."""
    shapes, sharding = stage.shapes()[0], mesh_lib.replicated(mesh)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes)
